"""An encoder on the GPU: `runtime.encode.RunsEngine` over buffers that are taken once."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.gpu.cuda import Device, DeviceArray
from triton_repo.runtime.session import EngineRefused

Arrays = Mapping[str, npt.NDArray[Any]]
_MASK = "attention_mask"
_SMALLEST_WIDTH = 16


class GpuEncoderEngine:
    """One loaded engine, of TensorRT, TensorRT-RTX or ONNX Runtime: `engine` has the interface of
    runtime.gpu.tensorrt.TensorRTEngine.

    `run` may be called from several threads; one runs at a time. It pads to few shapes, since each has
    kernels and a CUDA graph of its own.
    """

    # A GPU is the better used the more it gets at once.
    max_tokens: int | None = None

    def __init__(self, manifest: Mapping[str, Any], engine: Any, device: Device) -> None:
        """Takes the memory for the largest run. Raises EngineRefused or DeviceMemoryFull."""
        self.manifest = dict(manifest)
        self._engine, self._device = engine, device
        self._lock = threading.Lock()
        wanted = set(manifest["serving"]["inputs"])
        inputs = {name: tensor for name, tensor in engine.tensors.items() if tensor.is_input}
        if inputs.keys() != wanted or any(len(tensor.shape) != 2 for tensor in inputs.values()):
            raise EngineRefused(
                f"{engine.path}: its inputs are {', '.join(sorted(inputs))}, the manifest says "
                f"{', '.join(sorted(wanted))}; build the engine again"
            )
        self._least, _, self._most = next(iter(inputs.values())).ranges[0]
        most = dict.fromkeys(inputs, self._most)
        self._context = engine.context(engine.profile_for(most))
        largest = self._context.output_shapes(most)
        self._inputs = {
            name: _Staged(device, self._most, tensor.dtype) for name, tensor in sorted(inputs.items())
        }
        self._outputs = {
            name: _Staged(device, shape, engine.tensors[name].dtype) for name, shape in largest.items()
        }
        staged = {**self._inputs, **self._outputs}
        self._addresses = {name: buffer.array.address for name, buffer in staged.items()}
        self._made: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}  # outputs' shapes by the inputs'

    def run(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name for int64 inputs [rows, width]. Raises EngineFailed, or CudaError as one."""
        with self._lock:
            return self._run(arrays)

    def warm_up(self) -> None:
        """Run the largest shape and the smallest: what does not fit is known now, kernels are there."""
        for batch, width in (self._most, self._least):
            self.run({name: np.ones((batch, width), np.int64) for name in self._inputs})
        self._engine.save_cache()

    def close(self) -> None:
        """Give everything on the device back; a second time does nothing."""
        with self._lock:
            try:
                self._engine.close()
            finally:
                self._device.close()

    def _run(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        rows, width = arrays[_MASK].shape
        shape = self._padded(rows, width)
        for name, buffer in self._inputs.items():
            staged = buffer.host(shape)
            staged[:rows, :width] = arrays[name]
            staged[:rows, width:] = 0
            staged[rows:] = 0
            if name == _MASK:
                staged[rows:, 0] = 1  # a row that attends to nothing would divide by zero
            self._device.upload(buffer.array.address, staged)
        shapes = dict.fromkeys(self._inputs, shape)
        if shape not in self._made:
            self._made[shape] = self._context.output_shapes(shapes)
        self._context.enqueue(shapes, self._addresses)
        found = {}
        for name, made in self._made[shape].items():
            found[name] = self._outputs[name].host(made)
            self._device.download(found[name], self._addresses[name])
        self._device.synchronize()
        # Copies: the buffers are the next run's.
        return {name: values[:rows].copy() for name, values in found.items()}

    def _padded(self, rows: int, width: int) -> tuple[int, int]:
        batch = round_up(rows, self._least[0], self._most[0])
        return batch, round_up(width, max(self._least[1], min(_SMALLEST_WIDTH, self._most[1])), self._most[1])


class _Staged:
    """A buffer on the device and its pinned twin, for any shape up to the one it was made for."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self.array: DeviceArray = device.array(shape, dtype, "buffers")
        self._flat = device.pinned((math.prod(shape),), dtype)

    def host(self, shape: Sequence[int]) -> npt.NDArray[Any]:
        return self._flat[: math.prod(shape)].reshape(tuple(shape))


def round_up(size: int, least: int, most: int) -> int:
    """The next of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ... that is at least `least`; at most `most`.

    So runs have few shapes, and at most a third of one is padding (half below 16). A size beyond `most`
    stays: the engine refuses it.
    """
    if size > most:
        return size
    power = 1 << (max(size, least) - 1).bit_length()
    between = power // 4 * 3
    chosen = between if between >= max(size, least, 17) else power
    return min(chosen, most)
