"""The encoders' baseline: sends jobs to the worker process and reads its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .machine import cores
from .process import Worker
from .summary import BenchModel, Item

NEEDS = ("torch", "transformers", "sentence_transformers")


@dataclass(frozen=True, slots=True)
class Speed:
    """One precision of the baseline: units per second, and the process's resident memory after the runs."""

    one_by_one_per_s: float
    batch32_per_s: float
    memory_mib: float


@dataclass(frozen=True, slots=True)
class Answers:
    """FP32 answers on all evaluation items; `tokens` are the model's lengths before truncation.

    `values` is [N] label indices, [N, D] vectors or the concatenated scores of all groups.
    """

    values: Any
    tokens: Any
    labels: tuple[str, ...]


class Baseline(Worker):
    """Context manager around the worker process."""

    def __init__(self, seconds: float) -> None:
        super().__init__("client.bench.worker")
        self._seconds = seconds

    def measure(self, model: BenchModel, precision: str, pool: Sequence[Item]) -> Speed:
        """Throughput over the pool, `precision` being fp32 or bf16."""
        result = self._job(model, precision, {"pool": [_plain(item) for item in pool]})
        return Speed(result["one_by_one_per_s"], result["batch32_per_s"], result["memory_mib"])

    def answers(self, model: BenchModel) -> Answers:
        """FP32 answers on every evaluation item."""
        path = self.folder / f"{model.name}.npz"
        result = self._job(model, "fp32", {"all": [_plain(item) for item in model.items], "out": str(path)})
        with np.load(path) as arrays:
            return Answers(arrays["values"], arrays["tokens"], tuple(result["labels"]))

    def _job(self, model: BenchModel, precision: str, work: dict[str, Any]) -> dict[str, Any]:
        job = {
            "task": model.task,
            "source": str(model.source),
            "max_length": model.max_length,
            "pooling": model.pooling,
            "normalize": model.normalize,
            "precision": precision,
            "seconds": self._seconds,
            "threads": cores(),
            **work,
        }
        return self.job(job, model.name)


def _plain(item: Item) -> list[Any]:
    return [item.text, list(item.passages)]
