"""Accuracy of one model's answers as the figures of its task, and padding as a share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import accuracy
from .baseline import Answers
from .summary import BenchModel, Item


def score(model: BenchModel, items: Sequence[Item], reference: Answers, answers: Any) -> dict[str, Any]:
    """Served answers against labels and against the FP32 baseline, on all evaluation items."""
    if model.task == "classify":
        expected = label_names(reference)
        return _rounded(
            accuracy=accuracy.accuracy([item.label for item in items], answers),
            agreement=accuracy.agreement(expected, answers),
        )
    if model.task == "embed":
        cosines = accuracy.cosines(np.asarray(reference.values, float), np.asarray(answers, float))
        return _rounded(mean_cosine=float(cosines.mean()), min_cosine=float(cosines.min()))
    return _rounded(
        ndcg10=mean_ndcg(items, answers),
        spearman=accuracy.spearman(np.asarray(reference.values).tolist(), answers),
    )


def baseline_score(model: BenchModel, items: Sequence[Item], reference: Answers) -> dict[str, Any]:
    if model.task == "classify":
        labels = [item.label for item in items]
        return _rounded(accuracy=accuracy.accuracy(labels, label_names(reference)))
    if model.task == "rerank":
        return _rounded(ndcg10=mean_ndcg(items, np.asarray(reference.values).tolist()))
    return {}


def label_names(reference: Answers) -> list[str]:
    return [reference.labels[place] for place in reference.values]


def mean_ndcg(items: Sequence[Item], scores: Sequence[float]) -> float | None:
    values, start = [], 0
    for item in items:
        end = start + len(item.passages)
        value = accuracy.ndcg(item.relevance, scores[start:end])
        values += [] if value is None else [value]
        start = end
    return sum(values) / len(values) if values else None


def padding(tokens: Sequence[int], batch: int) -> float:
    """Share of computed positions that hold no token when consecutive texts form batches."""
    computed = 0
    for start in range(0, len(tokens), batch):
        group = tokens[start : start + batch]
        computed += max(group) * len(group)
    return 1 - sum(tokens) / computed


def _rounded(**values: float | None) -> dict[str, Any]:
    """NaN, which JSON does not have, becomes None as what is not known does."""
    return {
        name: None if value is None or math.isnan(value) else round(value, 5)
        for name, value in values.items()
    }
