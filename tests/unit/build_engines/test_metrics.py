"""The metrics against SciPy and against their definitions, on data with ties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from build_engines.metrics import accuracy, ndcg_at_k, spearman


@pytest.mark.parametrize("seed", range(40))
def test_spearman_is_scipys(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    size = int(rng.integers(3, 60))
    a = rng.integers(0, size // 2 + 2, size).astype(float)
    b = np.where(rng.random(size) < 0.5, a, rng.normal(size=size))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        pytest.skip("constant sample")
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_of_known_orders() -> None:
    assert spearman([1, 2, 3], [10, 20, 300]) == 1.0
    assert spearman([1, 2, 3], [3, 2, 1]) == -1.0


@pytest.mark.parametrize(
    ("a", "b"),
    [([1, 1], [1, 2]), ([1], [1]), ([], []), ([1, 2], [1]), ([1, math.nan], [1, 2]), ([[1, 2]], [[1, 2]])],
)
def test_spearman_refuses_what_has_no_answer(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"."):
        spearman(a, b)


def dcg(grades: list[float], k: int) -> float:
    return sum((2**grade - 1) / math.log2(rank + 2) for rank, grade in enumerate(grades[:k]))


def by_definition(scores: list[float], relevance: list[float], k: int) -> float:
    """The mean over every order that the scores allow."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    mean = sum(dcg([relevance[i] for i in order], k) for order in orders) / len(orders)
    return mean / dcg(sorted(relevance, reverse=True), k)


@pytest.mark.parametrize("seed", range(30))
def test_ndcg_is_its_definition_averaged_over_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, k = int(rng.integers(1, 7)), int(rng.integers(1, 8))
    scores = rng.integers(0, 4, size).astype(float).tolist()
    relevance = rng.integers(0, 3, size).astype(float)
    relevance[rng.integers(size)] = 2.0
    expected = by_definition(scores, relevance.tolist(), k)
    assert ndcg_at_k(scores, relevance, k) == pytest.approx(expected, abs=1e-12)


def test_ndcg_of_known_lists() -> None:
    assert ndcg_at_k([3, 2, 1], [2, 1, 0]) == 1.0
    assert ndcg_at_k([1, 2, 3], [1, 0, 0]) == pytest.approx(1 / math.log2(4))
    assert ndcg_at_k(np.arange(20.0), np.eye(20)[0], k=10) == 0.0


@pytest.mark.parametrize(
    ("scores", "relevance", "k"),
    [([1, 2], [0, 0], 10), ([1, 2], [1], 10), ([math.inf, 1], [1, 0], 10), ([1], [1], 0)],
)
def test_ndcg_refuses_what_has_no_answer(scores: list[float], relevance: list[float], k: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        ndcg_at_k(scores, relevance, k)


def test_accuracy() -> None:
    assert accuracy(["a", "b", "b"], ["a", "b", "c"]) == pytest.approx(2 / 3)
    assert accuracy(np.array([1, 0]), np.array([1, 0])) == 1.0
    with pytest.raises(ValueError, match="0 predictions"):
        accuracy([], [])
    with pytest.raises(ValueError, match="1 predictions with 2"):
        accuracy([1], [1, 2])
