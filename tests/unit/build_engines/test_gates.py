"""Gates: both sides of every limit, and nothing that cannot be judged ever passes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from build_engines.errors import DataError
from build_engines.gates import Check, GateReport, Truth, judge
from build_engines.stack import DEFAULT_GATES, Gates

EMBED = Gates(**DEFAULT_GATES["embed"])
CLASSIFY = Gates(**DEFAULT_GATES["classify"])
RERANK = Gates(**DEFAULT_GATES["rerank"])


def checks(report: GateReport) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


@pytest.mark.parametrize(
    ("sense", "value", "passes"),
    [
        ("at least", 0.99, True),
        ("at least", 0.98999, False),
        ("at most", 0.99, True),
        ("at most", 0.99001, False),
        ("at least", math.nan, False),
        ("at most", math.nan, False),
        ("at least", math.inf, False),
        ("at most", -math.inf, False),
    ],
)
def test_a_check_passes_at_its_limit_and_never_without_a_number(
    sense: str, value: float, passes: bool
) -> None:
    assert Check("x", value, 0.99, sense).passed is passes  # type: ignore[arg-type]
    assert Check("x", value, None, sense).passed is True  # type: ignore[arg-type]


def unit(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def embeddings(mean: float, worst: float, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of unit vectors with these mean and minimum cosines."""
    generator = np.random.default_rng(0)
    start = generator.uniform(0, 2 * np.pi, count)
    cosines = np.full(count, (mean * count - worst) / (count - 1))
    cosines[7] = worst
    return unit(start), unit(start + np.arccos(cosines))


@pytest.mark.parametrize(
    ("mean", "worst", "failing"),
    [
        (0.9951, 0.9805, set()),
        (0.9949, 0.9805, {"mean cosine"}),
        (0.9951, 0.9795, {"minimum cosine"}),
    ],
)
def test_embedding_cosines(mean: float, worst: float, failing: set[str]) -> None:
    reference, answers = embeddings(mean, worst)
    report = judge("embed", "int8", reference, answers, EMBED, Truth())
    found = checks(report)
    assert found["mean cosine"].value == pytest.approx(mean, abs=1e-6)
    assert found["minimum cosine"].value == pytest.approx(worst, abs=1e-6)
    assert {name for name, check in found.items() if not check.passed} == failing
    assert report.passed is (not failing)
    assert report.samples == len(reference)


def test_embedding_order_of_similarities() -> None:
    """Cosines may be perfect on average while the order of the neighbours is lost."""
    generator = np.random.default_rng(0)
    base = generator.normal(size=64)
    reference = base + 0.01 * generator.normal(size=(80, 64))
    answers = base + 0.01 * generator.normal(size=(80, 64))
    found = checks(judge("embed", "int8", reference, answers, EMBED, Truth()))
    assert found["minimum cosine"].passed
    assert not found["Spearman of pairwise similarities"].passed
    near = reference + 1e-5 * generator.normal(size=reference.shape)
    assert judge("embed", "int8", reference, near, EMBED, Truth()).passed


def scores(classes: np.ndarray) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[classes] * 0.8 + 0.1


def test_classifier_agreement_and_accuracy() -> None:
    classes = np.arange(400) % 3
    other = classes.copy()
    other[:4] = (other[:4] + 1) % 3
    report = judge("classify", "int8", scores(classes), scores(other), CLASSIFY, Truth(labels=classes))
    assert report.passed  # 396 of 400, and one point lost exactly
    assert checks(report)["accuracy loss"].value == pytest.approx(0.01)
    other[4] = (other[4] + 1) % 3
    report = judge("classify", "int8", scores(classes), scores(other), CLASSIFY, Truth(labels=classes))
    assert {name for name, check in checks(report).items() if not check.passed} == {
        "top-1 agreement",
        "accuracy loss",
    }
    # Disagreement that makes the model better loses nothing, but it is still another model.
    report = judge("classify", "int8", scores(other), scores(classes), CLASSIFY, Truth(labels=classes))
    assert {name for name, check in checks(report).items() if not check.passed} == {"top-1 agreement"}


def test_independent_labels_are_judged_one_by_one() -> None:
    """With several labels per text (or one in all) the largest probability says nothing about the others."""
    reference = np.tile([[0.9, 0.6, 0.1]], (100, 1))
    truth = Truth(labels=np.full(100, 1), multi_label=True)
    assert judge("classify", "int8", reference, reference * 0.99, CLASSIFY, truth).passed
    answers = reference.copy()
    answers[:2, 1] = 0.4  # the first label still leads
    report = judge("classify", "int8", reference, answers, CLASSIFY, truth)
    assert checks(report)["agreement of all labels"].value == pytest.approx(0.98)
    assert checks(report)["accuracy loss"].value == pytest.approx(0.02)
    assert not report.passed
    single = Truth(labels=np.zeros(100, dtype=np.int64), multi_label=True)
    assert not judge("classify", "int8", reference[:, :1], 0.1 * reference[:, :1], CLASSIFY, single).passed


def ranking(queries: int = 40, passages: int = 5) -> tuple[np.ndarray, Truth]:
    generator = np.random.default_rng(0)
    spans = tuple((i * passages, (i + 1) * passages) for i in range(queries))
    relevance = np.tile([2.0, 1.0, 0.0, 0.0, 0.0], queries)
    return np.tile([0.9, 0.7, 0.5, 0.3, 0.1], queries) + 0.01 * generator.uniform(
        size=queries * passages
    ), Truth(groups=spans, relevance=relevance)


def test_reranker_order_and_gain() -> None:
    reference, truth = ranking()
    assert judge("rerank", "int8", reference, reference + 1e-6, RERANK, truth).passed
    worse = reference.copy()
    worse[0:10:5], worse[1:10:5] = reference[1:10:5], reference[0:10:5]  # two of 40 queries swap their best
    report = judge("rerank", "int8", reference, worse, RERANK, truth)
    found = checks(report)
    # The swap costs each of the two (1 - (1 + 3 / log2 3) / (3 + 1 / log2 3)) = 0.20 of nDCG.
    assert found["nDCG@10 loss"].value == pytest.approx(2 * 0.2037 / 40, abs=1e-3)
    assert not found["nDCG@10 loss"].passed
    assert report.samples == 40
    noisy = reference + 0.2 * np.random.default_rng(1).normal(size=len(reference))
    assert not checks(judge("rerank", "int8", reference, noisy, RERANK, truth))["Spearman of scores"].passed


@pytest.mark.parametrize("task", ["embed", "classify", "rerank"])
def test_half_precision_has_a_gate_of_its_own(task: str) -> None:
    reference, truth = ranking()
    gates = {"embed": EMBED, "classify": CLASSIFY, "rerank": RERANK}[task]
    if task != "rerank":
        reference, truth = np.random.default_rng(0).uniform(0.1, 1, (50, 3)), Truth()
    direction = np.random.default_rng(1).normal(size=reference.shape)

    def cosine_check(step: float) -> Check:
        report = judge(task, "fp16", reference, reference + step * direction, gates, truth)
        return checks(report)["cosine"]

    assert cosine_check(1e-4).passed
    assert not cosine_check(0.1).passed
    assert "cosine" not in checks(judge(task, "int8", reference, reference, gates, truth))


@pytest.mark.parametrize("task", ["embed", "classify", "rerank"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_answers_that_are_no_numbers_fail(task: str, broken: float) -> None:
    """They fail, rather than raise: the fallback must be able to try the next step."""
    reference, truth = ranking()
    gates = {"embed": EMBED, "classify": CLASSIFY, "rerank": RERANK}[task]
    if task != "rerank":
        reference, truth = np.random.default_rng(0).uniform(0.1, 1, (50, 3)), Truth()
    if task == "classify":
        truth = Truth(labels=reference.argmax(axis=1))
    answers = reference.copy()
    answers[3] = broken
    report = judge(task, "int8", reference, answers, gates, truth)
    assert not report.passed
    assert "share of finite answers" in report.summary()


def test_answers_that_are_all_the_same_fail() -> None:
    reference, truth = ranking()
    assert not judge("rerank", "int8", reference, np.full_like(reference, 0.5), RERANK, truth).passed
    vectors = np.random.default_rng(0).normal(size=(20, 8))
    assert not judge("embed", "int8", vectors, np.ones_like(vectors), EMBED, Truth()).passed
    assert not judge("embed", "int8", vectors, np.zeros_like(vectors), EMBED, Truth()).passed


@pytest.mark.parametrize("vectors", [np.eye(1, 8), np.eye(2, 8), np.ones((5, 8))])
def test_too_little_to_compare_an_order_is_an_error(vectors: np.ndarray) -> None:
    with pytest.raises(DataError, match="at least three different texts"):
        judge("embed", "int8", vectors, vectors, EMBED, Truth())


def test_a_single_pair_has_no_order() -> None:
    truth = Truth(groups=((0, 1),), relevance=np.array([1.0]))
    with pytest.raises(DataError, match="at least two different pairs"):
        judge("rerank", "int8", np.array([0.4]), np.array([0.4]), RERANK, truth)


def test_one_text_is_enough_for_a_classifier() -> None:
    truth = Truth(labels=np.array([1]))
    assert judge("classify", "int8", scores(np.array([1])), scores(np.array([1])), CLASSIFY, truth).passed
    assert not judge("classify", "int8", scores(np.array([1])), scores(np.array([0])), CLASSIFY, truth).passed


@pytest.mark.parametrize(
    ("reference", "answers"),
    [(np.empty((0, 3)), np.empty((0, 3))), (np.ones((3, 2)), np.ones((2, 2)))],
)
def test_nothing_to_compare_is_an_error_never_a_pass(reference: np.ndarray, answers: np.ndarray) -> None:
    with pytest.raises(DataError, match="nothing to compare"):
        judge("embed", "int8", reference, answers, EMBED, Truth())


def test_a_reranker_without_groups_is_an_error() -> None:
    with pytest.raises(DataError, match="groups of passages"):
        judge("rerank", "int8", np.ones(3), np.ones(3), RERANK, Truth())


def test_the_report_as_data_and_as_text() -> None:
    reference, answers = embeddings(0.9949, 0.9805)
    report = judge("embed", "int8", reference, answers, EMBED, Truth())
    data = report.as_dict()
    assert data["passed"] is False
    assert data["checks"][0] == {
        "name": "mean cosine",
        "value": pytest.approx(0.9949, abs=1e-6),
        "limit": 0.995,
        "sense": "at least",
        "passed": False,
    }
    assert "mean cosine 0.99490, at least 0.995 [FAILED]" in report.summary()
