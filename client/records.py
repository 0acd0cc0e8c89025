"""One log record at the end of every request, for the logger named `client`; never with text of it.

With its id a request can be followed through this log, the proxy's, Triton's and the model's.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

from .codec import InferRequest
from .errors import Cancelled, ClientError, InvalidInput, Overloaded

LOGGER = logging.getLogger("client")
LOGGER.addHandler(logging.NullHandler())  # or Python would print failures by itself
# What every record has beside its message; `error` is None unless it failed.
FIELDS = (
    "request_id",
    "model",
    "model_version",
    "task",
    "texts",
    "milliseconds",
    "outcome",
    "error",
    "attempt",
)


def outcome_of(error: ClientError) -> str:
    """As the server's metrics name it: rejected, cancelled or failed."""
    if isinstance(error, InvalidInput | Overloaded):
        return "rejected"
    return "cancelled" if isinstance(error, Cancelled) else "failed"


def log_end(
    request: InferRequest,
    outcome: str,
    *,
    attempt: int,
    seconds: float,
    version: str = "",
    error: ClientError | None = None,
) -> None:
    """Completed requests at DEBUG, every other at INFO."""
    level = logging.DEBUG if outcome == "completed" else logging.INFO
    if not LOGGER.isEnabledFor(level):
        return
    fields = {
        "request_id": request.request_id,
        "model": request.model,
        "model_version": version,
        "task": request.task,
        "texts": request.texts,
        "milliseconds": round(seconds * 1e3, 3),
        "outcome": outcome,
        "error": type(error).__name__ if error else None,
        "attempt": attempt,
    }
    LOGGER.log(
        level,
        "request %s to %s: %s after %.1f ms (attempt %d)",
        request.request_id,
        request.model,
        fields["error"] or outcome,
        seconds * 1e3,
        attempt,
        extra=fields,
    )


class JsonLines(logging.FileHandler):
    """Each record as one JSON object on a line of a file, which is appended to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="a", encoding="utf-8")

    def format(self, record: logging.LogRecord) -> str:
        values = {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, "level": record.levelname.lower(), **values}, ensure_ascii=False)
