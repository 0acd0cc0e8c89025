"""Losses of predicted tokens, whole or by parts of the vocabulary, and the gate on the perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engines.errors import ArtifactError, DataError
from build_engines.perplexity import Reference, Scorer, Scores, engine_nll, join, judge, predictions, score
from build_engines.stack import Gates

GATES = Gates(max_perplexity_increase=0.01)


def rows_of(*lengths: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, 50, length) for length in lengths)


def scores_of(losses: Sequence[float], best: Sequence[int] | None = None) -> Scores:
    values = np.asarray(losses, np.float32)
    return Scores(values, np.asarray(best or [0] * len(values), np.int64))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from([1, 30])
)
def test_parts_of_the_vocabulary_give_the_whole(seed: int, parts: list[int], scale: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((7, sum(parts))) * scale).astype(np.float32)
    targets = rng.integers(0, sum(parts), 7)
    scorer, first = Scorer(targets), 0
    for part in parts:
        scorer.add(logits[:, first : first + part], first)
        first += part
    found = scorer.scores()
    exact = logits.astype(np.float64)
    expected = np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1)) + exact.max(1)
    expected -= exact[np.arange(7), targets]
    assert np.allclose(found.losses, expected, rtol=1e-5, atol=1e-5)
    assert np.array_equal(found.best, logits.argmax(axis=1))
    assert np.allclose(score(logits, targets).losses, found.losses, rtol=1e-5, atol=1e-5)


class Counts:
    """Knows that every token is followed by the next number."""

    def logits(self, tokens: Sequence[int]) -> Any:
        found = np.zeros((len(tokens), 20), np.float32)
        found[np.arange(len(tokens)), np.asarray(tokens) + 1] = 50
        return found


def test_each_token_is_predicted_from_the_one_before() -> None:
    rows = [np.arange(3, 9), np.arange(1, 3), np.array([4])]
    found = engine_nll(Counts(), rows)
    assert predictions(rows) == len(found.losses) == 6
    assert np.abs(found.losses).max() < 1e-6
    assert found.best.tolist() == [4, 5, 6, 7, 8, 2]
    assert found.perplexity == pytest.approx(1)


def test_the_increase_is_relative_and_of_the_mean() -> None:
    reference = scores_of([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4])
    found = scores_of([1.02, 2.0, 3.01, 4.0], [1, 2, 9, 4])
    report = judge(reference, found, GATES)
    values = {check.name: check.value for check in report.checks}
    assert values["perplexity increase"] == pytest.approx(np.exp(0.0075) - 1, rel=1e-4)
    assert values["perplexity in FP32"] == pytest.approx(np.exp(2.5))
    assert values["perplexity"] == pytest.approx(np.exp(2.5075))
    assert values["next-token agreement"] == 0.75
    assert values["standard error of the increase"] > 0
    assert report.passed
    assert report.samples == 4


@pytest.mark.parametrize(("rise", "passes"), [(0.0099, True), (0.0101, False), (-0.5, True), (40.0, False)])
def test_the_limit(rise: float, passes: bool) -> None:
    losses = np.full(500, 3.0)
    found = losses + np.log1p(rise)
    assert judge(scores_of(losses), scores_of(found), GATES).passed is passes


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    report = judge(scores_of([1.0, 1.0]), scores_of([1.0, value]), GATES)
    assert not report.passed
    assert report.checks[0].name == "share of finite predictions"
    assert report.checks[0].value == 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_show_in_the_loss(value: float) -> None:
    logits = np.zeros((3, 5), np.float32)
    logits[1, 2] = value
    assert np.isfinite(score(logits, np.zeros(3, np.int64)).losses).tolist() == [True, False, True]


def test_losses_beyond_all_measure_fail_without_a_traceback() -> None:
    report = judge(scores_of([1.0]), scores_of([3e4]), GATES)
    assert not report.passed


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to compare"):
        judge(join([]), join([]), GATES)
    with pytest.raises(DataError, match="2 predicted tokens in FP32, 1 here"):
        judge(scores_of([1.0, 2.0]), scores_of([1.0]), GATES)


def test_the_reference_on_disk(tmp_path: Path) -> None:
    rows = rows_of(5, 5, 1, 3)
    reference = Reference(rows, scores_of(np.arange(10) / 7, list(range(10))))
    reference.save(tmp_path / "reference.npz")
    loaded = Reference.load(tmp_path / "reference.npz")
    assert [row.tolist() for row in loaded.rows] == [row.tolist() for row in rows]
    assert np.array_equal(loaded.scores.losses, reference.scores.losses)
    assert np.array_equal(loaded.scores.best, reference.scores.best)


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "short"])
def test_a_damaged_reference_is_an_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "reference.npz"
    scores = scores_of([1.0, 2.0]) if damage == "short" else scores_of([1.0, 2.0, 3.0, 4.0])
    Reference(rows_of(5), scores).save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "other":
        np.savez(path, something=np.zeros(3))
    with pytest.raises(ArtifactError, match="reference"):
        Reference.load(path)
