"""The server that runs on a repository, for other commands to find: its process, addresses and admin key.

`triton-repo serve` writes `server.json` beside the repository, readable by its owner alone, and removes it
when it stops. One that a killed server left behind is recognised: its process is gone. The folder that it is
in, where the log is too, is one server's: `claim` keeps a second one away.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

from build_engines.atomic import write_text
from build_engines.errors import ServerError
from triton_repo.processes import stat_fields

# The name that Triton looks for over HTTP and over gRPC alike: it puts this prefix before the name that a
# gRPC restriction is given, and nothing before the one of an HTTP restriction.
GRPC_PREFIX = "triton-grpc-protocol-"
ADMIN_NAME = "onecard-admin-key"
ADMIN_HEADER = GRPC_PREFIX + ADMIN_NAME

# A server of our own is never reached through a proxy, which would read the admin key: the environment's
# http_proxy is meant for other machines.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

_FILE = "server.json"
_MOST_BYTES = 1 << 16
_START_TIME = 19
_START = "start it: triton-repo serve STACK"


@dataclass(frozen=True, slots=True)
class Running:
    """A running server. `born`: its process's start in clock ticks after boot, which tells it from a later
    process with the same number; `started` in seconds since the epoch; `urls`: host:port by service."""

    pid: int
    born: int
    started: float
    repository: str
    urls: dict[str, str]
    log: str
    key: str = field(repr=False)

    @classmethod
    def of(cls, pid: int, *, repository: Path, urls: dict[str, str], log: Path, key: str) -> Running:
        """The record of a process that runs now."""
        return cls(pid, _born(pid) or 0, time.time(), str(repository.resolve()), urls, str(log), key)

    @property
    def admin_header(self) -> tuple[str, str]:
        """Name and value of the header (gRPC: of the metadata) that opens the restricted APIs."""
        return ADMIN_HEADER, self.key


def state_file(repository: Path) -> Path:
    return repository.resolve().parent / _FILE


def answers(address: str, path: str, timeout_s: float) -> bool:
    """Whether the server at host:port answers GET /v2/`path` with success."""
    try:
        with DIRECT.open(f"http://{address}/v2/{path}", timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError, http.client.HTTPException):
        return False


def claim(repository: Path) -> int | None:
    """Hold the state file's folder for one server, as long as the descriptor is open: the kernel closes that
    of a process that dies. Raises ServerError when another server has it.

    None where nothing is held: several servers may share a folder that nothing can be written to, and a
    network file system may lock no folder.
    """
    folder = state_file(repository).parent
    if not os.access(folder, os.R_OK | os.W_OK):
        return None
    # The folder itself: a lock file would be left behind, and another user's could not be opened.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise _taken(folder) from None
        return None
    return descriptor


def write_running(running: Running) -> None:
    """Replace the state file beside its repository atomically, mode 0600. Raises OSError where it cannot."""
    write_text(state_file(Path(running.repository)), json.dumps(asdict(running)) + "\n", mode=0o600)


def remove_running(repository: Path, pid: int) -> None:
    """Remove the state file if it is still that of the process `pid`."""
    with contextlib.suppress(ServerError, OSError):
        if _read(state_file(repository)).pid == pid:
            state_file(repository).unlink()


def read_running(repository: Path) -> Running:
    """The server that runs on `repository`. Raises ServerError when none does, or its file cannot be read."""
    path = state_file(repository)
    running = _read(path)
    cause = None
    if running.repository != str(repository.resolve()):
        cause = f"{path} is that of a server on {running.repository}"
    elif _born(running.pid) != running.born:
        cause = f"{path} is that of process {running.pid}, which is gone"
    if cause:
        raise ServerError(f"no server runs on {repository}", cause=cause, next_step=_START)
    return running


def _taken(folder: Path) -> ServerError:
    """Who has claimed the folder, as far as its state file tells."""
    who = f"another server is being started or stopped in {folder}"
    with contextlib.suppress(ServerError):
        other = _read(folder / _FILE)
        if _born(other.pid) == other.born:
            addresses = ", ".join(f"{name} {url}" for name, url in other.urls.items())
            who = f"a server runs on {other.repository} already: process {other.pid}, {addresses}"
    return ServerError(
        who,
        cause=f"{_FILE} and the log in {folder} are one server's",
        next_step="stop that `triton-repo serve`, replace its models (triton-repo deploy STACK), "
        "or serve a repository in another folder",
    )


def _read(path: Path) -> Running:
    try:
        with path.open(encoding="utf-8") as file:
            found = Running(**json.loads(file.read(_MOST_BYTES)))
        if not (isinstance(found.pid, int) and isinstance(found.urls, dict) and isinstance(found.key, str)):
            raise ValueError
    except FileNotFoundError:
        raise ServerError(f"no server runs there: {path} does not exist", next_step=_START) from None
    except OSError as error:
        raise ServerError(
            f"{path} cannot be read: {error.strerror or error}",
            cause="the server was started by another user",
            next_step="run this command as that user",
        ) from None
    except (ValueError, TypeError, RecursionError):
        raise ServerError(
            f"{path} is not the state of a server", next_step="restart the server: triton-repo serve STACK"
        ) from None
    return found


def _born(pid: int) -> int | None:
    """When the process started, in clock ticks after boot; None when there is no such process."""
    try:
        fields = stat_fields(pid)
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[_START_TIME])
