"""What happened between two readings of the metrics: rates, means and quantiles. No I/O.

Counters that begin again at zero, because a process was started again, count from there: no rate is negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .metrics import Labels, Scrape, Series


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRates:
    """One model over the last window. Rates are per second, times in ms; None where nothing was counted, or
    where the model has nothing of the kind.

    `rejected_per_s` is by reason. `queue_ms` is the mean from arrival to start, `p50_ms` and `p99_ms` are to
    the last response. `batch` is rows per run of the engine.
    """

    name: str
    requests_per_s: float
    failed_per_s: float
    cancelled_per_s: float
    rejected_per_s: Mapping[str, float] = field(default_factory=dict)
    queue_requests: int | None = None
    queue_ms: float | None = None
    batch: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    cache_hits_per_s: float | None = None
    cache_misses_per_s: float | None = None
    slots: int | None = None
    slots_active: int | None = None
    tokens_per_s: float | None = None
    first_token_p50_ms: float | None = None
    first_token_p99_ms: float | None = None
    resident_bytes: int | None = None
    planned_bytes: int | None = None


def rates(before: Scrape, after: Scrape) -> tuple[ModelRates, ...]:
    """Every model of the later reading that publishes metrics of ours, by name."""
    found = []
    for name in sorted(after.models):
        if after.series(name, "onecard_requests_total"):
            found.append(_model(Window(before, after, name)))
        elif after.series(name, "onecard_tokens_total"):
            found.append(_native(Window(before, after, name), Window(before, after, f"{name}_engine")))
    return tuple(found)


def _native(whole: Window, engine: Window) -> ModelRates:
    """Of the native layout Triton's figures: the ensemble's requests, the engine's queue and batches."""
    seconds = max(whole.seconds, 1e-9)
    failures = whole.by("nv_inference_request_failure", "reason")
    rejected = engine.by("nv_inference_request_failure", "reason").get("REJECTED", 0.0)
    wait_us = engine.ratio("nv_inference_queue_duration_us", "nv_inference_request_success")
    return ModelRates(
        name=whole.model,
        requests_per_s=(whole.increase("nv_inference_request_success") + sum(failures.values())) / seconds,
        failed_per_s=sum(failures.values()) / seconds,
        cancelled_per_s=failures.get("CANCELED", 0.0) / seconds,
        rejected_per_s={"rejected": rejected / seconds} if rejected else {},
        queue_requests=int(engine.after.total(engine.model, "nv_inference_pending_request_count")),
        queue_ms=None if wait_us is None else wait_us / 1e3,
        batch=engine.ratio("nv_inference_count", "nv_inference_exec_count"),
        **_cached(whole),
    )


def _cached(window: Window) -> dict[str, Any]:
    if not window.after.series(window.model, "nv_cache_num_hits_per_model"):
        return {}
    seconds = max(window.seconds, 1e-9)
    return {
        f"cache_{what}_per_s": window.increase(f"nv_cache_num_{what}_per_model") / seconds
        for what in ("hits", "misses")
    }


def _model(window: Window) -> ModelRates:
    def gauge(name: str) -> int | None:
        series = window.after.series(window.model, name)
        return int(sum(series.values())) if series else None

    outcomes = window.by("onecard_requests_total", "outcome")
    rejections = window.by("onecard_rejections_total", "reason")
    seconds = max(window.seconds, 1e-9)
    generates = bool(window.after.series(window.model, "onecard_llm_slots"))
    return ModelRates(
        name=window.model,
        requests_per_s=sum(outcomes.values()) / seconds,
        failed_per_s=outcomes.get("failed", 0.0) / seconds,
        cancelled_per_s=outcomes.get("cancelled", 0.0) / seconds,
        rejected_per_s={reason: count / seconds for reason, count in rejections.items() if count},
        queue_requests=gauge("onecard_queue_requests"),
        queue_ms=milliseconds(window.ratio("onecard_queue_seconds_sum", "onecard_queue_seconds_count")),
        batch=window.ratio("onecard_rows_total", "onecard_runs_total"),
        p50_ms=milliseconds(window.quantile("onecard_request_seconds_bucket", 0.5)),
        p99_ms=milliseconds(window.quantile("onecard_request_seconds_bucket", 0.99)),
        slots=gauge("onecard_llm_slots"),
        slots_active=gauge("onecard_llm_slots_active"),
        tokens_per_s=window.increase("onecard_llm_generated_tokens_total") / seconds if generates else None,
        first_token_p50_ms=milliseconds(window.quantile("onecard_first_token_seconds_bucket", 0.5)),
        first_token_p99_ms=milliseconds(window.quantile("onecard_first_token_seconds_bucket", 0.99)),
        resident_bytes=gauge("onecard_resident_bytes"),
        planned_bytes=gauge("onecard_planned_bytes"),
        **_cached(window),
    )


@dataclass(frozen=True, slots=True)
class Window:
    """One model between two readings."""

    before: Scrape
    after: Scrape
    model: str

    @property
    def seconds(self) -> float:
        return self.after.at - self.before.at

    def increases(self, name: str) -> dict[Labels, float]:
        """By series. One that was not there before counts from zero, as does one that began again."""
        before = self.before.series(self.model, name)
        return {
            labels: increase(before.get(labels, 0.0), value)
            for labels, value in self.after.series(self.model, name).items()
        }

    def increase(self, name: str) -> float:
        return sum(self.increases(name).values())

    def by(self, name: str, label: str) -> dict[str, float]:
        """Increases by one label's value, the other labels together."""
        found: dict[str, float] = {}
        for labels, value in self.increases(name).items():
            key = dict(labels).get(label, "")
            found[key] = found.get(key, 0.0) + value
        return found

    def ratio(self, name: str, over: str) -> float | None:
        count = self.increase(over)
        return self.increase(name) / count if count > 0 else None

    def quantile(self, name: str, share: float) -> float | None:
        return quantile(share, _bounds(self.increases(name)))


def increase(before: float, after: float) -> float:
    return after - before if after >= before else max(after, 0.0)


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """Of observations in cumulative buckets by upper bound, as Prometheus's histogram_quantile computes it:
    evenly spread within a bucket, the lowest beginning at 0; in the last bucket, its lower bound.

    None without observations, or without the bucket of all (+Inf) and one more.
    """
    bounds = sorted(buckets)
    if len(bounds) < 2 or bounds[-1] != math.inf:
        return None
    counts: list[float] = []
    for bound in bounds:  # a scrape may have come between two updates: never fewer than below
        counts.append(max(buckets[bound], counts[-1] if counts else 0.0))
    if counts[-1] <= 0:
        return None
    rank = share * counts[-1]
    place = next(index for index, count in enumerate(counts) if count >= rank)
    if place == len(bounds) - 1:
        return bounds[-2]
    upper = bounds[place]
    if place == 0 and upper <= 0:
        return upper
    lower, below = (bounds[place - 1], counts[place - 1]) if place else (0.0, 0.0)
    inside = counts[place] - below
    return lower + (upper - lower) * ((rank - below) / inside if inside else 1.0)


def mean_of(scrape: Scrape, model: str, name: str) -> float | None:
    """The mean of a histogram since the server started."""
    count = scrape.total(model, f"{name}_count")
    return scrape.total(model, f"{name}_sum") / count if count else None


def since_start(scrape: Scrape, model: str, name: str, share: float) -> float | None:
    """A quantile of a histogram since the server started."""
    return quantile(share, _bounds(scrape.series(model, f"{name}_bucket")))


def _bounds(series: Series) -> dict[float, float]:
    """Counts by upper bound, versions of the model together."""
    found: dict[float, float] = {}
    for labels, value in series.items():
        try:
            bound = float(dict(labels).get("le", ""))
        except ValueError:
            continue
        found[bound] = found.get(bound, 0.0) + value
    return found


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
