"""The scheduler under any interleaving: every answer is what the request gets alone, and nothing is lost."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from hash_engine import Asked, HashEngine, Inline, hash_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_repo.runtime.admission import Busy, Limits
from triton_repo.runtime.delivery import Delta
from triton_repo.runtime.jobs import Request
from triton_repo.runtime.sampling import SamplingParams
from triton_repo.runtime.scheduler import Scheduler
from triton_repo.runtime.texts import BadRequest, EngineFailed

END = 1
# Two families of prompts that share beginnings longer and shorter than a copy is worth.
SYSTEMS = ([], [5, 6, 7], [5, 6, 7, *range(8, 28)], [5, 6, 7, *range(8, 28), 3, 3])


class Bench:
    """A scheduler over a HashEngine, stepped by hand, with everything checked after every step."""

    def __init__(self, engine: HashEngine, **limits: Any) -> None:
        self.engine = engine
        self.now = 100.0
        self.scheduler = Scheduler(engine, clock=lambda: self.now, delivery=Inline(), **limits)
        self.asked: list[Asked] = []
        self.broke = False

    def ask(self, prompt: list[int], stop: frozenset[int] = frozenset({END}), **params: Any) -> Asked:
        asked = Asked(prompt, SamplingParams(**params), stop)
        asked.submit(self.scheduler)
        self.asked.append(asked)
        return asked

    def step(self) -> bool:
        """One step; every stream that runs gets a token, whatever else the step does."""
        scheduler, engine = self.scheduler, self.engine
        running = {id(s): s.count for s in scheduler._running if not self._is_cancelled(s.job)}
        samples = {id(s): s for s in scheduler._running}
        before = len(engine.calls)
        more = scheduler.step()
        calls = engine.calls[before:]
        kinds = [kind for kind, _ in calls]
        assert kinds.count("prefill") <= 1, "more than one chunk between two tokens of a stream"
        assert kinds.count("decode") <= 1
        failed = any(place in engine.broken for place in range(before, len(engine.calls)))
        if not failed:
            assert all(samples[key].count == count + 1 for key, count in running.items())
        self.check()
        return more

    def _is_cancelled(self, job: Any) -> bool:
        return job in self.scheduler._cancelled

    def check(self) -> None:
        scheduler, table = self.scheduler, self.scheduler._table
        held = [s.slot for s in scheduler._running]
        if scheduler._prefilling:
            held += [s.slot for s in scheduler._prefilling.samples]
        assert len(held) == len(set(held)), "two sequences in one slot"
        assert table.free == self.engine.slots - len(held), "a slot was lost"
        assert sorted(held) == [slot for slot, busy in enumerate(table._busy) if busy]
        for slot in range(self.engine.slots):
            length = table.length(slot)
            assert length <= self.engine.valid[slot]
            known = table._tokens[slot, :length].tolist()
            assert known == self.engine.cache[slot, :length].tolist(), "the table knows another cache"

    def finish(self) -> None:
        for _ in range(5000):
            if not self.step():
                return
        raise AssertionError("it never ends")

    def check_answers(self) -> None:
        for asked in self.asked:
            assert asked.done
            assert sum(delta.usage is not None for delta in asked.deltas) == 1
            reasons = asked.reasons()
            assert set(reasons) == set(range(asked.params.n))
            for index, reason in reasons.items():
                expected, why = asked.alone(self.engine.capacity, self.engine.vocabulary, index)
                tokens = asked.tokens(index)
                if reason in ("cancelled", "error"):
                    assert tokens == expected[: len(tokens)]
                    assert reason == "error" or asked.cancelled
                    assert reason == "cancelled" or self.broke
                else:
                    assert (tokens, reason) == (expected, why)


PARAMS = st.one_of(
    st.fixed_dictionaries({"max_tokens": st.integers(1, 12)}),
    st.fixed_dictionaries(
        {
            "max_tokens": st.integers(1, 40),
            "temperature": st.sampled_from([0.7, 1.5]),
            "seed": st.integers(0, 3),
            "n": st.integers(1, 3),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
        }
    ),
)
ACTIONS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 3), st.lists(st.integers(2, 4), max_size=9), PARAMS),
    st.tuples(
        st.just("turn"), st.integers(0, 9), st.lists(st.integers(2, 4), min_size=1, max_size=3), PARAMS
    ),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("break"), st.integers(0, 4)),
)


def act(bench: Bench, action: tuple[Any, ...]) -> None:
    match action:
        case ("ask", system, own, params):
            bench.ask([2, *SYSTEMS[system], *own], **params)
        case ("turn", which, own, params) if bench.asked:
            # The next turn of a conversation: all that was said, and something new.
            before = bench.asked[which % len(bench.asked)]
            prompt = [*before.prompt, *before.tokens(), *own]
            if len(prompt) <= bench.engine.capacity:
                bench.ask(prompt, **params)
        case ("step", times):
            for _ in range(times):
                bench.step()
        case ("cancel", which) if bench.asked:
            asked = bench.asked[which % len(bench.asked)]
            assert asked.handle
            asked.cancelled = True
            asked.handle.cancel()
            bench.step()
            assert asked.done, "a cancelled request ends within one step"
            assert all(s.job is not asked.handle._job for s in bench.scheduler._running)
        case ("break", ahead):
            bench.broke = True
            bench.engine.broken.add(len(bench.engine.calls) + ahead)


@settings(max_examples=600, deadline=None)
@given(st.lists(ACTIONS, min_size=1, max_size=25), st.integers(3, 5), st.sampled_from([1, 4, 16]))
def test_any_interleaving(actions: list[tuple[Any, ...]], slots: int, chunk: int) -> None:
    bench = Bench(HashEngine(slots=slots, capacity=48, chunk=chunk))
    for action in actions:
        act(bench, action)
    bench.finish()
    bench.check_answers()
    assert bench.scheduler._table.free == slots
    outcomes = bench.scheduler.snapshot()["requests_total"]
    assert sum(outcomes.values()) == len(bench.asked)


def test_one_request_is_prefilled_by_chunks() -> None:
    bench = Bench(HashEngine(chunk=4))
    asked = bench.ask(list(range(2, 12)), max_tokens=3, stop=frozenset())
    bench.finish()
    assert bench.engine.calls == [
        ("prefill", 4),
        ("prefill", 4),
        ("prefill", 2),
        ("decode", 1),
        ("decode", 1),
    ]
    bench.check_answers()
    usage = asked.deltas[-1].usage
    assert usage
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["cached_tokens"]) == (10, 3, 0)


def test_the_first_token_comes_before_the_others_next_one() -> None:
    """It is delivered right after the prefill, not after the decode step that follows."""
    engine = HashEngine()
    order: list[str] = []
    scheduler = Scheduler(engine, delivery=Inline())
    decode = engine.decode

    def decoding(*arguments: Any) -> Any:
        order.append("decode")
        return decode(*arguments)

    engine.decode = decoding  # type: ignore[method-assign]
    scheduler.submit(Request([2, 3], SamplingParams(max_tokens=2), lambda _: order.append("delta")))
    scheduler.step()
    assert order[:2] == ["delta", "decode"]


def test_a_long_prompt_does_not_stop_running_streams() -> None:
    bench = Bench(HashEngine(slots=2, capacity=200, chunk=4))
    stream = bench.ask([2, 3], max_tokens=100, stop=frozenset())
    bench.step()
    bench.ask(list(range(2, 32)) * 4, max_tokens=1)
    for _ in range(29):
        before = len(stream.deltas)
        bench.step()
        assert len(stream.deltas) == before + 1
        assert bench.engine.calls[-2:] == [("prefill", 4), ("decode", 1)]


def test_requests_start_in_the_order_they_came() -> None:
    """Also when the first needs more slots than are free and a later one would fit."""
    bench = Bench(HashEngine(slots=2))
    first = bench.ask([2, 3], max_tokens=6, stop=frozenset())
    pair = bench.ask([2, 4], max_tokens=2, n=2, stop=frozenset(), temperature=1.0, seed=1)
    last = bench.ask([2, 5], max_tokens=2, stop=frozenset())
    while not first.done:
        bench.step()
        assert not pair.deltas
        assert not last.deltas
    while not pair.done:
        bench.step()
        assert not last.deltas
    bench.finish()
    bench.check_answers()


def test_samples_share_one_prefill() -> None:
    bench = Bench(HashEngine(slots=4, chunk=8, capacity=64))
    asked = bench.ask(list(range(2, 26)), max_tokens=4, n=4, temperature=1.0, seed=3, stop=frozenset())
    bench.finish()
    bench.check_answers()
    assert [call for call in bench.engine.calls if call[0] != "decode"] == [("prefill", 8)] * 3 + [
        ("copy", 24)
    ] * 3
    assert len({tuple(asked.tokens(index)) for index in range(4)}) == 4
    usage = asked.deltas[-1].usage
    assert usage
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (24, 16)


def prefilled(bench: Bench) -> int:
    return sum(tokens for kind, tokens in bench.engine.calls if kind == "prefill")


def test_a_conversation_prefills_only_what_is_new() -> None:
    bench = Bench(HashEngine(slots=2, capacity=400, chunk=16))
    said = [2, *range(3, 20)]
    for turn in range(8):
        before = prefilled(bench)
        asked = bench.ask(said, max_tokens=10, stop=frozenset())
        bench.finish()
        # All that was said before lies in the slot, but the last answer's last token, which nobody decoded.
        assert prefilled(bench) - before == (len(said) if turn == 0 else 6)
        usage = asked.deltas[-1].usage
        assert usage
        assert usage["cached_tokens"] == (0 if turn == 0 else len(said) - 6)
        said = [*said, *asked.tokens(), *range(5, 10)]
    bench.check_answers()
    assert bench.scheduler.snapshot()["llm_cached_tokens_total"] > 0


def test_the_same_prompt_again_computes_its_last_token_only() -> None:
    bench = Bench(HashEngine(slots=2, capacity=64, chunk=16))
    prompt = list(range(2, 32))
    bench.ask(prompt, max_tokens=2)
    bench.finish()
    before = prefilled(bench)
    bench.ask(prompt, max_tokens=9)
    bench.finish()
    assert prefilled(bench) - before == 1
    bench.check_answers()


def test_a_running_streams_prompt_is_copied() -> None:
    bench = Bench(HashEngine(slots=2, capacity=100, chunk=64))
    system = list(range(2, 32))
    bench.ask([*system, 2], max_tokens=30, stop=frozenset())
    bench.step()
    other = bench.ask([*system, 3, 3], max_tokens=2, stop=frozenset())
    bench.step()
    assert ("copy", 30) in bench.engine.calls
    assert bench.engine.calls[-2] == ("prefill", 2)
    bench.finish()
    usage = other.deltas[-1].usage
    assert usage
    assert usage["cached_tokens"] == 30
    bench.check_answers()


def test_a_cancelled_request_frees_its_slots_within_one_step() -> None:
    bench = Bench(HashEngine(slots=3, capacity=64, chunk=4))
    pair = bench.ask([2, 3], max_tokens=50, n=2, temperature=1.0, seed=0, stop=frozenset())
    prefilling = bench.ask(list(range(2, 32)), max_tokens=5)
    queued = bench.ask([2], max_tokens=5)
    other = bench.ask([4], max_tokens=5, stop=frozenset())
    for _ in range(3):
        bench.step()
    assert bench.scheduler.snapshot()["llm_slots_active"] == 3
    for asked in (pair, prefilling, queued):
        assert asked.handle
        asked.cancelled = True
        asked.handle.cancel()
        asked.handle.cancel()
    bench.step()
    assert pair.reasons() == {0: "cancelled", 1: "cancelled"}
    assert prefilling.reasons() == queued.reasons() == {0: "cancelled"}
    assert bench.scheduler.snapshot()["llm_slots_active"] == 1
    bench.finish()
    bench.check_answers()
    assert other.reasons() == {0: "length"}
    assert bench.scheduler.snapshot()["requests_total"]["cancelled"] == 3


def test_a_consumer_that_raises_cancels_its_request() -> None:
    engine = HashEngine()
    scheduler = Scheduler(engine, delivery=Inline())
    calls = []

    def vanished(delta: Delta) -> None:
        calls.append(delta)
        raise ConnectionError

    scheduler.submit(Request([2], SamplingParams(max_tokens=20), vanished))
    scheduler.step()
    scheduler.step()
    assert len(calls) == 1
    assert scheduler.snapshot()["llm_slots_active"] == 0
    assert not scheduler.step()


def test_a_broken_step_fails_those_in_it_and_nobody_else() -> None:
    bench = Bench(HashEngine(slots=2, capacity=40, chunk=8))
    first, second = (bench.ask([2, token], max_tokens=9, stop=frozenset()) for token in (3, 4))
    bench.step()
    bench.step()
    waiting = bench.ask([2, 3], max_tokens=9, stop=frozenset())
    bench.broke = True
    bench.engine.broken = {len(bench.engine.calls)}
    bench.step()
    for asked in (first, second):
        assert asked.reasons() == {0: "error"}
        assert isinstance(asked.deltas[-1].error, EngineFailed)
        assert "device lost" in str(asked.deltas[-1].error)
    bench.finish()
    # Nothing of the broken slots was taken for a cached prompt.
    assert waiting.deltas[-1].usage
    assert waiting.deltas[-1].usage["cached_tokens"] == 0
    bench.check_answers()
    assert waiting.reasons() == {0: "length"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_fail_one_sequence(value: float, temperature: float) -> None:
    class Poisoned(HashEngine):
        def _logits(self, slot: int) -> Any:
            logits = super()._logits(slot)
            if 9 in self.cache[slot, : self.valid[slot]]:
                logits[3] = value
            return logits

    bench = Bench(Poisoned())
    good = bench.ask([2, 3], max_tokens=6, stop=frozenset({9}))
    bench.step()
    bad = bench.ask([2, 9], max_tokens=6, temperature=temperature, stop=frozenset())
    bench.finish()
    assert bad.reasons() == {0: "error"}
    assert "no numbers" in str(bad.deltas[-1].error)
    assert good.tokens() == good.alone(24, 32)[0]


def test_tokens_that_came_beside_a_failure_are_counted() -> None:
    class Failing(HashEngine):
        def decode(self, *arguments: Any) -> Any:
            logits = super().decode(*arguments)
            logits[1:] = np.nan
            return logits

    bench = Bench(Failing())
    good, bad = (bench.ask([2, token], max_tokens=6, stop=frozenset()) for token in (3, 4))
    while bench.scheduler.step():
        pass
    assert (good.reasons(), bad.reasons()) == ({0: "length"}, {0: "error"})
    assert bench.scheduler.snapshot()["llm_generated_tokens_total"] == len(good.tokens()) + len(bad.tokens())


def test_an_engine_of_the_wrong_shape_does_not_stop_the_loop() -> None:
    class Short(HashEngine):
        def decode(self, *arguments: Any) -> Any:
            return super().decode(*arguments)[:0] if len(self.calls) < 4 else super().decode(*arguments)

    engine = Short()
    scheduler = Scheduler(engine)
    scheduler.start()
    first, second = (Asked([2, 3], SamplingParams(max_tokens=5), frozenset()) for _ in range(2))
    for asked in (first, second):
        asked.submit(scheduler)
        assert asked.handle
        assert asked.handle.wait(10)
        engine.calls += [("rest", 0)] * 4
    assert first.reasons() == {0: "error"}
    assert second.tokens() == second.alone(24, 32)[0]
    scheduler.close()


def test_a_fault_of_the_scheduler_costs_what_runs_and_no_slot() -> None:
    engine = HashEngine(slots=1)
    scheduler = Scheduler(engine)

    def broken(slot: int) -> None:
        raise ZeroDivisionError

    scheduler._table.release = broken  # type: ignore[method-assign]
    first, second = (Asked([2, 3], SamplingParams(max_tokens=3), frozenset()) for _ in range(2))
    first.submit(scheduler)
    second.submit(scheduler)
    scheduler.start()
    for asked in (first, second):
        assert asked.handle
        assert asked.handle.wait(5)
    assert first.reasons() == {0: "error"}
    assert "ZeroDivisionError" in str(first.deltas[-1].error)
    assert second.tokens() == second.alone(24, 32)[0]
    scheduler.close()


def test_a_slot_that_is_full_ends_the_sample() -> None:
    bench = Bench(HashEngine(capacity=8))
    for length in (5, 8):
        asked = bench.ask([2] * length, max_tokens=100, stop=frozenset())
        bench.finish()
        assert asked.reasons() == {0: "length"}
        assert len(asked.tokens()) == 8 - length + 1
    bench.check_answers()


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "no tokens"),
        ([2] * 25, {}, "25 tokens; a slot of this model holds 24"),
        ([2, 32], {}, "token 32; the model knows 0 to 31"),
        ([-1], {}, "token -1"),
        ([2], {"n": 4}, "'n' is 4; this model has 3 slots"),
        ([2], {"max_tokens": 0}, "'max_tokens' is 0"),
        ([2], {"stop_token_ids": (32,)}, "'stop_token_ids' has 32"),
    ],
)
def test_what_can_never_run_is_refused(prompt: list[int], params: dict[str, Any], message: str) -> None:
    bench = Bench(HashEngine())
    running = bench.ask([2, 3], max_tokens=5)
    bench.step()
    with pytest.raises(BadRequest, match=message.replace("(", r"\(")):
        Asked(prompt, SamplingParams(**params), frozenset()).submit(bench.scheduler)
    bench.finish()
    bench.check_answers()
    assert running.done
    assert bench.scheduler.snapshot()["rejections_total"]["bad_input"] == 1


def test_a_full_queue_refuses_and_a_free_slot_is_no_queue() -> None:
    bench = Bench(HashEngine(slots=2), limits=Limits(max_size=1))
    for _ in range(3):
        bench.ask([2, 3], max_tokens=20, stop=frozenset())
    with pytest.raises(Busy, match="queue is full: 3 requests"):
        bench.ask([2], max_tokens=1)
    bench.step()
    bench.step()
    assert bench.scheduler.snapshot()["queue_requests"] == 1
    with pytest.raises(Busy, match="queue is full: 1 requests"):
        bench.ask([2], max_tokens=1)
    bench.finish()
    bench.check_answers()


def test_waiting_too_long_is_an_error_with_the_limit() -> None:
    bench = Bench(HashEngine(slots=1), limits=Limits(deadline_s=30.0))
    running = bench.ask([2, 3], max_tokens=20, stop=frozenset())
    bench.step()
    late = bench.ask([2], max_tokens=1)
    bench.now += 26
    bench.step()
    in_time = bench.ask([4], max_tokens=1)
    bench.now += 2
    bench.step()
    assert late.reasons() == {0: "error"}
    assert isinstance(late.deltas[-1].error, Busy)
    assert "30000 ms" in str(late.deltas[-1].error)
    assert late.deltas[-1].usage
    assert late.deltas[-1].usage["queue_ms"] == pytest.approx(28000)
    bench.finish()
    assert running.reasons() == in_time.reasons() == {0: "length"}
    assert bench.scheduler.snapshot()["rejections_total"]["expired"] == 1


def test_a_request_has_waited_since_it_arrived() -> None:
    bench = Bench(HashEngine(slots=1), limits=Limits(deadline_s=30.0))
    deltas: list[Delta] = []
    params = SamplingParams(max_tokens=1)
    bench.scheduler.submit(Request([2], params, deltas.append, arrived=bench.now - 7))
    bench.step()
    assert deltas[-1].usage
    assert deltas[-1].usage["queue_ms"] == 7000
    running = bench.ask([2, 3], max_tokens=20, stop=frozenset())
    bench.step()
    with pytest.raises(Busy, match="the wait is too long"):
        bench.scheduler.check(0, 30.0, bench.now - 20)
    with pytest.raises(Busy, match="the wait is too long"):
        bench.scheduler.submit(Request([2], params, deltas.append, arrived=bench.now - 20))
    assert not running.done


def test_usage_and_rate_are_of_the_clock() -> None:
    bench = Bench(HashEngine(slots=1, chunk=2))
    first = bench.ask([2, 3, 4, 5], max_tokens=4, stop=frozenset())
    second = bench.ask([2, 3], max_tokens=1)
    while not second.done:
        bench.now += 1.0
        bench.step()
    assert first.deltas[-1].usage
    # Steps at 101: chunk; 102: chunk, first and second token; 103 and 104: one token each.
    assert {name: first.deltas[-1].usage[name] for name in ("queue_ms", "prefill_ms", "total_ms")} == {
        "queue_ms": 1000,
        "prefill_ms": 1000,
        "total_ms": 4000,
    }
    assert second.deltas[-1].usage
    assert second.deltas[-1].usage["queue_ms"] == 5000
    bench.now = 106.0
    assert bench.scheduler.snapshot()["llm_tokens_per_second"] == pytest.approx(5 / 5)
    bench.now += 60
    assert bench.scheduler.snapshot()["llm_tokens_per_second"] == 0


def test_threads_that_ask_and_cancel_all_at_once() -> None:
    """The real loop and the real delivery, from many threads."""
    engine = HashEngine(slots=4, capacity=64, chunk=8)
    scheduler = Scheduler(engine)
    scheduler.start()
    asked: list[Asked] = []

    def user(number: int) -> None:
        random = np.random.default_rng(number)
        for _ in range(12):
            prompt = [2, *SYSTEMS[random.integers(4)], *random.integers(2, 32, random.integers(0, 9))]
            params = SamplingParams(
                max_tokens=int(random.integers(1, 30)),
                temperature=float(random.integers(0, 2)),
                seed=number,
                n=int(random.integers(1, 3)),
            )
            one = Asked([int(token) for token in prompt], params, frozenset({END}))
            one.submit(scheduler)
            assert one.handle
            if random.random() < 0.4:
                one.cancelled = True
                one.handle.wait(random.random() * 0.003)
                one.handle.cancel()
            assert one.handle.wait(30)
            asked.append(one)

    users = [threading.Thread(target=user, args=(number,)) for number in range(8)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    assert len(asked) == 96
    for one in asked:
        for index, reason in one.reasons().items():
            expected, why = one.alone(64, 32, index)
            tokens = one.tokens(index)
            assert tokens == expected[: len(tokens)]
            assert reason == "cancelled" or (tokens, reason) == (expected, why)
            assert reason != "cancelled" or one.cancelled
    assert scheduler.snapshot()["llm_slots_active"] == 0
    scheduler.close()


def test_closing_ends_everything_and_refuses_more() -> None:
    engine = HashEngine(slots=1, capacity=4000)
    scheduler = Scheduler(engine)
    scheduler.start()
    asked = [Asked([2], SamplingParams(max_tokens=3900), frozenset()) for _ in range(3)]
    for one in asked:
        one.submit(scheduler)
    scheduler.close()
    for one in asked:
        assert one.handle
        assert one.handle.wait(5)
        # Which of them had begun is for the thread to say.
        assert one.reasons()[0] in ("cancelled", "error")
    with pytest.raises(Busy, match="unloaded"):
        asked[0].submit(scheduler)
    assert engine.closed


def test_what_waits_when_the_model_goes_is_told_to_come_again() -> None:
    bench = Bench(HashEngine(slots=1), limits=Limits(max_size=2))
    running = bench.ask([2], max_tokens=20, stop=frozenset())
    bench.step()
    displaced, waiting = bench.ask([3], max_tokens=9), bench.ask([4], max_tokens=9)
    bench.scheduler.submit(Request([5], SamplingParams(), lambda delta: None, level=1))
    bench.scheduler.close()
    assert running.reasons() == {0: "cancelled"}
    for asked in (displaced, waiting):
        assert isinstance(asked.deltas[-1].error, Busy)
        assert str(asked.deltas[-1].error) == "the model is being unloaded"
    found = bench.scheduler.snapshot()
    assert (found["rejections_total"]["unloading"], found["requests_total"]["cancelled"]) == (3, 1)


@pytest.mark.parametrize("where", ["take", "expired"])
def test_a_fault_in_choosing_who_is_next_costs_those_who_wait(where: str) -> None:
    scheduler = Scheduler(HashEngine(slots=1))
    works = getattr(scheduler._queue, where)

    def broken(*given: Any, **options: Any) -> Any:
        raise ZeroDivisionError

    setattr(scheduler._queue, where, broken)
    first, second = (Asked([2, 3], SamplingParams(max_tokens=3), frozenset()) for _ in range(2))
    first.submit(scheduler)
    scheduler.start()
    assert first.handle
    assert first.handle.wait(5)
    assert "ZeroDivisionError" in str(first.deltas[-1].error)
    setattr(scheduler._queue, where, works)
    second.submit(scheduler)
    assert second.handle
    assert second.handle.wait(5)
    assert second.tokens() == second.alone(24, 32)[0]
    scheduler.close()


def test_a_fault_in_starting_over_does_not_end_the_thread() -> None:
    scheduler = Scheduler(HashEngine(slots=1))
    post = scheduler._delivery.post
    faults = iter([True, True, False])

    def broken(batch: Any) -> None:
        if next(faults, False):
            raise RuntimeError("can't start new thread")
        post(batch)

    scheduler._delivery.post = broken  # type: ignore[method-assign]
    scheduler.start()
    lost, found = (Asked([2, 3], SamplingParams(max_tokens=3), frozenset()) for _ in range(2))
    for asked in (lost, found):
        asked.submit(scheduler)
    assert found.handle
    assert found.handle.wait(5)
    assert found.tokens() == found.alone(24, 32)[0]
    scheduler.close()


def test_an_llm_with_one_request_waiting_learns_how_long_one_takes() -> None:
    """Answers of 4 s, and each request comes when one is running and nobody waits."""
    bench = Bench(HashEngine(slots=1), limits=Limits(deadline_s=10.0))
    before = bench.ask([2], max_tokens=5, stop=frozenset())
    for _ in range(5):
        bench.step()
        waiting = bench.ask([2], max_tokens=5, stop=frozenset())
        while not before.done:
            bench.now += 4 / 3
            bench.step()
        before = waiting
    bench.step()
    bench.ask([2], max_tokens=5, stop=frozenset())
    with pytest.raises(Busy, match="the wait is too long"):
        bench.ask([2], max_tokens=5)


def test_nothing_remains_of_finished_requests() -> None:
    scheduler = Scheduler(HashEngine(slots=2, vocabulary=8), delivery=Inline())
    for number in range(400):
        handle = scheduler.submit(Request([number % 7], SamplingParams(max_tokens=3), lambda _: None))
        if number % 5 == 0:
            handle.cancel()
        while scheduler.step():
            pass
    del handle
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one).__name__ in ("Job", "Sample", "Outbox", "Delta")]


def test_the_hash_depends_on_every_token_and_place() -> None:
    """Else the tests above would prove nothing."""
    seen = {tuple(hash_logits(tokens, 16)) for tokens in ([1, 2, 3], [2, 1, 3], [1, 2], [1, 2, 4], [0, 2, 3])}
    assert len(seen) == 5
