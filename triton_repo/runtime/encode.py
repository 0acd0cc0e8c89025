"""Token rows to engine outputs: rows of similar length share a run, results come back in the order given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.engines import open_encoder_engine
from triton_repo.runtime.grouping import measure_overhead, plan_groups
from triton_repo.runtime.texts import EngineFailed
from triton_repo.runtime.tokenization import Row, TextTokenizer, padded

# The output of each task's graph that the answer is made from.
ANSWER_OUTPUT = {"classify": "probabilities", "embed": "embeddings", "rerank": "scores"}


class RunsEngine(Protocol):
    """What this module needs of an engine; `runtime.session.Engine` is one.

    `max_tokens` is how many tokens a run should have at most, None where more are never worse.
    """

    manifest: dict[str, Any]
    max_tokens: int | None

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]: ...


class Encoder:
    """An engine with its tokenizer. Counts runs, their rows, and real and padded tokens in `runs`, `rows`,
    `tokens` and `padding`."""

    def __init__(
        self, engine: RunsEngine, tokenizer: TextTokenizer, *, overhead: float | None = None
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        serving = engine.manifest["serving"]
        self.task: str = engine.manifest["task"]
        self.max_batch: int = serving["max_batch"]
        self._inputs = frozenset(serving["inputs"])
        self._pad_id: int = serving["pad_id"]
        self._output = ANSWER_OUTPUT[self.task]
        self.runs = self.rows = self.tokens = self.padding = 0
        self._max_tokens = engine.max_tokens or self.max_batch * tokenizer.max_length
        self.overhead = self._measured() if overhead is None else overhead

    @classmethod
    def open(cls, folder: Path, threads: int | None = None, device: int = 0) -> Encoder:
        """Open an engine folder (digests checked), on the GPU `device` where it is for one.

        Raises EngineRefused or TokenizerRefused.
        """
        engine = open_encoder_engine(folder, threads, device)
        tokenizer = TextTokenizer(
            Path(folder) / "tokenizer.json", max_length=engine.manifest["serving"]["max_length"]
        )
        return cls(engine, tokenizer)

    def encode(self, rows: Sequence[Row]) -> list[npt.NDArray[Any] | EngineFailed]:
        """The task's output for every row, in order: probabilities [labels], embedding [dim], or score [].

        A run that breaks fails only the rows that were in it.
        """
        answer: list[npt.NDArray[Any] | EngineFailed] = [_NOT_RUN] * len(rows)
        lengths = [len(row.ids) for row in rows]
        groups = plan_groups(
            lengths, max_batch=self.max_batch, overhead=self.overhead, max_tokens=self._max_tokens
        )
        for group in groups:
            width = lengths[group[-1]]
            try:
                values = self.engine.run(self.arrays([rows[index] for index in group], width))[self._output]
            except Exception as error:  # whatever the engine library raises
                failure = EngineFailed(f"the engine failed on {len(group)} x {width} tokens: {error}")
                for index in group:
                    answer[index] = failure
                continue
            for index, value in zip(group, values, strict=True):
                answer[index] = value
            real = sum(lengths[index] for index in group)
            self.runs += 1
            self.rows += len(group)
            self.tokens += real
            self.padding += len(group) * width - real
        return answer

    def arrays(self, rows: Sequence[Row], width: int) -> dict[str, npt.NDArray[np.int64]]:
        """Graph inputs int64 [rows, width], padded on the right."""
        return padded(rows, width, self._pad_id, self._inputs)

    def close(self) -> None:
        """Give back what the engine holds outside this process's memory; nothing for one on the CPU."""
        if close := getattr(self.engine, "close", None):
            close()

    def _measured(self) -> float:
        """What a run costs beyond its tokens, in tokens, measured at sizes that the engine is used with."""
        if self.engine.max_tokens is None:
            # On a GPU small runs take all as long: the line goes through a large one, and may be steep.
            batch, width = self.max_batch, min(128, self.tokenizer.max_length)
            return measure_overhead(self._dry_run, batch=batch, width=width, most=float(batch * width))
        batch, width = min(8, self.max_batch), min(64, self.tokenizer.max_length)
        return measure_overhead(self._dry_run, batch=batch, width=width)

    def _dry_run(self, batch: int, width: int) -> None:
        row = Row([self._pad_id] * width, [0] * width, False)
        self.engine.run(self.arrays([row] * batch, width))


_NOT_RUN = EngineFailed("the row was not run")
