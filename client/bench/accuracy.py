"""What served answers are worth: against the labels, and against the FP32 baseline on the same texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float64]


def accuracy(labels: Sequence[str | None], answers: Sequence[str]) -> float | None:
    """Share of labelled texts answered with their label; None when no text has one."""
    pairs = [(label, answer) for label, answer in zip(labels, answers, strict=True) if label is not None]
    return sum(label == answer for label, answer in pairs) / len(pairs) if pairs else None


def agreement(first: Sequence[str], second: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def cosines(first: Vectors, second: Vectors) -> Vectors:
    """Cosine of each row of `first` with the same row of `second`; both of shape [N, D]."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.asarray((first * second).sum(axis=1) / np.maximum(lengths, 1e-30), dtype=np.float64)


def ndcg(relevance: Sequence[float], scores: Sequence[float], depth: int = 10) -> float | None:
    """nDCG at `depth` with gain 2**relevance - 1 and discount log2(rank + 1) (Järvelin and Kekäläinen, 2002).

    Passages of equal score share the mean gain of their ranks, so that their order in the data is void.
    None when no passage is relevant.
    """
    gains = [2.0**value - 1 for value in relevance]
    ideal = sum(gain * _discount(rank) for rank, gain in enumerate(sorted(gains, reverse=True)[:depth]))
    if ideal == 0:
        return None
    by_score: dict[float, list[float]] = {}
    for score, gain in zip(scores, gains, strict=True):
        by_score.setdefault(score, []).append(gain)
    total, rank = 0.0, 0
    for score in sorted(by_score, reverse=True):
        tied = by_score[score]
        mean = sum(tied) / len(tied)
        total += sum(mean * _discount(place) for place in range(rank, min(rank + len(tied), depth)))
        rank += len(tied)
    return float(total / ideal)


def _discount(rank: int) -> float:
    return 1 / math.log2(rank + 2)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank. NaN when one side is constant."""
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def _ranks(values: Sequence[float]) -> Vectors:
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse], dtype=np.float64)
