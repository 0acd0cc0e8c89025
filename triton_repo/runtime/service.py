"""A batch of requests to a batch of answers, without anything of Triton: each request fails on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.encode import Encoder
from triton_repo.runtime.metrics import resident_bytes
from triton_repo.runtime.texts import BadRequest, EngineFailed, read_pairs, read_texts
from triton_repo.runtime.tokenization import Row, TextTokenizer

# Of Korean and of English alike, a token has fewer; in UTF-8 bytes.
_CHARACTERS_PER_TOKEN = 8

Arrays = dict[str, npt.NDArray[Any]]
Answer = Arrays | BadRequest | EngineFailed


@dataclass(frozen=True, slots=True)
class Job:
    """One readable request: its texts, or its queries each with as many passages."""

    shape: tuple[int, int]
    texts: list[str]
    groups: list[tuple[str, list[str]]]


Accepted = tuple[Job, list[Row]]


class Reader:
    """Requests to token rows for one task; counts the rows that lost tokens in `truncated`."""

    def __init__(self, task: str, tokenizer: TextTokenizer, *, refuse: bool) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self._refuse = refuse
        self.truncated = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("query", "passages") if self.task == "rerank" else ("text",)

    def rows(self, requests: Sequence[Mapping[str, npt.NDArray[Any]]]) -> list[Accepted | BadRequest]:
        """Each request's rows, or why it is refused, in order; all texts in one call of the tokenizer."""
        found: list[Job | BadRequest] = []
        for request in requests:
            try:
                found.append(self._read(request))
            except BadRequest as error:
                found.append(error)
        rows_of = iter(self._tokenize_each([job for job in found if isinstance(job, Job)]))
        return [job if isinstance(job, BadRequest) else self._accept(job, next(rows_of)) for job in found]

    def _tokenize_each(self, jobs: Sequence[Job]) -> list[list[Row] | BadRequest]:
        """Together, unless the tokenizer fails on a text: then one by one, to know whose it is."""
        try:
            return [*self._tokenize(jobs)]
        except BadRequest as error:
            if len(jobs) == 1:
                return [error]
        return [rows for job in jobs for rows in self._tokenize_each([job])]

    def _accept(self, job: Job, rows: list[Row] | BadRequest) -> Accepted | BadRequest:
        if isinstance(rows, BadRequest):
            return rows
        dropped = sum(row.truncated for row in rows)
        if dropped and self._refuse:
            return self._too_long(rows)
        self.truncated += dropped
        return job, rows

    def _read(self, request: Mapping[str, npt.NDArray[Any]]) -> Job:
        if self.task == "rerank":
            queries, passages = read_pairs(request["query"], request["passages"])
            groups = list(zip(queries, passages, strict=True))
            return Job((len(queries), len(passages[0])), [], groups)
        texts = read_texts(request["text"], "text")
        return Job((len(texts), 1), texts, [])

    def _tokenize(self, jobs: Sequence[Job]) -> list[list[Row]]:
        if self.task == "rerank":
            per_query = iter(self.tokenizer.pairs([group for job in jobs for group in job.groups]))
            return [[row for _ in job.groups for row in next(per_query)] for job in jobs]
        rows = iter(self.tokenizer.singles([text for job in jobs for text in job.texts]))
        return [[next(rows) for _ in job.texts] for job in jobs]

    def _too_long(self, rows: Sequence[Row]) -> BadRequest:
        position = next(index for index, row in enumerate(rows) if row.truncated)
        name = "the text" if len(rows) == 1 else f"text {position}"
        if self.task == "rerank":
            name = f"the query with passage {position}"
        limit = self.tokenizer.max_length
        return BadRequest(
            f"{name} has more than {limit} tokens, and this model refuses instead of truncating"
        )


def flags(job: Job, rows: Sequence[Row]) -> npt.NDArray[np.bool_]:
    """`truncated` in the shape of the request: [n, 1], or [b, p] of a reranker."""
    return np.array([row.truncated for row in rows], dtype=np.bool_).reshape(job.shape)


def best_first(labels: npt.NDArray[np.object_], probabilities: npt.NDArray[np.float32]) -> Arrays:
    """labels and scores [n, L], the likeliest first; equal ones keep the checkpoint's order."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    return {"labels": labels[order], "scores": np.take_along_axis(probabilities, order, axis=1)}


def label_bytes(labels: Sequence[str] | None) -> npt.NDArray[np.object_]:
    """Labels as Triton's BYTES elements [L]."""
    return np.array([label.encode() for label in labels or ()], dtype=object)


class EncoderService:
    """Answers batches of requests for one encoder of any of the three tasks.

    Inputs and outputs per request (n texts, b queries with p passages each):
      classify: text [n, 1] -> labels [n, L] and scores [n, L] (best first), truncated [n, 1]
      embed:    text [n, 1] -> embedding [n, D], truncated [n, 1]
      rerank:   query [b, 1], passages [b, p] -> scores [b, p] in the order given, truncated [b, p]
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.max_rows = encoder.max_batch
        self.most_characters = encoder.tokenizer.max_length * _CHARACTERS_PER_TOKEN
        serving = encoder.engine.manifest["serving"]
        self._reader = Reader(encoder.task, encoder.tokenizer, refuse=serving["overflow"] == "refuse")
        self._labels = label_bytes(serving.get("labels"))
        self._finish: Callable[[Job, list[Row], list[Any]], Arrays] = {
            "classify": self._classified,
            "embed": self._embedded,
            "rerank": self._reranked,
        }[encoder.task]

    @property
    def inputs(self) -> tuple[str, ...]:
        return self._reader.inputs

    @property
    def truncated(self) -> int:
        return self._reader.truncated

    def snapshot(self) -> dict[str, float]:
        """What was computed since the start, and the memory of this process, as metrics."""
        encoder = self.encoder
        planned = sum(encoder.engine.manifest.get("memory", {}).values())
        return {
            "rows_total": encoder.rows,
            "runs_total": encoder.runs,
            "tokens_total": encoder.tokens,
            "padding_total": encoder.padding,
            "truncated_total": self.truncated,
            "resident_bytes": resident_bytes(),
        } | ({"planned_bytes": planned} if planned else {})

    def answer(self, requests: Sequence[Mapping[str, npt.NDArray[Any]]]) -> list[Answer]:
        """One answer per request, in order; a bad request or a broken run is returned, not raised."""
        read = self._reader.rows(requests)
        accepted = [found for found in read if not isinstance(found, BadRequest)]
        values = iter(self.encoder.encode([row for _, rows in accepted for row in rows]))
        return [
            found if isinstance(found, BadRequest) else self._answer(*found, [next(values) for _ in found[1]])
            for found in read
        ]

    def _answer(self, job: Job, rows: list[Row], values: list[Any]) -> Answer:
        failure = next((value for value in values if isinstance(value, EngineFailed)), None)
        return failure or self._finish(job, rows, values)

    def _classified(self, job: Job, rows: list[Row], values: list[Any]) -> Arrays:
        return best_first(self._labels, np.stack(values)) | {"truncated": flags(job, rows)}

    def _embedded(self, job: Job, rows: list[Row], values: list[Any]) -> Arrays:
        vectors = values[0][np.newaxis] if len(values) == 1 else np.stack(values)
        return {"embedding": vectors, "truncated": flags(job, rows)}

    def _reranked(self, job: Job, rows: list[Row], values: list[Any]) -> Arrays:
        scores = np.array(values, dtype=np.float32).reshape(job.shape)
        return {"scores": scores, "truncated": flags(job, rows)}
