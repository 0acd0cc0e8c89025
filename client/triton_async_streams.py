"""Streams of responses for asyncio; see triton_streams, whose choices these share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from . import sse, wire
from .access import Access
from .codec import InferReply, InferRequest
from .errors import ClientError
from .transport import Endpoint
from .triton_streams import stream_failure

# A line longer than twice this is refused; an answer that does not stream is one line with all its tokens.
LINE_BYTES = 2**23


def open_channel(endpoint: Endpoint, access: Access) -> Any:
    options = wire.channel_arguments(endpoint.address)
    if endpoint.tls:
        credentials = access.channel_credentials()
        return grpc.aio.secure_channel(endpoint.address, credentials, options=options)
    return grpc.aio.insecure_channel(endpoint.address, options=options)


def open_session(endpoint: Endpoint, access: Access) -> Any:
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=access.context if endpoint.tls else True),
        timeout=aiohttp.ClientTimeout(total=None),  # each wait has its own
        read_bufsize=LINE_BYTES,
    )


class _Stream:
    """Opened with the first wait, because only a running loop has channels; closed by whatever ends it."""

    def __init__(
        self,
        opened: Callable[[], Any],
        endpoint: Endpoint,
        access: Access,
        request: InferRequest,
        timeout: float,
    ) -> None:
        self._opened, self._url, self._request, self._timeout = opened, endpoint.url, request, timeout
        self._headers = access.headers(request.request_id)
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> InferReply:
        if self._closed:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self._timeout):
                reply = await self._next()
        except Exception as error:
            if self._closed:
                raise StopAsyncIteration from None
            await self.close()
            if isinstance(error, ClientError):
                raise
            raise stream_failure(error, self._url, self._request) from error
        except asyncio.CancelledError:
            closed = self._closed
            await self.close()
            # gRPC ends the wait of a call that another task closed as if this one had been cancelled.
            if closed and not _cancelling():
                raise StopAsyncIteration from None
            raise
        except BaseException:
            await self.close()
            raise
        if reply is None:
            await self.close()
            raise StopAsyncIteration
        return reply

    async def _next(self) -> InferReply | None:
        """The next response; None at the end."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Grpc(_Stream):
    _call: Any = None

    async def _next(self) -> InferReply | None:
        if self._call is None:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(self._opened())
            message = wire.infer_message(self._request, self._timeout)
            self._call = stub.ModelStreamInfer(iter([message]), metadata=tuple(self._headers.items()))
        response = await self._call.read()
        while response is not grpc.aio.EOF and response.error_message:
            # As in the blocking transport: a call that is about to end is not to be cancelled.
            if await self._call.read() is grpc.aio.EOF:
                break
        return None if response is grpc.aio.EOF else wire.stream_reply(self._request, response)

    async def close(self) -> None:
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    def __del__(self) -> None:
        if self._call is not None:
            self._call.cancel()


class Http(_Stream):
    _response: Any = None

    async def _next(self) -> InferReply | None:
        if self._response is None:
            self._response = await self._opened().post(
                self._url + sse.path(self._request),
                data=sse.body(self._request, self._timeout),
                headers={"Content-Type": "application/json", **self._headers},
                allow_redirects=False,
            )
        status = self._response.status
        while line := await self._response.content.readline():
            data = sse.event(line)
            if data is None and status >= 400 and line.strip():
                data = line.strip()
            if data is not None:
                return sse.reply(self._request, data, status)
        return None

    async def close(self) -> None:
        self._closed = True
        if self._response is not None:
            self._response.close()

    def __del__(self) -> None:
        if self._response is not None:
            self._response.close()
