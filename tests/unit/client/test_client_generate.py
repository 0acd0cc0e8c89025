"""Generation over fake transports: answers, pieces, batches, retries, and checks before anything is sent."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import fake_llm
import numpy as np
import pytest
from fake_llm import USAGE, WORDS, arrays

from client import (
    AsyncClient,
    Client,
    ClientError,
    ConnectionLost,
    Delta,
    InvalidInput,
    QueueFull,
    ServerFault,
    UnexpectedAnswer,
    UnknownModel,
)
from client.generate import GenerateOptions

TEXT = "".join(WORDS)
SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "hello"}


@pytest.fixture(params=["sync", "asyncio"])
def server(request: pytest.FixtureRequest, transport: Any, async_transport: Any) -> Any:
    chosen = transport if request.param == "sync" else async_transport
    chosen.configs["writer"] = fake_llm.config("writer")
    return chosen


@pytest.fixture
def call(server: Any, transport: Any, clock: Any) -> Callable[..., Any]:
    """Calls a method of whichever client the server belongs to; of a stream come its pieces and itself."""

    def do(method: str, *arguments: Any, **options: Any) -> Any:
        if server is transport:
            with Client(transport=server, clock=clock) as client:
                result = getattr(client, method)(*arguments, **options)
                return ([*result], result) if "stream" in method else result

        async def go() -> Any:
            async with AsyncClient(transport=server, clock=clock) as client:
                if "stream" in method:
                    stream = getattr(client, method)(*arguments, **options)
                    return [delta async for delta in stream], stream
                return await getattr(client, method)(*arguments, **options)

        return asyncio.run(go())

    return do


def test_one_prompt_gives_one_answer_and_a_list_gives_a_list(call: Any, server: Any) -> None:
    answer = call("generate", "The soup")
    assert (answer.text, answer.finish_reason, answer.token_ids) == (TEXT, "stop", (0, 1, 2, 3, 4))
    assert answer.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens, answer.usage.queue_ms) == (7, 3, 0.5)
    answers = call("generate", [f"prompt {n}" for n in range(20)])
    assert [answer.text for answer in answers] == [TEXT] * 20
    assert call("generate", []) == []
    sent = server.requests[0]
    assert sent.inputs.keys() == {"text", "stream"}
    assert (sent.inputs["text"].tolist(), sent.inputs["stream"].tolist()) == ([b"The soup"], [False])


def test_the_answers_of_a_list_keep_its_order(call: Any, server: Any) -> None:
    class Slow(list[Any]):
        """The earlier the prompt, the later its answer."""

        def __init__(self, text: bytes) -> None:
            super().__init__([arrays([text.decode()], [0], [1], reasons=["stop"], usage=USAGE)])
            self.wait = 0.01 * (5 - int(text))

        def __iter__(self) -> Any:
            time.sleep(self.wait)
            return super().__iter__()

    server.script_of = lambda request, timeout: Slow(request.inputs["text"][0])
    assert [answer.text for answer in call("generate", list("01234"))] == list("01234")


def test_samples_share_a_prompt(call: Any) -> None:
    answer = call("generate", "a", n=3, logprobs=True)
    assert [(sample.index, sample.text) for sample in answer.samples] == [(0, TEXT), (1, TEXT), (2, TEXT)]
    assert [sample.token_ids[0] for sample in answer.samples] == [0, 5, 10]
    assert answer.samples[2].logprobs == (-0.5,) * 5
    deltas, stream = call("stream", "a", n=2)
    assert {delta.index for delta in deltas} == {0, 1}
    assert [sample.text for sample in stream.generation.samples] == [TEXT, TEXT]


@pytest.mark.parametrize("method", ["stream", "chat_stream"])
def test_pieces_joined_are_the_answer(call: Any, server: Any, method: str) -> None:
    deltas, stream = call(method, "a")
    assert [delta.text for delta in deltas] == list(WORDS)
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["stop"]
    assert [delta.usage is None for delta in deltas] == [True] * 4 + [False]
    assert stream.text == stream.generation.text == TEXT
    assert stream.generation.finish_reason == "stop"
    assert server.requests[0].inputs["stream"].tolist() == [True]
    assert isinstance(deltas[0], Delta)


def test_every_parameter_is_a_tensor_of_its_type(call: Any, server: Any) -> None:
    given = {
        "max_tokens": (5, np.int32, [5]),
        "temperature": (0.5, np.float32, [0.5]),
        "top_k": (0, np.int32, [0]),
        "top_p": (1, np.float32, [1.0]),
        "min_p": (0.25, np.float32, [0.25]),
        "repetition_penalty": (1.5, np.float32, [1.5]),
        "seed": (-(2**40), np.int64, [-(2**40)]),
        "stop": (("끝", "\n"), np.object_, ["끝".encode(), b"\n"]),
        "stop_token_ids": ([3, 4], np.int32, [3, 4]),
        "n": (2, np.int32, [2]),
        "logprobs": (False, np.bool_, [False]),
        "ignore_eos": (True, np.bool_, [True]),
    }
    own = {"model", "precision", "priority", "request_id", "timeout", "system"}
    assert given.keys() == GenerateOptions.__annotations__.keys() - own
    call("generate", "a", **{name: value for name, (value, _, _) in given.items()})
    inputs = server.requests[0].inputs
    for name, (_, dtype, values) in given.items():
        assert (inputs[name].dtype, inputs[name].tolist()) == (np.dtype(dtype), values), name
    call("generate", "a", stop="one", temperature=None)
    assert server.requests[-1].inputs["stop"].tolist() == [b"one"]
    assert "temperature" not in server.requests[-1].inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1 up, not 0"),
        ({"max_tokens": -3}, "max_tokens .* not -3"),
        ({"max_tokens": 1.0}, r"max_tokens .* not 1\.0"),
        ({"max_tokens": True}, "max_tokens .* not True"),
        ({"max_tokens": 2**31}, "max_tokens .* not 2147483648"),
        ({"temperature": float("nan")}, "temperature must be a number of at least 0, not nan"),
        ({"temperature": float("inf")}, "temperature .* not inf"),
        ({"temperature": -0.1}, r"temperature .* not -0\.1"),
        ({"temperature": "hot"}, "temperature .* not 'hot'"),
        ({"temperature": 1e39}, r"temperature .* not 1e\+39"),
        ({"repetition_penalty": 10**400}, "repetition_penalty .* not 10000"),
        ({"top_k": -1}, "top_k must be a whole number from 0 up, not -1"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1, not 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, not 0"),
        ({"seed": 2**63}, "seed must be a whole number of 64 bits"),
        ({"stop": ""}, "stop 0 is empty"),
        ({"stop": ["a", 3]}, "stop 1 must be str, not int"),
        ({"stop": 5}, "stop must be a str or a list of str, not int"),
        ({"stop": ["\ud800"]}, "stop 0 has a lone surrogate"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must hold token ids from 0 up, not -1"),
        ({"stop_token_ids": "12"}, "stop_token_ids must be a list"),
        ({"n": 0}, "n must be"),
        ({"logprobs": 1}, "logprobs must be True or False, not 1"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"system": ""}, "system is empty"),
        ({"timeout": 0}, "timeout must be"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream", "chat"])
def test_bad_parameters_are_refused_before_anything_is_sent(
    call: Any, server: Any, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(method, "a", **options)
    assert not server.requests


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("", "content of message 0 is empty"),
        (3, "must be a str or a list, not int"),
        (["hello"], "message 0 must be a dict of role and content, not str"),
        ([USER, {"role": "user"}], "message 1 has no content"),
        ([{**USER, "name": "x"}], "message 0 has an unknown field 'name'"),
        ([{"role": "wizard", "content": "x"}], "message 0 has role 'wizard'; known: system, user, assistant"),
        ([{"role": "user", "content": 3}], "content of message 0 must be str, not int"),
        ([{"role": "user", "content": "a\udcff"}], "content of message 0 has a lone surrogate"),
        ([SYSTEM, SYSTEM, USER], "2 system messages, one is allowed"),
    ],
)
@pytest.mark.parametrize("method", ["chat", "chat_stream"])
def test_bad_conversations_are_refused(
    call: Any, server: Any, method: str, messages: Any, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(method, messages)
    assert not server.requests


def test_a_system_prompt_comes_first_and_only_once(call: Any, server: Any) -> None:
    call("chat", [USER], system="be brief")
    call("generate", ["hello", "hello"], system="be brief")
    call("chat", "hello", system="be brief")
    assert {request.inputs["messages"][0] for request in server.requests} == {
        json.dumps([SYSTEM, USER]).encode()
    }
    call("generate", "hello", chat=True)
    assert json.loads(server.requests[-1].inputs["messages"][0]) == [USER]
    with pytest.raises(InvalidInput, match=r"2 system messages, one is allowed \(`system` counts as one\)"):
        call("chat", [SYSTEM, USER], system="be long")


@pytest.mark.parametrize("prompt", ["", "  ", b"bytes", 3, ["a", ""], "a\ud800"])
def test_bad_prompts_are_refused(call: Any, server: Any, prompt: Any) -> None:
    with pytest.raises(InvalidInput, match="prompt"):
        call("generate", prompt)
    assert not server.requests


def test_an_unknown_option_names_the_known_ones(call: Any) -> None:
    with pytest.raises(TypeError, match=r"unknown option max_token; known: .*max_tokens"):
        call("generate", "a", max_token=3)
    with pytest.raises(TypeError, match="unknown option chat"):
        call("chat", "a", chat=True)


def test_a_model_for_another_task_is_refused(call: Any, server: Any) -> None:
    with pytest.raises(InvalidInput, match="task is embed, not generate"):
        call("generate", "a", model="embedder")
    with pytest.raises(InvalidInput, match="task is generate, not embed"):
        call("embed", "a", model="writer")
    server.configs["other"] = fake_llm.config("other")
    with pytest.raises(UnknownModel, match="several models generate: other, writer"):
        call("stream", "a")


def test_overload_is_tried_again_until_a_piece_has_come(call: Any, server: Any) -> None:
    server.scripts += [[QueueFull("full")], [QueueFull("full")]]
    assert call("generate", "a").text == TEXT
    server.scripts += [[QueueFull("full")], [ConnectionLost("gone")]]
    assert call("stream", "a")[1].text == TEXT
    assert len(server.requests) == 6
    begun = fake_llm.responses(server.requests[-1])[:2]
    server.scripts.append([*begun, ConnectionLost("gone")])
    with pytest.raises(ConnectionLost):
        call("stream", "a")
    assert len(server.requests) == 7


def test_a_stream_that_ends_early_is_no_answer(call: Any, server: Any) -> None:
    whole = fake_llm.responses(type("R", (), {"inputs": {"stream": np.array([True])}})())
    server.scripts.append(whole[:3])
    with pytest.raises(UnexpectedAnswer, match="ended before the answer did"):
        call("stream", "a", request_id="r7")
    server.scripts.append([])
    with pytest.raises(UnexpectedAnswer, match="without an answer"):
        call("generate", "a")


@pytest.mark.parametrize(
    "change",
    [
        {"token_counts": np.array([4], np.int32)},
        {"usage": np.array([b""], object)},
        {"usage": np.array([b'{"prompt_tokens": 1}'], object)},
        {"usage": np.array([b"{"], object)},
        {"finish_reason": np.array([b""], object)},
        {"logprobs": np.zeros(2, np.float32)},
        {"text": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_answer_that_breaks_the_promise_is_an_error(call: Any, server: Any, change: Any) -> None:
    outputs = arrays([TEXT], [0], [5], logprobs=True, reasons=["stop"], usage=USAGE) | change
    server.scripts.append([{name: value for name, value in outputs.items() if value is not None}])
    with pytest.raises(UnexpectedAnswer) as caught:
        call("generate", "a", logprobs=True, request_id="r7")
    assert caught.value.request_id == "r7"


def test_leaving_a_stream_early_ends_it_at_the_server(server: Any, transport: Any, clock: Any) -> None:
    async def leave() -> Any:
        async with AsyncClient(transport=server, clock=clock) as client, client.stream("a") as stream:
            async for _ in stream:
                break
        assert [delta async for delta in stream] == []
        return stream

    if server is transport:
        with Client(transport=server, clock=clock) as client, client.stream("a") as stream:
            next(stream)
        assert [*stream] == []
    else:
        stream = asyncio.run(leave())
    assert server.streams[0].closed
    assert stream.text == WORDS[0]
    assert stream.generation.finish_reason is None


def test_another_thread_may_end_a_stream(transport: Any, clock: Any) -> None:
    transport.configs["writer"] = fake_llm.config("writer")
    transport.scripts.append(["hang"])
    with Client(transport=transport, clock=clock) as client:
        stream = client.stream("a")
        threading.Thread(
            target=lambda: (transport.streams[0].waiting.wait(5), stream.close()), daemon=True
        ).start()
        assert [*stream] == []


def test_a_failure_behind_the_whole_answer_is_none(call: Any, server: Any) -> None:
    whole = fake_llm.responses(type("R", (), {"inputs": {"stream": [True]}})())
    server.scripts.append([*whole, ConnectionLost("the connection broke")])
    pieces, stream = call("stream", "a")
    assert "".join(piece.text for piece in pieces) == TEXT
    assert stream.generation.usage
    assert len(server.streams) == 1


def test_a_stream_closed_before_its_next_attempt_is_not_sent_again(
    transport: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.configs["writer"] = fake_llm.config("writer")
    transport.scripts.append([QueueFull("full")])
    with Client(transport=transport, clock=clock) as client:
        stream = client.stream("a")
        monkeypatch.setattr(clock, "sleep", lambda seconds: stream.close())
        assert [*stream] == []
    assert len(transport.streams) == 1


def test_a_stream_closed_before_its_request_left_does_not_run(
    async_transport: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async_transport.configs["writer"] = fake_llm.config("writer")
    answer = async_transport.ask

    async def leave() -> None:
        resolving, closed = asyncio.Event(), asyncio.Event()

        async def ask(question: str, model: str, timeout: float) -> Any:
            resolving.set()
            await closed.wait()
            return await answer(question, model, timeout)

        monkeypatch.setattr(async_transport, "ask", ask)
        async with AsyncClient(transport=async_transport, clock=clock) as client:
            stream = client.stream("a")
            reading = asyncio.create_task(stream.result())
            await resolving.wait()
            await stream.close()
            closed.set()
            assert (await reading).token_ids == ()

    asyncio.run(leave())
    assert all(stream.closed for stream in async_transport.streams)


def test_the_first_failure_of_a_list_ends_the_others(transport: Any, clock: Any) -> None:
    transport.configs["writer"] = fake_llm.config("writer")

    def script(request: Any, timeout: float) -> list[Any]:
        transport.requests.append(request)
        if request.inputs["text"][0] != b"bad":
            return ["hang"]
        for stream in transport.streams:
            stream.waiting.wait(5)
        return [InvalidInput("the prompt is too long")]

    transport.script_of = script
    start = time.perf_counter()
    with (
        Client(transport=transport, clock=clock) as client,
        pytest.raises(InvalidInput, match=r"too long \[prompt 2 of the list\]"),
    ):
        client.generate(["a", "b", "bad", *["more"] * 40])
    assert time.perf_counter() - start < 5
    assert all(stream.closed for stream in transport.streams)
    assert len(transport.requests) < 43  # those that waited for a thread never left


def test_the_timeout_is_the_calls_or_a_pieces(call: Any, server: Any) -> None:
    server.scripts.append([QueueFull("full")])
    call("generate", "a", timeout=5)
    assert server.timeouts[0] == 5
    assert server.timeouts[1] < 5  # what the first attempt and the wait left
    server.scripts.append([QueueFull("full")])
    call("stream", "a", timeout=5)
    assert server.timeouts[2:] == [5, 5]


def test_a_failure_names_model_and_request(call: Any, server: Any) -> None:
    server.scripts += [[ServerFault("the engine failed")]] * 2
    for method in ("generate", "stream"):
        with pytest.raises(ClientError) as caught:
            call(method, "a", request_id="r9")
        assert (caught.value.model, caught.value.request_id) == ("writer", "r9")
