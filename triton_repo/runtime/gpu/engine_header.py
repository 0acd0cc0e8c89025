"""What a TensorRT-RTX engine file says about itself, read without a GPU: version, cards, whether it is whole.

The layout of its first 36 bytes is not documented; it was read off engines that TensorRT-RTX 1.7 compiled for
different cards, and a test compiles and reads them again with the library that is installed. A file with
another layout is refused, never guessed at.

    0   "vtrt"     16  total size, uint64          28  "vtrt"
    8   2, uint64  24  version, four bytes         32  compute capabilities, uint32, one bit each
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from triton_repo.runtime.session import EngineRefused

_MAGIC = b"vtrt"
_HEADER = struct.Struct("<4sIQQ4B4sI")
_CARDS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
# Set beside the cards from 8.0 on in an engine that was compiled for no card in particular: "and later".
_LATER = 1 << 6


@dataclass(frozen=True, slots=True)
class EngineHeader:
    """`compute_capabilities`: those the engine was compiled for, as far as their bits are known; `later`: and
    those that came after them."""

    version: str
    compute_capabilities: tuple[str, ...]
    later: bool
    size: int


def read_header(path: Path) -> EngineHeader:
    """Read the header of an engine. Raises EngineRefused: missing, truncated, or no TensorRT-RTX engine."""
    try:
        with path.open("rb") as file:
            start = file.read(_HEADER.size)
        actual = path.stat().st_size
    except OSError as error:
        raise EngineRefused(f"{path} cannot be read: {error.strerror}") from error
    if len(start) < _HEADER.size:
        raise EngineRefused(f"{path} is truncated: {len(start)} bytes are no engine")
    magic, _, _, size, *version, second_magic, cards = _HEADER.unpack(start)
    if magic != _MAGIC or second_magic != _MAGIC:
        raise EngineRefused(
            f"{path} is no TensorRT-RTX engine: it was altered, or written by full TensorRT or by a version "
            "with another layout"
        )
    if size != actual:
        raise EngineRefused(
            f"{path} is truncated or altered: it has {actual:,} bytes, its header says {size:,} (was a copy "
            "cut short?)"
        )
    named = tuple(card for bit, card in enumerate(_CARDS) if cards & (1 << bit))
    return EngineHeader(".".join(map(str, version)), named, bool(cards & _LATER), size)
