"""An LLM's request, from Triton's tensors and parameters to checked sampling parameters."""

from __future__ import annotations

import json
from typing import Any

import draw
import numpy as np

from triton_repo.runtime.generation import FIELDS, read_params
from triton_repo.runtime.texts import BadRequest
from triton_repo.runtime.wire import read_fields

_NAMES = (*FIELDS, "stream", "unknown")
_TYPES = (np.int32, np.float32, np.int64, np.bool_, object)
# A field, its type, its length, its value.
SEEDS = [bytes([name, name % 5, 1]) + b"\x08\x00\x00\x00" * 4 for name in range(len(_NAMES))]
WORDS = [name.encode() for name in FIELDS] + [
    b"\xff" * 4,
    b"\x00" * 4,
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\xff",
]


def target(data: bytes) -> None:
    found = draw.Draw(data)
    tensors = {found.choice(_NAMES): _array(found) for _ in range(found.byte() % 6)}
    parameters = _parameters(found)
    try:
        fields, stream = read_fields(tensors, parameters)
        assert isinstance(stream, bool)
        read_params({name: value for name, value in fields.items() if name in FIELDS}).validate()
    except BadRequest as error:
        assert str(error)
    try:  # as a caller in Python may give them
        read_params({found.choice(_NAMES): found.value() for _ in range(found.byte() % 6)}).validate()
    except BadRequest as error:
        assert str(error)


def _array(found: draw.Draw) -> Any:
    kind, size = found.choice(_TYPES), found.byte() % 5
    shape = found.choice([(size,), (size, 1), (1, size)])
    if kind is object:
        return np.array([found.part() for _ in range(size)] + [None], dtype=object)[:-1].reshape(shape)
    width = np.dtype(kind).itemsize
    raw = found.raw(size * width).ljust(size * width, b"\0")
    return (
        (np.frombuffer(raw, np.uint8) % 2).astype(bool).reshape(shape)
        if kind is np.bool_
        else np.frombuffer(raw, kind).reshape(shape)
    )


def _parameters(found: draw.Draw) -> str:
    """Triton's, always JSON of one level."""
    names = [found.choice(_NAMES) if found.byte() % 2 else found.text() for _ in range(found.byte() % 3)]
    return found.choice(["", json.dumps({name: found.integer(0, 9) for name in names})])
