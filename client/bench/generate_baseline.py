"""The generating baseline, and the bound that memory sets: jobs for the worker process and their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .generate_data import SMALLEST_NUMBER, BenchGenerator, Prompt
from .machine import cores
from .process import Worker

NEEDS = ("torch", "transformers")
BATCHES = (1, 4, 8)
MAX_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Speed:
    """One precision of the baseline: figures by batch size, and the process's resident memory afterwards."""

    points: dict[str, dict[str, float]]
    memory_mib: float


class GenerateBaseline(Worker):
    """Context manager around the worker process."""

    def __init__(self, seconds: float, limit: float = MAX_LIMIT_S) -> None:
        super().__init__("client.bench.generate_worker")
        self._seconds, self._limit = seconds, limit

    def measure(
        self, model: BenchGenerator, precision: str, prompts: Sequence[Prompt], new_tokens: int
    ) -> Speed:
        """Generation over the prompts, one by one and in static batches; `precision` is fp32 or bf16.

        The larger batches are left out once the limit is over: a large model on a few cores.
        """
        work = {
            "kind": "generate",
            "source": str(model.source),
            "precision": precision,
            # As long as the served side's, which are numbered too.
            "prompts": [prompt.distinct(SMALLEST_NUMBER + n).plain() for n, prompt in enumerate(prompts)],
            "new_tokens": new_tokens,
            "batches": BATCHES,
            "seconds": self._seconds,
            "limit": self._limit,
            "threads": cores(),
        }
        result = self.job(work, model.name)
        return Speed(result["points"], result["memory_mib"])

    def texts(self, model: BenchGenerator, wanted: Sequence[tuple[int, int]]) -> list[list[str]]:
        """For each pair of tokens and count, so many texts of so many tokens once they are made distinct,
        special tokens included."""
        words = [turn["content"] for prompt in model.prompts[:200] for turn in prompt.messages]
        words += [prompt.text for prompt in model.prompts[:200] if prompt.text]
        work = {
            "kind": "texts",
            "source": str(model.source),
            "wanted": list(wanted),
            "words": words,
            "before": Prompt().distinct(SMALLEST_NUMBER).text,
        }
        found: list[list[str]] = self.job(work, model.name)["texts"]
        return found

    def read_bandwidth(self, model: BenchGenerator, seconds: float) -> float:
        """Bytes per second, all cores reading."""
        work: dict[str, Any] = {"kind": "bandwidth", "seconds": seconds, "threads": cores()}
        return float(self.job(work, model.name)["bytes_per_s"])

    def weight_bytes(self, model: BenchGenerator, precision: str) -> int | None:
        """Bytes of weights that one decode step of the served engine reads; None where that is not known."""
        found = model.manifest(precision)
        if found is None:
            return None
        folder, manifest = found
        engine = folder / manifest["engine"]["file"]
        counted: int | None = self.job({"kind": "weights", "engine": str(engine)}, model.name)["bytes"]
        return counted
