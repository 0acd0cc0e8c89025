"""How ModelOpt stored a checkpoint that TensorRT-LLM is to serve, and which files it is made of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from build_engines.errors import PlanError
from build_engines.stack import LLM_CAPABILITIES, Model
from build_engines.stack_fields import one_of, show
from build_engines.untrusted import read_json

QUANT_FILE: Final = "hf_quant_config.json"
_INDEX: Final = "model.safetensors.index.json"
_SETTINGS: Final = ("config.json", "generation_config.json", QUANT_FILE, _INDEX)
_PRECISIONS: Final = {
    None: "fp16",
    "NO_QUANT": "fp16",
    "FP8": "fp8",
    "NVFP4": "nvfp4",
    "W4A16_AWQ": "int4-awq",
}
_CACHE_BYTES: Final = {None: 2, "FP8": 1}


@dataclass(frozen=True, slots=True)
class Stored:
    """`precision`: one of LLM_CAPABILITIES. `cache_bytes`: of one key or value; `weight_bytes`: of all."""

    precision: str
    cache_bytes: int
    weight_bytes: int


def read_stored(folder: Path, model: Model) -> Stored:
    """What the checkpoint in `folder` says of itself; `model` must have named the same precision.

    Raises PlanError for a checkpoint that TensorRT-LLM's PyTorch backend does not load, or another one than
    the stack file says.
    """
    settings = _quantization(folder)
    algorithm, cache = settings.get("quant_algo"), settings.get("kv_cache_quant_algo")
    if not isinstance(algorithm, str | None) or algorithm not in _PRECISIONS:
        raise _not_loaded(folder / QUANT_FILE, algorithm)
    if not isinstance(cache, str | None) or cache not in _CACHE_BYTES:
        raise PlanError(
            f"{folder / QUANT_FILE}: kv_cache_quant_algo is {show(cache)}; known are FP8 and none",
            next_step="export the checkpoint again with an FP8 cache, or with none",
        )
    precision = _PRECISIONS[algorithm]
    if precision not in model.precisions:
        raise PlanError(
            f"models.{model.name}.precisions is {model.precisions[0]}, but the checkpoint is {precision}",
            cause=f"{folder} says quant_algo {show(algorithm)}, and TensorRT-LLM serves it as it is stored",
            next_step=f'write precisions = ["{precision}"], or name another checkpoint',
        )
    return Stored(precision, _CACHE_BYTES[cache], sum(path.stat().st_size for path in weight_files(folder)))


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that TensorRT-LLM loads, tokenizer aside: settings and weights."""
    return [folder / name for name in _SETTINGS if (folder / name).is_file()] + weight_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files, those of the index where there is one."""
    index = folder / _INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    shards = _read(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(_is_plain(name) for name in shards.values()):
        raise PlanError(f"{index}: no weight_map of file names", next_step="fetch the checkpoint again")
    paths = [folder / name for name in sorted(set(shards.values()))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise PlanError(f"{folder}: {one_of(missing[:3])} missing", next_step="fetch the checkpoint again")
    return paths


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _quantization(folder: Path) -> dict[str, Any]:
    path = folder / QUANT_FILE
    if os.path.lexists(path):
        found = _read(path).get("quantization")
        if not isinstance(found, dict):
            raise PlanError(f"{path}: has no 'quantization'", next_step="export it with ModelOpt again")
        return found
    other = _read(folder / "config.json").get("quantization_config")
    if other:
        method = other.get("quant_method") if isinstance(other, dict) else other
        raise PlanError(
            f"{folder}: quantized by {show(method)}, without ModelOpt's {QUANT_FILE}",
            cause="TensorRT-LLM 1.2 reads quantization from that file",
            next_step="take a checkpoint that ModelOpt exported (--export_fmt hf), or the original one",
        )
    return {}


def _not_loaded(path: Path, algorithm: Any) -> PlanError:
    integer = isinstance(algorithm, str) and (algorithm.startswith("W8A8") or "INT8" in algorithm)
    return PlanError(
        f"{path}: quant_algo is {show(algorithm)}"
        + (": TensorRT-LLM's PyTorch backend has no INT8 W8A8" if integer else ""),
        cause=f"onecard serves {one_of(LLM_CAPABILITIES)} through TensorRT-LLM",
        next_step="quantize the original checkpoint with ModelOpt to one of these"
        + ('; for INT8 weights remove target and use precisions = ["int8-weights"]' if integer else ""),
    )


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path, PlanError)
    return found if isinstance(found, dict) else {}
