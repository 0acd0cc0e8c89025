"""The processes of a server: tritonserver and, its children, one of the Python backend for each instance.

A model's process that dies is never replaced by Triton 2.51: requests in flight there wait until their
clients give up. So somebody has to look.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from build_engines.errors import ServerError

_PR_SET_PDEATHSIG = 1
_STUB = b"triton_python_backend_stub"
_NAME_LENGTH = 15  # of a process, as the kernel keeps it
# Triton collects what ends because a model is unloaded within milliseconds, and what crashed never.
_CRASHED_AFTER_S = 0.5
# But one that dies while its version is being loaded it finds out about, and collects: in a second.
_NOT_LOADED_AFTER_S = 2.0
_SERVED = re.compile(r"\bversions: (\d+)")  # in a config.pbtxt
# Of /proc/<pid>/stat, behind the name: the address of the command line; the wait status, once it has ended.
_ARG_START, _EXIT_CODE = 45, 49

# Why the system refuses what a start needs: in general, and to run a program.
_CAUSES = {
    errno.ENOSPC: "the disk, or the folder for temporary files (TMPDIR), is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "it is mounted read-only",
    errno.EMFILE: "this process has as many files open as it may (ulimit -n)",
    errno.ENFILE: "the machine has as many files open as it may",
    errno.ENOMEM: "no memory is left",
    errno.EAGAIN: "there are as many processes as this user may have (ulimit -u)",
}
_PROGRAM_CAUSES = {
    errno.EACCES: "it is not executable, or its file system is mounted noexec",
    errno.ENOEXEC: "it is no program, or one for another kind of machine",
    errno.ENOENT: "it, or the interpreter that it names, is not there",
}


@dataclass(frozen=True, slots=True)
class DeadModel:
    """A model whose process died by itself, and how: "signal SIGKILL" or "exit code 3"."""

    model: str
    how: str


class ModelProcesses:
    """The Python backend's processes of one tritonserver."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._models: dict[int, str] = {}
        self._ended: dict[int, float] = {}
        self._folders: dict[int, Path | None] = {}  # of their versions

    def find(self) -> None:
        """Learn which process is whose: of one that has died nobody can tell any more."""
        for pid in _children(self._server):
            if pid not in self._models and (model := _model(pid)):
                self._models[pid] = model

    def crashed(self) -> DeadModel | None:
        """The first that crashed half a second ago or more, if any; two seconds, where its version is not the
        one that is to be served. Ask several times a second."""
        self.find()
        now = time.monotonic()
        for pid, model in list(self._models.items()):
            state = _state(pid)
            if state is None:
                # Collected: its model was unloaded.
                del self._models[pid]
                self._ended.pop(pid, None)
                self._folders.pop(pid, None)
            elif state[0] != "Z":
                if pid not in self._folders:
                    self._folders[pid] = _version(pid)
            elif now - self._ended.setdefault(pid, now) >= _patience(self._folders.get(pid)):
                return DeadModel(model, how_it_ended(os.waitstatus_to_exitcode(state[1])))
        return None

    def running(self) -> bool:
        """Whether any still runs."""
        self.find()
        return any((state := _state(pid)) and state[0] != "Z" for pid in self._models)


def how_it_ended(code: int) -> str:
    """An exit code in words; a negative one is a signal."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def not_run(binary: Path, error: OSError) -> ServerError:
    """The error for a server's binary that the system does not run."""
    return ServerError(
        f"{binary} cannot be run: {error.strerror or error}",
        cause=(_PROGRAM_CAUSES | _CAUSES).get(error.errno or 0),
        next_step="name a tritonserver that runs here with --tritonserver, or see build-engines doctor",
    )


def not_started(error: OSError) -> ServerError:
    """The error for anything else that the system refuses while a server is started."""
    where = f"{error.filename}: " if error.filename else ""
    return ServerError(
        f"the server cannot be started: {where}{error.strerror or error}",
        cause=_CAUSES.get(error.errno or 0),
        next_step="mend that and start it again; build-engines doctor tells what else this machine lacks",
    )


def hide(pid: int, secret: str) -> bool:
    """Overwrite `secret` in the command line that every user of the machine can read; whether that worked."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        start = int(stat_fields(pid)[_ARG_START])
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            place = line.find(secret.encode())
            while place >= 0:
                memory.seek(start + place)
                memory.write(b"*" * len(secret))
                place = line.find(secret.encode(), place + 1)
    except (OSError, ValueError, IndexError):
        return False
    return True


def die_with_parent() -> Callable[[], None]:
    """Make the child receive SIGTERM when its parent dies, so that nothing is left running after kill -9."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return in_child


def _children(pid: int) -> list[int]:
    """Of all threads; empty when the process has gone."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def _model(pid: int) -> str | None:
    """The model that a process of the Python backend runs; None for another process."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        name = Path(f"/proc/{pid}/comm").read_bytes().rstrip()
    except OSError:
        return None
    if words == [b""] and name == _STUB[:_NAME_LENGTH]:
        # It died before anybody looked at it.
        return "?"
    if len(words) < 2 or os.path.basename(words[0]) != _STUB:
        return None
    # <repository>/<model>/<version>/model.py
    return Path(os.fsdecode(words[1])).parent.parent.name


def _version(pid: int) -> Path | None:
    """The version's folder that a living process of the Python backend runs."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return Path(os.fsdecode(words[1])).parent if len(words) > 1 else None


def _patience(version: Path | None) -> float:
    """Seconds after its death for which a process of that version may be Triton's own business."""
    if version is None:
        return _CRASHED_AFTER_S
    try:
        served = _SERVED.search((version.parent / "config.pbtxt").read_text(encoding="utf-8"))
    except OSError:
        # Where its version has a config and the model none, the model is being added.
        return _NOT_LOADED_AFTER_S if (version / "config.pbtxt").exists() else _CRASHED_AFTER_S
    return _CRASHED_AFTER_S if served is None or served[1] == version.name else _NOT_LOADED_AFTER_S


def _state(pid: int) -> tuple[str, int] | None:
    """Its state ("Z" has ended) and, then, its wait status; None when there is no such process."""
    try:
        fields = stat_fields(pid)
    except OSError:
        return None
    return fields[0], int(fields[_EXIT_CODE])


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat behind the name, from the state on. OSError: no such process."""
    # The name in parentheses may hold anything.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
