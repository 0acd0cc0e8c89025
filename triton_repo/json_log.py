"""tritonserver's log as JSON lines: its output comes in on stdin, one object for each line goes to stdout.

    tritonserver ... 2>&1 | python -m triton_repo.json_log

    {"time": "2026-11-27T02:50:21.369312+00:00", "level": "warning", "source": "model.py:8", "message": "..."}

What a model file says of a request (triton_repo.runtime.events) adds its fields, such as request_id and
model. A process of its own, so that the log goes on while a server is stopped whose parent was killed.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import sys
from typing import BinaryIO

from triton_repo.runtime import events

_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "fatal"}
_LINE = re.compile(
    r"([IWEF])(\d\d)(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{1,6}) \d+ ([^\s\]]+)\] (.*)", re.ASCII | re.DOTALL
)
_REQUEST = re.compile(r"\[request id: (.{1,256}?)\] ")
_UNKNOWN_REQUEST = "<id_unknown>"
_MOST_BYTES = 1 << 16  # of a line; what is longer becomes several


def record(line: str, now: datetime.datetime) -> dict[str, str]:
    """The object of one line. `now`: a time in UTC, from which a line that has none, or no year, gets it."""
    match = _LINE.fullmatch(line)
    if match is None:
        return {"time": now.isoformat(), "level": "info", "source": "console", "message": line}
    level, month, day, hour, minute, second, fraction, source, quoted = match.groups()
    written = (month, day, hour, minute, second, fraction.ljust(6, "0"))
    message = _unquoted(quoted)
    found = {"time": _time(written, now), "level": _LEVELS[level], "source": source, "message": message}
    request = _REQUEST.match(message)
    if request and request[1] != _UNKNOWN_REQUEST:
        found["request_id"] = events.printable(request[1])
    return found | (events.parse(message) or {})


def text(found: dict[str, str]) -> str:
    """The line that an object was made of, without its time."""
    level = next((letter for letter, name in _LEVELS.items() if name == found["level"]), "I")
    if found["source"] == "console":
        return found["message"]
    quoted = json.dumps(found["message"], ensure_ascii=False)
    return f"{level}0101 00:00:00.000000 0 {found['source']}] {quoted}"


def convert(source: BinaryIO, out: BinaryIO) -> None:
    """Until `source` ends. A full disk loses lines, but never stops the server that writes them."""
    while line := source.readline(_MOST_BYTES):
        now = datetime.datetime.now(datetime.UTC)
        found = record(line.decode("utf-8", "replace").rstrip("\r\n"), now)
        with contextlib.suppress(OSError):
            out.write(json.dumps(found, ensure_ascii=False).encode() + b"\n")


def _unquoted(message: str) -> str:
    """Triton writes its messages as JSON strings."""
    try:
        found = json.loads(message, strict=False)
    except ValueError:
        return message
    return found if isinstance(found, str) else message


def _time(written: tuple[str, ...], now: datetime.datetime) -> str:
    """In ISO 8601, UTC as Triton writes it. It writes no year: it is the one nearest to now."""
    month, day, hour, minute, second, micro = map(int, written)
    for year in (now.year, now.year - 1, now.year + 1):
        with contextlib.suppress(ValueError):
            found = datetime.datetime(year, month, day, hour, minute, second, micro, datetime.UTC)
            if abs(found - now) < datetime.timedelta(days=183):
                return found.isoformat()
    return now.isoformat()


if __name__ == "__main__":
    # Unbuffered: a line is in the file when it was written.
    with open(sys.stdout.fileno(), "wb", buffering=0) as log:
        convert(sys.stdin.buffer, log)
