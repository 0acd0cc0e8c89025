"""Retries happen only where they are safe and never outlive the caller's deadline."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

import pytest

from client import (
    AsyncClient,
    Client,
    ConnectionLost,
    DeadlineExceeded,
    InvalidInput,
    QueueFull,
    QueueTimeout,
    RetryPolicy,
    ServerFault,
    Unreachable,
)
from client.codec import InferRequest
from client.errors import ClientError
from client.retry import Attempts

POLICY = RetryPolicy(attempts=4, initial=0.1, multiplier=2, maximum=0.3, jitter=0)


@pytest.mark.parametrize("error", [Unreachable, ConnectionLost, QueueFull, QueueTimeout])
def test_transient_failures_are_tried_again(transport: Any, clock: Any, error: type[ClientError]) -> None:
    transport.script = [error("once"), error("twice"), error("thrice")]
    with Client(transport=transport, clock=clock, retry=POLICY) as client:
        assert client.classify("good").label == "positive"
    assert clock.waits == pytest.approx([0.1, 0.2, 0.3])  # doubling, then the maximum


@pytest.mark.parametrize("error", [DeadlineExceeded, InvalidInput, ServerFault])
def test_other_failures_are_not(transport: Any, clock: Any, error: type[ClientError]) -> None:
    transport.script = [error("no")]
    with Client(transport=transport, clock=clock, retry=POLICY) as client, pytest.raises(error):
        client.classify("good")
    assert len(transport.requests) == 1
    assert clock.waits == []


def test_attempts_are_limited_and_the_last_error_is_raised(transport: Any, clock: Any) -> None:
    transport.script = [QueueFull(f"failure {n}") for n in range(9)]
    with Client(transport=transport, clock=clock, retry=POLICY) as client, pytest.raises(QueueFull) as caught:
        client.classify("good", request_id="r1")
    assert len(transport.requests) == 4
    assert str(caught.value) == "failure 3 (model sentiment, request r1)"


def test_the_deadline_covers_all_attempts(transport: Any, clock: Any) -> None:
    transport.script = [QueueFull("full")] * 9
    policy = RetryPolicy(attempts=9, initial=1, multiplier=1, jitter=0)
    with Client(transport=transport, clock=clock, retry=policy) as client, pytest.raises(QueueFull):
        client.classify("good", timeout=2.5)
    assert clock.waits == [1, 1]  # a third wait would end after the deadline
    assert transport.timeouts == pytest.approx([2.5, 1.5, 0.5])


def test_a_request_that_is_not_idempotent_is_not_sent_twice(clock: Any) -> None:
    attempts = Attempts(POLICY, clock, clock.now() + 60)
    with pytest.raises(ConnectionLost):
        attempts.wait_after(ConnectionLost("broke"), idempotent=False)
    assert Attempts(POLICY, clock, clock.now() + 60).wait_after(Unreachable("no"), idempotent=False) > 0
    assert InferRequest(model="m", inputs={}, outputs=(), request_id="r").idempotent


def test_no_time_left_is_a_deadline_and_nothing_is_sent(clock: Any) -> None:
    with pytest.raises(DeadlineExceeded):
        Attempts(POLICY, clock, clock.now()).begin()


def test_jitter_shortens_waits_by_at_most_its_share() -> None:
    policy = RetryPolicy(initial=1, jitter=0.5)
    assert policy.wait(1, 0.0) == 1
    assert policy.wait(1, 0.999) == pytest.approx(0.5, abs=0.01)
    assert policy.wait(50, 0.0) == policy.maximum


def test_a_client_that_is_turned_away_does_not_add_to_the_load(transport: Any, clock: Any) -> None:
    """Of 50 calls only the first ones are tried again; answers give the right back."""
    transport.script = [QueueFull("full")] * 200
    with Client(transport=transport, clock=clock, retry=POLICY) as client:

        def tries() -> int:
            before = len(transport.requests)
            with contextlib.suppress(QueueFull):
                client.classify("good", model="sentiment")
            return len(transport.requests) - before

        assert [tries() for _ in range(50)] == [4, 4, 2, *[1] * 47]
        transport.script = []
        assert [tries() for _ in range(150)] == [1] * 150
        transport.script = [QueueFull("full")] * 200
        assert tries() == 4


def test_without_a_budget_it_goes_on(transport: Any, clock: Any) -> None:
    transport.script = [QueueFull("full")] * 100
    policy = RetryPolicy(attempts=200, initial=0.01, maximum=0.01, budget=math.inf)
    with Client(transport=transport, clock=clock, retry=policy) as client:
        client.classify("good")
    assert len(transport.requests) == 101


def test_a_server_that_is_away_costs_no_budget(transport: Any, clock: Any) -> None:
    transport.script = [Unreachable("no")] * 100
    policy = RetryPolicy(attempts=200, initial=0.01, maximum=0.01)
    with Client(transport=transport, clock=clock, retry=policy) as client:
        client.classify("good")
    assert len(transport.requests) == 101


@pytest.mark.parametrize(
    "settings", [{"attempts": 0}, {"jitter": 1.5}, {"multiplier": 0.5}, {"initial": -1}, {"budget": 0}]
)
def test_impossible_policies_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a retry policy"):
        RetryPolicy(**settings)


def test_asyncio_retries_alike(async_transport: Any, clock: Any) -> None:
    async_transport.script = [QueueFull("full"), Unreachable("gone")]

    async def go() -> str:
        async with AsyncClient(transport=async_transport, clock=clock, retry=POLICY) as client:
            return (await client.classify("good")).label

    assert asyncio.run(go()) == "positive"
    assert clock.waits == pytest.approx([0.1, 0.2])
