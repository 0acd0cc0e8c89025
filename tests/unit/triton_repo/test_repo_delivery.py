"""Consumers get everything in order, and none waits for another that is slow or gone."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from triton_repo.runtime.delivery import STALL_S, Delivery, Delta, Outbox, merged

USAGE = {"prompt_tokens": 1.0}


def outbox(consumer: object, lost: list[int] | None = None) -> Outbox:
    return Outbox(consumer, lambda: (lost if lost is not None else []).append(1))  # type: ignore[arg-type]


def threads() -> int:
    return sum(thread.name == "delivery" for thread in threading.enumerate())


def test_deltas_of_a_sample_merge_and_the_last_stays_last() -> None:
    deltas = [
        Delta(0, "a", (1,), (0.1,)),
        Delta(1, "x", (7,), (0.7,), "stop"),
        Delta(0, "b", (2,), (0.2,)),
        Delta(0, "", (3,), (0.3,), "length", USAGE),
    ]
    assert merged(deltas) == [
        Delta(1, "x", (7,), (0.7,), "stop"),
        Delta(0, "ab", (1, 2, 3), (0.1, 0.2, 0.3), "length", USAGE),
    ]
    assert merged(deltas[:2]) == deltas[:2]
    assert merged([]) == []


def test_every_consumer_gets_its_own_in_order() -> None:
    delivery = Delivery()
    got: dict[int, list[int]] = {number: [] for number in range(20)}
    boxes = {number: outbox(lambda delta, n=number: got[n].extend(delta.token_ids)) for number in got}
    for token in range(200):
        delivery.post([(box, Delta(0, "", (token,))) for box in boxes.values()])
    delivery.post([(box, Delta(0, "", (), finish_reason="stop", usage=USAGE)) for box in boxes.values()])
    assert all(box.done.wait(5) for box in boxes.values())
    assert all(tokens == list(range(200)) for tokens in got.values())
    delivery.close()


def test_a_process_that_may_have_no_more_threads_delivers_later(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery()
    got: list[Delta] = []
    box = outbox(got.append)

    def refuses(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuses)
        delivery.post([(box, Delta(0, "a"))])
    delivery.post([(box, Delta(0, "b", usage=USAGE))])
    assert box.done.wait(5)
    assert got == [Delta(0, "ab", usage=USAGE)]
    delivery.close()


def test_a_consumer_lost_without_anyone_to_tell_ends_no_thread() -> None:
    delivery = Delivery()

    def fails(delta: object = None) -> None:
        raise RuntimeError

    lost, good = Outbox(fails, fails), outbox(lambda _: None)
    delivery.post([(lost, Delta(0, "a", usage=USAGE)), (good, Delta(0, "a", usage=USAGE))])
    assert lost.done.wait(5)
    assert good.done.wait(5)
    delivery.close()


def test_consumers_that_never_return_hold_up_nobody() -> None:
    delivery = Delivery()
    never = threading.Event()
    stuck = [outbox(lambda _: never.wait()) for _ in range(5)]
    started = time.monotonic()
    delivery.post([(box, Delta(0, "a")) for box in stuck])
    posted = time.monotonic() - started
    for turn in range(3):
        got: list[Delta] = []
        good = outbox(got.append)
        delivery.post([(good, Delta(0, str(turn), usage=USAGE))])
        assert good.done.wait(5), "somebody else's consumer holds it up"
        assert got == [Delta(0, str(turn), usage=USAGE)]
    assert posted < STALL_S
    assert threads() <= len(stuck) + 2
    never.set()
    delivery.close()


@pytest.mark.parametrize("together", [True, False])
def test_who_comes_behind_a_stuck_consumer_is_not_forgotten(together: bool) -> None:
    """In the same step or the next one, when nothing follows that would wake anybody."""
    delivery = Delivery()
    never = threading.Event()
    # Both threads exist and sleep.
    for _ in range(2):
        box = outbox(lambda _: None)
        delivery.post([(box, Delta(0, usage=USAGE))])
        assert box.done.wait(5)
    time.sleep(2 * STALL_S)
    good = outbox(lambda _: None)
    batch = [(outbox(lambda _: never.wait()), Delta(0)), (good, Delta(0, usage=USAGE))]
    if together:
        delivery.post(batch)
    else:
        delivery.post(batch[:1])
        time.sleep(2 * STALL_S)
        delivery.post(batch[1:])
    assert good.done.wait(5)
    never.set()
    delivery.close()


def test_once_they_are_passed_stuck_consumers_cost_no_time() -> None:
    delivery = Delivery()
    never = threading.Event()
    delivery.post([(outbox(lambda _: never.wait()), Delta(0))])
    first = outbox(lambda _: None)
    delivery.post([(first, Delta(0, usage=USAGE))])
    assert first.done.wait(5)
    started = time.monotonic()
    for _ in range(50):
        box = outbox(lambda _: None)
        delivery.post([(box, Delta(0, usage=USAGE))])
        assert box.done.wait(5)
    assert time.monotonic() - started < 25 * STALL_S
    never.set()
    delivery.close()


def test_a_slow_consumer_gets_fewer_and_larger_deltas() -> None:
    delivery = Delivery()
    go, got = threading.Event(), []

    def slow(delta: Delta) -> None:
        got.append(delta)
        go.wait(5)

    box = outbox(slow)
    delivery.post([(box, Delta(0, "a", (0,)))])
    for token in range(1, 50):
        delivery.post([(box, Delta(0, "b", (token,)))])
    delivery.post([(box, Delta(0, "", (), finish_reason="length", usage=USAGE))])
    go.set()
    assert box.done.wait(5)
    assert "".join(delta.text for delta in got) == "a" + "b" * 49
    assert [token for delta in got for token in delta.token_ids] == list(range(50))
    assert len(got) <= 5
    assert Counter(delta.finish_reason for delta in got)["length"] == 1
    delivery.close()


def test_a_consumer_that_raises_is_left_alone() -> None:
    delivery = Delivery()
    lost: list[int] = []
    calls: list[Delta] = []

    def gone(delta: Delta) -> None:
        calls.append(delta)
        raise BrokenPipeError

    box = outbox(gone, lost)
    delivery.post([(box, Delta(0, "a")), (box, Delta(1, "b"))])
    delivery.post([(box, Delta(2, "c"))])
    delivery.post([(box, Delta(0, "", usage=USAGE))])
    assert box.done.wait(5)
    assert len(calls) == 1
    assert lost == [1]
    delivery.close()


def test_threads_go_when_it_closes_and_take_what_is_in_line_along() -> None:
    before = threads()
    delivery = Delivery()
    got: list[Delta] = []
    box = outbox(got.append)
    delivery.post([(box, Delta(0, "a"))])
    delivery.post([(box, Delta(0, "b", usage=USAGE))])
    delivery.close()
    assert box.done.wait(5)
    assert "".join(delta.text for delta in got) == "ab"
    delivery.post([(box, Delta(0, "c"))])
    deadline = time.monotonic() + 5
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() <= before
