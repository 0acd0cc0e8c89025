"""The baseline's side of the fence: starts the worker process, sends it jobs, reads its results.

A process of its own, so that its memory is its own, its threads do not disturb the load generator, and this
process never imports torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..errors import BenchError
from .machine import cores
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


def check_installed() -> None:
    missing = [name.replace("_", "-") for name in NEEDS if find_spec(name) is None]
    if missing:
        raise BenchError(
            f"the baseline needs {', '.join(missing)}", next_step="pip install 'onecard[bench]' installs it"
        )


class Baseline:
    """Context manager around the worker process."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="onecard-bench-")
        self._log = Path(self._folder.name) / "worker.log"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "client.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # its forks can then be ended with it
                env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._folder.cleanup()

    def measure(self, model: BenchModel, precision: str, pool: Sequence[Item]) -> Speed:
        """Throughput over the pool, `precision` being fp32 or bf16."""
        result = self._job(model, precision, {"pool": [_plain(item) for item in pool]})
        return Speed(result["one_by_one_per_s"], result["batch32_per_s"], result["memory_mib"])

    def answers(self, model: BenchModel) -> Answers:
        """FP32 answers on every evaluation item."""
        path = Path(self._folder.name) / f"{model.name}.npz"
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
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise BenchError(f"the baseline process ended: {self._last_words()}", model=model.name)
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            raise BenchError(f"the baseline failed ({precision}): {result['error']}", model=model.name)
        return result

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self._process.wait()}"


def _plain(item: Item) -> list[Any]:
    return [item.text, list(item.passages)]
