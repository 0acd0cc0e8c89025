"""The seam between our calls and tritonclient: two protocols (sync, async) and how one is opened.

Tests put their own object in place of a transport; nothing above this line knows gRPC from HTTP.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .codec import InferReply, InferRequest
from .errors import InvalidInput
from .types import Protocol as WireProtocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from .access import Access

Question = Literal["config", "statistics", "metadata"]


class ReplyStream(Protocol):
    """The responses to one request of a decoupled model, as they come. Raises ClientError only."""

    def __iter__(self) -> Iterator[InferReply]: ...

    def __next__(self) -> InferReply: ...

    def close(self) -> None:
        """End it, at the server too; from any thread. A wait in another thread then ends as at its end.

        A stream whose last response has come is better read to its end: a call that is cancelled in that
        moment Triton 2.51 may never release.
        """


class AsyncReplyStream(Protocol):
    """As ReplyStream, awaited; a task that is cancelled while it waits closes the stream."""

    def __aiter__(self) -> AsyncIterator[InferReply]: ...

    async def __anext__(self) -> InferReply: ...

    async def close(self) -> None: ...


class Transport(Protocol):
    """Blocking; safe to use from several threads. Raises ClientError only. Timeouts are in seconds."""

    @property
    def endpoint(self) -> Endpoint: ...

    def infer(self, request: InferRequest, timeout: float) -> InferReply: ...

    def stream(self, request: InferRequest, timeout: float) -> ReplyStream:
        """Send a decoupled model's request; `timeout` bounds the wait for each response."""

    def ask(self, question: Question, model: str, timeout: float) -> Any:
        """The server's report as JSON: `config` of one model, or one that covers the whole server."""

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """As Transport, for the event loop it is first used in."""

    @property
    def endpoint(self) -> Endpoint: ...

    async def infer(self, request: InferRequest, timeout: float) -> InferReply: ...

    def stream(self, request: InferRequest, timeout: float) -> AsyncReplyStream: ...

    async def ask(self, question: Question, model: str, timeout: float) -> Any: ...

    async def close(self) -> None: ...


_SCHEMES: dict[str, tuple[WireProtocol | None, bool]] = {
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
    "http": ("http", False),
    "https": ("http", True),
}
# A name, an IPv4 address, or a name in letters of any script. A colon would be a second port.
_NAME = re.compile(r"[\w.-]+")
_PATH = re.compile(r"[^\s?#\x00-\x1f\x7f]*")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server listens and what is spoken there."""

    protocol: WireProtocol
    address: str
    tls: bool = False

    @property
    def host(self) -> str:
        """Without the port; an IPv6 address keeps its brackets."""
        return host_of(self.address)

    @property
    def url(self) -> str:
        if self.protocol == "http":
            return f"{'https' if self.tls else 'http'}://{self.address}"
        return f"{'grpcs' if self.tls else 'grpc'}://{self.address}"

    @classmethod
    def parse(
        cls,
        url: str | None,
        protocol: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Endpoint:
        """From `host:port`, or with one of the schemes grpc, grpcs, http, https.

        Without a URL: ONECARD_URL_GRPC or ONECARD_URL_HTTP, else Triton's usual port on this machine.
        """
        if protocol not in (None, "grpc", "http"):
            raise InvalidInput(f"protocol must be grpc or http, not {protocol!r}")
        if not url:
            variables = os.environ if environment is None else environment
            fallback = "127.0.0.1:8000" if protocol == "http" else "127.0.0.1:8001"
            url = variables.get(f"ONECARD_URL_{(protocol or 'grpc').upper()}") or fallback
        scheme, separator, address = url.rpartition("://")
        spoken, tls = _SCHEMES.get(scheme, (None, False))
        if separator and spoken is None:
            raise InvalidInput(f"cannot use {url!r}: write host:port, grpc://host:port or http://host:port")
        if protocol and spoken and protocol != spoken:
            raise InvalidInput(f"{url!r} contradicts protocol {protocol!r}")
        address = address.rstrip("/")
        chosen = spoken or ("http" if protocol == "http" else "grpc")
        if reason := refusal(address, path_allowed=chosen == "http"):
            raise InvalidInput(f"cannot use {url!r}: {reason}", next_step="write host:port or [IPv6]:port")
        return cls(chosen, address, tls)


def host_of(address: str) -> str:
    """Of host:port, with or without a path; an IPv6 address keeps its brackets."""
    return address.partition("/")[0].rpartition(":")[0]


def refusal(address: str, *, path_allowed: bool = False) -> str | None:
    """Why the address is not host:port; None where it is."""
    where, slash, path = address.partition("/")
    host, colon, port = where.rpartition(":")
    if slash and not path_allowed:
        return "a path has no place there"
    if not _PATH.fullmatch(path):
        return "its path holds white space, or what belongs to no path"
    if not colon or not host:
        return "the host or the port is missing"
    if not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 65536:
        return f"{port!r} is no port"
    if not _is_host(host):
        return f"{host!r} is no host"
    return None


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return _NAME.fullmatch(host) is not None
    try:
        return host.endswith("]") and ipaddress.ip_address(host[1:-1]).version == 6
    except ValueError:
        return False


def open_transport(endpoint: Endpoint, access: Access) -> Transport:
    # Imported here: tritonclient takes longer to import than all of the client.
    from . import triton_sync

    kind = triton_sync.Grpc if endpoint.protocol == "grpc" else triton_sync.Http
    return kind(endpoint, access)


def open_async_transport(endpoint: Endpoint, access: Access) -> AsyncTransport:
    from . import triton_async

    kind = triton_async.Grpc if endpoint.protocol == "grpc" else triton_async.Http
    return kind(endpoint, access)
