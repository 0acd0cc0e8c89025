"""Requests of an encoder: answered at once where they can be, in order of urgency where they have to wait."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from triton_repo.runtime import batching
from triton_repo.runtime.admission import Busy, Limits
from triton_repo.runtime.batching import Batcher, Ticket
from triton_repo.runtime.exchange import Cancelled
from triton_repo.runtime.texts import BadRequest, EngineFailed

LIMITS = Limits(max_size=6, deadline_s=5.0, levels=3, default_level=2)


class Echo:
    """Answers a text with itself. It waits for `gate`; the text "bad" is refused, "broken" breaks the run."""

    max_rows = 4
    most_characters = 100

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[str]] = []

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        texts = [request["text"].flat[0].decode() for request in requests]
        self.batches.append(texts)
        assert self.gate.wait(10)
        if "broken" in texts:
            raise ZeroDivisionError("secret")
        return [BadRequest("bad") if text == "bad" else {"out": np.array([text])} for text in texts]

    def snapshot(self) -> dict[str, float]:
        return {"runs_total": len(self.batches)}


class Exchange:
    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.gone = self.breaks = False
        self.done = threading.Event()

    def send(self, answer: Any) -> None:
        self.answers.append(answer)
        self.done.set()
        if self.breaks:
            raise RuntimeError("no room")

    def is_gone(self) -> bool:
        return self.gone

    @property
    def answer(self) -> Any:
        assert self.done.wait(10)
        assert len(self.answers) == 1
        return self.answers[0]


def ticket(text: str, **fields: Any) -> Ticket:
    rows = fields.pop("rows", 1)
    return Ticket({"text": np.array([[text.encode()]] * rows, dtype=object)}, **fields)


class Bench:
    def __init__(self, limits: Limits = LIMITS) -> None:
        self.service = Echo()
        self.batcher = Batcher(self.service, limits)
        self.batcher.start()

    def ask(self, text: str, **fields: Any) -> Exchange:
        exchange = Exchange()
        (reason,) = self.batcher.submit([(ticket(text, **fields), exchange)])
        if reason is not None:
            exchange.send(reason)
        return exchange

    def hold(self) -> Exchange:
        """The thread computes, and goes on to do so."""
        self.service.gate.clear()
        held = self.ask("held")
        while not self.service.batches:
            time.sleep(0.001)
        return held

    def outcomes(self) -> dict[str, float]:
        found: Any = self.batcher.snapshot()
        own = {**found["requests_total"], **found["rejections_total"]}
        return {name: count for name, count in own.items() if count}


@pytest.fixture
def bench() -> Any:
    found = Bench()
    yield found
    found.service.gate.set()
    found.batcher.close()


def texts(answers: Any) -> list[Any]:
    return [answer["out"][0] if isinstance(answer, dict) else type(answer) for answer in answers]


def test_an_idle_model_answers_at_once_and_in_order(bench: Bench) -> None:
    assert texts([bench.ask("first").answer]) == ["first"]
    answers = bench.batcher.answer_now([ticket("a"), ticket("bad"), ticket("b")])
    assert texts(answers) == ["a", BadRequest, "b"]
    assert bench.batcher.answer_now([]) == []
    assert bench.outcomes() == {"completed": 3, "rejected": 1, "bad_input": 1}
    assert bench.batcher.snapshot()["queue_seconds_count"] == 4


def test_a_full_batch_and_a_busy_model_are_for_the_queue(bench: Bench) -> None:
    assert bench.batcher.answer_now([ticket("a", rows=4)]) is None
    held = bench.hold()
    assert bench.batcher.answer_now([ticket("a")]) is None
    waiting = bench.ask("b")
    bench.service.gate.set()
    assert texts([held.answer, waiting.answer]) == ["held", "b"]


def test_whoever_is_more_urgent_is_first_and_batches_have_their_size(bench: Bench) -> None:
    bench.hold()
    asked = [bench.ask(f"low {n}", level=3) for n in range(2)] + [bench.ask(f"any {n}") for n in range(2)]
    asked += [bench.ask("high", level=1), bench.ask("pair", level=1, rows=2)]
    bench.service.gate.set()
    assert all(exchange.answer for exchange in asked)
    assert bench.service.batches[1:] == [["high", "pair", "any 0"], ["any 1", "low 0", "low 1"]]


def test_a_request_larger_than_a_batch_runs_alone(bench: Bench) -> None:
    bench.hold()
    large, small = bench.ask("large", rows=9), bench.ask("small")
    bench.service.gate.set()
    assert texts([large.answer, small.answer]) == ["large", "small"]
    assert bench.service.batches[1:] == [["large"], ["small"]]


def test_a_full_queue_sends_away_at_once_or_the_least_urgent(bench: Bench) -> None:
    bench.hold()
    waiting = [bench.ask(f"{n}") for n in range(6)]
    sent_away = bench.ask("too many")
    assert isinstance(sent_away.answer, Busy)
    with pytest.raises(Busy, match="queue is full"):
        bench.batcher.check(0, math.inf)
    bench.batcher.check(1, math.inf)
    urgent = bench.ask("urgent", level=1)
    assert "more urgent requests" in str(waiting[-1].answer)
    assert bench.batcher.snapshot()["queue_requests"] == 6
    bench.service.gate.set()
    assert texts([urgent.answer, *[exchange.answer for exchange in waiting[:-1]]]) == ["urgent", *"01234"]
    assert bench.outcomes() == {"completed": 7, "rejected": 2, "queue_full": 1, "displaced": 1}


def test_time_runs_out_while_it_waits(bench: Bench) -> None:
    bench.hold()
    late, patient = bench.ask("late", timeout_s=0.02), bench.ask("patient")
    time.sleep(0.05)
    bench.service.gate.set()
    assert isinstance(late.answer, Busy)
    assert "the request's own timeout is 20 ms" in str(late.answer)
    assert texts([patient.answer]) == ["patient"]
    assert bench.service.batches[1:] == [["patient"]]


def test_nobody_computes_for_a_client_that_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_LONG_WAIT_S", 0.0)
    bench.hold()
    left, stays = bench.ask("left"), bench.ask("stays")
    left.gone = True
    bench.service.gate.set()
    assert isinstance(left.answer, Cancelled)
    assert texts([stays.answer]) == ["stays"]
    assert bench.service.batches[1:] == [["stays"]]
    assert bench.outcomes() == {"completed": 2, "cancelled": 1}


def test_a_fault_of_ours_and_a_broken_wire_leave_the_thread_running(bench: Bench) -> None:
    bench.hold()
    unheard, broken = bench.ask("unheard"), bench.ask("broken")
    unheard.breaks = True
    bench.service.gate.set()
    for exchange in (unheard, broken):
        assert isinstance(exchange.answer, EngineFailed)
        assert str(exchange.answer) == "the server failed on this request: ZeroDivisionError"
    assert texts([bench.ask("after").answer]) == ["after"]
    assert bench.batcher.answer_now([ticket("broken")]) is not None
    assert bench.outcomes() == {"completed": 2, "failed": 3}


@pytest.mark.parametrize("where", ["is_gone", "_next_batch", "_has_left", "expired"])
def test_no_fault_ends_the_thread_or_leaves_anyone_waiting(
    bench: Bench, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(batching, "_LONG_WAIT_S", 0.0)
    held = bench.hold()
    waiting = [bench.ask("a"), bench.ask("b")]
    with monkeypatch.context() as fault:
        owner = {"is_gone": Exchange, "expired": bench.batcher._queue}.get(where, bench.batcher)
        fault.setattr(owner, where, fails)
        bench.service.gate.set()
        answers = [exchange.answer for exchange in waiting]
    assert texts([held.answer]) == ["held"]
    assert texts(answers) == (["a", "b"] if where == "is_gone" else [EngineFailed, EngineFailed])
    assert "secret" not in str(answers)
    assert texts([bench.ask("after").answer]) == ["after"]
    assert sum(bench.outcomes().values()) == 4


def test_what_waits_when_the_model_goes_is_told_so(bench: Bench) -> None:
    held = bench.hold()
    waiting = bench.ask("waiting")
    closing = threading.Thread(target=bench.batcher.close)
    closing.start()
    while not bench.batcher._closing:
        time.sleep(0.001)
    late = bench.ask("late")
    bench.service.gate.set()
    closing.join(10)
    assert texts([held.answer]) == ["held"], "what was being computed is answered"
    for exchange in (waiting, late):
        assert str(exchange.answer) == "the model is being unloaded"
    assert bench.outcomes() == {"completed": 1, "rejected": 2, "unloading": 2}


def test_a_long_text_counts_as_far_as_it_is_read(bench: Bench) -> None:
    short, long = ticket("x" * 50), ticket("x" * 100_000)
    assert bench.batcher._measure(long) - bench.batcher._measure(short) == Echo.most_characters - 50
    assert bench.batcher._measure(ticket("x" * 50, rows=3)) == 3 * bench.batcher._measure(short)


def test_how_much_work_a_request_is_is_computed_once(bench: Bench) -> None:
    reads: list[int] = []

    class Counting(Echo):
        @property
        def most_characters(self) -> int:  # type: ignore[override]
            reads.append(1)
            return 100

    bench.batcher._service = Counting()
    asked, exchange = ticket("a", rows=4), Exchange()
    assert bench.batcher.answer_now([asked]) is None
    assert bench.batcher.submit([(asked, exchange)]) == [None]
    assert texts([exchange.answer]) == ["a"]
    assert len(reads) == 4


def test_what_takes_long_is_not_answered_while_triton_waits(bench: Bench) -> None:
    """What comes meanwhile would wait where no deadline and no priority is known."""
    assert bench.batcher.answer_now([ticket("a")]) is None, "how long is not known yet"
    slow = bench.service.answer

    def slowly(requests: Sequence[Any]) -> list[Any]:
        time.sleep(0.06 * len(requests))
        return slow(requests)

    bench.service.answer = slowly  # type: ignore[method-assign]
    assert texts([bench.ask("a").answer]) == ["a"]
    assert texts(bench.batcher.answer_now([ticket("a")])) == ["a"]
    assert bench.batcher.answer_now([ticket("a"), ticket("b")]) is None
    assert bench.batcher.answer_now([ticket("longer than one that takes 0.06 s, by far" * 3)]) is None
