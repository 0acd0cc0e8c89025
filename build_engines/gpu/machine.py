"""The machine that a figure was measured on: card, driver, processor, packages, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import asdict
from typing import Any, Final

from build_engines import host
from build_engines.nvidia import Card

PACKAGES: Final = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "nvidia-pytriton",
    "tritonclient",
)


def describe(card: Card | None, why_no_card: str = "") -> dict[str, Any]:
    """Facts for the report: GPU, processor, versions, compiler, in JSON values."""
    packages = {name: found for name in PACKAGES if (found := version(name))}
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return {
        "gpu": asdict(card) if card else None,
        "no_gpu": why_no_card or None,
        "cpu": host.cpu_name(),
        "cores": host.cores(),
        "memory_gib": round(host.memory_bytes() / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "c_compiler": os.environ.get("CC") or compiler,
        "packages": packages,
        "missing": [name for name in PACKAGES if name not in packages],
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
