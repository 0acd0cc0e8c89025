"""Accuracy gates: what an engine's answers must share with PyTorch FP32 before it may be published.

Pure arithmetic on arrays; `verify` produces them. A gate without data is an error, never a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from build_engines.errors import DataError
from build_engines.metrics import accuracy, ndcg_at_k, spearman
from build_engines.stack import Gates

FloatArray = npt.NDArray[np.floating[Any]]

# One point of accuracy is one point, though 1 - 0.99 > 0.01 in floating point.
_ROUNDING = 1e-9
# Pairwise similarities grow with the square of the texts; this many say enough about the order.
_MAX_PAIRWISE = 1000


@dataclass(frozen=True, slots=True)
class Check:
    """One measure against its limit. `limit` None: reported, not gated."""

    name: str
    value: float
    limit: float | None
    sense: Literal["at least", "at most"]

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        if not np.isfinite(self.value):
            return False
        excess = self.value - self.limit if self.sense == "at most" else self.limit - self.value
        return excess <= _ROUNDING


@dataclass(frozen=True, slots=True)
class GateReport:
    """All checks of one engine on one evaluation set of `samples` texts or groups."""

    checks: tuple[Check, ...]
    samples: int

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return {"passed": self.passed, "samples": self.samples, "checks": checks}

    def summary(self) -> str:
        """One line per check, for tables and errors."""
        return "\n".join(describe(check) for check in self.checks)


def describe(check: Check) -> str:
    verdict = "" if check.limit is None else f", {check.sense} {check.limit:g}"
    mark = "ok" if check.passed else "FAILED"
    return f"{check.name} {check.value:.5f}{verdict} [{mark}]"


@dataclass(frozen=True, slots=True)
class Truth:
    """What the evaluation data says besides the texts: label indices, or the groups of ranked pairs.

    `multi_label`: each label is decided for itself, at a probability of one half.
    `groups`: (first row, last row + 1) of each query's pairs; `relevance` [pairs].
    """

    labels: npt.NDArray[np.int64] | None = None
    multi_label: bool = False
    groups: tuple[tuple[int, int], ...] = ()
    relevance: FloatArray | None = None


def judge(
    task: str, precision: str, reference: FloatArray, answers: FloatArray, gates: Gates, truth: Truth
) -> GateReport:
    """Compare answers with the FP32 reference, row by row of the evaluation set.

    Args:
        reference, answers: embed [texts, dimension]; classify probabilities [texts, labels]; rerank scores
            [pairs].

    Answers that are not finite fail; nothing else is measured on them.

    Raises:
        DataError: there is nothing to compare, or too little for one of the task's measures.
    """
    if len(reference) == 0 or reference.shape != answers.shape:
        raise DataError(
            f"the gates have nothing to compare: reference {reference.shape}, answers {answers.shape}",
            cause="the evaluation data is empty",
            next_step="name evaluation data in the stack file: [models.<name>] evaluation = ...",
        )
    reference, answers = reference.astype(np.float64), answers.astype(np.float64)
    samples = len(truth.groups) if task == "rerank" else len(reference)
    finite = np.isfinite(answers).reshape(len(answers), -1).all(axis=1)
    if not finite.all():
        return GateReport((Check("share of finite answers", float(finite.mean()), 1.0, "at least"),), samples)
    if task == "embed":
        checks = _embedding_checks(reference, answers, gates)
    elif task == "classify":
        checks = _classifier_checks(reference, answers, gates, truth)
    else:
        checks = _reranker_checks(reference, answers, gates, truth)
    if precision in {"fp16", "fp32"}:
        checks.append(_half_check(task, reference, answers, gates))
    return GateReport(tuple(checks), samples)


def _embedding_checks(reference: FloatArray, answers: FloatArray, gates: Gates) -> list[Check]:
    cosines = row_cosines(reference, answers)
    rank = _order(_pairwise(reference), _pairwise(answers), "embeddings of at least three different texts")
    return [
        Check("mean cosine", float(cosines.mean()), gates.min_mean_cosine, "at least"),
        Check("minimum cosine", float(cosines.min()), gates.min_cosine, "at least"),
        Check("Spearman of pairwise similarities", rank, gates.min_spearman, "at least"),
    ]


def _classifier_checks(reference: FloatArray, answers: FloatArray, gates: Gates, truth: Truth) -> list[Check]:
    if truth.multi_label:
        agreement = float(((reference >= 0.5) == (answers >= 0.5)).all(axis=1).mean())
        checks = [Check("agreement of all labels", agreement, gates.min_agreement, "at least")]
    else:
        agreement = float((reference.argmax(axis=1) == answers.argmax(axis=1)).mean())
        checks = [Check("top-1 agreement", agreement, gates.min_agreement, "at least")]
    if truth.labels is not None:
        before, after = _accuracy(reference, truth), _accuracy(answers, truth)
        checks.append(Check("accuracy", after, None, "at least"))
        checks.append(Check("accuracy loss", before - after, gates.max_accuracy_loss, "at most"))
    return checks


def _accuracy(probabilities: FloatArray, truth: Truth) -> float:
    """The share of texts whose own label is the first, or where labels are independent, is found."""
    assert truth.labels is not None
    if truth.multi_label:
        return float((np.take_along_axis(probabilities, truth.labels[:, None], axis=1) >= 0.5).mean())
    return accuracy(probabilities.argmax(axis=1), truth.labels)


def _reranker_checks(reference: FloatArray, answers: FloatArray, gates: Gates, truth: Truth) -> list[Check]:
    if not truth.groups or truth.relevance is None:
        raise DataError("the reranker's gates need groups of passages with their relevance")
    rank = _order(reference, answers, "the scores of at least two different pairs")
    checks = [Check("Spearman of scores", rank, gates.min_spearman, "at least")]
    before = _mean_ndcg(reference, truth)
    after = _mean_ndcg(answers, truth)
    checks.append(Check("nDCG@10", after, None, "at least"))
    checks.append(Check("nDCG@10 loss", before - after, gates.max_ndcg_loss, "at most"))
    return checks


def _half_check(task: str, reference: FloatArray, answers: FloatArray, gates: Gates) -> Check:
    """Embeddings row by row; logits and scores, whose rows have one or two numbers, as one vector."""
    if task == "embed":
        value = float(row_cosines(reference, answers).min())
    else:
        value = float(row_cosines(reference.reshape(1, -1), answers.reshape(1, -1))[0])
    return Check("cosine", value, gates.min_fp16_cosine, "at least")


def row_cosines(first: FloatArray, second: FloatArray) -> FloatArray:
    """Cosine of each pair of rows; 0 where one of them has no length."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products: FloatArray = (first * second).sum(axis=1) / np.where(lengths > 0, lengths, 1)
    return products


def _order(reference: FloatArray, answers: FloatArray, needed: str) -> float:
    """Spearman's rank correlation; 0 where the answers have no order at all."""
    if len(reference) < 2 or np.ptp(reference) == 0:
        raise DataError(
            f"the gates need {needed} to compare their order",
            cause="the evaluation data is too small, or its texts are all the same",
            next_step="name more evaluation data in the stack file: [models.<name>] evaluation = ...",
        )
    return spearman(reference, answers) if np.ptp(answers) > 0 else 0.0


def _pairwise(vectors: FloatArray) -> FloatArray:
    kept = vectors[:_MAX_PAIRWISE]
    unit = kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)
    similarities: FloatArray = (unit @ unit.T)[np.triu_indices(len(kept), 1)]
    return similarities


def _mean_ndcg(scores: FloatArray, truth: Truth) -> float:
    assert truth.relevance is not None
    values: Sequence[float] = [
        ndcg_at_k(scores[first:last], truth.relevance[first:last], k=10) for first, last in truth.groups
    ]
    return float(np.mean(values))
