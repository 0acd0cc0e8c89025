"""The real streaming transports against small servers of this process: gRPC, and server-sent events."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fake_llm
import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor

from client import errors
from client.access import Access
from client.codec import InferReply, InferRequest
from client.generate import OUTPUTS, Assembly, chat_prompt, parameters, parse_deltas, request_inputs
from client.transport import Endpoint, open_async_transport, open_transport

TEXT = "".join(fake_llm.WORDS)
ACCESS = Access("a-token")


class Behaviour:
    """What both servers do with a prompt, and what they noticed."""

    def __init__(self) -> None:
        self.prompts: list[Any] = []
        self.headers: dict[str, str] = {}
        self.parameters: dict[str, Any] = {}
        self.left = threading.Event()

    def responses(self, inputs: dict[str, Any], alive: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        prompt = inputs["messages"][0]["content"]
        self.prompts.append(inputs)
        if prompt == "endless":
            while alive():
                yield fake_llm.arrays(["x"], [0], [1])
                time.sleep(0.005)
            return
        stream = np.array([inputs.get("stream", True)])
        request = InferRequest(model="m", inputs={"stream": stream}, outputs=(), request_id="")
        for place, outputs in enumerate(fake_llm.responses(request)):
            if prompt == "silent" and place == 2:
                until = time.monotonic() + 2  # over HTTP nothing tells it that nobody listens
                while alive() and time.monotonic() < until:
                    time.sleep(0.005)
                return
            if prompt.startswith("fail") and place == 2 * stream[0]:
                raise RuntimeError(prompt.partition(" ")[2])
            yield outputs


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        ended: list[bool] = []
        context.add_callback(lambda: ended or self.behaviour.left.set())
        yield from self._answer(requests, context)
        ended.append(True)

    def _answer(self, requests: Any, context: Any) -> Iterator[Any]:
        for request in requests:
            inputs = {
                tensor.name: array(tensor.datatype, raw)
                for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
            }
            self.behaviour.headers = dict(context.invocation_metadata())
            self.behaviour.parameters = {
                name: value.int64_param for name, value in request.parameters.items()
            } | {"id": request.id}
            # It crashes Triton 2.51.
            assert "triton_grpc_error" not in self.behaviour.headers
            try:
                for outputs in self.behaviour.responses(inputs, context.is_active):
                    yield service_pb2.ModelStreamInferResponse(infer_response=message(outputs))
            except RuntimeError as error:
                text = str(error).partition(" ")[2]
                yield service_pb2.ModelStreamInferResponse(error_message=text)


def array(datatype: str, raw: bytes) -> Any:
    if datatype == "BYTES":
        return json.loads(deserialize_bytes_tensor(raw)[0])
    return np.frombuffer(raw, {"BOOL": bool, "INT32": np.int32}[datatype])[0].item()


def message(outputs: dict[str, Any]) -> Any:
    response = service_pb2.ModelInferResponse(model_name="m")
    for name, values in outputs.items():
        response.outputs.add(name=name, datatype=np_to_triton_dtype(values.dtype), shape=values.shape)
        raw = serialize_byte_tensor(values).item() if values.dtype == object and values.size else b""
        response.raw_output_contents.append(raw if values.dtype == object else values.tobytes())
    return response


class Handler(BaseHTTPRequestHandler):
    """As Triton's generate extension: one value for a list of one, status 400 for whatever a model says."""

    behaviour: Behaviour

    def do_POST(self) -> None:
        inputs = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v2/models/m/generate_stream"
        inputs["messages"] = json.loads(inputs["messages"])
        self.behaviour.headers = {name.lower(): value for name, value in self.headers.items()}
        self.behaviour.parameters = {
            name: inputs.pop(name) for name in ("id", "timeout", "onecard_priority") if name in inputs
        }
        begun = False
        try:
            for outputs in self.behaviour.responses(inputs, lambda: True):
                plain = {name: plain_json(values) for name, values in outputs.items()}
                self.send(200, plain, begun=begun)
                begun = True
        except RuntimeError as error:
            self.send(400, {"error": str(error).partition(" ")[2]}, begun=begun)
        except OSError:
            self.behaviour.left.set()

    def send(self, status: int, document: Any, *, begun: bool) -> None:
        if not begun:
            self.send_response(status)
            self.end_headers()
        self.wfile.write(f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode())

    def log_message(self, *_: Any) -> None:
        pass


def plain_json(values: Any) -> Any:
    plain = [value.decode() if isinstance(value, bytes) else value for value in values.tolist()]
    return plain[0] if len(plain) == 1 else plain


@pytest.fixture(scope="module")
def behaviour() -> Behaviour:
    return Behaviour()


@pytest.fixture(scope="module")
def urls(behaviour: Behaviour) -> Iterator[dict[str, str]]:
    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(behaviour), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    Handler.behaviour = behaviour
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield {"grpc": f"grpc://127.0.0.1:{port}", "http": f"http://127.0.0.1:{web.server_port}"}
    web.shutdown()
    server.stop(None)


@pytest.fixture(params=["grpc", "http"])
def endpoint(request: pytest.FixtureRequest, urls: dict[str, str]) -> Endpoint:
    return Endpoint.parse(urls[request.param])


def infer_request(text: str, *, stream: bool = True) -> InferRequest:
    inputs = request_inputs(chat_prompt(text, None), parameters({"max_tokens": 9}), stream=stream)
    return InferRequest(model="m", inputs=inputs, outputs=OUTPUTS, request_id="r", priority=2, decoupled=True)


@pytest.fixture(params=["sync", "asyncio"])
def receive(request: pytest.FixtureRequest, endpoint: Endpoint) -> Callable[..., list[InferReply]]:
    """Up to `count` replies; the stream is closed then."""

    def sync(text: str, *, count: int = 99, timeout: float = 5.0, stream: bool = True) -> list[InferReply]:
        transport = open_transport(endpoint, ACCESS)
        replies = transport.stream(infer_request(text, stream=stream), timeout)
        got = []
        for reply in replies:
            got.append(reply)
            if len(got) == count:
                replies.close()
        transport.close()
        return got

    async def go(text: str, count: int, timeout: float, stream: bool) -> list[InferReply]:
        transport = open_async_transport(endpoint, ACCESS)
        replies = transport.stream(infer_request(text, stream=stream), timeout)
        got = []
        async for reply in replies:
            got.append(reply)
            if len(got) == count:
                await replies.close()
        await transport.close()
        return got

    def awaited(text: str, *, count: int = 99, timeout: float = 5.0, stream: bool = True) -> Any:
        return asyncio.run(go(text, count, timeout, stream))

    return sync if request.param == "sync" else awaited


@pytest.mark.parametrize("stream", [True, False])
def test_text_arrives_whole_in_pieces_or_at_once(receive: Any, behaviour: Behaviour, stream: bool) -> None:
    replies = receive('quotes " and\nlines 한글', stream=stream)
    assert len(replies) == (5 if stream else 1)
    assembly = Assembly(logprobs=False)
    for reply in replies:
        for delta in parse_deltas(reply, logprobs=False):
            assembly.add(delta)
    assert assembly.finished
    assert (assembly.generation().text, assembly.generation().finish_reason) == (TEXT, "stop")
    sent = behaviour.prompts[-1]
    assert sent["messages"] == [{"role": "user", "content": 'quotes " and\nlines 한글'}]
    assert (sent["max_tokens"], sent["stream"]) == (9, stream)


def test_token_id_priority_and_the_time_left_go_along(receive: Any, behaviour: Behaviour) -> None:
    receive("text", timeout=5.0)
    assert behaviour.headers["authorization"] == "Bearer a-token"
    assert behaviour.headers["x-request-id"] == "r"
    assert behaviour.parameters == {"id": "r", "timeout": 5_000_000, "onecard_priority": 2}


def test_closing_a_stream_is_noticed_by_the_server(receive: Any, behaviour: Behaviour) -> None:
    behaviour.left.clear()
    assert len(receive("endless", count=3)) == 3
    assert behaviour.left.wait(5)


def test_a_silence_longer_than_the_limit_is_a_deadline(
    receive: Any, behaviour: Behaviour, endpoint: Endpoint
) -> None:
    behaviour.left.clear()
    start = time.perf_counter()
    with pytest.raises(errors.DeadlineExceeded, match="in time"):
        receive("silent", timeout=0.1)
    assert time.perf_counter() - start < 2
    if endpoint.protocol == "grpc":
        assert behaviour.left.wait(5)


def test_the_limit_is_for_each_wait(receive: Any) -> None:
    """More than 0.3 s of pieces, none of which takes 0.2 s."""
    assert len(receive("endless", count=70, timeout=0.2)) == 70


@pytest.mark.parametrize(
    ("failure", "over_grpc", "over_http"),
    [
        ("INVALID_ARGUMENT the prompt has 9 tokens", errors.InvalidInput, errors.InvalidInput),
        ("UNAVAILABLE the queue is full: 9 requests", errors.QueueFull, errors.QueueFull),
        ("UNAVAILABLE the wait is too long: about 9 s", errors.QueueFull, errors.QueueFull),
        ("UNAVAILABLE the wait was too long: 9 s", errors.QueueTimeout, errors.QueueTimeout),
        ("UNAVAILABLE the model is being unloaded", errors.Overloaded, errors.Overloaded),
        ("CANCELLED the request was cancelled", errors.Cancelled, errors.Cancelled),
        ("INTERNAL the engine failed on the prompt", errors.ServerFault, errors.ServerFault),
        ("TEXT unexpected inference input 'x'", errors.InvalidInput, errors.InvalidInput),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_the_model_says_becomes_its_own_error(
    receive: Any, endpoint: Endpoint, failure: str, over_grpc: Any, over_http: Any, stream: bool
) -> None:
    with pytest.raises(errors.ClientError) as caught:
        receive(f"fail {failure}", stream=stream)
    assert type(caught.value) is (over_grpc if endpoint.protocol == "grpc" else over_http)
    assert failure.partition(" ")[2] in str(caught.value)
    assert (caught.value.model, caught.value.request_id) == ("m", "r")


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:1", "http://127.0.0.1:1"])
def test_nobody_there_is_unreachable(url: str) -> None:
    endpoint = Endpoint.parse(url)
    with pytest.raises(errors.Unreachable, match="cannot reach"):
        next(open_transport(endpoint, ACCESS).stream(infer_request("a"), 5))

    async def go() -> None:
        transport = open_async_transport(endpoint, ACCESS)
        try:
            await anext(transport.stream(infer_request("a"), 5))
        finally:
            await transport.close()

    with pytest.raises(errors.Unreachable, match="cannot reach"):
        asyncio.run(go())


def test_a_cancelled_task_ends_the_generation(endpoint: Endpoint, behaviour: Behaviour) -> None:
    behaviour.left.clear()

    async def go() -> None:
        transport = open_async_transport(endpoint, ACCESS)
        replies = transport.stream(infer_request("endless"), 5)

        async def drain() -> None:
            async for _ in replies:
                pass

        task = asyncio.create_task(drain())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await transport.close()

    asyncio.run(go())
    assert behaviour.left.wait(5)


def test_another_thread_ends_a_wait(endpoint: Endpoint) -> None:
    transport = open_transport(endpoint, ACCESS)
    replies = transport.stream(infer_request("silent"), 30)
    assert next(replies) is not None
    assert next(replies) is not None
    threading.Timer(0.1, replies.close).start()
    start = time.perf_counter()
    assert [*replies] == []
    assert time.perf_counter() - start < 5
    transport.close()


def test_an_interrupt_ends_the_generation(
    endpoint: Endpoint, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviour.left.clear()
    transport = open_transport(endpoint, ACCESS)
    replies = transport.stream(infer_request("endless"), 5)
    next(replies)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for module in ("wire.stream_reply", "sse.reply"):
        monkeypatch.setattr(f"client.{module}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(replies)
    assert behaviour.left.wait(5)
    transport.close()
