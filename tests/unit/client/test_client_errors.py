"""The error tree, and the translation of what real transports raised (recorded from a server)."""

from __future__ import annotations

import re
import socket
import ssl

import pytest
from tritonclient.utils import InferenceServerException

from client import errors
from client.errors import (
    AccessDenied,
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
from client.failures import translate
from triton_repo.runtime.admission import Limits, expired


def triton(message: str, status: str) -> InferenceServerException:
    return InferenceServerException(msg=message, status=status)


RECORDED = [
    (triton("text 0: boom", "StatusCode.INVALID_ARGUMENT"), InvalidInput),
    (triton("text 0: boom", "400"), InvalidInput),
    (triton("'internal'", "StatusCode.INTERNAL"), ServerFault),
    (triton("'internal'", "500"), ServerFault),
    (triton("Request for unknown model: 'nope' is not found", "StatusCode.NOT_FOUND"), UnknownModel),
    (triton("Request for unknown model: 'nope' is not found", "404"), UnknownModel),
    (triton("Request for unknown model: 'm' has no available versions", "400"), ModelNotReady),
    (
        triton("[request id: 1] Server is stopping, scheduler for model has stopped", "UNAVAILABLE"),
        ModelNotReady,
    ),
    (
        triton("Request for unknown model: 'm' has no available versions", "StatusCode.UNAVAILABLE"),
        ModelNotReady,
    ),
    (triton("[request id: a] Exceeds maximum queue size", "StatusCode.UNAVAILABLE"), QueueFull),
    (triton("Stub process 'm_0_0' is not healthy.", "StatusCode.INTERNAL"), ModelNotReady),
    (triton("Stub process 'm_0_0' is not healthy.", "500"), ModelNotReady),
    (triton("[request id: a] Exceeds maximum queue size", "503"), QueueFull),
    (triton("Request timeout expired", "StatusCode.UNAVAILABLE"), QueueTimeout),
    (triton("Request timeout expired", "503"), QueueTimeout),
    (triton("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED"), DeadlineExceeded),
    (TimeoutError("timed out"), DeadlineExceeded),
    (
        triton(
            "failed to connect to all addresses; last error: Connection refused", "StatusCode.UNAVAILABLE"
        ),
        Unreachable,
    ),
    (triton("errors resolving nohost:1: Domain name not found", "StatusCode.UNAVAILABLE"), Unreachable),
    (ConnectionRefusedError(111, "Connection refused"), Unreachable),
    (socket.gaierror(-2, "Name or service not known"), Unreachable),
    (triton("Socket closed", "StatusCode.UNAVAILABLE"), ConnectionLost),
    (ConnectionResetError(104, "Connection reset by peer"), ConnectionLost),
    (BrokenPipeError(32, "Broken pipe"), ConnectionLost),
    (triton("Method Not Allowed", "405"), UnexpectedAnswer),
    (triton("the queue is full: 9 wait", "503"), QueueFull),
    (triton("in ensemble 'm', the queue is full: 9 wait", "StatusCode.UNAVAILABLE"), QueueFull),
    (triton("the wait is too long: about 3 s", "StatusCode.UNAVAILABLE"), QueueFull),
    (triton("the wait was too long: 2 s", "503"), QueueTimeout),
    (triton(str(expired(Limits(), 2.0)), "503"), DeadlineExceeded),
    (triton(str(expired(Limits(deadline_s=60.0), 99.0)), "503"), QueueTimeout),
    (triton("the model is being unloaded", "StatusCode.UNAVAILABLE"), Overloaded),
    (
        triton(
            "This protocol is restricted, expecting header 'triton-grpc-protocol-k'", "StatusCode.UNAVAILABLE"
        ),
        AccessDenied,
    ),
    (triton("This API is restricted, expecting header 'k'", "403"), AccessDenied),
    (triton("a bearer token is needed", "401"), AccessDenied),
    (triton("Received http2 header with status: 401", "StatusCode.UNAUTHENTICATED"), AccessDenied),
    (triton("Received http2 header with status: 403", "StatusCode.PERMISSION_DENIED"), AccessDenied),
    (triton("Received http2 header with status: 413", "StatusCode.UNKNOWN"), InvalidInput),
    (triton("Received http2 header with status: 429", "StatusCode.UNAVAILABLE"), Overloaded),
    (triton("too many at once", "429"), Overloaded),
    (triton("Received http2 header with status: 502", "StatusCode.UNAVAILABLE"), ConnectionLost),
    (triton("the server is away", "502"), ConnectionLost),
    (
        triton(
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:443: "
            "Ssl handshake failed: SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
            "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate",
            "StatusCode.UNAVAILABLE",
        ),
        Untrusted,
    ),
    (ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate"), Untrusted),
    (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), UnexpectedAnswer),
    (RuntimeError("something else"), ServerFault),
]


@pytest.mark.parametrize(("raised", "expected"), RECORDED, ids=lambda value: str(value)[:60])
def test_every_recorded_failure_becomes_its_own_error(raised: Exception, expected: type[ClientError]) -> None:
    error = translate(raised, url="grpc://host:1", model="m", request_id="r1")
    assert type(error) is expected
    assert (error.model, error.request_id) == ("m", "r1")
    assert "model m, request r1" in str(error)
    assert "\n" not in str(error)


def classes() -> list[type[ClientError]]:
    return [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ClientError)
    ]


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = dict(re.findall(r"^[│├└─ ]*(\w+) \((\d+)\)", errors.__doc__ or "", flags=re.MULTILINE))
    assert {cls.__name__: str(cls.exit_code) for cls in classes()} == drawn


def test_siblings_have_distinct_exit_codes() -> None:
    codes = [cls.exit_code for cls in classes() if cls.__bases__ == (ClientError,)]
    assert len(codes) == len(set(codes))


def test_only_failures_before_any_computation_are_retryable() -> None:
    assert {cls.__name__ for cls in classes() if cls.retryable} == {
        "ModelNotReady",
        "Unreachable",
        "ConnectionLost",
        "Overloaded",
        "QueueFull",
        "QueueTimeout",
    }
