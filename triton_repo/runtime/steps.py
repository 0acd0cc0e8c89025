"""The Python steps around an engine that Triton runs itself: texts to padded rows, and rows to answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triton_repo.runtime.service import Accepted, Arrays, Job, Reader, best_first, flags, label_bytes
from triton_repo.runtime.session import check_files, read_manifest
from triton_repo.runtime.texts import BadRequest
from triton_repo.runtime.tokenization import Row, TextTokenizer, padded

_NARROWEST = 16
# What a run costs a GPU beyond its tokens, in tokens: below about this many, reading the weights takes
# the time. An estimate from bandwidth and arithmetic of the cards, not a measurement.
_RUN_TOKENS = 128


def widths(max_length: int) -> tuple[int, ...]:
    """The widths that rows are padded to: powers of two, then `max_length`.

    Triton batches requests of one shape only, and replays a CUDA graph for exactly the shape it was captured
    with, so there are few.
    """
    found = []
    width = _NARROWEST
    while width < max_length:
        found.append(width)
        width *= 2
    return (*found, max_length)


def shared_widths(needs: Sequence[tuple[int, int]]) -> list[int]:
    """Widths for requests that wait one behind the other, each of (rows, width needed).

    Triton ends a batch at the first request of another shape and keeps the order, so mixed traffic would run
    one by one. Neighbours get their widest width where that costs less than runs of their own: the split into
    neighbours that costs least, where a run costs `_RUN_TOKENS` and its rows times its width.
    """
    best, start_of = [0], [0]
    for end in range(1, len(needs) + 1):
        rows = width = 0
        options = []
        for start in range(end - 1, -1, -1):
            rows, width = rows + needs[start][0], max(width, needs[start][1])
            options.append((best[start] + _RUN_TOKENS + rows * width, start))
        lowest, start = min(options)
        best.append(lowest)
        start_of.append(start)
    found: list[int] = []
    end = len(needs)
    while end:
        start = start_of[end]
        found[:0] = [max(width for _, width in needs[start:end])] * (end - start)
        end = start
    return found


class TokenizeStep:
    """Requests to the engine's inputs, [rows, width] int64, and `truncated` in the request's own shape.

    A reranker's b queries with p passages each become b * p rows; `shape`, int32 [rows, 2], says (b, p) in
    every row, for the step that puts the scores back together.
    """

    def __init__(self, tokenizer: TextTokenizer, manifest: Mapping[str, Any]) -> None:
        serving = manifest["serving"]
        self.reader = Reader(manifest["task"], tokenizer, refuse=serving["overflow"] == "refuse")
        self._inputs = frozenset(serving["inputs"])
        self._pad_id: int = serving["pad_id"]
        self._max_batch: int = serving["max_batch"]
        self._widths = widths(serving["max_length"])
        self.tokens = 0
        self.padding = 0

    @classmethod
    def open(cls, folder: Path) -> TokenizeStep:
        """Open a step's folder (digests checked). Raises EngineRefused or TokenizerRefused."""
        manifest = read_manifest(folder)
        # The engine lies beside another step; of its files this one has the tokenizer alone.
        tokenizer = {"file": "tokenizer.json", **manifest["files"]["tokenizer.json"]}
        check_files(folder, {"engine": tokenizer, "files": {}})
        max_length = manifest["serving"]["max_length"]
        return cls(TextTokenizer(folder / "tokenizer.json", max_length=max_length), manifest)

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.reader.inputs

    def snapshot(self) -> dict[str, float]:
        """What was tokenized since the start, as metrics."""
        return {
            "tokens_total": self.tokens,
            "padding_total": self.padding,
            "truncated_total": self.reader.truncated,
        }

    def answer(self, requests: Sequence[Mapping[str, Any]]) -> list[Arrays | BadRequest]:
        """One answer per request, in order; a bad request is returned, not raised."""
        read = [self._bounded(found) for found in self.reader.rows(requests)]
        accepted = [found for found in read if not isinstance(found, BadRequest)]
        chosen = iter(shared_widths([(len(rows), self._width(rows)) for _, rows in accepted]))
        return [
            found if isinstance(found, BadRequest) else self._answer(*found, next(chosen)) for found in read
        ]

    def _bounded(self, found: Accepted | BadRequest) -> Accepted | BadRequest:
        if isinstance(found, BadRequest) or len(found[1]) <= self._max_batch:
            return found
        return self._too_many(*found[0].shape)

    def _width(self, rows: Sequence[Row]) -> int:
        longest = max(len(row.ids) for row in rows)
        return next(width for width in self._widths if width >= longest)

    def _answer(self, job: Job, rows: list[Row], width: int) -> Arrays:
        real = sum(len(row.ids) for row in rows)
        self.tokens += real
        self.padding += len(rows) * width - real
        own = {"truncated": flags(job, rows), **self._shape(*job.shape)}
        return own | padded(rows, width, self._pad_id, self._inputs)

    def _shape(self, queries: int, passages: int) -> Arrays:
        if self.reader.task != "rerank":
            return {}
        return {"shape": np.tile(np.array([queries, passages], dtype=np.int32), (queries * passages, 1))}

    def _too_many(self, queries: int, passages: int) -> BadRequest:
        return BadRequest(
            f"{queries} queries with {passages} passages each are {queries * passages} pairs; this model "
            f"takes at most {self._max_batch} in one request (send several requests)"
        )


class AnswerStep:
    """What the engine gave to what the request gets: labels best first, or scores in the request's shape."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self.task: str = manifest["task"]
        self._labels = label_bytes(manifest["serving"].get("labels"))

    @classmethod
    def open(cls, folder: Path) -> AnswerStep:
        """Open a step's folder. Raises EngineRefused for a manifest that was altered."""
        return cls(read_manifest(folder))

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("scores", "shape") if self.task == "rerank" else ("probabilities",)

    def answer(self, requests: Sequence[Mapping[str, Any]]) -> list[Arrays]:
        """One answer per request, in order."""
        if self.task == "rerank":
            return [{"scores": request["scores"].reshape(request["shape"][0])} for request in requests]
        return [best_first(self._labels, request["probabilities"]) for request in requests]
