"""Percentiles, schedules, and that a stall shows in every request it delays."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from client import BenchError, Client, QueueFull, metrics
from client.bench.loadgen import Point, arrivals, closed_loop, open_loop, percentile
from client.bench.served import Variant
from client.bench.summary import BenchModel


def payloads() -> Iterator[bytes]:
    return (str(number).encode() for number in itertools.count())


def test_percentiles_are_nearest_ranks() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.99) == 4
    assert percentile([7.0], 0.5) == 7
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_arrivals_have_the_rate_asked_for_and_are_the_same_in_every_run() -> None:
    times = arrivals(1000, 10)
    assert 9_700 < len(times) < 10_300
    assert times == sorted(times) == arrivals(1000, 10)
    assert times[0] > 0
    assert times[-1] < 10
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.05)  # as in a Poisson process; an even schedule has 0


def test_closed_loop_keeps_its_number_of_callers() -> None:
    now = highest = 0

    async def send(_: bytes) -> None:
        nonlocal now, highest
        now += 1
        highest = max(highest, now)
        await asyncio.sleep(0.01)
        now -= 1

    point = asyncio.run(closed_loop(send, payloads(), concurrency=5, seconds=0.2))
    assert highest == 5
    assert 5 <= point.requests <= 105
    assert 10 <= point.p50_ms <= point.p90_ms <= point.p99_ms
    assert point.per_s == pytest.approx(point.requests / point.seconds)


def test_closed_loop_goes_on_until_it_has_the_minimum_but_not_for_ever() -> None:
    async def send(_: bytes) -> None:
        await asyncio.sleep(0.02)

    point = asyncio.run(closed_loop(send, payloads(), concurrency=1, seconds=0.06, minimum=8))
    assert point.requests >= 8
    start = time.perf_counter()
    point = asyncio.run(closed_loop(send, payloads(), concurrency=1, seconds=0.05, minimum=10_000))
    assert time.perf_counter() - start < 1


def test_open_loop_latency_counts_from_the_intended_time() -> None:
    """The server stalls for 0.3 s once: a generator that waited for it would see one slow request."""
    gate = asyncio.Event()

    async def send(payload: bytes) -> None:
        if payload == b"0":
            await asyncio.sleep(0.3)
            gate.set()
        await gate.wait()

    times = [index * 0.01 for index in range(20)]
    point = asyncio.run(open_loop(send, payloads(), times))
    assert point.requests == 20
    assert point.p50_ms > 150
    assert point.p99_ms >= 295


def test_open_loop_counts_a_generator_that_is_late_as_latency() -> None:
    async def send(payload: bytes) -> None:
        if payload == b"0":
            time.sleep(0.2)  # blocks the generator itself, which makes every later request late

    point = asyncio.run(open_loop(send, payloads(), [index * 0.01 for index in range(10)]))
    assert point.p50_ms > 100
    assert point.late_p99_ms is not None
    assert point.late_p99_ms > 100


def test_rejections_are_counted_and_other_failures_end_the_run() -> None:
    async def send(payload: bytes) -> None:
        if int(payload) % 2:
            raise QueueFull("full")

    def rejects(error: Exception) -> bool:
        return isinstance(error, QueueFull)

    point = asyncio.run(open_loop(send, payloads(), [0.001 * index for index in range(10)], rejects))
    assert (point.requests, point.rejected) == (5, 5)
    point = asyncio.run(closed_loop(send, payloads(), concurrency=2, seconds=0.05, is_rejection=rejects))
    assert point.rejected > 0
    with pytest.raises(ExceptionGroup):
        asyncio.run(closed_loop(send, payloads(), concurrency=2, seconds=0.05))


def test_a_point_without_an_answer_is_an_error() -> None:
    async def send(_: bytes) -> None:
        raise QueueFull("full")

    with pytest.raises(BenchError, match="no request was answered"):
        asyncio.run(open_loop(send, payloads(), [0.0], lambda error: True))


@pytest.mark.parametrize(
    ("names", "batch"),
    [(("m",), 2.0), (("m", "m_tokenize", "m_engine"), 8.0), (("m", "other_engine"), 2.0)],
)
def test_the_batches_of_an_ensemble_are_its_engine_s(names: tuple[str, ...], batch: float) -> None:
    counts = {"m": (40, 20, 3), "m_engine": (80, 10, 0)}
    loaded: list[bool] = []

    def status() -> Any:
        models = []
        for name in names:
            texts, runs, hits = counts.get(name, (7, 7, 7))
            if not loaded:
                texts = runs = 0
            models.append(SimpleNamespace(name=name, texts=texts, runs=runs, cache_hits=hits))
        return SimpleNamespace(models=models)

    client = cast("Client", SimpleNamespace(status=status))
    variant = Variant(client, "", cast("BenchModel", None), "m")
    assert variant._status("m").cache_hits == 3
    variant._begin()
    loaded.append(True)
    assert variant._mean_batch(Point(9, 1.0, 9.0, 1.0, 1.0, 1.0)) == batch


def test_batches_are_rows_in_a_run_once_the_load_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(requests: int, rows: int, runs: int) -> Any:
        return metrics.parse(
            f'onecard_requests_total{{model="m",outcome="completed"}} {requests}\n'
            f'onecard_rows_total{{model="m"}} {rows}\nonecard_runs_total{{model="m"}} {runs}\n'
        )

    readings = iter([reading(5, 5, 5), reading(5, 5, 5), reading(9, 9, 6), reading(25, 85, 16)])
    monkeypatch.setattr("client.bench.metrics.read", lambda: next(readings))
    variant = Variant(cast("Client", None), "", cast("BenchModel", None), "m")
    variant._begin()
    warm_up, point = Point(5, 1.0, 5.0, 1.0, 1.0, 1.0), Point(14, 1.0, 14.0, 1.0, 1.0, 1.0, rejected=1)
    assert variant._mean_batch(warm_up, point) == 80 / 11
