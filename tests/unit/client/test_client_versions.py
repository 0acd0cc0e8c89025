"""All answers of one call are of one version, whatever a rollout does between its parts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import fake_llm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import AsyncClient, Client, UnexpectedAnswer
from client.codec import InferReply, InferRequest
from client.flows import VERSION_ROUNDS, InferAll, one_version


def requests(count: int) -> tuple[InferRequest, ...]:
    return tuple(
        InferRequest(model="m", inputs={}, outputs=(), request_id=f"r/{place}") for place in range(count)
    )


def play(count: int, versions: Iterator[str]) -> tuple[list[InferReply], list[int]]:
    """The replies of a call in `count` parts that `versions` answer, and the size of each round."""
    rounds = []

    def infer(some: tuple[InferRequest, ...]) -> Any:
        return (yield InferAll(some))

    flow = one_version(requests(count), infer)
    effect = next(flow)
    try:
        while True:
            rounds.append(len(effect.requests))
            replies = [InferReply("m", r.request_id, {}, next(versions)) for r in effect.requests]
            effect = flow.send(replies)
    except StopIteration as stop:
        return stop.value, rounds


@given(
    count=st.integers(1, 12),
    switches=st.lists(st.integers(0, 30), max_size=3),
    names=st.permutations(["3", "9", "10", "11"]),
)
def test_replies_are_of_one_version_and_in_order(count: int, switches: list[int], names: list[str]) -> None:
    """A server that switches versions at some moments, up or down, answers a call of some parts."""

    def served() -> Iterator[str]:
        for moment in itertools.count():
            yield names[sum(moment >= switch for switch in switches)]

    replies, rounds = play(count, served())
    assert len({reply.version for reply in replies}) == 1
    assert [reply.request_id for reply in replies] == [request.request_id for request in requests(count)]
    assert len(rounds) <= VERSION_ROUNDS + 1


def test_only_the_older_parts_are_asked_for_again() -> None:
    replies, rounds = play(5, iter(["9", "9", "10", "10", "10", "10", "10"]))
    assert rounds == [5, 2]
    assert {reply.version for reply in replies} == {"10"}


def test_after_a_rollback_the_lower_version_counts() -> None:
    replies, rounds = play(3, iter(["2", "2", "1", "1", "1", "1"]))
    assert {reply.version for reply in replies} == {"1"}
    assert rounds == [3, 1, 2]


def test_a_server_that_never_settles_is_an_error() -> None:
    with pytest.raises(UnexpectedAnswer, match="again and again"):
        play(4, itertools.cycle(["1", "2"]))


@pytest.fixture(params=["sync", "asyncio"])
def both(request: pytest.FixtureRequest, transport: Any, async_transport: Any, clock: Any) -> Any:
    server = transport if request.param == "sync" else async_transport
    server.configs["writer"] = fake_llm.config("writer")

    def call(method: str, *arguments: Any, **options: Any) -> Any:
        if server is transport:
            with Client(transport=server, clock=clock) as client:
                return getattr(client, method)(*arguments, **options)

        async def go() -> Any:
            async with AsyncClient(transport=server, clock=clock) as client:
                return await getattr(client, method)(*arguments, **options)

        return asyncio.run(go())

    return server, call


@pytest.mark.parametrize("method", ["classify", "embed"])
def test_a_list_that_meets_a_rollout_is_answered_by_the_new_version(both: Any, method: str) -> None:
    server, call = both
    texts = [f"good {place}" for place in range(12)]  # three requests
    server.versions = iter(["1", "2", "2", "2"])
    assert len(call(method, texts, request_id="r")) == 12
    again = server.requests[-1]
    assert len(server.requests) == 4
    assert again.request_id in ("r/0", "r/1", "r/2")
    old = [request for request in server.requests[:3] if request.request_id == again.request_id]
    np.testing.assert_array_equal(old[0].inputs["text"], again.inputs["text"])


def test_a_ranking_too(both: Any) -> None:
    server, call = both
    server.versions = iter(["1", "2", "2"])
    assert len(call("rerank", "query", ["x" * n for n in range(1, 9)])) == 8
    assert len(server.requests) == 3


def test_one_request_is_never_asked_for_again(both: Any) -> None:
    server, call = both
    server.versions = iter(["1"])
    call("embed", "a")
    assert len(server.requests) == 1
