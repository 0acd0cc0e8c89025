"""Split the outlier channels between the two Linears of an FFN, exactly.

A few of the inner channels reach far beyond the others. Smoothing moves their range into the second Linear's
weights, where each of them then decides the scale of every output, and the other weights keep two or three
codes. Outlier channel splitting (Zhao et al. 2019) has such a channel m times by repeating its column in the
first Linear, and divides its row in the second by m: the graph computes the same, the row's range is m times
smaller. The copies get offsets a fraction of a quantization step apart (scales.py): their mean rounds m
times finer.

Only an FFN whose activation is elementwise and not gated can be split without any work at run time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from build_engines.quantize.linears import FloatArray, Linear
from build_engines.quantize.statistics import InputStatistics

# Copies as a share of the inner width: they cost as much time as they are.
_SHARE = 1 / 48
_ALIGNMENT = 16  # integer kernels work on blocks of channels
# Splitting that does not at least halve the largest row is not worth its copies.
_WORTH = 2.0


@dataclass(frozen=True, slots=True)
class Split:
    """`parents` [copies]: the channel that each appended one repeats; `counts` [inputs + copies]: how many
    channels now share that channel's value; `stagger` [inputs + copies]: its offset in quantization steps."""

    parents: npt.NDArray[np.int64]
    counts: FloatArray
    stagger: FloatArray

    def first_columns(self, values: FloatArray) -> FloatArray:
        """The first Linear's weight [k, inputs] or bias [inputs] with the copies' columns appended."""
        return np.concatenate([values, values[..., self.parents]], axis=-1)

    def second_rows(self, weight: FloatArray) -> FloatArray:
        """The second Linear's weight [inputs, n] with every row divided among its copies."""
        rows: FloatArray = np.concatenate([weight, weight[self.parents]]) / self.counts[:, None]
        return rows

    def statistics(self, found: InputStatistics) -> InputStatistics:
        low, high, rows = (self.first_columns(values) for values in (found.low, found.high, found.rows))
        return InputStatistics(low, high, rows)


def find_pairs(linears: Sequence[Linear]) -> list[tuple[Linear, Linear]]:
    """(first, second) Linear of every FFN whose inner channels can be split."""
    by_name = {linear.name: linear for linear in linears}
    pairs = []
    for second in linears:
        first = by_name.get(second.name.removesuffix(".down") + ".up")
        if second.name.endswith(".ffn.down") and first is not None and first.outputs == second.inputs:
            pairs.append((first, second))
    return pairs


def split_outliers(weight: FloatArray, found: InputStatistics) -> Split | None:
    """Which inner channels to repeat, given the second Linear's weight [inputs, n]; None: not worth it.

    The copies go, one by one, to the channel whose range times weight is largest at that moment.
    """
    budget = math.ceil(len(weight) * _SHARE / _ALIGNMENT) * _ALIGNMENT
    reach = (found.high - found.low) / 2 * np.abs(weight).max(axis=1)
    if not reach.max() > 0:
        return None
    counts = np.ones(len(weight), dtype=np.float32)
    parents = []
    for _ in range(budget):
        parent = int(np.argmax(reach / counts))
        counts[parent] += 1
        parents.append(parent)
    if reach.max() < _WORTH * (reach / counts).max():
        return None
    return _staggered(np.array(parents, dtype=np.int64), counts)


def _staggered(parents: npt.NDArray[np.int64], counts: FloatArray) -> Split:
    """Spread the copies of a channel evenly over one step, around its own offset."""
    channels = np.concatenate([np.arange(len(counts)), parents])
    seen: dict[int, int] = {}
    order = np.empty(len(channels), dtype=np.float32)
    for position, channel in enumerate(channels.tolist()):
        order[position] = seen[channel] = seen.get(channel, -1) + 1
    shared = counts[channels]
    stagger: FloatArray = ((order - (shared - 1) / 2) / shared).astype(np.float32)
    return Split(parents, shared, stagger)
