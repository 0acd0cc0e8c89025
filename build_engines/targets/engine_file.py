"""What a TensorRT-RTX engine file says about itself, read without a GPU: version, cards, whether it is whole.

`Runtime.get_engine_validity` needs a driver even for the version, so the first 36 bytes are read here. Their
layout is not documented; it was read off engines that TensorRT-RTX 1.7 compiled for different cards, and a
test compiles and reads them again with the library that is installed. A file with another layout is refused,
never guessed at.

    0   "vtrt"     16  total size, uint64          28  "vtrt"
    8   2, uint64  24  version, four bytes         32  compute capabilities, uint32, one bit each
"""

from __future__ import annotations

import importlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_engines.errors import ArtifactError
from build_engines.targets.gpu import gpu_compute_capability

_MAGIC = b"vtrt"
_HEADER = struct.Struct("<4sIQQ4B4sI")
_CARDS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_REBUILD = "run `build-engines build STACK` again with this library and card"


@dataclass(frozen=True, slots=True)
class EngineHeader:
    """`compute_capabilities`: those the engine was compiled for, as far as their bits are known."""

    version: str
    compute_capabilities: tuple[str, ...]
    size: int


def read_header(path: Path) -> EngineHeader:
    """Read the header of an engine.

    Raises:
        ArtifactError: the file is missing, truncated, or no TensorRT-RTX engine.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_HEADER.size)
        actual = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}", next_step=_REBUILD) from error
    if len(start) < _HEADER.size:
        raise ArtifactError(f"{path} is truncated: {len(start)} bytes are no engine", next_step=_REBUILD)
    magic, _, _, size, *version, second_magic, cards = _HEADER.unpack(start)
    if magic != _MAGIC or second_magic != _MAGIC:
        raise ArtifactError(
            f"{path} is no TensorRT-RTX engine",
            cause="it was altered, or written by full TensorRT or by a version with another layout",
            next_step=_REBUILD,
        )
    if size != actual:
        raise ArtifactError(
            f"{path} is truncated or altered: it has {actual:,} bytes, its header says {size:,}",
            cause="a copy was cut short",
            next_step="copy it again, or " + _REBUILD,
        )
    named = tuple(card for bit, card in enumerate(_CARDS) if cards & (1 << bit))
    return EngineHeader(".".join(map(str, version)), named, size)


def check_engine(path: Path, *, version: str | None, compute_capability: str | None) -> EngineHeader:
    """Refuse an engine that is not for this library version or this card; None leaves that open.

    Where a GPU is present the library's own verdict is asked as well.

    Raises:
        ArtifactError: with the reason.
    """
    header = read_header(path)
    if version is not None and header.version != version:
        raise ArtifactError(
            f"{path} was compiled by TensorRT-RTX {header.version}, {version} is installed",
            cause="an engine is tied to the version of the library that compiled it",
            next_step=f"pip install tensorrt-rtx=={header.version}, or " + _REBUILD,
        )
    if compute_capability is not None and compute_capability not in header.compute_capabilities:
        compiled = " and ".join(header.compute_capabilities) or "none that is known here"
        raise ArtifactError(
            f"{path} was compiled for compute capability {compiled}, this card has {compute_capability}",
            cause="it was built for another card",
            next_step="set the card in the stack file, then " + _REBUILD,
        )
    if gpu_compute_capability() is not None:
        _ask_the_library(path)
    return header


def _ask_the_library(path: Path) -> None:
    """`Runtime.get_engine_validity`: it knows drivers and memory too, but answers only where a GPU is."""
    try:
        trt: Any = importlib.import_module("tensorrt_rtx")
    except ImportError:
        return
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    validity, diagnostics = runtime.get_engine_validity(path.read_bytes())
    if validity == trt.EngineValidity.INVALID:
        flags = trt.EngineInvalidityDiagnostics.__members__
        reasons = [name.lower().replace("_", " ") for name, flag in flags.items() if diagnostics & int(flag)]
        raise ArtifactError(
            f"{path} cannot run on this machine: {', '.join(reasons) or 'TensorRT-RTX gives no reason'}",
            next_step=_REBUILD,
        )
