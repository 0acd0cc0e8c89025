"""A proxy that the environment names: for other machines, never for this one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from client import ClientError, codec, metrics
from client.access import Access
from client.bench.generate_load import Streamer
from client.bench.loadgen import Sender
from client.codec import InferRequest
from client.transport import Endpoint, open_async_transport, open_transport

REQUEST = InferRequest(
    model="m", inputs={"text": codec.text_column([b"good"])}, outputs=("o",), request_id="r", decoupled=True
)
SECONDS = 1.0


def ask(url: str) -> None:
    open_transport(Endpoint.parse(url), Access()).ask("metadata", "", SECONDS)


def stream(url: str) -> None:
    next(open_transport(Endpoint.parse(url), Access()).stream(REQUEST, SECONDS))


def ask_async(url: str) -> None:
    async def call() -> None:
        transport = open_async_transport(Endpoint.parse(url), Access())
        try:
            await transport.ask("metadata", "", SECONDS)
        finally:
            await transport.close()

    asyncio.run(call())


def stream_async(url: str) -> None:
    async def call() -> None:
        transport = open_async_transport(Endpoint.parse(url), Access())
        try:
            await anext(transport.stream(REQUEST, SECONDS))
        finally:
            await transport.close()

    asyncio.run(call())


@pytest.mark.parametrize(
    "url", ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1", "http://127.0.0.1:1"]
)
@pytest.mark.parametrize("call", [ask, stream, ask_async, stream_async])
def test_what_goes_to_this_machine_passes_no_proxy(
    url: str, call: Callable[[str], None], proxy: socket.socket
) -> None:
    with pytest.raises(ClientError):
        call(url)
    with pytest.raises(BlockingIOError):
        proxy.accept()


def test_the_benchmark_and_the_metrics_pass_none_either(proxy: socket.socket) -> None:
    async def load() -> None:
        async with Sender("127.0.0.1:1") as send:
            with pytest.raises(Exception, match="failed to connect"):
                await send(b"")
        async with Streamer("127.0.0.1:1") as streamer:
            with pytest.raises(Exception, match="failed to connect"):
                await streamer.run(b"")

    asyncio.run(load())
    assert "refused" in metrics.read("127.0.0.1:1").error
    with pytest.raises(BlockingIOError):
        proxy.accept()


@pytest.mark.parametrize("call", [ask, stream, ask_async, stream_async])
def test_for_another_machine_grpc_asks_the_proxy(call: Callable[[str], None], proxy: socket.socket) -> None:
    with pytest.raises(ClientError):
        call("card.invalid:8001")
    connection, _ = proxy.accept()
    with connection:
        assert connection.recv(100).startswith(b"CONNECT card.invalid:8001 ")
