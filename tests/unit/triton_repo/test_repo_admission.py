"""The queue against a plain model of it, and what it predicts against what then happens."""

from __future__ import annotations

import contextlib
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from triton_repo.runtime.admission import (
    _UNSEEN_SHARE,
    _WAIT_SHARE,
    AdmissionQueue,
    Busy,
    Limits,
    _Rate,
    read_level,
    read_timeout,
)
from triton_repo.runtime.texts import BadRequest


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Queueing(RuleBasedStateMachine):
    """A queue that never learns how fast it is: only its size, its priorities and its clock decide."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.limits = Limits(max_size=5, deadline_s=10.0, levels=3, default_level=2)
        self.queue: AdmissionQueue[int] = AdmissionQueue(self.limits, self.clock)
        self.waiting: list[tuple[int, int, float]] = []  # level, number, until when
        self.number = 0

    def first(self) -> tuple[int, int, float]:
        return min(self.waiting)

    @rule(level=st.integers(0, 5), timeout=st.sampled_from([math.inf, 0.5, 3.0]), room=st.integers(0, 2))
    def offer(self, level: int, timeout: float, room: int) -> None:
        self.number += 1
        place = min(level or 2, 3)
        full = len(self.waiting) >= self.limits.max_size + room
        least = max((entry[0] for entry in self.waiting), default=0)
        offered: dict[str, Any] = {"level": level, "timeout_s": timeout, "room": room}
        if full and least <= place:
            for attempt in (self.queue.check, lambda **fields: self.queue.offer(self.number, **fields)):
                with pytest.raises(Busy, match="the queue is full") as caught:
                    attempt(**offered)
                assert caught.value.reason == "queue_full"
            return
        self.queue.check(**offered)
        displaced = self.queue.offer(self.number, **offered)
        youngest = max(self.waiting) if full else None
        assert displaced == (youngest[1] if youngest else None)
        if youngest:
            self.waiting.remove(youngest)
        until = self.clock.now + (1 - _UNSEEN_SHARE) * min(10.0, timeout)
        self.waiting.append((place, self.number, until))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def discard(self, data: Any) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(gone)
        self.queue.discard(gone[1])
        self.queue.discard(gone[1])

    @rule(seconds=st.sampled_from([0.1, 0.5, 4.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        # Nothing is learned, so no time is kept for being served.
        late = {entry for entry in self.waiting if entry[2] <= self.clock.now}
        assert set(self.queue.expired()) == {entry[1] for entry in late}
        self.waiting = [entry for entry in self.waiting if entry not in late]

    @rule(most=st.integers(1, 4), refused=st.integers(0, 60))
    def take(self, most: int, refused: int) -> None:
        """In the order of urgency and arrival; nobody overtakes one that does not fit."""
        taken = self.queue.take(lambda item: item != refused, most=most)
        expected = []
        while self.waiting and len(expected) < most and self.first()[1] != refused:
            expected.append(self.first()[1])
            self.waiting.remove(self.first())
        assert taken == expected
        self.queue._rate = _Rate(3)

    @invariant()
    def same_size(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert self.queue.soonest <= min((entry[2] for entry in self.waiting), default=math.inf)
        for place, work in enumerate(self.queue._work, start=1):
            assert work == pytest.approx(sum(entry[0] == place for entry in self.waiting))


TestQueueing = Queueing.TestCase


def busy(clock: Clock, queue: AdmissionQueue[Any], *, seconds: float, batch: int) -> None:
    """Somebody has been waiting for a while, and `batch` requests were taken every `seconds`."""
    for _ in range(8 * batch):
        queue.offer(object())
    for _ in range(7):
        queue.take(lambda item: True, most=batch)
        clock.now += seconds


def fill(queue: AdmissionQueue[Any], level: int = 0) -> Busy:
    """Offer until one is rejected."""
    for _ in range(10_000):
        try:
            queue.offer(object(), level=level)
        except Busy as error:
            return error
    raise AssertionError("it takes everything")


def test_nothing_is_predicted_before_anyone_has_waited() -> None:
    clock = Clock()
    queue: AdmissionQueue[Any] = AdmissionQueue(Limits(deadline_s=0.001), clock)
    for _ in range(10):
        queue.offer(object())
        clock.now += 1.0
        queue.expired()
        queue.take(lambda item: True)
    queue.offer(object(), work=1e9)


def test_a_slow_start_rejects_nobody() -> None:
    """The warm-up took a thousand times as long as what comes now."""
    clock = Clock()
    queue: AdmissionQueue[Any] = AdmissionQueue(Limits(deadline_s=10.0), clock)
    queue.offer("warm-up")
    queue.take(lambda item: True)
    clock.now += 1.5
    queue.served(1, 1.5)
    for _ in range(32):
        queue.offer(object())
    for _ in range(200):
        queue.take(lambda item: True, most=4)
        clock.now += 0.006
        for _ in range(4):
            queue.offer(object())
    assert queue.seconds_for(1) == pytest.approx(0.0015, rel=0.1)


@pytest.mark.parametrize("deadline", [1.0, 2.0, 5.0])
def test_what_cannot_be_answered_in_time_is_rejected_when_it_arrives(deadline: float) -> None:
    """64 requests in 0.2 s: 320 a second, so about deadline * 320 may wait, less the margin."""
    clock = Clock()
    queue: AdmissionQueue[Any] = AdmissionQueue(Limits(max_size=100_000, deadline_s=deadline), clock)
    busy(clock, queue, seconds=0.2, batch=64)
    error = fill(queue)
    assert (error.reason, str(error)[:24]) == ("deadline", "the wait is too long: ab")
    assert 0.5 * deadline * 320 < len(queue) < deadline * 320


def test_an_urgent_request_waits_for_urgent_ones_only() -> None:
    clock = Clock()
    queue: AdmissionQueue[Any] = AdmissionQueue(Limits(max_size=100_000, deadline_s=1.0), clock)
    busy(clock, queue, seconds=0.2, batch=64)
    fill(queue, level=3)
    urgent = [object() for _ in range(64)]
    for item in urgent:
        queue.offer(item, level=1)
    assert queue.take(lambda item: True, most=64) == urgent


def test_who_is_less_urgent_counts_on_more_urgent_ones_to_come() -> None:
    """Half of what was taken lately was urgent: what waits behind it takes twice as long."""
    queues = []
    for level in (2, 1):
        clock = Clock()
        queue: AdmissionQueue[Any] = AdmissionQueue(Limits(max_size=100_000, deadline_s=10.0), clock)
        for _ in range(20):
            queue.offer(object())
        for _ in range(10):
            for _ in range(5):
                queue.offer(object())
                queue.offer(object(), level=level)
            queue.take(lambda item: True, most=10)
            clock.now += 0.1
        fill(queue)
        queues.append(len(queue))
    assert 0.4 * queues[0] < queues[1] < 0.65 * queues[0]


def test_a_batch_takes_no_longer_than_it_may() -> None:
    clock = Clock()
    queue: AdmissionQueue[Any] = AdmissionQueue(Limits(), clock)
    busy(clock, queue, seconds=0.1, batch=10)
    assert len(queue.take(lambda item: True, seconds=0.045)) == 4
    queue.offer("large", work=50, level=1)
    assert queue.take(lambda item: True, seconds=0.045) == ["large"]


def test_a_request_s_own_timeout_is_its_deadline() -> None:
    clock = Clock()
    queue: AdmissionQueue[Any] = AdmissionQueue(Limits(deadline_s=60.0), clock)
    busy(clock, queue, seconds=1.0, batch=1)
    queue.offer(object(), timeout_s=30.0)
    with pytest.raises(Busy, match="1000 ms after arrival"):
        queue.offer(object(), timeout_s=1.0)


def test_time_before_the_queue_is_time_of_the_deadline() -> None:
    clock = Clock()
    queue: AdmissionQueue[str] = AdmissionQueue(Limits(deadline_s=10.0), clock)
    with pytest.raises(Busy, match="about 6500 ms, and the deadline is 10000 ms after arrival"):
        queue.offer("late", arrived=clock.now - 6.5)
    queue.offer("in time", arrived=clock.now - 5.0)
    queue.offer("slots are free", arrived=clock.now - 8.0, room=2)
    clock.now += 3.0
    assert queue.expired() == ["slots are free"]
    clock.now += 1.0
    assert queue.expired() == ["in time"]


def test_a_model_that_stalls_turns_requests_away() -> None:
    """The rate was learned in better times; what is late says more."""
    clock = Clock()
    queue: AdmissionQueue[Any] = AdmissionQueue(Limits(deadline_s=10.0), clock)
    busy(clock, queue, seconds=0.05, batch=1)
    queue.offer("soon")
    queue.take(lambda item: True, most=1)
    clock.now += 9.0
    with pytest.raises(Busy, match="the wait is too long"):
        queue.offer("late")


def test_the_last_interval_of_a_backlog_counts_too() -> None:
    clock = Clock()
    queue: AdmissionQueue[Any] = AdmissionQueue(Limits(), clock)
    for _ in range(4):
        queue.offer("first")
        queue.offer("second")
        assert queue.take(lambda item: True, most=1) == ["first"]
        clock.now += 0.5
        assert queue.take(lambda item: True, most=1) == ["second"]
    assert queue.seconds_for(1) == pytest.approx(0.5)


@settings(max_examples=100, deadline=None)
@given(service=st.floats(0.01, 20), slots=st.integers(1, 8), data=st.data())
def test_one_at_a_time_waits_and_who_cannot_make_it_is_rejected_on_arrival(
    service: float, slots: int, data: Any
) -> None:
    """An LLM whose slots are taken, and never more than one request behind them: none is there at a take."""
    clock = Clock()
    interval = service / slots
    queue: AdmissionQueue[Any] = AdmissionQueue(Limits(deadline_s=1e6), clock, slots=slots)
    for _ in range(8):
        before = data.draw(st.floats(0.0, 1.0)) * interval
        clock.now += before
        queue.offer("next")
        clock.now += interval - before
        queue.served(1, service)
        assert queue.take(lambda item: True, most=1) == ["next"]
    assert queue.seconds_for(1) == pytest.approx(interval)
    # The slot is free in one interval; who comes behind that one waits for two.
    for ahead in (1, 2, 3):
        with pytest.raises(Busy, match="the wait is too long"):
            queue.check(timeout_s=0.99 * ahead * interval / _WAIT_SHARE)
        queue.offer("waits", timeout_s=1.01 * ahead * interval / _WAIT_SHARE)
        queue.offer(object())
        queue.discard("waits")


def test_who_waits_behind_long_answers_is_not_rejected_for_how_long_nobody_came() -> None:
    clock = Clock()
    queue: AdmissionQueue[Any] = AdmissionQueue(Limits(deadline_s=10.0), clock, slots=1)
    for _ in range(5):
        queue.offer("short")
        queue.take(lambda item: True)
        clock.now += 0.1
        queue.served(1, 0.1)
    queue.offer("long")
    queue.take(lambda item: True)
    clock.now += 60.0
    queue.offer("first")
    clock.now += 7.0
    with pytest.raises(Busy, match="the wait is too long"):
        queue.offer("second")


@settings(max_examples=40, deadline=None)
@given(rate=st.floats(20, 2000), load=st.floats(1.5, 4), seed=st.integers(0, 5))
def test_under_overload_the_accepted_are_in_time_and_the_model_never_idles(
    rate: float, load: float, seed: int
) -> None:
    """A simulated server takes 16 at a time, 1/rate seconds for each; load times as many arrive."""
    dice = random.Random(seed)
    clock = Clock()
    queue: AdmissionQueue[float] = AdmissionQueue(Limits(max_size=10_000, deadline_s=100 / rate), clock)
    start, free_at, due, answered, expired = clock.now, clock.now, clock.now, [], 0
    end, batch = start + 1000 / rate, []
    while due < end:
        due += dice.expovariate(rate * load)
        while free_at <= due:
            clock.now = max(free_at, clock.now)
            # As Batcher does when a batch is done.
            queue.served(len(batch), len(batch) / rate)
            expired += len(queue.expired())
            batch = queue.take(lambda item: True, most=16)
            if not batch:
                break
            free_at = clock.now + len(batch) / rate
            answered += [free_at - arrived for arrived in batch]
        clock.now = due
        with contextlib.suppress(Busy):
            queue.offer(due)
        free_at = max(free_at, due)
    answered.sort()
    assert answered[int(len(answered) * 0.99)] <= 100 / rate
    assert len(answered) > 0.9 * 1000
    assert expired < 0.01 * len(answered)


@pytest.mark.parametrize(
    ("given", "level"), [("", 0), ("{}", 0), ('{"onecard_priority": 1}', 1), ('{"a": 2}', 0)]
)
def test_priorities_are_read(given: str, level: int) -> None:
    assert read_level(given) == level


@pytest.mark.parametrize("value", ["-1", "1.5", '"high"', "true", "null", "[1]"])
def test_priorities_that_are_none(value: str) -> None:
    with pytest.raises(BadRequest, match=r"'onecard_priority' is .*; 1 is the most urgent"):
        read_level(f'{{"onecard_priority": {value}}}')


@pytest.mark.parametrize(
    ("given", "seconds"), [("", math.inf), ('{"timeout": 2500000}', 2.5), ('{"timeout": 0}', math.inf)]
)
def test_timeouts_are_read(given: str, seconds: float) -> None:
    assert read_timeout(given) == seconds


@pytest.mark.parametrize("value", ["-1", "1.5", '"soon"', "true", "null"])
def test_timeouts_that_are_none(value: str) -> None:
    with pytest.raises(BadRequest, match=r"'timeout' is .*; it is in whole microseconds"):
        read_timeout(f'{{"timeout": {value}}}')
