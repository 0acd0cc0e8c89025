"""A unary gRPC call that nobody waits for any more is not cancelled at once: that may crash Triton 2.51."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from client import wire
from client.access import Access
from client.codec import InferRequest
from client.errors import DeadlineExceeded, InvalidInput
from client.transport import Endpoint, open_async_transport, open_transport

REQUEST = InferRequest(
    model="m", inputs={"text": np.array([[b"good"]], object)}, outputs=(), request_id="r", priority=3
)


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers when `answer` is set, and knows how many calls ended before they were answered."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.arrived = threading.Event()
        self.cancelled = threading.Event()
        self.completed = 0
        self.seen: dict[str, Any] = {}

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.seen = {
            "timeout": request.parameters["timeout"].int64_param,
            "priority": request.parameters[wire.PRIORITY].int64_param,
            **dict(context.invocation_metadata()),
        }
        self.arrived.set()
        if request.id == "wrong":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "text 0: no")
        while not self.answer.wait(0.002):
            if not context.is_active():
                self.cancelled.set()
                return service_pb2.ModelInferResponse()
        self.completed += context.is_active()
        return service_pb2.ModelInferResponse(model_name="m", model_version="4")


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
def endpoint(servicer: Servicer) -> Iterator[Endpoint]:
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield Endpoint.parse(f"grpc://127.0.0.1:{port}")
    servicer.answer.set()
    server.stop(None)


class Caller:
    """One of the transports, in one loop of its own if it needs one."""

    def __init__(self, kind: str, endpoint: Endpoint) -> None:
        self.loop = asyncio.new_event_loop()
        self.transport: Any = (open_transport if kind == "sync" else open_async_transport)(
            endpoint, Access("a-token")
        )

    def run(self, answer: Any) -> Any:
        return self.loop.run_until_complete(answer) if asyncio.iscoroutine(answer) else answer

    def infer(self, timeout: float, request: InferRequest = REQUEST) -> Any:
        return self.run(self.transport.infer(request, timeout))

    def close(self) -> None:
        self.run(self.transport.close())


@pytest.fixture(params=["sync", "asyncio"])
def caller(request: pytest.FixtureRequest, endpoint: Endpoint) -> Iterator[Caller]:
    caller = Caller(request.param, endpoint)
    yield caller
    caller.close()
    caller.loop.close()


def test_a_late_call_is_left_to_be_answered(caller: Caller, servicer: Servicer) -> None:
    start = time.perf_counter()
    with pytest.raises(DeadlineExceeded):
        caller.infer(0.1)
    assert 0.1 <= time.perf_counter() - start < 0.6
    assert servicer.arrived.is_set()
    assert servicer.seen["timeout"] <= 100_000
    assert (servicer.seen["priority"], servicer.seen["authorization"]) == (3, "Bearer a-token")
    threading.Timer(0.1, servicer.answer.set).start()
    caller.close()  # waits for it
    assert servicer.completed == 1
    assert not servicer.cancelled.is_set()


def test_it_is_given_up_in_the_end(
    caller: Caller, servicer: Servicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "GRACE_S", 0.2)
    with pytest.raises(DeadlineExceeded):
        caller.infer(0.1)
    assert not servicer.cancelled.is_set()
    start = time.perf_counter()
    caller.close()
    assert time.perf_counter() - start < 1
    assert servicer.cancelled.wait(5)


def test_answers_and_errors_of_brief_calls(caller: Caller, servicer: Servicer) -> None:
    servicer.answer.set()
    reply = caller.infer(0.9)
    assert (reply.model, reply.request_id, reply.version) == ("m", "r", "4")
    wrong = InferRequest(model="m", inputs=REQUEST.inputs, outputs=(), request_id="wrong")
    with pytest.raises(InvalidInput, match="text 0: no"):
        caller.infer(0.9, wrong)


def test_a_task_that_is_cancelled_leaves_its_call(endpoint: Endpoint, servicer: Servicer) -> None:
    async def go() -> None:
        transport = open_async_transport(endpoint, Access())
        task = asyncio.ensure_future(transport.infer(REQUEST, 30.0))
        while not servicer.arrived.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)
        assert not servicer.cancelled.is_set()
        servicer.answer.set()
        await transport.close()

    asyncio.run(go())
    assert servicer.completed == 1
