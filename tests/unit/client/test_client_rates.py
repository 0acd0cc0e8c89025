"""Two readings of the metrics to rates and quantiles; what is parsed, and what restarts do."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import metrics
from client.metrics import Scrape
from client.rates import Window, increase, mean_of, quantile, rates, since_start

BOUNDS = st.lists(st.floats(0.001, 100), min_size=1, max_size=8, unique=True)


def bucket_quantile(share: float, buckets: list[tuple[float, float]]) -> float:
    """As in Prometheus's promql/quantile.go, statement by statement."""
    if buckets[-1][0] != math.inf or len(buckets) < 2:
        return math.nan
    observations = buckets[-1][1]
    if observations == 0:
        return math.nan
    rank = share * observations
    b = 0
    while b < len(buckets) - 1 and not buckets[b][1] >= rank:
        b += 1
    if b == len(buckets) - 1:
        return buckets[-2][0]
    if b == 0 and buckets[0][0] <= 0:
        return buckets[0][0]
    start, end, count = 0.0, buckets[b][0], buckets[b][1]
    if b > 0:
        start = buckets[b - 1][0]
        count -= buckets[b - 1][1]
        rank -= buckets[b - 1][1]
    return start + (end - start) * (rank / count)


def cumulative(bounds: list[float], counts: list[int]) -> dict[float, float]:
    total = 0.0
    found = {}
    for bound, count in zip([*sorted(bounds), math.inf], counts, strict=True):
        total += count
        found[bound] = total
    return found


@st.composite
def histograms(draw: st.DrawFn) -> dict[float, float]:
    bounds = draw(BOUNDS)
    size = len(bounds) + 1
    return cumulative(bounds, draw(st.lists(st.integers(0, 50), min_size=size, max_size=size)))


@given(buckets=histograms(), share=st.floats(0.01, 1))
def test_a_quantile_is_prometheus_s(buckets: dict[float, float], share: float) -> None:
    expected = bucket_quantile(share, sorted(buckets.items()))
    found = quantile(share, buckets)
    if math.isnan(expected):
        assert found is None
    else:
        assert found == pytest.approx(expected)


@given(buckets=histograms(), low=st.floats(0, 1), high=st.floats(0, 1))
def test_quantiles_do_not_fall(buckets: dict[float, float], low: float, high: float) -> None:
    low, high = sorted((low, high))
    first, second = quantile(low, buckets), quantile(high, buckets)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert first <= second + 1e-9
        assert 0 <= first <= max(bound for bound in buckets if bound != math.inf)


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ({1.0: 10, math.inf: 10}, 0.5, 0.5),
        ({1.0: 5, 2.0: 10, math.inf: 10}, 0.75, 1.5),
        ({1.0: 5, 2.0: 6, math.inf: 10}, 0.99, 2.0),  # in the last bucket: the bound below it
        ({1.0: 5, 2.0: 3, math.inf: 10}, 0.25, 0.5),  # read between two updates
        ({math.inf: 10}, 0.5, None),
        ({1.0: 10}, 0.5, None),
        ({1.0: 0, math.inf: 0}, 0.5, None),
        ({}, 0.5, None),
    ],
)
def test_known_quantiles(buckets: Mapping[float, float], share: float, expected: float | None) -> None:
    assert quantile(share, buckets) == expected


@given(values=st.lists(st.tuples(st.floats(0, 1e12), st.booleans()), min_size=2, max_size=20))
def test_no_increase_is_negative_and_none_is_lost_or_made(values: list[tuple[float, bool]]) -> None:
    """A counter that grows by the steps and is now and then reset before one."""
    counter, readings, counted = 0.0, [], 0.0
    for step, restarts in values:
        counter = step if restarts else counter + step
        readings.append(counter)
        counted += step
    found = [increase(a, b) for a, b in zip([0.0, *readings], readings, strict=False)]
    assert all(value >= 0 for value in found)
    assert sum(found) <= counted * (1 + 1e-9)
    if not any(restarts for _, restarts in values):
        assert sum(found) == pytest.approx(counted)


def scrape(at: float, **values: float) -> Scrape:
    """`requests` and so on, of model m."""
    names = {
        "completed": 'onecard_requests_total{model="m",version="1",outcome="completed"}',
        "failed": 'onecard_requests_total{model="m",version="1",outcome="failed"}',
        "full": 'onecard_rejections_total{model="m",version="1",reason="queue_full"}',
        "queue": 'onecard_queue_requests{model="m",version="1"}',
        "queue_sum": 'onecard_queue_seconds_sum{model="m",version="1"}',
        "queue_count": 'onecard_queue_seconds_count{model="m",version="1"}',
        "rows": 'onecard_rows_total{model="m",version="1"}',
        "runs": 'onecard_runs_total{model="m",version="1"}',
        "fast": 'onecard_request_seconds_bucket{model="m",version="1",le="0.1"}',
        "all": 'onecard_request_seconds_bucket{model="m",version="1",le="+Inf"}',
        "hits": 'nv_cache_num_hits_per_model{model="m",version="1"}',
        "misses": 'nv_cache_num_misses_per_model{model="m",version="1"}',
        "slots": 'onecard_llm_slots{model="m",version="1"}',
        "generated": 'onecard_llm_generated_tokens_total{model="m",version="1"}',
        "resident": 'onecard_resident_bytes{model="m",version="1"}',
        "planned": 'onecard_planned_bytes{model="m",version="1"}',
    }
    return metrics.parse("".join(f"{names[name]} {value}\n" for name, value in values.items()), at)


def test_rates_over_a_window() -> None:
    before = scrape(10, completed=100, failed=1, queue_sum=1, queue_count=100, rows=200, runs=50)
    after = scrape(
        12,
        completed=140,
        failed=3,
        full=8,
        queue=5,
        queue_sum=2,
        queue_count=140,
        rows=280,
        runs=60,
        fast=20,
        all=40,
        hits=6,
        misses=2,
        slots=4,
        generated=30,
        resident=2e9,
        planned=3e9,
    )
    [model] = rates(before, after)
    assert (model.name, model.requests_per_s, model.failed_per_s) == ("m", 21, 1)
    assert model.rejected_per_s == {"queue_full": 4}
    assert (model.queue_requests, model.queue_ms, model.batch) == (5, 25, 8)
    assert (model.p50_ms, model.p99_ms) == (100, 100)
    assert (model.cache_hits_per_s, model.cache_misses_per_s) == (3, 1)
    assert (model.slots, model.tokens_per_s) == (4, 15)
    assert (model.resident_bytes, model.planned_bytes) == (2e9, 3e9)


def test_what_did_not_happen_is_none() -> None:
    [model] = rates(scrape(0, completed=5), scrape(1, completed=5))
    assert model.requests_per_s == 0
    assert model.rejected_per_s == {}
    for value in (model.queue_ms, model.batch, model.p99_ms, model.slots, model.planned_bytes):
        assert value is None


def test_a_process_that_was_started_again_counts_from_zero() -> None:
    [model] = rates(scrape(0, completed=1000, rows=900, runs=90), scrape(2, completed=10, rows=8, runs=4))
    assert model.requests_per_s == 5
    assert model.batch == 2


def test_a_new_version_counts_beside_the_old_one() -> None:
    old = 'onecard_requests_total{model="m",version="1",outcome="completed"} '
    new = 'onecard_requests_total{model="m",version="2",outcome="completed"} '
    before, both = metrics.parse(f"{old}100\n", 0), metrics.parse(f"{old}104\n{new}6\n", 1)
    assert rates(before, both)[0].requests_per_s == 10
    assert rates(both, metrics.parse(f"{new}9\n", 2))[0].requests_per_s == 3  # the old one is unloaded


def test_models_without_metrics_of_ours_are_left_out() -> None:
    assert rates(Scrape(0), metrics.parse('nv_inference_count{model="other",version="1"} 5\n', 1)) == ()


def test_the_native_layout_has_triton_s_figures() -> None:
    def page(at: float, count: int) -> Scrape:
        lines = [
            f'nv_inference_request_success{{model="m",version="1"}} {count}',
            f'nv_inference_request_failure{{model="m",reason="OTHER",version="1"}} {count // 10}',
            f'nv_inference_request_success{{model="m_engine",version="1"}} {count}',
            f'nv_inference_request_failure{{model="m_engine",reason="REJECTED",version="1"}} {count // 20}',
            f'nv_inference_count{{model="m_engine",version="1"}} {8 * count}',
            f'nv_inference_exec_count{{model="m_engine",version="1"}} {count}',
            f'nv_inference_queue_duration_us{{model="m_engine",version="1"}} {3000 * count}',
            'nv_inference_pending_request_count{model="m_engine",version="1"} 7',
            f'onecard_tokens_total{{model="m"}} {9 * count}',
        ]
        return metrics.parse("\n".join(lines) + "\n", at)

    [model] = rates(page(0, 100), page(2, 200))
    assert (model.name, model.requests_per_s, model.failed_per_s) == ("m", 55, 5)
    assert model.rejected_per_s == {"rejected": 2.5}
    assert (model.queue_requests, model.queue_ms, model.batch) == (7, 3, 8)
    assert (model.p99_ms, model.cache_hits_per_s) == (None, None)


def test_totals_since_the_start() -> None:
    found = scrape(0, queue_sum=3, queue_count=12, fast=50, all=100)
    assert mean_of(found, "m", "onecard_queue_seconds") == 0.25
    assert mean_of(found, "m", "onecard_request_seconds") is None
    assert since_start(found, "m", "onecard_request_seconds", 0.25) == 0.05


def test_the_text_format() -> None:
    text = (
        "# HELP a What it is\n# TYPE a counter\n"
        'a{model="m"} 1\na{le="+Inf",model="m"} 2e3\n'
        'a{model="odd \\"name\\" \\\\ with, commas\\n",x="}"} 3 1700000000\n'
        'a{model="m",x="nan"} NaN\nplain 5\na{model="m",x="bad"} five\n'
    )
    found = metrics.parse(text, 7)
    assert found.at == 7
    assert set(found.models) == {"m", 'odd "name" \\ with, commas\n'}
    assert found.series("m", "a")[()] == 1
    assert found.series("m", "a")[(("le", "+Inf"),)] == 2000
    for value in ("nan", "bad"):
        assert (("x", value),) not in found.series("m", "a")
    assert found.total("m", "a", le="+Inf") == 2000
    assert found.total("nobody", "a") == 0


@given(text=st.text(max_size=300))
def test_no_text_breaks_the_parser(text: str) -> None:
    metrics.parse(text + "\n" + 'a{model="' + text + '"} 1\n')


def test_a_window_needs_no_model_before() -> None:
    window = Window(Scrape(0), scrape(1, completed=3), "m")
    assert window.by("onecard_requests_total", "outcome") == {"completed": 3}
