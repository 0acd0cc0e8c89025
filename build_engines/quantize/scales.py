"""How one Linear is quantized, chosen by the error of the layer's own output on calibration rows.

Activations have one scale per tensor, so outlier channels and one-sided distributions waste its codes. Two
exact rewrites move the problem into the weights, which have a scale per output, and into the bias:

  smoothing  x is multiplied and W divided, channel by channel, by m = max|W|^(1-alpha) / max|x|^alpha
             (SmoothQuant, Xiao et al. 2023);
  shifting   each channel is centred, x - z with z = (min + max) / 2, and the bias takes z W
             (Outlier Suppression+, Wei et al. 2023); GELU's outputs, almost all positive, gain one bit.

Both are elementwise and come before the quantizer: x' = x * multiplier + offset. Whether to
shift and which alpha is searched per layer: a fixed alpha helps some layers and ruins others
(docs/quantization.md has the figures).
The bias also absorbs the mean error that is left (bias correction, Nagel et al. 2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from build_engines.quantize.calibrators import CALIBRATORS
from build_engines.quantize.clipping import half_scale
from build_engines.quantize.linears import FloatArray
from build_engines.quantize.statistics import InputStatistics

ALPHAS = (0.5, 0.7, 0.8, 0.9, 1.0)
# Each part of the rewrite is one more pass over the activations at run time, up to a twentieth of the layer's
# time on a CPU. A layer that is good without keeps its speed; one that is smoothed is shifted if that helps.
WORTH = 0.5
SHIFT_WORTH = 0.9
_LEAST = 1e-5
# An activation is divided by its scale: a normal FP16 number, whose inverse is one too. A weight is not.
_LEAST_SCALE = float(np.finfo(np.float16).tiny)
_MOST_LIFT = 64  # times the largest multiplier of a rewrite, still an FP16 number


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """INT8 weight [inputs, outputs] and its scale per output channel, float32 [outputs]."""

    values: npt.NDArray[np.int8]
    scale: FloatArray


@dataclass(frozen=True, slots=True)
class Rewrite:
    """x * multiplier [inputs] + offset [inputs] (None: not shifted), FP16 numbers both."""

    multiplier: FloatArray
    offset: FloatArray | None

    def apply(self, rows: FloatArray) -> FloatArray:
        product = rows * self.multiplier
        return product if self.offset is None else product + self.offset


@dataclass(frozen=True, slots=True)
class StaticScales:
    """One Linear in static INT8. `scale` is the input's; `bias_shift` [outputs] is added to the bias;
    `error` is the relative squared error of the output on the sampled rows, bias correction included."""

    weight: QuantizedWeight
    rewrite: Rewrite | None
    scale: np.float32
    bias_shift: FloatArray
    alpha: float | None
    error: float


def quantize_weight(weight: FloatArray) -> QuantizedWeight:
    """Symmetric, per output channel, in [-127, 127]; scales are FP16 numbers so that no cast changes them."""
    largest = np.abs(weight).max(axis=0)
    scale = half_scale(np.where(largest > _LEAST, largest, 127) / 127)  # a dead channel's is free
    return QuantizedWeight(np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale)


def search_scales(
    weight: FloatArray,
    statistics: InputStatistics,
    *,
    method: str,
    percentile: float,
    smoothing: str,
    stagger: FloatArray | None = None,
) -> StaticScales:
    """The best static INT8 form of one Linear, by the error of its output on `statistics.rows`.

    `method` is a calibrator's name; `smoothing` is "auto" (smoothing and shifting where they help) or "off";
    `stagger` [inputs] moves each channel's offset by that many quantization steps (outliers.py). An input too
    small for an FP16 scale is multiplied by a power of two, and the weight divided by it.
    """
    calibration, lift = Calibration(method, percentile), _lift(statistics)
    if lift == 1:
        return _best(_Search(weight, statistics, calibration, stagger), smoothing)
    lifted = InputStatistics(statistics.low * lift, statistics.high * lift, statistics.rows * lift)
    found = _best(_Search(weight / lift, lifted, calibration, stagger), smoothing)
    rewrite = found.rewrite or Rewrite(np.ones(len(weight), dtype=np.float32), None)
    return replace(found, rewrite=Rewrite(rewrite.multiplier * lift, rewrite.offset))


def _best(search: _Search, smoothing: str) -> StaticScales:
    plain = search.candidate(None, shifted=False)
    if smoothing == "off":
        return plain
    shifted = min((search.candidate(alpha, shifted=True) for alpha in ALPHAS), key=lambda found: found.error)
    smooth = search.candidate(shifted.alpha, shifted=False)
    best = shifted if shifted.error < SHIFT_WORTH * smooth.error else smooth
    return best if best.error < WORTH * plain.error else plain


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibrator's name and its percentile."""

    method: str
    percentile: float


class _Search:
    def __init__(
        self,
        weight: FloatArray,
        statistics: InputStatistics,
        calibration: Calibration,
        stagger: FloatArray | None,
    ) -> None:
        self.weight = weight
        self.statistics = statistics
        self.calibration = calibration
        self.stagger = stagger
        self.exact = statistics.rows @ weight
        power = np.square(self.exact).mean(axis=1, keepdims=True)
        # The norm after the layer divides each token by its own size: a token ten times as large bears an
        # error ten times as large. Without this a handful of tokens would decide every scale.
        self.share = 1 / np.maximum(power + np.median(power), 1e-12)
        self.share /= self.share.sum()
        self.power = float((self.share * np.square(self.exact)).sum()) or 1.0

    def candidate(self, alpha: float | None, *, shifted: bool) -> StaticScales:
        """The best scales for one alpha (None: no rewrite)."""
        low, high = self.statistics.low, self.statistics.high
        rewrite, weight, rows = None, self.weight, self.statistics.rows
        if alpha is not None:
            rewrite = self._rewrite(alpha, shifted)
            weight = weight / rewrite.multiplier[:, None]
            rows, low, high = rewrite.apply(rows), rewrite.apply(low), rewrite.apply(high)
        quantized = quantize_weight(weight)
        restored = quantized.values.astype(np.float32) * quantized.scale
        maximum = max(float(np.abs(low).max()), float(np.abs(high).max()), _LEAST)
        calibrator = CALIBRATORS[self.calibration.method]
        scale = _activation_scale(calibrator(rows, maximum, self.calibration.percentile))
        if self.stagger is not None and rewrite is not None and rewrite.offset is not None:
            rewrite = Rewrite(rewrite.multiplier, _as_half(rewrite.offset + self.stagger * scale))
            rows = rewrite.apply(self.statistics.rows)
        output = (np.clip(np.rint(rows / scale), -128, 127) * scale) @ restored
        bias_shift = (self.share * (self.exact - output)).sum(axis=0)
        error = float((self.share * np.square(output + bias_shift - self.exact)).sum()) / self.power
        return StaticScales(quantized, rewrite, scale, bias_shift, alpha, error)

    def _rewrite(self, alpha: float, shifted: bool) -> Rewrite:
        """The multiplier is scaled so that the weights keep their typical size; FP16 must hold all of it."""
        low, high = self.statistics.low, self.statistics.high
        centre = (low + high) / 2 if shifted else np.zeros_like(low)
        reach = np.maximum(np.maximum(np.abs(low - centre), np.abs(high - centre)), _LEAST)
        weight_max = np.maximum(np.abs(self.weight).max(axis=1), _LEAST)
        smoothing = reach**alpha / weight_max ** (1 - alpha)
        smoothing /= np.median(weight_max * smoothing) / np.median(weight_max)
        multiplier = _as_half(1 / np.clip(smoothing, 1e-3, 1e3))
        return Rewrite(multiplier, _as_half(-centre * multiplier) if shifted else None)


def _lift(statistics: InputStatistics) -> np.float32:
    """The power of two, at most _MOST_LIFT, that makes the scale of this input at least _LEAST_SCALE."""
    reach = max(float(np.abs(statistics.low).max()), float(np.abs(statistics.high).max()))
    if not 0 < reach < 127 * _LEAST_SCALE:
        return np.float32(1)
    return np.float32(min(2 ** math.ceil(math.log2(127 * _LEAST_SCALE / reach)), _MOST_LIFT))


def _activation_scale(threshold: float) -> np.float32:
    return np.float32(_as_half(np.asarray(max(threshold / 127, _LEAST_SCALE))))


def _as_half(values: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Round to FP16 where that holds the value as a normal number (to_fp16 keeps smaller ones in float32)."""
    values = np.asarray(values, dtype=np.float32)
    half = values.astype(np.float16).astype(np.float32)
    return np.where(np.abs(values) >= np.finfo(np.float16).tiny, half, values).astype(np.float32)
