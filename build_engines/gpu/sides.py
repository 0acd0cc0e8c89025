"""Contenders in processes of their own: a crash, a hang or a full GPU there is a reason here.

PyTorch and the engines never share a process: each brings its own CUDA libraries, allocator and threads, and
what one of them breaks must not be measured as the other's. A function sent to a side is named by its module,
so it must be importable there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from build_engines.gpu.results import Failed, Skipped, said

_END_S: Final = 5.0
_SPAWN = multiprocessing.get_context("spawn")  # a fork would inherit a CUDA context that does not work there


class Side:
    """One process, started by the first call and again after it had to be ended. A context manager.

    What the process prints goes to `log`. `lost` counts how often it ended: what it had loaded is gone then.
    """

    def __init__(self, name: str, log: Path | None = None) -> None:
        self.name = name
        self.lost = 0
        self._log = log or Path(tempfile.gettempdir()) / f"onecard-{name}-{os.getpid()}.log"
        self._process: Any = None
        self._pipe: Connection | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
        """The function's result, run over there.

        Raises:
            Failed: it raised (with its text), did not return in `seconds`, or its process ended.
            Skipped: it raised that itself.
        """
        pipe = self._started()
        try:
            pipe.send((function, arguments))
            if not pipe.poll(seconds):
                self.end()
                raise Failed(f"not finished after {seconds:.0f} s; its process was ended")
            kind, value = pipe.recv()
        except (EOFError, OSError):
            reason = self._why_it_ended()
            self.end()
            raise Failed(reason) from None
        if kind == "result":
            return value
        raise {"skipped": Skipped, "failed": Failed}[kind](value)

    def end(self) -> None:
        """End the process now; the next call starts a new one. Safe to repeat."""
        if self._process is None:
            return
        self.lost += 1
        self._process.kill()
        self._process.join(_END_S)
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def close(self) -> None:
        """Let the process end by itself, so that engines free what they hold; then make sure it has."""
        if self._process is None:
            return
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                self._pipe.send(None)
        self._process.join(_END_S)
        self.end()
        self.lost -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self) -> Connection:
        if self._pipe is not None and self._process.is_alive():
            return self._pipe
        self._process = None
        ours, theirs = _SPAWN.Pipe()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        # Not a daemon: torch.compile starts processes of its own, which daemons may not.
        process = _SPAWN.Process(target=_serve, args=(theirs, str(self._log)), name=self.name)
        process.start()
        theirs.close()
        self._process, self._pipe = process, ours
        return ours

    def _why_it_ended(self) -> str:
        self._process.join(_END_S)
        code = self._process.exitcode
        ended = f"exit code {code}"
        if code is not None and code < 0:
            ended = f"signal {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                ended += ": the machine's memory was full, or someone ended it"
        last = last_line(self._log)
        return f"the process {self.name} ended ({ended})" + (f"; it said last: {last}" if last else "")


def last_line(log: Path) -> str:
    try:
        lines = log.read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:200]


def _serve(pipe: Connection, log: str) -> None:
    """The other process: one job after another until the pipe closes."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)  # libraries in C write there too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        if job is None:
            return
        function, arguments = job
        try:
            answer: tuple[str, Any] = ("result", function(*arguments))
        except Skipped as reason:
            answer = ("skipped", said(reason))
        except Exception as error:  # whatever a library raises becomes the case's reason
            traceback.print_exc(file=sys.stderr)
            sys.stderr.flush()
            answer = ("failed", said(error))
        try:
            pipe.send(answer)
        except OSError:
            return
