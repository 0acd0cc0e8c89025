"""Asyncio transports over tritonclient."""

from __future__ import annotations

import asyncio
from typing import Any

import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio

from . import triton_async_streams, wire
from .access import Access
from .codec import InferReply, InferRequest
from .failures import translate
from .transport import Endpoint, Question


class _PerLoop:
    """Opens tritonclient's object in the loop that uses it: its sockets cannot move to another."""

    def __init__(self, endpoint: Endpoint, access: Access) -> None:
        self.endpoint, self._access = endpoint, access
        self._opened: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def _open(self) -> Any:
        raise NotImplementedError

    def _client(self) -> Any:
        loop = asyncio.get_running_loop()
        if self._opened is None or self._loop is not loop:
            self._opened, self._loop = self._open(), loop
        return self._opened

    async def close(self) -> None:
        if self._opened is not None and self._loop is asyncio.get_running_loop():
            await self._opened.close()
        self._opened = None


class _Channel(_PerLoop):
    """gRPC for streams; tritonclient's object has a channel of its own."""

    def _open(self) -> Any:
        return triton_async_streams.open_channel(self.endpoint, self._access)


class _Session(_PerLoop):
    """HTTP for streams."""

    def _open(self) -> Any:
        return triton_async_streams.open_session(self.endpoint, self._access)


class Grpc(_PerLoop):
    def __init__(self, endpoint: Endpoint, access: Access) -> None:
        super().__init__(endpoint, access)
        self._channel = _Channel(endpoint, access)
        self._left: set[asyncio.Task[Any]] = set()  # calls that nobody waits for any more

    async def close(self) -> None:
        if self._left and self._loop is asyncio.get_running_loop():
            await asyncio.wait(self._left, timeout=wire.GRACE_S)
        await self._channel.close()
        await super().close()

    def stream(self, request: InferRequest, timeout: float) -> triton_async_streams.Grpc:
        opened = self._channel._client
        return triton_async_streams.Grpc(opened, self.endpoint, self._access, request, timeout)

    def _open(self) -> Any:
        credentials = self._access.channel_credentials() if self.endpoint.tls else None
        return tritonclient.grpc.aio.InferenceServerClient(
            self.endpoint.address,
            creds=credentials,
            channel_args=wire.channel_arguments(self.endpoint.address),
        )

    async def infer(self, request: InferRequest, timeout: float) -> InferReply:
        try:
            arguments = wire.infer_arguments(tritonclient.grpc, request, timeout, self._access)
            call = asyncio.ensure_future(self._client().infer(**arguments))
            return wire.reply_of(request, await self._within(timeout, call))
        except Exception as error:
            raise translate(
                error, url=self.endpoint.url, model=request.model, request_id=request.request_id
            ) from error

    async def _within(self, timeout: float, call: asyncio.Task[Any]) -> Any:
        """The call's result. Where it is late, or whoever waits is cancelled, it gets its time to end."""
        try:
            done, _ = await asyncio.wait((call,), timeout=timeout)
        finally:
            if not call.done():
                self._left.add(call)
                call.add_done_callback(self._forget)
                asyncio.get_running_loop().call_later(wire.GRACE_S, call.cancel)
        if not done:
            raise TimeoutError
        return call.result()

    def _forget(self, call: asyncio.Task[Any]) -> None:
        self._left.discard(call)
        if not call.cancelled():
            call.exception()  # or asyncio would report that nobody asked

    async def ask(self, question: Question, model: str, timeout: float) -> Any:
        method = getattr(self._client(), wire.QUESTIONS[question])
        try:
            return await method(
                *wire.question_arguments(question, model),
                as_json=True,
                client_timeout=timeout,
                headers=self._access.headers(),
            )
        except Exception as error:
            raise translate(error, url=self.endpoint.url, model=model or None, request_id=None) from error


class Http(_PerLoop):
    def __init__(self, endpoint: Endpoint, access: Access) -> None:
        super().__init__(endpoint, access)
        self._session = _Session(endpoint, access)

    async def close(self) -> None:
        await self._session.close()
        await super().close()

    def stream(self, request: InferRequest, timeout: float) -> triton_async_streams.Http:
        opened = self._session._client
        return triton_async_streams.Http(opened, self.endpoint, self._access, request, timeout)

    def _open(self) -> Any:
        # Its own timeout is off: each call has its own, below.
        return tritonclient.http.aio.InferenceServerClient(
            self.endpoint.address,
            ssl=self.endpoint.tls,
            ssl_context=self._access.context if self.endpoint.tls else None,
            conn_timeout=None,
        )

    async def infer(self, request: InferRequest, timeout: float) -> InferReply:
        try:
            arguments = wire.infer_arguments(tritonclient.http, request, timeout, self._access)
            async with asyncio.timeout(timeout):
                return wire.reply_of(request, await self._client().infer(**arguments))
        except Exception as error:
            raise translate(
                error, url=self.endpoint.url, model=request.model, request_id=request.request_id
            ) from error

    async def ask(self, question: Question, model: str, timeout: float) -> Any:
        method = getattr(self._client(), wire.QUESTIONS[question])
        try:
            async with asyncio.timeout(timeout):
                return await method(*wire.question_arguments(question, model), headers=self._access.headers())
        except Exception as error:
            raise translate(error, url=self.endpoint.url, model=model or None, request_id=None) from error
