"""An LLM's KV cache on the device: allocated once, read and written in place by every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.gpu.cuda import Device
from triton_repo.runtime.session import EngineRefused

# What the libraries ask of a tensor's address; a batch may begin at any row.
_ALIGNMENT = 256


class DeviceCache:
    """Keys and values of every layer, each [slots, kv_heads, capacity, head_dim], zeroed.

    Zeros matter: attention multiplies what lies beyond a row's length by 0, and 0 times garbage may be NaN.
    """

    def __init__(self, device: Device, serving: Mapping[str, Any], dtype: npt.DTypeLike) -> None:
        """`serving`: the manifest's sizes. Raises EngineRefused, or DeviceMemoryFull."""
        heads, capacity, head_dim = (int(serving[size]) for size in ("kv_heads", "capacity", "head_dim"))
        self._token = head_dim * np.dtype(dtype).itemsize
        self._heads = heads
        self._head = capacity * self._token
        self._row = heads * self._head
        if self._row % _ALIGNMENT:
            raise EngineRefused(
                f"a slot of {capacity} tokens takes {self._row} bytes of a cache, which is no multiple of "
                f"{_ALIGNMENT}; set max_length to a multiple of 8 and build the engine again"
            )
        self._slots: int = serving["slots"]
        self._shape = (heads, capacity, head_dim)
        self._device = device
        self._names = [f"{kind}.{layer}" for layer in range(serving["layers"]) for kind in ("key", "value")]
        shape = (len(self._names), self._slots, *self._shape)
        self._array = device.array(shape, dtype, "cache", zeroed=True)
        self._spare = device.array(self._shape, dtype, "buffers")

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """The shape of each past_* input of a run over so many rows."""
        return {f"past_{name}": (rows, *self._shape) for name in self._names}

    def addresses(self, row: int) -> dict[str, int]:
        """Where a run from row `row` on has past_* and present_*: at the same places."""
        return {
            f"{side}_{name}": self._address(array, row)
            for array, name in enumerate(self._names)
            for side in ("past", "present")
        }

    def swap(self, row: int, other: int, length: int) -> None:
        """Exchange the first `length` tokens of two rows, through a spare one."""
        for array in range(len(self._names)):
            one, two = self._address(array, row), self._address(array, other)
            self._move(self._spare.address, two, length)
            self._move(two, one, length)
            self._move(one, self._spare.address, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of row `source` become those of row `target`."""
        for array in range(len(self._names)):
            self._move(self._address(array, target), self._address(array, source), length)

    def _address(self, array: int, row: int) -> int:
        return self._array.address + (array * self._slots + row) * self._row

    def _move(self, target: int, source: int, length: int) -> None:
        self._device.copy_rows(target, source, width=length * self._token, pitch=self._head, rows=self._heads)
