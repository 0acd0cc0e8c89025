"""Numbers that say how good a model is: pure NumPy, so that a gate needs no model library for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["accuracy", "ndcg_at_k", "spearman"]


def ndcg_at_k(scores: ArrayLike, relevance: ArrayLike, k: int = 10) -> float:
    """Normalized discounted cumulative gain of one ranked list, 0 to 1.

    ``scores`` and ``relevance`` are 1-D and equally long. A passage's gain is ``2**relevance - 1``, its
    discount ``log2(rank + 1)`` (Burges et al., 2005). Passages with equal scores share their mean gain
    (McSherry and Najork, 2008): their order is arbitrary, and equal scores must not earn luck.

    Raises ValueError for other shapes, scores that are not finite, ``k < 1`` or no relevant passage.
    """
    score, grade = _pair(scores, relevance)
    if k < 1:
        raise ValueError(f"k is {k}, and must be at least 1")
    gain = np.exp2(grade) - 1.0
    if not np.any(gain > 0):
        raise ValueError("no passage is relevant, so nDCG is undefined")
    discount = 1.0 / np.log2(np.arange(2, len(gain) + 2))
    discount[k:] = 0.0
    order = np.argsort(-score, kind="stable")
    _, first, tied = np.unique(-score[order], return_index=True, return_counts=True)
    ranked = np.repeat(np.add.reduceat(gain[order], first) / tied, tied)
    return float(ranked @ discount / (np.sort(gain)[::-1] @ discount))


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of two equally long 1-D samples, -1 to 1; ties get their average rank.

    Raises ValueError for other shapes, fewer than two values, values that are not finite, or a constant
    sample, whose correlation is undefined.
    """
    x, y = (_ranks(sample) for sample in _pair(a, b))
    if len(x) < 2:
        raise ValueError("rank correlation needs at least two values")
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    if scale == 0.0:
        raise ValueError("one sample is constant, so its rank correlation is undefined")
    return float(np.clip((x @ y) / scale, -1.0, 1.0))


def accuracy(predicted: Sequence[Any] | NDArray[Any], expected: Sequence[Any] | NDArray[Any]) -> float:
    """The share of equal entries, 0 to 1. Raises ValueError when the lengths differ or are zero."""
    if len(predicted) != len(expected) or len(expected) == 0:
        raise ValueError(f"cannot compare {len(predicted)} predictions with {len(expected)} labels")
    return sum(bool(p == e) for p, e in zip(predicted, expected, strict=True)) / len(expected)


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size == 0:
        raise ValueError(f"expected two 1-D arrays of the same length, got shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the values must be finite")
    return x, y


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts).astype(np.float64)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2.0)[inverse]
    return ranks
