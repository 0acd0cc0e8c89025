"""The one place that turns what tritonclient and its transports raise into our errors.

The statuses and messages below were recorded from a real server on every transport; tests replay them.
"""

from __future__ import annotations

import socket

from .errors import (
    Cancelled,
    ClientError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    QueueFull,
    QueueTimeout,
    ServerFault,
    UnexpectedAnswer,
    UnknownModel,
    Unreachable,
)

_NEVER_CONNECTED = ("failed to connect", "errors resolving", "dns resolution failed", "connection refused")

# gRPC codes and HTTP statuses whose meaning does not depend on the message.
_BY_STATUS: dict[str, type[ClientError]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "400": InvalidInput,
    "413": InvalidInput,
    "NOT_FOUND": UnknownModel,
    "404": UnknownModel,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": DeadlineExceeded,
    "499": DeadlineExceeded,
    "504": DeadlineExceeded,
    "RESOURCE_EXHAUSTED": QueueFull,
    "405": UnexpectedAnswer,
    "UNIMPLEMENTED": UnexpectedAnswer,
}

# How the generating model begins what it says. Over HTTP Triton gives all of it status 400, over gRPC none.
_BEGINNINGS: tuple[tuple[str, type[ClientError]], ...] = (
    ("the queue is full", QueueFull),
    ("no slot became free", QueueTimeout),
    ("the model is being unloaded", ModelNotReady),
    ("the request was cancelled", Cancelled),
    ("the engine failed", ServerFault),
    ("the scheduler failed", ServerFault),
    ("the server failed", ServerFault),
    ("the next token could not be chosen", ServerFault),
)


def translate(error: BaseException, *, url: str, model: str | None, request_id: str | None) -> ClientError:
    """Our error for one raised by a transport; never raises, so that no foreign error escapes."""
    kind, message = _classify(error, url)
    step = None
    if kind is Unreachable:
        step = "is the server running there? `triton-repo serve` prints its addresses"
    elif kind is UnknownModel:
        step = "`client status` lists the models"
    return kind(message, model=model, request_id=request_id, next_step=step)


def _classify(error: BaseException, url: str) -> tuple[type[ClientError], str]:
    from tritonclient.utils import InferenceServerException

    if isinstance(error, InferenceServerException):
        status = str(error.status() or "").removeprefix("StatusCode.")
        return _from_status(status, error.message() or str(error), url)
    if isinstance(error, TimeoutError):
        return DeadlineExceeded, f"no answer from {url} in time"
    if isinstance(error, ConnectionRefusedError | socket.gaierror) or _named(error, "ClientConnectorError"):
        return Unreachable, f"cannot reach {url}: {error}"
    if isinstance(error, OSError | EOFError) or _named(
        error, "ServerDisconnectedError", "HTTPConnectionClosed", "IncompleteRead", "ClientPayloadError"
    ):
        return ConnectionLost, f"the connection to {url} broke: {error or type(error).__name__}"
    if _named(error, "HTTPParseError", "ClientResponseError", "BadStatusLine"):
        return UnexpectedAnswer, f"{url} does not speak HTTP; is it the gRPC port?"
    return ServerFault, f"{type(error).__name__} from {url}: {error}"


def _from_status(status: str, message: str, url: str) -> tuple[type[ClientError], str]:
    text = message.strip()
    lowered = text.lower()
    if status in ("UNAVAILABLE", "400"):
        for beginning, kind in _BEGINNINGS:
            if lowered.startswith(beginning):
                return kind, text
    if status in ("UNAVAILABLE", "503"):
        return _unavailable(text, lowered, url)
    if "no available versions" in lowered or "is not ready" in lowered:
        return ModelNotReady, text
    kind = _BY_STATUS.get(status, ServerFault)
    if kind is DeadlineExceeded:
        return kind, f"no answer from {url} in time"
    if kind is UnexpectedAnswer:
        return kind, f"{url} does not serve Triton's inference protocol: {text}"
    return kind, text


def _unavailable(text: str, lowered: str, url: str) -> tuple[type[ClientError], str]:
    """UNAVAILABLE covers a full queue, an expired one, an unloaded model and a missing server."""
    if "maximum queue size" in lowered:
        return QueueFull, "the model's queue is full"
    if "timeout expired" in lowered:
        return QueueTimeout, "the request waited in the model's queue for longer than its policy allows"
    if "is not ready" in lowered or "no available versions" in lowered:
        return ModelNotReady, text
    if any(sign in lowered for sign in _NEVER_CONNECTED):
        return Unreachable, f"cannot reach {url}: {text.rsplit('last error:', maxsplit=1)[-1].strip()}"
    return ConnectionLost, f"the connection to {url} broke: {text}"


def _named(error: BaseException, *names: str) -> bool:
    """Whether one of these classes is among the error's; spares importing their packages to ask."""
    return any(cls.__name__ in names for cls in type(error).__mro__)
