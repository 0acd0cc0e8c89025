"""The log of a server: the last ones are kept, and it is text as Triton writes it, or JSON lines."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Literal

from build_engines.errors import ServerError
from triton_repo import server_log

LogFormat = Literal["text", "json"]
# <name>.1 is the newest of those before the present one.
KEPT = 5
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
_CLOSE_S = 2.0


class LogFile:
    """The log of one start of a server. `descriptor` is what the server writes to."""

    def __init__(self, path: Path, form: LogFormat) -> None:
        """Rotate the logs of earlier starts and open a new one. Raises ServerError where that cannot be."""
        _check(path)
        self.path = path
        self._converter: subprocess.Popen[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _rotate(path)
            self.descriptor = os.open(path, _FLAGS, 0o640)
        except OSError as error:
            raise ServerError(
                f"the log {path} cannot be written: {error.strerror or error}",
                next_step="name another file with --log",
            ) from error
        if form == "json":
            try:
                self._convert()
            except OSError:
                self.opened()
                raise

    def opened(self) -> None:
        """The server has the descriptor: close our own, so that the log ends when the server does."""
        os.close(self.descriptor)

    def close(self) -> None:
        """Wait until everything that the server wrote is in the file."""
        if self._converter is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._converter.wait(_CLOSE_S)
        self._converter.kill()
        self._converter.wait()

    def text(self) -> str:
        """What it says so far, as Triton wrote it."""
        return server_log.read(self.path)

    def _convert(self) -> None:
        reader, writer = os.pipe()
        environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent))
        try:
            self._converter = subprocess.Popen(
                [sys.executable, "-P", "-m", "triton_repo.json_log"],
                stdin=reader,
                stdout=self.descriptor,
                env=environment,
                # Its own session: a signal at the terminal, and the end of the server's group, leave it be.
                start_new_session=True,
            )
        except OSError:
            os.close(writer)
            raise
        finally:
            os.close(reader)
        os.close(self.descriptor)
        self.descriptor = writer


def _check(path: Path) -> None:
    """Refuse what cannot be emptied, rotated and read back, as a log is: a link, a pipe, a terminal."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # not there yet, or the reason comes when it is opened
        return
    if stat.S_ISREG(mode):
        return
    what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise ServerError(
        f"the log {path} is {what}: it has to be a file",
        cause="it is read back while the models load, and set aside at the next start",
        next_step="leave --log out or name a file, and follow it: tail -F FILE",
    )


def _rotate(path: Path) -> None:
    """Each log moves on by one, and the oldest goes."""
    if not path.is_file() or not path.stat().st_size:
        return
    for number in range(KEPT, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        newer = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
        with contextlib.suppress(FileNotFoundError):
            newer.replace(older)
