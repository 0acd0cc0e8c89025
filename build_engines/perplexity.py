"""How well a decoder predicts the evaluation texts: the loss of every token, and the gate on the perplexity.

Every text is a row of token ids. Each token but a row's first is predicted from those before it, as when the
decoder generates. Two forms of one model are compared on the same predictions, so the rise of the perplexity
is far more certain than either perplexity; its standard error is reported.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from build_engines.errors import ArtifactError, DataError
from build_engines.gates import Check, GateReport
from build_engines.stack import Gates

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Rows = Sequence[IntArray]


class GivesLogits(Protocol):
    """Anything that reads one text: an engine, a graph, the streamed pass."""

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        """float32 [len(tokens), vocabulary]: what follows each token, given it and those before it."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Of every predicted token, row after row: `losses` float32 [tokens], -ln of the probability given to it;
    `best` int64 [tokens], the token that greedy decoding would have taken."""

    losses: FloatArray
    best: IntArray

    @property
    def perplexity(self) -> float:
        """e to the mean loss; infinity where that is beyond floating point."""
        with np.errstate(over="ignore"):
            return float(np.exp(np.mean(self.losses, dtype=np.float64)))


@dataclass(frozen=True, slots=True)
class Reference:
    """The evaluation rows and the FP32 model's scores on them."""

    rows: tuple[IntArray, ...]
    scores: Scores

    def save(self, path: Path) -> None:
        """Write an .npz without pickles."""
        lengths = np.array([len(row) for row in self.rows], dtype=np.int64)
        np.savez(
            path,
            tokens=np.concatenate(self.rows),
            lengths=lengths,
            losses=self.scores.losses,
            best=self.scores.best,
        )

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                tokens, lengths = stored["tokens"], stored["lengths"]
                scores = Scores(stored["losses"], stored["best"])
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ArtifactError(
                f"{path} holds no reference scores: {error}",
                cause="the file was altered, or a run that wrote it was cut short",
                next_step="delete its folder and run the build again",
            ) from error
        rows = tuple(np.split(tokens, np.cumsum(lengths)[:-1]))
        if len(scores.losses) != predictions(rows) or scores.best.shape != scores.losses.shape:
            raise ArtifactError(
                f"{path}: {len(scores.losses)} scores for {predictions(rows)} predicted tokens",
                next_step="delete its folder and run the build again",
            )
        return cls(rows, scores)


def predictions(rows: Rows) -> int:
    """Tokens of `rows` that are predicted: all but each row's first."""
    return sum(max(0, len(row) - 1) for row in rows)


class Scorer:
    """Scores predictions whose logits come in parts of the vocabulary, as a table too large for memory gives
    them; `targets` [tokens] are the tokens that did follow."""

    def __init__(self, targets: IntArray) -> None:
        self.targets = targets
        self._top = np.full(len(targets), -np.inf)
        self._spread = np.zeros(len(targets))
        self._chosen = np.full(len(targets), np.nan)
        self._best = np.full(len(targets), -1, dtype=np.int64)

    def add(self, logits: FloatArray, first: int = 0) -> None:
        """`logits` [tokens, part] are those of the vocabulary from token `first` on."""
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite must show in the loss
            at = logits.argmax(axis=1)
            highest = logits[np.arange(len(at)), at].astype(np.float64)
            top = np.maximum(self._top, highest)
            part = np.exp(logits - top[:, None].astype(np.float32)).sum(axis=1, dtype=np.float64)
            self._spread = self._spread * np.exp(self._top - top) + part
        self._best = np.where(highest > self._top, at + first, self._best)
        self._top = top
        inside = np.flatnonzero((self.targets >= first) & (self.targets < first + logits.shape[1]))
        self._chosen[inside] = logits[inside, self.targets[inside] - first]

    def scores(self) -> Scores:
        with np.errstate(invalid="ignore", divide="ignore"):
            losses = np.log(self._spread) + self._top - self._chosen
        return Scores(losses.astype(np.float32), self._best)


def score(logits: FloatArray, targets: IntArray) -> Scores:
    """What `logits` [tokens, vocabulary] make of the tokens that did follow, `targets` [tokens]."""
    scorer = Scorer(targets)
    scorer.add(logits)
    return scorer.scores()


def join(parts: Iterable[Scores]) -> Scores:
    found = list(parts)
    if not found:
        return Scores(np.empty(0, np.float32), np.empty(0, np.int64))
    losses, best = zip(*((part.losses, part.best) for part in found), strict=True)
    return Scores(np.concatenate(losses), np.concatenate(best))


def engine_nll(engine: GivesLogits, rows: Rows) -> Scores:
    """Score an engine (or anything else that gives logits) on `rows`, one row at a time."""
    return join(score(engine.logits(row[:-1].tolist()), row[1:]) for row in rows if len(row) > 1)


def judge(reference: Scores, found: Scores, gates: Gates) -> GateReport:
    """Compare predictions with the FP32 model's on the same rows.

    Predictions that are not finite fail; nothing else is measured on them.

    Raises:
        DataError: nothing was predicted, or the two are not of the same rows.
    """
    count = len(reference.losses)
    if count == 0 or len(found.losses) != count:
        raise DataError(
            f"the gate has nothing to compare: {count} predicted tokens in FP32, {len(found.losses)} here",
            cause="the evaluation data holds no text of at least two tokens",
            next_step="name evaluation data in the stack file: [models.<name>] evaluation = ...",
        )
    finite = np.isfinite(found.losses)
    if not finite.all():
        checks = (Check("share of finite predictions", float(finite.mean()), 1.0, "at least"),)
        return GateReport(checks, count)
    rise = found.losses.astype(np.float64) - reference.losses
    increase = float(np.expm1(min(rise.mean(), 700.0)))  # e^709 is the largest float
    error = float(rise.std() / np.sqrt(count)) * (1 + increase)
    agreement = float((reference.best == found.best).mean())
    return GateReport(
        (
            Check("perplexity increase", increase, gates.max_perplexity_increase, "at most"),
            Check("next-token agreement", agreement, None, "at least"),
            Check("perplexity", found.perplexity, None, "at most"),
            Check("perplexity in FP32", reference.perplexity, None, "at most"),
            Check("standard error of the increase", error, None, "at most"),
        ),
        count,
    )
