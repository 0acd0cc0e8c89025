"""What `client status` tells: the loaded models, from Triton's statistics and the models' own metrics."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from . import metrics, rates
from .errors import ModelNotReady, UnknownModel
from .flows import Ask, Describe, Flow, ReadMetrics
from .metrics import Scrape
from .transport import Endpoint
from .types import ModelInfo, ModelStatus, ServerStatus

UNKNOWN_ADDRESS = "no address is known: set ONECARD_URL_METRICS"


def server_status(endpoint: Endpoint) -> Flow[ServerStatus]:
    metadata = yield Ask("metadata")
    report = yield Ask("statistics")
    entries = sorted(report.get("model_stats", ()), key=lambda entry: (entry["name"], entry["version"]))
    infos: dict[str, ModelInfo] = {}
    for name in {entry["name"] for entry in entries}:
        with suppress(UnknownModel, ModelNotReady):  # unloaded since
            infos[name] = yield Describe(name)
    address = metrics.address_for(endpoint)
    scrape: Scrape = (yield ReadMetrics(address)) if address else Scrape(0.0, error=UNKNOWN_ADDRESS)
    return ServerStatus(
        url=endpoint.address,
        protocol=endpoint.protocol,
        server=str(metadata.get("name", "")),
        version=str(metadata.get("version", "")),
        models=tuple(model_status(entry, infos.get(entry["name"]), scrape) for entry in entries),
        metrics=address,
        metrics_error=scrape.error or None,
    )


def model_status(entry: Mapping[str, Any], info: ModelInfo | None, scrape: Scrape) -> ModelStatus:
    """From the model's statistics and the metrics, of which a model may have none."""
    name = str(entry["name"])
    values: dict[str, Any] = {
        "name": name,
        "version": str(entry.get("version", "")),
        "task": info.task if info else None,
        "precision": info.precision if info else None,
        "requests": _stat(entry, "success") + _stat(entry, "fail"),
        "failed": _stat(entry, "fail"),
        "cache_hits": _stat(entry, "cache_hit"),
        "cache_misses": _stat(entry, "cache_miss"),
    }
    if scrape.series(name, "onecard_requests_total"):
        values |= _from_metrics(name, scrape)
    elif not scrape.error:
        values |= _from_statistics(entry)
    if values.get("runs"):
        values["mean_batch_size"] = values["texts"] / values["runs"]
    return ModelStatus(**values, generation=metrics.generation_status(scrape, name))


def _from_metrics(name: str, scrape: Scrape) -> dict[str, Any]:
    """Of all loaded versions together."""

    def count(metric: str, **labels: str) -> int:
        return int(scrape.total(name, f"onecard_{metric}", **labels))

    def gauge(metric: str) -> int | None:
        return count(metric) if scrape.series(name, f"onecard_{metric}") else None

    rejected: dict[str, int] = {}
    for labels, value in scrape.series(name, "onecard_rejections_total").items():
        reason = dict(labels).get("reason", "")
        if value:
            rejected[reason] = rejected.get(reason, 0) + int(value)
    return {
        "requests": count("requests_total"),
        "failed": count("requests_total", outcome="failed"),
        "rejected": rejected,
        "texts": gauge("rows_total"),
        "runs": gauge("runs_total"),
        "queue_ms": rates.milliseconds(rates.mean_of(scrape, name, "onecard_queue_seconds")),
        "request_ms": rates.milliseconds(rates.mean_of(scrape, name, "onecard_request_seconds")),
        "p99_ms": rates.milliseconds(rates.since_start(scrape, name, "onecard_request_seconds", 0.99)),
        "resident_bytes": gauge("resident_bytes"),
        "planned_bytes": gauge("planned_bytes"),
    }


def _from_statistics(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "texts": _int(entry, "inference_count"),
        "runs": _int(entry, "execution_count"),
        "queue_ms": _mean_ms(entry, "queue"),
        "request_ms": _mean_ms(entry, "success"),
    }


def _stat(entry: Mapping[str, Any], name: str, field: str = "count") -> int:
    return _int(entry.get("inference_stats", {}).get(name, {}), field)


def _int(values: Mapping[str, Any], name: str) -> int:
    return int(values.get(name, 0))  # gRPC's JSON gives 64-bit numbers as strings


def _mean_ms(entry: Mapping[str, Any], name: str) -> float | None:
    count = _stat(entry, name)
    return _stat(entry, name, "ns") / count / 1e6 if count else None
