"""Engines with every tensor in the GPU's memory: the network alone, without copies from and to the host.

A second copy of the engine beside the one that is served: nothing of a server's way of running it is in these
figures. Runs in a side process.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from build_engines.gpu.results import Skipped
from build_engines.gpu.timing import Run

if TYPE_CHECKING:
    from triton_repo.runtime.gpu.cuda import Device

Arrays = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]

_MODULES: Final = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


class Bare:
    """An engine on the GPU with buffers of its own. A run returns when the GPU is done with it."""

    def __init__(self, folder: Path) -> None:
        """Load the engine in `folder` once more. Raises Skipped for a target that is not on the GPU."""
        from triton_repo.runtime.gpu.cuda import Device
        from triton_repo.runtime.session import read_manifest

        manifest = read_manifest(folder)
        if manifest["target"] not in {*_MODULES, "onnxruntime-cuda"}:
            raise Skipped("this engine runs from host memory only")
        self._serving = manifest["serving"]
        self._device = Device()
        self._engine = _network(manifest, folder / manifest["engine"]["file"], self._device)
        self._context = self._engine.context(0)
        self._kept: list[Any] = []

    def encoder_run(self, arrays: Arrays) -> Run:
        """Runs of these inputs."""
        return self._run({name: array.shape for name, array in arrays.items()}, arrays)

    def step_run(self, batch: int, held: int) -> Run:
        """Runs of a decode step of `batch` sequences that hold `held` tokens each."""
        arrays = {
            "input_ids": np.full((batch, 1), 5, np.int64),
            "past_lengths": np.full(batch, held, np.int64),
            "logit_indices": np.zeros((batch, 1), np.int64),
        }
        row = (self._serving["kv_heads"], self._serving["capacity"], self._serving["head_dim"])
        inputs = [name for name, tensor in self._engine.tensors.items() if tensor.is_input]
        shapes: Shapes = {name: arrays[name].shape if name in arrays else (batch, *row) for name in inputs}
        return self._run(shapes, arrays)

    def close(self) -> None:
        """Give everything on the GPU back."""
        self._engine.close()
        self._device.close()

    def _run(self, shapes: Shapes, arrays: Arrays) -> Run:
        for there in self._kept:  # what the run before needed
            there.close()
        self._kept.clear()
        addresses: dict[str, int] = {}
        for name, shape in {**shapes, **self._context.output_shapes(shapes)}.items():
            if name in addresses:
                continue
            there = self._device.array(shape, self._engine.tensors[name].dtype, "bench", zeroed=True)
            self._kept.append(there)
            addresses[name] = there.address
            if name in arrays:
                host = self._device.pinned(shape, arrays[name].dtype)
                host[...] = arrays[name]
                self._device.upload(there.address, host)
            elif name in shapes:  # a cache, which is written in place
                addresses[name.replace("past", "present", 1)] = there.address
        self._device.synchronize()

        def run() -> None:
            self._context.enqueue(shapes, addresses)
            self._device.synchronize()

        return run


def _network(manifest: Mapping[str, Any], path: Path, device: Device) -> Any:
    """The engine of either library, as the served one loads it."""
    if manifest["target"] == "onnxruntime-cuda":
        from triton_repo.runtime.gpu.onnxruntime import OnnxRuntimeEngine

        exact, generates = manifest["precision"] == "fp32", manifest["task"] == "generate"
        profile = dict(manifest["profile"])
        if generates:
            one = (1, 1, 1)
            profile = {"batch": (1, 1, manifest["serving"]["slots"]), "sequence": one, "logits": one}
        return OnnxRuntimeEngine(path, device, profiles=[profile], exact=exact, graphs=generates)
    from triton_repo.runtime.gpu.runtime_cache import cache_path
    from triton_repo.runtime.gpu.tensorrt import TensorRTEngine

    kernels = cache_path(manifest["engine"]["sha256"], device.info.name)
    module = importlib.import_module(_MODULES[manifest["target"]])
    return TensorRTEngine(path, module, device, runtime_cache=kernels)
