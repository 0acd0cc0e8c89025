"""Query the models of a running onecard server: `Client` blocks, `AsyncClient` awaits."""

from .async_client import AsyncClient
from .client import Client
from .errors import (
    BenchError,
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
)
from .retry import RetryPolicy
from .types import Classification, Embedding, ModelInfo, ModelStatus, Ranked, ServerStatus

__all__ = [
    "AsyncClient",
    "BenchError",
    "Classification",
    "Client",
    "ClientError",
    "ConnectionLost",
    "DeadlineExceeded",
    "Embedding",
    "InvalidInput",
    "ModelInfo",
    "ModelNotReady",
    "ModelStatus",
    "Overloaded",
    "QueueFull",
    "QueueTimeout",
    "Ranked",
    "RetryPolicy",
    "ServerFault",
    "ServerStatus",
    "UnexpectedAnswer",
    "UnknownModel",
    "Unreachable",
]
