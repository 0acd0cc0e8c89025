"""Split texts of different lengths into engine runs so that little padding is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter


def plan_groups(
    lengths: Sequence[int], *, max_batch: int, overhead: float, max_tokens: int
) -> list[list[int]]:
    """The partition of range(len(lengths)) into runs that costs least.

    No run has more than `max_tokens`, padding included, unless it is one text: beyond what the caches hold,
    every further token of a run makes all of its tokens slower.

    A run over n texts padded to the longest, w tokens, costs `overhead + n * w` tokens; `overhead` is what a
    run costs before its first token, measured on the engine (`measure_overhead`). Every index comes exactly
    once, no group has more than `max_batch` members, and groups run from the shortest texts to the longest.
    An optimal partition is made of neighbours in sorted order, so dynamic programming over that order finds
    it in O(n * max_batch).
    """
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, not {max_batch}")
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    if len(order) < 2:
        return [order] if order else []
    best = [0.0]
    start_of = [0]
    for end in range(1, len(order) + 1):
        width = lengths[order[end - 1]]
        lowest, chosen = float("inf"), end - 1
        cost_of_rows = 0.0
        for start in range(end - 1, max(0, end - max_batch) - 1, -1):
            cost_of_rows += width
            if cost_of_rows > max_tokens and start < end - 1:
                break
            cost = best[start] + cost_of_rows
            # `<=` prefers the larger group among equals: fewer runs.
            if cost <= lowest:
                lowest, chosen = cost, start
        best.append(lowest + overhead)
        start_of.append(chosen)
    groups = []
    end = len(order)
    while end:
        groups.append(order[start_of[end] : end])
        end = start_of[end]
    groups.reverse()
    return groups


def measure_overhead(
    run: Callable[[int, int], object], *, batch: int = 8, width: int = 64, most: float = 512.0
) -> float:
    """What one engine run costs beyond its tokens, in tokens; `run(batch, width)` executes one.

    Times a small and a large run (best of several, the first ones warm up) and puts a line through both.
    Clamped to 8..`most` so that a measurement disturbed by other work cannot make the grouping absurd.
    """
    small_tokens, large_tokens = width // 4, batch * width
    run(batch, width)
    small = _best_of(10, lambda: run(1, small_tokens))
    large = _best_of(4, lambda: run(batch, width))
    per_token = (large - small) / (large_tokens - small_tokens)
    if per_token <= 0:
        return most
    return min(most, max(8.0, small / per_token - small_tokens))


def _best_of(times: int, call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(times):
        started = perf_counter()
        call()
        best = min(best, perf_counter() - started)
    return best
