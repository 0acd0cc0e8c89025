"""The served side: load on one variant, what the server's counters say about it, and its answers."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..client import Client
from ..errors import BenchError
from ..types import ModelStatus
from . import metrics
from .loadgen import (
    Point,
    Send,
    Sender,
    arrivals,
    closed_loop,
    first_failure,
    grpc_failure,
    open_loop,
    was_rejected,
)
from .summary import BenchModel, Item
from .workload import Payloads

CONCURRENCIES = (1, 8, 32, 64)
CACHED_SECONDS = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how hard to measure."""

    seconds: float
    warm_up: float
    minimum: int
    pool: int  # texts or passages that the load repeats
    evaluated: int  # texts or passages whose answers are judged, at most
    rates: tuple[float, ...]  # per cent of the closed-loop peak


QUICK = Plan(seconds=1.2, warm_up=0.25, minimum=50, pool=256, evaluated=1000, rates=(50, 80))
FULL = Plan(seconds=5.0, warm_up=1.0, minimum=200, pool=512, evaluated=5000, rates=(50, 80))


@dataclass(frozen=True, slots=True)
class ServedPoint:
    """A point with the mean number of rows in a run of the engine during it."""

    point: Point
    mean_batch: float | None


@dataclass(frozen=True, slots=True)
class Load:
    """All points of one variant. `cached_p50_ms` is None when its cache is off."""

    closed: dict[int, ServedPoint]
    open: dict[float, ServedPoint]
    cached_p50_ms: float | None
    cache_hits: int


class Variant:
    """Loads one served variant of a model."""

    def __init__(self, client: Client, address: str, model: BenchModel, triton_name: str) -> None:
        self._client = client
        self._address = address
        self._name = triton_name
        self._model = model

    def load(self, pool: Sequence[Item], plan: Plan) -> Load:
        """Every point of the plan; BenchError when requests fail or the response cache answers any."""
        payloads = Payloads(self._model, self._name, pool)
        # A full collection over everything imported would stop the generator for tens of milliseconds.
        gc.collect()
        gc.freeze()
        try:
            return asyncio.run(self._load(payloads, plan))
        except BaseExceptionGroup as group:
            failure = grpc_failure(first_failure(group), self._address, self._name)
            raise BenchError(f"a request failed under load: {failure}", model=self._name) from group

    async def _load(self, payloads: Payloads, plan: Plan) -> Load:
        self._begin()
        hits_before = self._status(self._name).cache_hits
        async with Sender(self._address) as send:
            closed = {
                concurrency: await self._closed(send, payloads, concurrency, plan)
                for concurrency in CONCURRENCIES
            }
            peak = max(measured.point.per_s for measured in closed.values())
            opened = {
                percent: await self._open(send, payloads, peak * percent / 100, plan.seconds)
                for percent in plan.rates
            }
            hits = self._status(self._name).cache_hits - hits_before
            if hits:
                raise BenchError(
                    f"the response cache answered {hits} requests: the measurement would flatter",
                    model=self._name,
                )
            cached = await self._cached(send, payloads.fixed())
        return Load(closed, opened, cached, hits)

    async def _closed(self, send: Send, payloads: Payloads, concurrency: int, plan: Plan) -> ServedPoint:
        warm_up = await closed_loop(
            send, payloads, concurrency=concurrency, seconds=plan.warm_up, is_rejection=was_rejected
        )
        point = await closed_loop(
            send,
            payloads,
            concurrency=concurrency,
            seconds=plan.seconds,
            minimum=plan.minimum,
            is_rejection=was_rejected,
        )
        return ServedPoint(point, self._mean_batch(warm_up, point))

    async def _open(self, send: Send, payloads: Payloads, rate: float, seconds: float) -> ServedPoint:
        times = arrivals(rate, seconds)
        point = await open_loop(send, payloads, times or [0.0], was_rejected)
        return ServedPoint(point, self._mean_batch(point))

    async def _cached(self, send: Send, same: Iterator[bytes]) -> float | None:
        if not self._client.describe(self._name).cached:
            return None
        await send(next(same))
        return (await closed_loop(send, same, concurrency=1, seconds=CACHED_SECONDS)).p50_ms

    def _begin(self) -> None:
        self._ended = 0  # requests of the load, answered or rejected
        self._base = metrics.read()
        self._counted = self._counts()

    def _mean_batch(self, *points: Point) -> float | None:
        """Rows in a run of the engine since this was last asked; `points` are all that was sent meanwhile."""
        self._ended += sum(point.requests + point.rejected for point in points)
        before, self._counted = self._counted, self._counts()
        rows, runs = (now - then for now, then in zip(self._counted, before, strict=True))
        return rows / runs if runs > 0 else None

    def _counts(self) -> tuple[float, float]:
        """Rows and runs of the engine, once all requests of the load are among them."""
        scrape = metrics.settled(self._name, self._ended, self._base)
        if scrape.series(self._name, "onecard_runs_total"):
            rows, runs = (scrape.total(self._name, f"onecard_{what}_total") for what in ("rows", "runs"))
            return rows, runs
        # An ensemble hands requests on one by one: those of the native layout meet in its engine's batches.
        models = {model.name: model for model in self._client.status().models}
        batched = models.get(f"{self._name}_engine", models.get(self._name))
        return (batched.texts or 0, batched.runs or 0) if batched else (0, 0)

    def _status(self, name: str) -> ModelStatus:
        for model in self._client.status().models:
            if model.name == name:
                return model
        raise BenchError("the model is gone from the server", model=self._name)

    def answers(self, items: Sequence[Item]) -> Any:
        """Label names [N], vectors [N, D] or the concatenated scores of all groups, in the items' order."""
        if self._model.task == "classify":
            return [a.label for a in self._client.classify([i.text for i in items], model=self._name)]
        if self._model.task == "embed":
            answers = self._client.embed([item.text for item in items], model=self._name)
            return np.stack([answer.vector for answer in answers])
        with ThreadPoolExecutor(8) as threads:
            return [score for scores in threads.map(self._scores, items) for score in scores]

    def _scores(self, item: Item) -> list[float]:
        ranked = self._client.rerank(item.text, item.passages, model=self._name)
        return [answer.score for answer in sorted(ranked, key=lambda answer: answer.index)]
