"""What `client status` tells, with the models' metrics and without them."""

from __future__ import annotations

from typing import Any

import pytest

from client import metrics
from client.flows import ReadMetrics
from client.metrics import Scrape
from client.status import UNKNOWN_ADDRESS, model_status, server_status
from client.transport import Endpoint
from client.types import ModelInfo, ServerStatus

ENTRY = {
    "name": "m",
    "version": "3",
    "inference_count": "80",
    "execution_count": "10",
    "inference_stats": {
        "success": {"count": "40", "ns": "80000000"},
        "fail": {"count": "2"},
        "queue": {"count": "40", "ns": "20000000"},
        "cache_hit": {"count": "7"},
        "cache_miss": {"count": "9"},
    },
}
OURS = metrics.parse(
    'onecard_requests_total{model="m",version="3",outcome="completed"} 50\n'
    'onecard_requests_total{model="m",version="2",outcome="completed"} 20\n'
    'onecard_requests_total{model="m",version="3",outcome="failed"} 1\n'
    'onecard_requests_total{model="m",version="3",outcome="rejected"} 4\n'
    'onecard_rejections_total{model="m",version="3",reason="queue_full"} 4\n'
    'onecard_rejections_total{model="m",version="3",reason="deadline"} 0\n'
    'onecard_rows_total{model="m",version="3"} 60\nonecard_runs_total{model="m",version="3"} 20\n'
    'onecard_queue_seconds_sum{model="m",version="3"} 0.5\n'
    'onecard_queue_seconds_count{model="m",version="3"} 50\n'
    'onecard_request_seconds_sum{model="m",version="3"} 1\n'
    'onecard_request_seconds_count{model="m",version="3"} 50\n'
    'onecard_request_seconds_bucket{model="m",version="3",le="0.1"} 50\n'
    'onecard_request_seconds_bucket{model="m",version="3",le="+Inf"} 50\n'
    'onecard_resident_bytes{model="m",version="3"} 1e9\n'
)


def test_a_model_s_own_metrics_count() -> None:
    status = model_status(ENTRY, None, OURS)
    assert (status.name, status.version, status.requests, status.failed) == ("m", "3", 75, 1)
    assert status.rejected == {"queue_full": 4}
    assert (status.texts, status.runs, status.mean_batch_size) == (60, 20, 3)
    assert (status.queue_ms, status.request_ms, status.p99_ms) == (10, 20, 99)
    assert (status.cache_hits, status.cache_misses) == (7, 9)
    assert (status.resident_bytes, status.planned_bytes) == (1e9, None)
    assert status.generation is None


def test_a_model_of_triton_s_own_backends_has_triton_s_figures() -> None:
    status = model_status(ENTRY, None, metrics.parse('onecard_tokens_total{model="m"} 9\n'))
    assert (status.requests, status.failed, status.rejected) == (42, 2, None)
    assert (status.texts, status.mean_batch_size) == (80, 8)
    assert (status.queue_ms, status.request_ms) == (0.5, 2)


def test_without_metrics_nothing_is_claimed_about_times_and_batches() -> None:
    status = model_status(ENTRY, None, Scrape(0, error="refused"))
    assert (status.requests, status.failed, status.cache_hits) == (42, 2, 7)
    for value in (status.rejected, status.texts, status.mean_batch_size, status.queue_ms, status.request_ms):
        assert value is None


def run(url: str, scrape: Scrape) -> tuple[ServerStatus, list[Any]]:
    flow, effects = server_status(Endpoint.parse(url)), []
    info = ModelInfo(
        name="m",
        task="embed",
        precision="int8",
        target=None,
        max_batch=4,
        inputs=frozenset(),
        outputs=frozenset(),
        cached=False,
    )
    answers = iter([{"name": "triton", "version": "2"}, {"model_stats": [ENTRY]}, info, scrape])
    try:
        effects.append(next(flow))
        while True:
            effects.append(flow.send(next(answers)))
    except StopIteration as stop:
        return stop.value, effects


def test_the_server_s_status_says_where_metrics_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONECARD_URL_METRICS", raising=False)
    status, effects = run("card:8001", OURS)
    assert effects[-1] == ReadMetrics("card:8002")
    assert (status.metrics, status.metrics_error) == ("card:8002", None)
    assert [(model.task, model.requests) for model in status.models] == [("embed", 75)]
    status, _ = run("card:8001", Scrape(0, error="refused"))
    assert status.metrics_error == "refused"
    status, effects = run("card:9999", OURS)
    assert not any(isinstance(effect, ReadMetrics) for effect in effects)
    assert (status.metrics, status.metrics_error) == ("", UNKNOWN_ADDRESS)
