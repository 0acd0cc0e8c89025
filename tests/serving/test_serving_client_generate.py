"""The client against a real server that generates: every transport, conversations, errors, the bench."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_llm import POSITIONS, quiet
from small_models import Served

from client import (
    AsyncClient,
    Client,
    ClientError,
    InvalidInput,
    QueueFull,
    QueueTimeout,
    RetryPolicy,
)
from client.bench import generate_command
from client.bench.generate_baseline import Speed
from client.bench.generate_data import read_generators
from client.cli import main

pytestmark = pytest.mark.serving

LONG = {"max_tokens": 6000, "ignore_eos": True}
SAMPLED = {"temperature": 1.0, "seed": 7, "max_tokens": 40, "ignore_eos": True}


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, talking: Served) -> str:
    return f"{request.param}://{talking.server.urls[request.param]}"


@pytest.fixture(params=["sync", "asyncio"])
def call(request: pytest.FixtureRequest, url: str) -> Callable[..., Any]:
    """One call by a client of its own; a stream is read to its end and gives its pieces and its answer."""

    def do(method: str, *arguments: Any, **options: Any) -> Any:
        options.setdefault("model", "talk")
        retry = RetryPolicy(attempts=1)
        if request.param == "sync":
            with Client(url, retry=retry) as client:
                result = getattr(client, method)(*arguments, **options)
                return ([*result], result.generation) if "stream" in method else result

        async def go() -> Any:
            async with AsyncClient(url, retry=retry) as client:
                if "stream" not in method:
                    return await getattr(client, method)(*arguments, **options)
                stream = getattr(client, method)(*arguments, **options)
                return [delta async for delta in stream], stream.generation

        return asyncio.run(go())

    return do


def test_streamed_whole_and_listed_answers_are_the_same(call: Any) -> None:
    prompts = ["국수가 정말", "the noodles", "배송이 👩‍🍳 느려요"]
    listed = call("generate", prompts, logprobs=True, **SAMPLED)
    for prompt, expected in zip(prompts, listed, strict=True):
        deltas, streamed = call("stream", prompt, logprobs=True, **SAMPLED)
        assert (streamed.text, streamed.token_ids) == (expected.text, expected.token_ids)
        assert streamed.logprobs == pytest.approx(expected.logprobs, abs=1e-3)  # others in the batch show
        assert "".join(delta.text for delta in deltas) == expected.text
        assert len(expected.token_ids) == len(expected.logprobs) == streamed.usage.completion_tokens == 40
        assert expected.finish_reason == "length"
    several = call("generate", "the noodles", n=3, **SAMPLED)
    assert several.samples[0].text == listed[1].text
    assert len({sample.token_ids for sample in several.samples}) == 3


def test_a_conversation_prefills_its_new_turn_alone(call: Any) -> None:
    # The number of characters makes this conversation's beginning one that no other test leaves behind.
    turns = [{"role": "user", "content": f"{id(call)} 국수가 정말 맛있어요"}]
    first = call("chat", turns, system="the noodles", max_tokens=8, ignore_eos=True)
    turns += [{"role": "assistant", "content": first.text or "."}, {"role": "user", "content": "a"}]
    _, second = call("chat_stream", turns, system="the noodles", max_tokens=8)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "x" * 10_000}, "10000 characters"),
        ({"n": 99}, "'n' is 99; this model has 4 slots"),
        ({"stop_token_ids": range(1000)}, "1000 ids"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "chat_stream"])
def test_what_the_server_refuses_keeps_its_reason(call: Any, method: str, options: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(method, "a", **options)


def test_a_prompt_longer_than_a_slot_is_named_with_both_lengths(call: Any) -> None:
    with pytest.raises(InvalidInput, match=f"tokens.*holds {POSITIONS}"):
        call("generate", "국수가 정말 " * POSITIONS)


def test_leaving_a_stream_frees_its_slot(url: str, talking: Served) -> None:
    with Client(url) as client:
        for _ in range(8):  # twice the slots: the second half would wait for ever
            with client.stream("a", model="talk", timeout=20, **LONG) as stream:
                next(stream)

    async def go() -> None:
        async with AsyncClient(url) as client:
            for _ in range(8):
                async with client.stream("a", model="talk", timeout=20, **LONG) as stream:
                    await anext(stream)

    asyncio.run(go())
    assert quiet(talking.server.urls["metrics"], "talk")["slots_active"] == 0


def test_a_full_queue_and_a_wait_too_long_are_told_apart(url: str) -> None:
    """Model tight: one slot, one may wait, for 300 ms."""
    seen: list[ClientError] = []

    def one() -> None:
        try:
            client.generate("a", model="tight", max_tokens=1)
        except ClientError as error:
            seen.append(error)

    with Client(url, retry=RetryPolicy(attempts=1)) as client:
        with client.stream("a", model="tight", max_tokens=2000, ignore_eos=True) as stream:
            next(stream)
            threads = [threading.Thread(target=one) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert {type(error) for error in seen} <= {QueueFull, QueueTimeout}
        assert QueueFull in {type(error) for error in seen}


def test_the_command_line_talks_and_shows_slots(talking: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_URL_GRPC", talking.server.urls["grpc"])
    monkeypatch.setenv("ONECARD_URL_METRICS", talking.server.urls["metrics"])
    run = CliRunner().invoke
    talk = run(main, ["chat", "--model", "talk", "--max-tokens", "5"], input="안녕\nmore\n")
    assert talk.exit_code == 0, talk.output
    assert talk.stderr.count("first after") == 2
    answer = run(main, ["query", "generate", "--model", "talk", "the noodles", "--max-tokens", "4", "--json"])
    assert '"finish_reason": "length"' in answer.stdout
    status = run(main, ["status"])
    assert "slots busy" in status.stdout
    assert "/4 " in status.stdout  # how many are busy is up to a second old


class NoBaseline:
    """Speeds, texts and bandwidth without torch, which has tests of its own."""

    def measure(self, *_: Any) -> Speed:
        return Speed({str(size): {"tokens_per_s": 9.0, "first_token_ms": 9.0} for size in (1, 4, 8)}, 1.0)

    def texts(self, model: Any, wanted: Any) -> list[list[str]]:
        return [[f"{place} " + "a " * (tokens // 3) for place in range(count)] for tokens, count in wanted]

    def read_bandwidth(self, *_: Any) -> float:
        return 1e9

    def weight_bytes(self, *_: Any) -> int:
        return 10**6


def test_the_bench_measures_every_point(talking: Served) -> None:
    [model] = [
        found for found in read_generators(Path(talking.folder) / "stack.json") if found.name == "talk"
    ]
    plan = replace(generate_command.QUICK, seconds=0.15, warm_up=0.05, repeats=1, new_tokens=8)
    plan = replace(plan, prompt_tokens=24, pool=8)
    found = generate_command.measure(model, NoBaseline(), plan, talking.server.urls["grpc"], (), print)  # type: ignore[arg-type]
    assert [*found["served"]["fp32"]] == ["1", "4", "8", "16"]
    assert all(point["tokens_per_s"] > 0 for point in found["served"]["fp32"].values())
    assert [*found["open_loop"]["fp32"]] == ["50", "80"]
    assert [*found["steady_tokens_per_s"]["fp32"]] == ["1", "4"]  # it has four slots
    assert found["first_token_beside_streams"]["fp32"]["streams"] == 3
    assert found["pause_for_long_prompt"]["fp32"]["longest_ms"] > 0
    assert len(found["conversation"]["fp32"]["turns"]) == 8
    assert found["conversation"]["fp32"]["only_new_prefilled"]
    assert found["roofline"]["fp32"]["by_streams"]["1"]["share"] > 0
    assert found["prompts"]["tokens_mean"] > 8
    assert found["served"]["fp32"]["1"]["cached_prompt_share"] < 0.5
