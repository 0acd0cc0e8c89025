"""Engines with every tensor in the GPU's memory: the network alone, without copies from and to the host.

A second copy of the engine beside the one that is served: nothing of a server's way of running it is in these
figures. Runs in a side process.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from build_engines.gpu.results import Skipped
from build_engines.gpu.timing import Run

if TYPE_CHECKING:
    from triton_repo.runtime.gpu.cuda import Device

Arrays = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]

_MODULES: Final = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


class Bare(Protocol):
    """An engine on the GPU. The run it hands out returns when the GPU is done with it."""

    def encoder_run(self, arrays: Arrays) -> Run: ...

    def step_run(self, batch: int, held: int) -> Run: ...

    def close(self) -> None: ...


def open_bare(folder: Path) -> Bare:
    """Load the engine in `folder` once more. Raises Skipped for a target that has no such way."""
    from triton_repo.runtime.gpu.cuda import Device
    from triton_repo.runtime.session import read_manifest

    manifest = read_manifest(folder)
    target, path = manifest["target"], folder / manifest["engine"]["file"]
    if target in _MODULES:
        return _TensorRT(manifest, path, importlib.import_module(_MODULES[target]), Device())
    if target == "onnxruntime-cuda" and manifest["task"] != "generate":
        return _OnnxRuntime(manifest, path, Device())
    raise Skipped("this engine runs from host memory only")


class _TensorRT:
    def __init__(self, manifest: Mapping[str, Any], path: Path, module: Any, device: Device) -> None:
        from triton_repo.runtime.gpu.tensorrt import TensorRTEngine

        self._serving, self._device = manifest["serving"], device
        self._engine = TensorRTEngine(path, module, device)
        self._context = self._engine.context(0)
        self._kept: list[Any] = []

    def encoder_run(self, arrays: Arrays) -> Run:
        return self._run({name: array.shape for name, array in arrays.items()}, arrays)

    def step_run(self, batch: int, held: int) -> Run:
        """A decode step of `batch` sequences that hold `held` tokens each."""
        arrays = {
            "input_ids": np.full((batch, 1), 5, np.int64),
            "past_lengths": np.full(batch, held, np.int64),
            "logit_indices": np.zeros((batch, 1), np.int64),
        }
        shapes: Shapes = {name: array.shape for name, array in arrays.items()}
        row = (self._serving["kv_heads"], self._serving["capacity"], self._serving["head_dim"])
        past = [name for name in self._engine.tensors if name.startswith("past_") and name not in arrays]
        return self._run(shapes | dict.fromkeys(past, (batch, *row)), arrays)

    def _run(self, shapes: Shapes, arrays: Arrays) -> Run:
        for array in self._kept:  # what the run before needed
            array.close()
        self._kept.clear()
        addresses: dict[str, int] = {}
        outputs = self._context.output_shapes(shapes)
        for name, shape in {**shapes, **outputs}.items():
            if name.startswith("present_"):
                continue
            there = self._device.array(shape, self._engine.tensors[name].dtype, "bench", zeroed=True)
            self._kept.append(there)
            addresses[name] = there.address
            if name.startswith("past_") and name not in arrays:  # a cache is written in place
                addresses[name.replace("past", "present", 1)] = there.address
        _fill(self._device, arrays, addresses)

        def run() -> None:
            self._context.enqueue(shapes, addresses)
            self._device.synchronize()

        return run

    def close(self) -> None:
        self._engine.close()
        self._device.close()


class _OnnxRuntime:
    def __init__(self, manifest: Mapping[str, Any], path: Path, device: Device) -> None:
        from triton_repo.runtime.gpu.onnxruntime import Bindings, cuda_place, load_library, open_session

        load_library()
        place = cuda_place(device, exact=manifest["precision"] == "fp32")
        self._device, self._session = device, open_session(path, place)
        self._runs = Bindings(self._session, place)
        self._kept: list[Any] = []

    def encoder_run(self, arrays: Arrays) -> Run:
        batch = len(next(iter(arrays.values())))
        inputs, outputs, addresses = {}, {}, {}
        for name, array in arrays.items():
            inputs[name] = self._tensor(array.shape, np.int64)
            addresses[name] = inputs[name][0]
        _fill(self._device, arrays, addresses)
        for tensor in self._session.get_outputs():
            kind = np.float16 if "float16" in tensor.type else np.float32
            outputs[tensor.name] = self._tensor((batch, *tensor.shape[1:]), kind)
        binding = self._runs.bind(inputs, outputs)

        def run() -> None:
            self._runs.run(binding)
            self._device.synchronize()

        return run

    def step_run(self, batch: int, held: int) -> Run:
        raise Skipped("this engine runs from host memory only")

    def _tensor(self, shape: tuple[int, ...], kind: Any) -> tuple[int, Any, tuple[int, ...]]:
        there = self._device.array(shape, kind, "bench")
        self._kept.append(there)
        return there.address, kind, shape

    def close(self) -> None:
        self._runs.session = self._session = None
        self._device.close()


def _fill(device: Device, arrays: Arrays, addresses: Mapping[str, int]) -> None:
    for name, array in arrays.items():
        host = device.pinned(array.shape, array.dtype)
        host[...] = array
        device.upload(addresses[name], host)
    device.synchronize()
