"""A batch of requests to a batch of answers, without anything of Triton: each request fails on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.encode import Encoder
from triton_repo.runtime.texts import BadRequest, EngineFailed, read_pairs, read_texts
from triton_repo.runtime.tokenization import Row

Arrays = dict[str, npt.NDArray[Any]]
Answer = Arrays | BadRequest | EngineFailed


@dataclass(frozen=True, slots=True)
class Job:
    """One readable request: its texts, or its queries each with as many passages."""

    shape: tuple[int, int]
    texts: list[str]
    groups: list[tuple[str, list[str]]]


class EncoderService:
    """Answers batches of requests for one encoder of any of the three tasks.

    Inputs and outputs per request (n texts, b queries with p passages each):
      classify: text [n, 1] -> labels [n, L] and scores [n, L] (best first), truncated [n, 1]
      embed:    text [n, 1] -> embedding [n, D], truncated [n, 1]
      rerank:   query [b, 1], passages [b, p] -> scores [b, p] in the order given, truncated [b, p]
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        serving = encoder.engine.manifest["serving"]
        self._refuse = serving["overflow"] == "refuse"
        labels = serving.get("labels") or []
        self._labels = np.array([label.encode() for label in labels], dtype=object)
        self._finish: Callable[[Job, list[Row], list[Any]], Arrays] = {
            "classify": self._classified,
            "embed": self._embedded,
            "rerank": self._reranked,
        }[encoder.task]
        self.truncated = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("query", "passages") if self.encoder.task == "rerank" else ("text",)

    def answer(self, requests: Sequence[Mapping[str, npt.NDArray[Any]]]) -> list[Answer]:
        """One answer per request, in order; a bad request or a broken run is returned, not raised."""
        answers: list[Answer] = [_UNANSWERED] * len(requests)
        jobs: list[tuple[int, Job]] = []
        for position, request in enumerate(requests):
            try:
                jobs.append((position, self._read(request)))
            except BadRequest as error:
                answers[position] = error
        accepted: list[tuple[int, Job, list[Row]]] = []
        for (position, job), rows in zip(jobs, self._tokenize([job for _, job in jobs]), strict=True):
            dropped = sum(row.truncated for row in rows)
            if dropped and self._refuse:
                answers[position] = self._too_long(rows)
            else:
                self.truncated += dropped
                accepted.append((position, job, rows))
        values = self.encoder.encode([row for _, _, rows in accepted for row in rows])
        start = 0
        for position, job, rows in accepted:
            own = values[start : start + len(rows)]
            start += len(rows)
            failure = next((value for value in own if isinstance(value, EngineFailed)), None)
            answers[position] = failure or self._finish(job, rows, own)
        return answers

    def _read(self, request: Mapping[str, npt.NDArray[Any]]) -> Job:
        if self.encoder.task == "rerank":
            queries, passages = read_pairs(request["query"], request["passages"])
            groups = list(zip(queries, passages, strict=True))
            return Job((len(queries), len(passages[0])), [], groups)
        texts = read_texts(request["text"], "text")
        return Job((len(texts), 1), texts, [])

    def _tokenize(self, jobs: Sequence[Job]) -> list[list[Row]]:
        """All jobs' texts in one call of the tokenizer; rows per job."""
        if self.encoder.task == "rerank":
            per_query = iter(self.encoder.tokenizer.pairs([group for job in jobs for group in job.groups]))
            return [[row for _ in job.groups for row in next(per_query)] for job in jobs]
        rows = iter(self.encoder.tokenizer.singles([text for job in jobs for text in job.texts]))
        return [[next(rows) for _ in job.texts] for job in jobs]

    def _too_long(self, rows: Sequence[Row]) -> BadRequest:
        position = next(index for index, row in enumerate(rows) if row.truncated)
        name = "the text" if len(rows) == 1 else f"text {position}"
        if self.encoder.task == "rerank":
            name = f"the query with passage {position}"
        limit = self.encoder.tokenizer.max_length
        return BadRequest(
            f"{name} has more than {limit} tokens, and this model refuses instead of truncating"
        )

    def _truncated(self, job: Job, rows: Sequence[Row]) -> npt.NDArray[np.bool_]:
        return np.array([row.truncated for row in rows], dtype=np.bool_).reshape(job.shape)

    def _classified(self, job: Job, rows: list[Row], values: list[Any]) -> Arrays:
        scores = np.stack(values)
        order = np.argsort(-scores, axis=1, kind="stable")
        return {
            "labels": self._labels[order],
            "scores": np.take_along_axis(scores, order, axis=1),
            "truncated": self._truncated(job, rows),
        }

    def _embedded(self, job: Job, rows: list[Row], values: list[Any]) -> Arrays:
        vectors = values[0][np.newaxis] if len(values) == 1 else np.stack(values)
        return {"embedding": vectors, "truncated": self._truncated(job, rows)}

    def _reranked(self, job: Job, rows: list[Row], values: list[Any]) -> Arrays:
        scores = np.array(values, dtype=np.float32).reshape(job.shape)
        return {"scores": scores, "truncated": self._truncated(job, rows)}


_UNANSWERED = EngineFailed("the request was not answered")
