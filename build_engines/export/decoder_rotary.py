"""Rotary positions: config.json's settings in both spellings, and the tables of cosines and sines.

transformers 5 keeps everything under `rope_parameters` (for some families once per kind of layer), older
checkpoints have `rope_theta` and `rope_scaling`. Frequencies as in transformers' modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from build_engines.errors import ExportError
from build_engines.export.checkpoint import FloatArray

SUPPORTED = ("default", "linear", "llama3")
# Longer tables cost more than any card here could fill with a cache.
MAX_ROWS = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """One set of frequencies; the last three only count for `kind` llama3, `factor` for linear and llama3."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_positions: int = 0


def read_ropes(config: dict[str, Any], folder: Path, positions: int) -> dict[str, Rope]:
    """{"global": ..., "local": ...}: what layers with full and with sliding attention rotate by.

    Raises:
        ExportError: a kind of scaling that the tables cannot express, or a number out of range, by name.
    """
    parameters = config.get("rope_parameters") or {}
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    scaling = config.get("rope_scaling") or {}
    theta = config.get("rope_theta")
    gemma3 = config.get("model_type") == "gemma3_text"
    full = nested.get("full_attention", parameters if not nested else {}) or scaling
    # Gemma 3 scales and stretches its global layers only.
    local_default = {} if gemma3 else full
    local = nested.get("sliding_attention", local_default)
    local_theta = config.get("rope_local_base_freq", 10_000.0) if gemma3 else theta
    return {
        "global": _rope(full, theta, 1e6 if gemma3 else 1e4, (config, folder, positions)),
        "local": _rope(local, local_theta, 1e4, (config, folder, positions)),
    }


def _rope(
    entry: dict[str, Any], theta: Any, default_theta: float, where: tuple[dict[str, Any], Path, int]
) -> Rope:
    config, folder, positions = where
    kind = entry.get("rope_type") or entry.get("type") or "default"
    if kind not in SUPPORTED:
        raise ExportError(
            f"{folder}: rope_type {kind!r} is not supported; supported are {', '.join(SUPPORTED)}",
            cause="its frequencies depend on the length of the text, the graph's tables are constant",
            next_step="choose a checkpoint without it, or remove the scaling from config.json if you never "
            "use texts beyond the length the model was trained on",
        )
    partial = entry.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ExportError(f"{folder}: partial_rotary_factor {partial!r} is not supported; supported is 1.0")
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    lost = [key for key in needed.get(str(kind), ()) if entry.get(key) is None]
    if lost:
        raise ExportError(f"{folder}: rope_type {kind!r} without {', '.join(lost)} in config.json")
    base = entry.get("rope_theta", theta)
    original = (
        config.get("original_max_position_embeddings")
        or entry.get("original_max_position_embeddings")
        or positions
    )
    rope = Rope(
        theta=_positive(default_theta if base is None else base, "rope_theta", folder),
        kind=str(kind),
        factor=_positive(entry.get("factor", 1.0), "the rope factor", folder) if kind != "default" else 1.0,
        low_frequency=_positive(entry.get("low_freq_factor", 1.0), "low_freq_factor", folder),
        high_frequency=_positive(entry.get("high_freq_factor", 4.0), "high_freq_factor", folder),
        original_positions=int(_positive(original, "original_max_position_embeddings", folder)),
    )
    if rope.kind == "llama3" and rope.high_frequency <= rope.low_frequency:
        raise ExportError(
            f"{folder}: high_freq_factor {rope.high_frequency:g} must be above low_freq_factor "
            f"{rope.low_frequency:g}"
        )
    return rope


def rope_tables(rope: Rope, head_dim: int, rows: int) -> tuple[FloatArray, FloatArray]:
    """Cosines and sines of position x frequency, float32 [rows, head_dim / 2].

    The product is taken in float32, as transformers takes it.
    """
    frequencies = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_positions * frequencies / (2 * math.pi)
        smooth = (turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
        smooth = np.clip(smooth, 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    return np.cos(angles), np.sin(angles)


def _positive(value: Any, what: str, folder: Path) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ExportError(f"{folder}/config.json: {what} must be a positive number, not {value!r}")
    return number
