"""What is counted, as Prometheus will read it."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from triton_fakes import fake_triton

from triton_repo.runtime import metrics
from triton_repo.runtime.admission import Busy
from triton_repo.runtime.metrics import Histogram, Publisher, Reporter, Tally, labels
from triton_repo.runtime.texts import BadRequest, EngineFailed


@given(st.lists(st.floats(0, 100)))
def test_buckets_are_cumulative_and_hold_every_observation(seconds: list[float]) -> None:
    histogram = Histogram()
    for value in seconds:
        histogram.observe(value)
    found: Any = histogram.snapshot("x_seconds")
    buckets = found["x_seconds_bucket"]
    assert list(buckets)[-1] == "+Inf"
    assert buckets["+Inf"] == found["x_seconds_count"] == len(seconds)
    assert found["x_seconds_sum"] == pytest.approx(sum(seconds))
    for bound, count in buckets.items():
        assert count == sum(value <= float(bound) for value in seconds)
    assert all(float(one) < float(next_one) for one, next_one in pairwise(buckets))


def test_every_end_is_counted_once() -> None:
    tally = Tally()
    tally.end(None, 0.5)
    tally.end(EngineFailed("x"), 0.5)
    tally.end(RuntimeError("no room"), 0.5)
    tally.end(BadRequest("x"))
    for reason in ("queue_full", "deadline", "expired", "displaced", "unloading"):
        tally.end(Busy("x", reason))  # type: ignore[arg-type]
    tally.cancel()
    found: Any = tally.snapshot()
    assert found["requests_total"] == {"completed": 1, "failed": 2, "cancelled": 1, "rejected": 6}
    assert set(found["rejections_total"].values()) == {1}
    assert sum(found["rejections_total"].values()) == found["requests_total"]["rejected"]
    assert found["request_seconds_count"] == 3, "rejected ones would make the server look fast"


def test_differences_are_sent_and_what_rests_is_not() -> None:
    triton = fake_triton()
    publisher = Publisher(triton, {"model": "m", "version": "1"})
    publisher.publish({"requests_total": {"completed": 2, "failed": 0}, "queue_requests": 3})
    publisher.publish({"requests_total": {"completed": 5, "failed": 0}, "queue_requests": 0})
    publisher.publish({"requests_total": {"completed": 5, "failed": 0}, "queue_requests": 0})
    requests = triton.families["onecard_requests_total"]
    assert (requests.kind, requests.made["completed"].value, requests.made["completed"].calls) == (
        "counter",
        5,
        2,
    )
    assert requests.made["failed"].calls == 0, "it is there, with 0"
    queue = triton.families["onecard_queue_requests"]
    assert (queue.kind, queue.made[""].value, queue.made[""].calls) == ("gauge", 0, 2)
    reported = triton.families["onecard_reported_timestamp_seconds"].made[""]
    assert (reported.calls, reported.value) == (3, pytest.approx(time.time(), abs=5))


def test_counters_begin_at_zero_and_gauges_are_what_they_are() -> None:
    triton = fake_triton()
    publisher = Publisher(triton, {"model": "m"})
    publisher.begin({"requests_total": {"completed": 4}, "queue_seconds_sum": 0.5, "queue_requests": 2})
    publisher.publish({"requests_total": {"completed": 4}, "queue_seconds_sum": 0.5, "queue_requests": 2})
    made = {name: family.made for name, family in triton.families.items()}
    assert made["onecard_requests_total"]["completed"].calls == 0, "it is there, with 0"
    assert made["onecard_queue_seconds_sum"][""].value == 0
    assert made["onecard_queue_requests"][""].value == 2
    publisher.publish({"requests_total": {"completed": 7}, "queue_seconds_sum": 0.75, "queue_requests": 2})
    assert made["onecard_requests_total"]["completed"].value == 3
    assert made["onecard_queue_seconds_sum"][""].value == 0.25


def test_a_log_that_fails_too_does_not_end_the_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_INTERVAL_S", 0.005)
    triton = fake_triton()

    def fails(message: str = "") -> Any:
        raise RuntimeError("no shared memory")

    monkeypatch.setattr(triton.Logger, "log_error", fails)
    broken = iter([True, True, False, False, False])
    reporter = Reporter(
        Publisher(triton, {"model": "m"}),
        lambda: fails() if next(broken, False) else {"queue_requests": 7},
    )
    deadline = time.monotonic() + 5
    while not triton.families and time.monotonic() < deadline:
        time.sleep(0.001)
    reporter.close()
    assert triton.families["onecard_queue_requests"].made[""].value == 7


def test_whoever_reads_in_between_finds_cumulative_buckets() -> None:
    triton = fake_triton()
    publisher = Publisher(triton, {"model": "m"})
    publisher.publish({"queue_seconds_bucket": {"1": 0, "2": 0, "+Inf": 0}})
    made = triton.families["onecard_queue_seconds_bucket"].made
    order: list[str] = []
    for label, metric in made.items():
        metric.increment = lambda amount, label=label: order.append(label)
    publisher.publish({"queue_seconds_bucket": {"1": 5, "2": 6, "+Inf": 7}})
    assert order == ["+Inf", "2", "1"]


def test_a_failure_to_publish_is_logged_without_its_text_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "_INTERVAL_S", 0.005)
    triton = fake_triton()
    looks: list[int] = []

    def snapshot() -> dict[str, float]:
        looks.append(1)
        if len(looks) == 1:
            raise RuntimeError("secret")
        return {"queue_requests": 7}

    reporter = Reporter(Publisher(triton, {"model": "m"}), snapshot)
    while len(looks) < 3:
        pass
    reporter.close()
    assert triton.log == ["publishing metrics failed: RuntimeError"]
    assert triton.families["onecard_queue_requests"].made[""].value == 7


def test_instances_side_by_side_have_gauges_of_their_own() -> None:
    args = {"model_name": "m", "model_version": "3", "model_instance_name": "m_0_1"}
    assert labels(args) == {"model": "m", "version": "3"}
    assert labels(args, 2) == {"model": "m", "version": "3", "replica": "m_0_1"}


def test_every_family_has_a_name_prometheus_knows_by_its_kind() -> None:
    for name, (label, text) in metrics._FAMILIES.items():
        assert text
        assert (label == "le") == name.endswith("_bucket")
        if not metrics._is_counter(name):
            assert not name.endswith("total")


def test_resident_memory_is_this_process_s() -> None:
    before = metrics.resident_bytes()
    assert before > 8 << 20
    block = bytearray(b"x") * (64 << 20)
    assert metrics.resident_bytes() - before >= 48 << 20
    del block
