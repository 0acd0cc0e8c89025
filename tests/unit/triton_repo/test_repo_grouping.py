"""Length grouping: a partition, within the batch limit, never dearer than any other split of the order."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_repo.runtime.grouping import measure_overhead, plan_groups

lengths_of_texts = st.lists(st.integers(1, 256), max_size=80)


def cost(lengths: list[int], groups: list[list[int]], overhead: float) -> float:
    return sum(overhead + len(group) * max(lengths[i] for i in group) for group in groups)


NO_LIMIT = 1_000_000


def plan_limited(lengths: list[int], max_batch: int, overhead: float) -> list[list[int]]:
    return plan_groups(lengths, max_batch=max_batch, overhead=overhead, max_tokens=NO_LIMIT)


@given(lengths_of_texts, st.integers(1, 64), st.floats(0, 500), st.integers(1, 2000))
def test_every_index_comes_once_and_no_group_is_too_large(
    lengths: list[int], max_batch: int, overhead: float, max_tokens: int
) -> None:
    groups = plan_groups(lengths, max_batch=max_batch, overhead=overhead, max_tokens=max_tokens)
    assert all(len(group) * lengths[group[-1]] <= max_tokens or len(group) == 1 for group in groups)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert all(1 <= len(group) <= max_batch for group in groups)
    widths = [lengths[group[-1]] for group in groups]
    assert widths == sorted(widths)
    assert all(lengths[group[-1]] == max(lengths[i] for i in group) for group in groups)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=7),
    st.integers(1, 7),
    st.floats(0, 60),
    st.integers(1, 200),
)
def test_no_partition_is_cheaper(
    lengths: list[int], max_batch: int, overhead: float, max_tokens: int
) -> None:
    """Against every split of the sorted order, by brute force."""
    groups = plan_groups(lengths, max_batch=max_batch, overhead=overhead, max_tokens=max_tokens)
    chosen = cost(lengths, groups, overhead)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        groups, current = [], [order[0]]
        for cut, index in zip(cuts, order[1:], strict=True):
            if cut:
                groups.append(current)
                current = []
            current.append(index)
        groups.append(current)
        rows = [len(group) * max(lengths[i] for i in group) for group in groups]
        fits = all(r <= max_tokens or len(g) == 1 for r, g in zip(rows, groups, strict=True))
        if fits and all(len(group) <= max_batch for group in groups):
            assert chosen <= cost(lengths, groups, overhead) + 1e-6


def test_short_texts_do_not_pay_for_a_long_one() -> None:
    lengths = [8] * 7 + [250]
    assert plan_limited(lengths, 64, 30) == [[0, 1, 2, 3, 4, 5, 6], [7]]


def test_a_dear_run_is_shared() -> None:
    assert plan_limited([10, 12], 64, 30) == [[0, 1]]
    assert plan_limited([10, 60], 64, 30) == [[0], [1]]
    assert plan_limited([], 4, 30) == []


def test_planning_a_thousand_rows_takes_milliseconds() -> None:
    started = time.process_time()
    plan_limited([1 + i * 37 % 256 for i in range(1024)], 64, 30)
    assert time.process_time() - started < 0.25


@pytest.mark.parametrize(("fixed_s", "low", "high"), [(0.0, 8, 20), (0.02, 60, 512)])
def test_the_overhead_is_measured_in_tokens(fixed_s: float, low: float, high: float) -> None:
    """An engine that takes 0.1 ms per token and `fixed_s` per run."""

    def run(batch: int, width: int) -> None:
        time.sleep(fixed_s + batch * width * 1e-4)

    assert low <= measure_overhead(run, batch=4, width=32) <= high
