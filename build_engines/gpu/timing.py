"""How runs are timed, for every contender alike: one at a time, each from its start to its answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

Run = Callable[[], object]

_WARM_UP: Final = 3  # the first allocates, the second captures a graph, the third launches it
_LEAST: Final = 7
_MOST: Final = 2000


def timed_runs(run: Run, seconds: float, least: int = _LEAST) -> list[float]:
    """Seconds of each run for about so long. `run` returns when its work is done, also on a GPU."""
    for _ in range(_WARM_UP):
        run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < _MOST):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


def summary(times: Sequence[float], scale: float = 1.0) -> tuple[float, tuple[float, float]]:
    """The median, and the tenth and ninetieth percentile, each times `scale`."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return scale * statistics.median(ordered), (scale * ordered[tenth], scale * ordered[-1 - tenth])


def encoder_arrays(inputs: Sequence[str], batch: int, length: int, vocabulary: int) -> dict[str, Any]:
    """Full rows, int64: what is timed is arithmetic, and padding would only flatter whoever skips it."""
    ids = np.random.default_rng(0).integers(5, vocabulary, (batch, length))
    arrays = {name: np.zeros((batch, length), np.int64) for name in inputs}
    return {**arrays, "input_ids": ids, "attention_mask": np.ones((batch, length), np.int64)}


def prompts(batch: int, length: int, vocabulary: int) -> Any:
    """Random tokens of one length, int64 [batch, length]; the same for every contender."""
    return np.random.default_rng(batch).integers(5, vocabulary, (batch, length))
