"""Whether an engine can run on the GPU that is here, known before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triton_repo.runtime.gpu.cuda import DeviceInfo
from triton_repo.runtime.gpu.engine_header import read_header
from triton_repo.runtime.session import EngineRefused

# TensorRT-RTX's default engines are for "8.0, 8.6, 8.9, 12.0 and later".
_PORTABLE_FROM = (8, 0)


def check_compatible(folder: Path, manifest: Mapping[str, Any], info: DeviceInfo, version: str) -> None:
    """Refuse a TensorRT engine that was compiled for another card or by another version of its library.

    Args:
        info: the GPU that is to run it.
        version: of the library that is installed.

    Raises:
        EngineRefused: naming what the engine was compiled for and what is here.
    """
    engine, target = folder / manifest["engine"]["file"], manifest["target"]
    capability, portable = manifest.get("compute_capability"), bool(manifest.get("portable"))
    compiled_by = manifest.get("versions", {}).get(target)
    compiled_for: tuple[str, ...] = (str(capability),)
    if target == "tensorrt-rtx":
        header = read_header(engine)
        compiled_by, compiled_for = header.version, header.compute_capabilities
        portable = portable or header.later
    if compiled_by != version:
        raise EngineRefused(
            f"{engine} was compiled by {target} {compiled_by}, {version} is installed here; an engine is "
            f"tied to the version that compiled it: pip install {target}=={compiled_by}, or build it again"
        )
    if info.compute_capability in compiled_for:
        return
    if portable and _numbers(info.compute_capability) >= _PORTABLE_FROM:
        return  # no promise: the library is asked when it is loaded
    named = " and ".join(compiled_for) or "that is not known here"
    raise EngineRefused(
        f"{engine} was compiled for compute capability {named}, the GPU here ({info.name}) has "
        f"{info.compute_capability}; name this card in the stack file"
        + (", or set portable = true," if target == "tensorrt-rtx" else "")
        + " and build again"
    )


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
