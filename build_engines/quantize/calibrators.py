"""Calibrators: from sampled activations to the magnitude that the largest INT8 code stands for.

All are symmetric and per tensor, the only form TensorRT takes for activations. Each takes the sampled rows
and the exact maximum over all calibration tokens, both after smoothing, and returns a threshold in (0,
maximum].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from build_engines.quantize.linears import FloatArray

Calibrator = Callable[[FloatArray, float, float], float]

_BINS = 2048
_LEVELS = 128  # magnitudes that INT8 can tell apart
_FIRST_CUT = 192  # entropy: never clip below this bin; fewer bins than levels say nothing


def minmax(rows: FloatArray, maximum: float, percentile: float) -> float:
    """Nothing seen in calibration is clipped."""
    del rows, percentile
    return maximum


def percentile_range(rows: FloatArray, maximum: float, percentile: float) -> float:
    """`percentile` per cent of the sampled magnitudes are kept, the rest clipped."""
    return min(maximum, float(np.percentile(np.abs(rows), percentile))) or maximum


def entropy(rows: FloatArray, maximum: float, percentile: float) -> float:
    """The threshold whose clipped, 128-level histogram loses least information (Kullback-Leibler divergence).

    The method is TensorRT's (Migacz, "8-bit Inference with TensorRT", GTC 2017).
    """
    del percentile
    histogram, edges = np.histogram(np.abs(rows), bins=_BINS, range=(0.0, maximum))
    counts = histogram.astype(np.float64)
    counts[0] = counts[1]  # exact zeros say nothing about the range
    cuts = range(_FIRST_CUT, _BINS + 1, 16)
    losses = [_divergence(counts, cut) for cut in cuts]
    return float(edges[cuts[int(np.argmin(losses))]])


def _divergence(counts: npt.NDArray[np.float64], cut: int) -> float:
    """KL divergence of the histogram clipped at bin `cut` from its 128-level quantization."""
    reference = counts[:cut].copy()
    reference[-1] += counts[cut:].sum()
    source = counts[:cut]
    level = np.minimum(np.arange(cut) * _LEVELS // cut, _LEVELS - 1)
    # By the clipped histogram, not by `source`: its last bin holds what was clipped even where it was empty.
    occupied = reference > 0
    sums = np.bincount(level, weights=source, minlength=_LEVELS)
    sizes = np.bincount(level, weights=occupied.astype(np.float64), minlength=_LEVELS)
    quantized = np.where(occupied, (sums / np.maximum(sizes, 1))[level], 0.0)
    p, q = reference / max(reference.sum(), 1e-12), quantized / max(quantized.sum(), 1e-12)
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))))


CALIBRATORS: Final[dict[str, Calibrator]] = {
    "minmax": minmax,
    "percentile": percentile_range,
    "entropy": entropy,
}
