"""INT8 weights whose scale clips: per output channel, the range that costs the layer's output least.

A channel quantized to its largest weight spends its 127 codes on one number. A smaller range rounds all the
others finer and cuts the largest off; which of the two weighs more depends on the inputs. In two steps:

1. A model of the error proposes a range. The weights of the largest inputs are rounded, range by range, and
   their error counts by the mean square of their input: most of a layer's power is in a few channels, and a
   range that suits those is worth more than any clipping. For all others rounding in steps of s leaves
   s^2 / 12 per weight and cutting at c leaves (|w| - c)^2 on the few beyond c: only those are looked at
   again, and the number of ranges costs little.
2. The proposal and the plain range (the largest magnitude) are quantized, and the calibration rows themselves
   go through both errors: E ||x (W - Wq)||^2, cross terms included. The plain range stays unless it loses.

Scales are rounded to FP16, which is what the graph stores, before any code is computed with them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from build_engines.errors import QuantizeError
from build_engines.quantize.linears import FloatArray

Codes = npt.NDArray[np.int8]

# Rows of one Linear's input that both candidates are compared on: each costs the Linear's own products twice.
MAX_ROWS = 256
# Ranges tried between the largest magnitude and the smallest range, closer together near the first: the best
# cut off one large weight is a share of about inputs / 190,000 of it.
_RANGES = 24
# For bell-shaped weights 127 codes are best spent on 3.5 to 7 standard deviations; below this it never pays.
_LEAST_DEVIATIONS = 2.5
_LEAST_SHARE = 0.3
# Inputs whose rounding is computed, not modelled. In an LLM some hundred channels carry most of the power.
_HEAVY = 128
# A range that promises less than this is not worth comparing.
_WORTH = 0.99
# Weights handled at a time: wide enough for long rows and a good matrix product, small enough for the cache.
_BLOCK = 1 << 20
# Subnormal FP16 steps are 2^-24: with this least scale the rounding of the scale itself stays within 3%.
_LEAST_SCALE = 2.0**-20
_MOST = 127


@dataclass(frozen=True, slots=True)
class ClippedWeight:
    """`codes` int8 [inputs, outputs] in [-127, 127]; `scale` float32 [outputs], FP16 numbers.

    `clipped`: output channels whose range is below their largest magnitude. `gain`: what that took off these
    channels' squared output error on the calibration rows, between 0 and 1.
    """

    codes: Codes
    scale: FloatArray
    clipped: int
    gain: float


def clip_weight(weight: FloatArray, rows: FloatArray, moments: FloatArray | None = None) -> ClippedWeight:
    """Quantize one Linear so that its output suffers least.

    Args:
        weight: float32 [inputs, outputs].
        rows: [tokens, inputs], the Linear's inputs on calibration texts.
        moments: [inputs], the mean square of each input over all calibration tokens; default: over `rows`.

    No channel's error over `rows` is above that of the plain range.

    Raises:
        QuantizeError: a weight or an input is not finite.
    """
    from threadpoolctl import threadpool_limits

    inputs, outputs = weight.shape
    if moments is None:
        moments = np.square(rows, dtype=np.float32).mean(axis=0)
    if not np.isfinite(moments).all() or not np.isfinite(rows).all():
        raise QuantizeError("the Linear's inputs are not finite on the calibration texts")
    codes = np.empty((inputs, outputs), dtype=np.int8)
    scale = np.empty(outputs, dtype=np.float32)
    weighed, rows = _Inputs.of(moments), np.ascontiguousarray(rows, dtype=np.float32)

    def quantize(part: slice) -> _Totals:
        block, totals = np.ascontiguousarray(weight[:, part]), _Totals()
        largest = np.maximum(block.max(axis=0), -block.min(axis=0))
        if not np.isfinite(largest).all():
            raise QuantizeError("a weight is not finite: the checkpoint is damaged")
        plain = half_scale(largest / _MOST)
        chosen = _proposed(block, largest, weighed)
        _keep_better(block, plain, chosen, rows, totals)
        codes[:, part] = _encode(block, chosen)
        scale[part] = chosen
        return totals

    # numpy lets other threads run while it computes, and blocks of channels are independent. Matrix products
    # that start threads of their own would fight with these: with both, two cores are slower than one.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        totals = _Totals.joined(pool.map(quantize, _blocks(inputs, outputs)))
    return ClippedWeight(codes, scale, totals.clipped, totals.gain)


def plain_rows(table: FloatArray) -> tuple[Codes, FloatArray]:
    """An embedding table [rows, width] in INT8 with a scale per row: a lookup has no inputs to weigh by."""
    scale = half_scale(np.abs(table).max(axis=1) / _MOST)
    codes = np.empty(table.shape, dtype=np.int8)
    step = max(1, _BLOCK // table.shape[1])
    for start in range(0, len(table), step):
        part = slice(start, start + step)
        codes[part] = _encode(table[part].T, scale[part]).T
    return codes, scale


def dequantize_into(target: FloatArray, codes: Codes, scale: FloatArray) -> None:
    """target [inputs, outputs] = codes * scale, some rows at a time: no second copy of the weight."""
    step = max(1, _BLOCK // max(1, codes.shape[1]))
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        np.multiply(codes[part], scale, out=target[part], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Which inputs count. `heavy`: the largest, `heavy_moments` theirs; `others` [inputs]: every input's mean
    square, 0 for the heavy ones; `noise`: what one unit of scale squared costs on those others."""

    heavy: npt.NDArray[np.intp]
    heavy_moments: FloatArray
    others: FloatArray
    noise: float

    @classmethod
    def of(cls, moments: FloatArray) -> _Inputs:
        heavy = np.sort(np.argsort(moments)[-_HEAVY:])
        others = moments.copy()
        others[heavy] = 0
        return cls(heavy, moments[heavy], others, float(others.sum(dtype=np.float64)) / 12)


@dataclass(slots=True)
class _Totals:
    """Over the channels that are clipped: how many, and their squared errors without and with it."""

    clipped: int = 0
    plain: float = 0.0
    chosen: float = 0.0

    @classmethod
    def joined(cls, parts: Iterable[_Totals]) -> _Totals:
        whole = cls()
        for part in parts:
            whole.clipped += part.clipped
            whole.plain += part.plain
            whole.chosen += part.chosen
        return whole

    @property
    def gain(self) -> float:
        return 1.0 - self.chosen / self.plain if self.plain > 0 else 0.0


def _blocks(inputs: int, outputs: int) -> Iterator[slice]:
    step = max(1, _BLOCK // inputs)
    for start in range(0, outputs, step):
        yield slice(start, min(start + step, outputs))


def half_scale(scale: FloatArray) -> FloatArray:
    """The FP16 number next to each scale; a channel of zeros has a scale too."""
    return np.asarray(np.maximum(scale, _LEAST_SCALE).astype(np.float16), dtype=np.float32)


def _encode(block: FloatArray, scale: FloatArray) -> FloatArray:
    """The codes of block [inputs, channels], still as floats."""
    codes = np.multiply(block, 1 / scale)
    np.rint(codes, out=codes)
    limit = np.full(len(scale), _MOST, dtype=np.float32)  # as an array: numpy is slow with a scalar
    np.minimum(codes, limit, out=codes)
    np.maximum(codes, -limit, out=codes)
    return codes


def _error(block: FloatArray, scale: FloatArray) -> FloatArray:
    """Wq - W [inputs, channels]."""
    error = _encode(block, scale)
    np.multiply(error, scale, out=error)
    return np.subtract(error, block, out=error)


def _proposed(block: FloatArray, largest: FloatArray, inputs: _Inputs) -> FloatArray:
    """Each channel's scale by the model of the error; block [inputs, channels]."""
    count = len(largest)
    power = np.einsum("kn,kn->n", block, block) / len(block)
    least = np.minimum(np.maximum(_LEAST_SHARE * largest, _LEAST_DEVIATIONS * np.sqrt(power)), largest)
    magnitude = np.abs(block)
    beyond = np.flatnonzero(magnitude > least)
    row, channel = np.divmod(beyond, count)
    values, weights = magnitude.ravel()[beyond], inputs.others[row]
    heavy = block[inputs.heavy]
    best = np.full(count, np.inf)
    at_largest, chosen = np.zeros(count), largest.copy()
    for step in range(_RANGES):
        limit = largest - (largest - least) * np.float32((step / _RANGES) ** 2)
        scale = half_scale(limit / _MOST)
        error = np.square(_error(heavy, scale)).T @ inputs.heavy_moments
        over = np.maximum(values - limit[channel], 0)
        error = error + np.bincount(channel, weights=over * over * weights, minlength=count)
        error += inputs.noise * np.square(scale, dtype=np.float64)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, scale, chosen)
        at_largest = error if step == 0 else at_largest
    return np.where(best < _WORTH * at_largest, chosen, half_scale(largest / _MOST))


def _keep_better(
    block: FloatArray, plain: FloatArray, chosen: FloatArray, rows: FloatArray, totals: _Totals
) -> None:
    """Put the plain scale back into `chosen` where the calibration rows [tokens, inputs] do not gain."""
    asked = np.flatnonzero(chosen != plain)
    if not len(asked):
        return
    part = np.take(block, asked, axis=1)
    before = np.square(rows @ _error(part, plain[asked])).sum(axis=0)
    after = np.square(rows @ _error(part, chosen[asked])).sum(axis=0)
    gained = after < before
    chosen[asked[~gained]] = plain[asked[~gained]]
    totals.clipped += int(gained.sum())
    totals.plain += float(before[gained].sum())
    totals.chosen += float(after[gained].sum())
