"""Every way a request can fail, in one tree; each class has its own exit code for the CLI.

ClientError (30)
├── InvalidInput (31)         the request is wrong: refused here before sending, or by the server
├── UnknownModel (32)         the server has no such model, or no such precision of it
├── ModelNotReady (33)        the model is known but is not loaded, or its process has ended
├── Unreachable (34)          no connection: nothing listens there, or the name does not resolve
│   ├── ConnectionLost (34)   the connection broke while the request was on its way
│   └── Untrusted (34)        the server's certificate is signed by nobody we trust, or for another name
├── DeadlineExceeded (35)     no answer within the time the caller gave
├── Overloaded (36)           the server refuses work for now; trying again later is right
│   ├── QueueFull (36)        rejected at once: no room, or too many wait for it to be answered in time
│   └── QueueTimeout (36)     the model's deadline passed while it waited
├── ServerFault (37)          the server failed while computing
│   └── UnexpectedAnswer (37) the server answered something that is not what the model promises
├── BenchError (38)           the benchmark cannot run: bad summary file, baseline or chart library missing
├── Cancelled (39)            the server ended a generation before it was finished
└── AccessDenied (40)         no token or a wrong one, or what only an administrator may ask

A subclass shares its parent's exit code because the caller would react in the same way.
Exit code 2 is Click's own (wrong usage), 130 an interrupt.
"""

from __future__ import annotations

from typing import ClassVar


class ClientError(Exception):
    """A failed request: what happened, to which model and request, and the next step where one is known."""

    exit_code: ClassVar[int] = 30
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        model: str | None = None,
        request_id: str | None = None,
        next_step: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.model = model
        self.request_id = request_id
        self.next_step = next_step

    def __str__(self) -> str:
        where = [f"model {self.model}"] if self.model else []
        where += [f"request {self.request_id}"] if self.request_id else []
        text = f"{self.message} ({', '.join(where)})" if where else self.message
        return f"{text}; {self.next_step}" if self.next_step else text


class InvalidInput(ClientError):
    exit_code = 31


class UnknownModel(ClientError):
    exit_code = 32


class ModelNotReady(ClientError):
    exit_code = 33
    retryable = True  # refused before it was computed: the model is being loaded, or the server stopped


class Unreachable(ClientError):
    exit_code = 34
    retryable = True  # nothing was sent


class ConnectionLost(Unreachable):
    """Retried only for idempotent requests: the server may have computed the answer already."""


class Untrusted(Unreachable):
    retryable = False  # it will be the same certificate


class DeadlineExceeded(ClientError):
    exit_code = 35  # never retried: the caller's time is spent


class Overloaded(ClientError):
    exit_code = 36
    retryable = True  # rejected before it was computed


class QueueFull(Overloaded):
    pass


class QueueTimeout(Overloaded):
    pass


class ServerFault(ClientError):
    exit_code = 37


class UnexpectedAnswer(ServerFault):
    pass


class Cancelled(ClientError):
    """Not retried: whoever ended it, an unloading model or its operator, meant it."""

    exit_code = 39


class AccessDenied(ClientError):
    exit_code = 40


class BenchError(ClientError):
    exit_code = 38
