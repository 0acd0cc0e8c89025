"""Evaluation and calibration data as token rows, and the answers of graphs and engines on them.

Our side always answers through the runtime's own Encoder (its tokenization, its grouping), so that what is
judged is what will be served; the reference (reference.py) is PyTorch with the Hugging Face tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from build_engines.errors import DataError, ExportError, QuantizeError
from build_engines.gates import Truth
from build_engines.stack import DataRef, Model
from calibration.samples import data_file, load_groups, load_texts
from triton_repo.runtime.encode import ANSWER_OUTPUT, Encoder
from triton_repo.runtime.texts import BadRequest
from triton_repo.runtime.tokenization import Row, TextTokenizer, TokenizerRefused

FloatArray = npt.NDArray[np.float32]

_BATCH = 16
# Deterministic grouping: a measured overhead differs from run to run, and with it padding and last digits.
_OVERHEAD = 64.0


@dataclass(frozen=True, slots=True)
class TextSet:
    """Texts (classify, embed) or groups of query and passages (rerank), and what is known of the answers."""

    task: str
    texts: tuple[str, ...]
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    truth: Truth

    def rows(self, tokenizer: TextTokenizer) -> list[Row]:
        """Token rows of all texts or pairs, in order. Raises DataError where the tokenizer fails on one."""
        try:
            return self._rows(tokenizer)
        except BadRequest as error:
            raise DataError(
                f"the evaluation or calibration data: {error}",
                cause="a pattern in the checkpoint's tokenizer.json cannot take one of the texts",
                next_step="use shorter texts without long runs of one character, or another checkpoint",
            ) from None

    def _rows(self, tokenizer: TextTokenizer) -> list[Row]:
        if self.task != "rerank":
            return tokenizer.singles(self.texts)
        return [row for group in tokenizer.pairs(self.groups) for row in group]


def check_evaluation(model: Model) -> None:
    """Raise what `load_evaluation` would without knowing the labels: before the checkpoint is opened."""
    if model.task == "classify" and model.evaluation is not None:
        load_texts(_reference(model.evaluation))
    else:
        load_evaluation(model, None)


def load_evaluation(model: Model, labels: Sequence[str] | None, *, multi_label: bool = False) -> TextSet:
    """The model's evaluation data; `labels` are the classifier's, in the order of its outputs.

    Raises:
        DataError: no data (a gate without data is an error), or a line that does not fit, by file and line.
    """
    if model.evaluation is None:
        raise DataError(
            f"model {model.name!r} has no evaluation data, so its accuracy gates cannot be judged",
            next_step=f"add to the stack file: [models.{model.name}] evaluation = "
            f'"{"bundled:ranking:evaluation" if model.task == "rerank" else "my-texts.jsonl"}"',
        )
    reference = _reference(model.evaluation)
    if model.task == "rerank":
        ranking = _ranking(reference)
        _require(sum(len(passages) for _, passages in ranking.groups), 2, "pairs", reference)
        return ranking
    if model.task == "embed":
        texts = [review.text for review in load_texts(reference)]
        _require(len(texts), 3, "texts", reference)
        return _texts(model, texts)
    assert labels is not None
    reviews = load_texts(reference, labels=labels)
    indices = np.array([labels.index(str(review.label)) for review in reviews], dtype=np.int64)
    return _texts(model, [review.text for review in reviews], Truth(labels=indices, multi_label=multi_label))


def _require(found: int, least: int, what: str, reference: str | Path) -> None:
    """Known before the work begins: the gates compare an order, and fewer have none."""
    if found < least:
        raise DataError(
            f"{data_file(reference)}: {found} {what}, and the accuracy gates need at least {least}",
            next_step="add more lines to that file",
        )


def load_calibration(model: Model) -> TextSet:
    """The model's calibration texts: at most `samples` texts, or groups with about as many pairs.

    Raises:
        DataError: no calibration data, or a line that does not fit.
    """
    if model.calibration.data is None:
        raise DataError(
            f"model {model.name!r} has no calibration data, which INT8 and the FP16 range check need",
            next_step=f"add to the stack file: [models.{model.name}.calibration] data = "
            f'"{"bundled:ranking:calibration" if model.task == "rerank" else "bundled:reviews:calibration"}"',
        )
    reference = _reference(model.calibration.data)
    limit = model.calibration.samples
    if model.task != "rerank":
        return _texts(model, [review.text for review in load_texts(reference, limit=limit)])
    passages = [len(group.passages) for group in load_groups(reference)]
    mean = sum(passages) / len(passages)
    return _ranking(reference, limit=max(1, round(limit / mean)))


def _reference(data: DataRef) -> str | Path:
    return data.path or data.spec


def _texts(model: Model, texts: Sequence[str], truth: Truth | None = None) -> TextSet:
    return TextSet(model.task, tuple(texts), (), truth or Truth())


def _ranking(reference: str | Path, limit: int | None = None) -> TextSet:
    groups = load_groups(reference, limit=limit)
    ends = np.cumsum([len(group.passages) for group in groups]).tolist()
    spans = tuple(zip([0, *ends[:-1]], ends, strict=True))
    relevance = np.array([grade for group in groups for grade in group.relevance], dtype=np.float64)
    pairs = tuple((group.query, group.passages) for group in groups)
    return TextSet("rerank", (), pairs, Truth(groups=spans, relevance=relevance))


def open_tokenizer(path: Path, max_length: int) -> TextTokenizer:
    """The runtime's tokenizer.

    Raises:
        ExportError: a tokenizer that the runtime cannot reproduce.
    """
    try:
        return TextTokenizer(path, max_length=max_length)
    except TokenizerRefused as error:
        raise ExportError(
            str(error), next_step="use a checkpoint whose tokenizer puts its special tokens around the texts"
        ) from None


class GraphEngine:
    """A session over a graph that is no published engine yet, in the shape the runtime's Encoder runs."""

    max_tokens: int | None = 768

    def __init__(self, session: Any, serving: dict[str, Any], max_batch: int = _BATCH) -> None:
        self.session = session
        self.manifest = {"task": serving["task"], "serving": {**serving, "max_batch": max_batch}}
        self._output = ANSWER_OUTPUT[serving["task"]]

    def run(self, arrays: Any) -> dict[str, npt.NDArray[Any]]:
        (answer,) = self.session.run([self._output], dict(arrays))
        return {self._output: answer}


def graph_encoder(session: Any, serving: dict[str, Any], tokenizer: TextTokenizer) -> Encoder:
    return Encoder(GraphEngine(session, serving), tokenizer, overhead=_OVERHEAD)


def answers(encoder: Encoder, rows: Sequence[Row]) -> FloatArray:
    """The encoder's answers: probabilities [rows, labels], embeddings [rows, dimension] or scores [rows]."""
    encoder.overhead = _OVERHEAD
    results = encoder.encode(rows)
    for result in results:
        if isinstance(result, Exception):
            raise QuantizeError(f"the graph does not run: {result}")
    return np.stack([np.asarray(result, dtype=np.float32) for result in results])


def token_batches(encoder: Encoder, rows: Sequence[Row]) -> list[dict[str, npt.NDArray[np.int64]]]:
    """Graph inputs for all rows, those of similar length together."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    chunks = [ordered[start : start + _BATCH] for start in range(0, len(ordered), _BATCH)]
    return [encoder.arrays(chunk, len(chunk[-1].ids)) for chunk in chunks]
