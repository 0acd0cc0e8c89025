"""The one place that turns what tritonclient and its transports raise into our errors.

The statuses and messages below were recorded from a real server on every transport; tests replay them.
"""

from __future__ import annotations

import re
import socket
import ssl

from .errors import (
    AccessDenied,
    Cancelled,
    ClientError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    Overloaded,
    QueueFull,
    QueueTimeout,
    ServerFault,
    UnexpectedAnswer,
    UnknownModel,
    Unreachable,
    Untrusted,
)

_NEVER_CONNECTED = ("failed to connect", "errors resolving", "dns resolution failed", "connection refused")
# What a proxy answers in HTTP is all that gRPC has to say about it.
_HTTP_STATUS = re.compile(r"http2 header with status: (\d{3})")
# An ensemble puts its name before what one of its models says.
_ENSEMBLE = re.compile(r"in ensemble '[^']*',\s*")

# gRPC codes and HTTP statuses whose meaning does not depend on the message.
_BY_STATUS: dict[str, type[ClientError]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "400": InvalidInput,
    "413": InvalidInput,
    "NOT_FOUND": UnknownModel,
    "404": UnknownModel,
    "UNAUTHENTICATED": AccessDenied,
    "PERMISSION_DENIED": AccessDenied,
    "401": AccessDenied,
    "403": AccessDenied,
    "429": Overloaded,
    "502": ConnectionLost,
    "503": Overloaded,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": DeadlineExceeded,
    "499": DeadlineExceeded,
    "504": DeadlineExceeded,
    "RESOURCE_EXHAUSTED": QueueFull,
    "405": UnexpectedAnswer,
    "UNIMPLEMENTED": UnexpectedAnswer,
}

# How the models begin what they say. A stream carries no code: over HTTP Triton gives all of it status 400.
_BEGINNINGS: tuple[tuple[str, type[ClientError]], ...] = (
    ("the queue is full", QueueFull),
    ("the wait is too long", QueueFull),
    ("the wait was too long: the request's own", DeadlineExceeded),  # it is the caller's time that ran out
    ("the wait was too long", QueueTimeout),
    ("the model is being unloaded", Overloaded),
    ("the request was cancelled", Cancelled),
    ("the engine failed", ServerFault),
    ("the scheduler failed", ServerFault),
    ("the server failed", ServerFault),
    ("the next token could not be chosen", ServerFault),
)

# Anywhere in a message, and what is told then if not the message itself.
_NOT_READY = (
    ("no available versions", ""),
    ("is not ready", ""),
    ("is not healthy", "the model's process has ended"),
    ("server is stopping", ""),
)

# Python's words first, then those of gRPC's library.
_VERIFY_FAILED = re.compile(r"certificate[ _]verify[ _]failed: ([^:(\]]*)", re.IGNORECASE)

# By name, which spares importing their packages to ask.
_BROKEN = ("ServerDisconnectedError", "HTTPConnectionClosed", "IncompleteRead", "ClientPayloadError")

_STEPS: dict[type[ClientError], str] = {
    AccessDenied: "give a valid token: --token-file FILE, or ONECARD_TOKEN_FILE",
    Unreachable: "is the server running there? `triton-repo serve` prints its addresses",
    UnknownModel: "`client status` lists the models",
    Untrusted: "name the authority that signed it: --ca FILE, or ONECARD_CA",
}


def translate(error: BaseException, *, url: str, model: str | None, request_id: str | None) -> ClientError:
    """Our error for one raised by a transport; never raises, so that no foreign error escapes."""
    kind, message = _classify(error, url)
    step = _STEPS.get(kind)
    if message.endswith("restricts this"):
        step = "only the server's administrator may ask for it"
    return kind(message, model=model, request_id=request_id, next_step=step)


def _classify(error: BaseException, url: str) -> tuple[type[ClientError], str]:
    from tritonclient.utils import InferenceServerException

    if isinstance(error, InferenceServerException):
        status = str(error.status() or "").removeprefix("StatusCode.")
        return _from_status(status, error.message() or str(error), url)
    if isinstance(error, TimeoutError):
        return DeadlineExceeded, f"no answer from {url} in time"
    if isinstance(error, OSError | EOFError) or _named(error, *_BROKEN):
        return _from_connection(error, url)
    if _named(error, "HTTPParseError", "ClientResponseError", "BadStatusLine"):
        return UnexpectedAnswer, f"{url} does not speak HTTP; is it the gRPC port?"
    return ServerFault, f"{type(error).__name__} from {url}: {error}"


def _from_connection(error: BaseException, url: str) -> tuple[type[ClientError], str]:
    if isinstance(error, ssl.SSLError) or _named(error, "ClientConnectorCertificateError", "ClientSSLError"):
        return _from_tls(str(error), url)
    if isinstance(error, ConnectionRefusedError | socket.gaierror) or _named(error, "ClientConnectorError"):
        return Unreachable, f"cannot reach {url}: {error}"
    return ConnectionLost, f"the connection to {url} broke: {error or type(error).__name__}"


def _from_tls(text: str, url: str) -> tuple[type[ClientError], str]:
    if found := _VERIFY_FAILED.search(text):
        return Untrusted, f"the certificate of {url} is not trusted: {found[1].strip()}"
    return UnexpectedAnswer, f"{url} does not speak TLS"


def _from_status(status: str, message: str, url: str) -> tuple[type[ClientError], str]:
    text = message.strip()
    lowered = _ENSEMBLE.sub("", text.lower(), count=1)
    if found := _HTTP_STATUS.search(lowered):
        return _by_status(found[1], text, url)
    if status in ("UNAVAILABLE", "400", "503"):
        for beginning, kind in _BEGINNINGS:
            if lowered.startswith(beginning):
                return kind, text
    if "is restricted, expecting header" in lowered:
        return AccessDenied, f"{url} restricts this"
    for sign, told in _NOT_READY:
        if sign in lowered:
            return ModelNotReady, told or text
    if status in ("UNAVAILABLE", "503"):
        return _unavailable(text, lowered, url)
    return _by_status(status, text, url)


def _by_status(status: str, text: str, url: str) -> tuple[type[ClientError], str]:
    kind = _BY_STATUS.get(status, ServerFault)
    if "plain http request was sent to https port" in text.lower():
        return UnexpectedAnswer, f"{url} speaks TLS: write grpcs:// or https:// before the address"
    if kind is DeadlineExceeded:
        return kind, f"no answer from {url} in time"
    if kind is UnexpectedAnswer:
        return kind, f"{url} does not serve Triton's inference protocol: {text}"
    if kind is AccessDenied:
        return kind, f"{url} refuses the request ({status}): {text}"
    if kind is ConnectionLost:
        return kind, f"the proxy at {url} does not reach the server"
    return kind, text


def _unavailable(text: str, lowered: str, url: str) -> tuple[type[ClientError], str]:
    """UNAVAILABLE covers a full queue, an expired one, an unloaded model and a missing server."""
    if "maximum queue size" in lowered:
        return QueueFull, "the model's queue is full"
    if "timeout expired" in lowered:
        return QueueTimeout, "the request waited in the model's queue for longer than its policy allows"
    if "certificate_verify_failed" in lowered or "wrong_version_number" in lowered:
        return _from_tls(text, url)
    if "http1.x server" in lowered:
        return UnexpectedAnswer, f"{url} does not speak gRPC; is it the HTTP port, or one for TLS (grpcs://)?"
    if any(sign in lowered for sign in _NEVER_CONNECTED):
        return Unreachable, f"cannot reach {url}: {text.rsplit('last error:', maxsplit=1)[-1].strip()}"
    return ConnectionLost, f"the connection to {url} broke: {text}"


def _named(error: BaseException, *names: str) -> bool:
    """Whether one of these classes is among the error's; spares importing their packages to ask."""
    return any(cls.__name__ in names for cls in type(error).__mro__)
