"""ONNX Runtime on the GPU: its sessions, and runs whose tensors are bound to addresses of the device."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.gpu.cuda import MIB, Device
from triton_repo.runtime.session import EngineRefused

PROVIDER = "CUDAExecutionProvider"
INSTALL = "pip uninstall --yes onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
_MEMORY = ("Failed to allocate memory", "out of memory", "cudaErrorMemoryAllocation")
# A width that is a multiple of 8 lets masked attention take its memory-efficient kernel.
_WIDTHS = 8


def load_library() -> Any:
    """The module onnxruntime, with its CUDA provider and the libraries that one needs loaded.

    ONNX Runtime itself would fall back to the CPU and only print why. Raises EngineRefused.
    """
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        raise EngineRefused(
            f"the onnxruntime {onnxruntime.__version__} installed here is the one for CPUs (its providers: "
            f"{', '.join(onnxruntime.get_available_providers())}); {INSTALL}: both have one module name, so only "
            "one of them can be installed"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(None):  # it prints what it does not find; the next lines name it
            onnxruntime.preload_dlls()
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        raise EngineRefused(
            f"the CUDA provider of onnxruntime {onnxruntime.__version__} does not load: {error}; a library of "
            f"CUDA is missing: {INSTALL}"
        ) from None
    return onnxruntime


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session computes: execution providers with their options, and whose addresses tensors have.

    `graphs`: decode steps are recorded as CUDA graphs, each under an id.
    """

    kind: str
    index: int
    providers: tuple[tuple[str, dict[str, str]], ...]
    graphs: bool = False


def cuda_place(device: Device, *, exact: bool, graphs: bool = False) -> Place:
    """Everything on the device's one stream, and no more memory than asked for. `exact`: no TF32 in FP32."""
    options = {
        "device_id": str(device.info.index),
        "user_compute_stream": str(device.stream),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0" if exact else "1",
        "enable_cuda_graph": "1" if graphs else "0",
    }
    return Place("cuda", device.info.index, ((PROVIDER, options),), graphs)


def open_session(model: Path, place: Place) -> Any:
    """A session whose every run is on `place`. Raises EngineRefused, also where a GPU's memory is full."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # the host only launches kernels and computes shapes
    # Weights come and go with the session, not with the arena, which would round them up.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    providers = [*place.providers, ("CPUExecutionProvider", {})]
    try:
        session = ort.InferenceSession(str(model), options, providers=list(dict(providers).items()))
        session.disable_fallback()
    except Exception as error:  # ONNX Runtime raises its own untyped exceptions
        raise EngineRefused(f"{model}: ONNX Runtime refuses it: {_first_line(error)}") from error
    wanted = place.providers[0][0]
    if wanted not in session.get_providers():
        raise EngineRefused(
            f"{model}: ONNX Runtime could not start its {wanted} and would compute on the CPU; "
            "its own message stands in the log above"
        )
    return session


@dataclass(slots=True)
class Bindings:
    """Runs of one session on tensors at given addresses."""

    session: Any
    place: Place
    _options: dict[int, Any] = field(default_factory=dict)

    def bind(
        self,
        inputs: Mapping[str, tuple[int, npt.DTypeLike, Sequence[int]]],
        outputs: Mapping[str, tuple[int, npt.DTypeLike, Sequence[int]]],
    ) -> Any:
        """A binding of every tensor: its address, type and shape. The memory must outlive it."""
        binding = self.session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, (address, dtype, shape) in tensors.items():
                bind(name, self.place.kind, self.place.index, np.dtype(dtype).type, tuple(shape), address)
        return binding

    def run(self, binding: Any, graph: int = -1) -> None:
        """Put a run on the stream; `graph` >= 0 is the id of the CUDA graph that it is recorded as."""
        self.session.run_with_iobinding(binding, self._run_options(graph if self.place.graphs else -1))

    def _run_options(self, graph: int) -> Any:
        if graph not in self._options:
            import onnxruntime as ort

            options = self._options[graph] = ort.RunOptions()
            if self.place.kind == "cuda":
                # Copies follow on the same stream, and one wait at their end is enough.
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
                options.add_run_config_entry("gpu_graph_id", str(graph))
        return self._options[graph]


class OnnxRuntimeEncoderEngine:
    """An encoder on the GPU; `runtime.encode.RunsEngine`. Safe to call from several threads, one run at a time.

    Memory for the largest batch is taken once, when the engine is opened.
    """

    def __init__(self, manifest: dict[str, Any], session: Any, device: Device, place: Place) -> None:
        self.manifest = manifest
        serving = manifest["serving"]
        self._width: int = serving["max_length"]
        self._batch: int = serving["max_batch"]
        self._pad_id: int = serving["pad_id"]
        self._device = device
        self._runs = Bindings(session, place)
        self._lock = threading.Lock()
        self._inputs = {
            tensor.name: _Staged(device, (self._batch, self._width), np.int64)
            for tensor in session.get_inputs()
        }
        self._outputs = {
            tensor.name: _Staged(device, (self._batch, *tensor.shape[1:]), _dtype(tensor))
            for tensor in session.get_outputs()
        }

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The outputs [batch, ...] for inputs int64 [batch, width]."""
        batch, width = next(iter(arrays.values())).shape
        if batch > self._batch or width > self._width:
            raise ValueError(
                f"{batch} x {width} tokens; this engine takes at most {self._batch} x {self._width}"
            )
        shape = (batch, min(-(-width // _WIDTHS) * _WIDTHS, self._width))
        with self._lock, _explained(self._device):
            for name, staged in self._inputs.items():
                filled = staged.host(shape)
                filled[:, :width] = arrays[name]
                filled[:, width:] = self._pad_id if name == "input_ids" else 0
                staged.upload(shape)
            inputs = {name: staged.tensor(shape) for name, staged in self._inputs.items()}
            shapes = {name: (batch, *staged.shape[1:]) for name, staged in self._outputs.items()}
            outputs = {name: staged.tensor(shapes[name]) for name, staged in self._outputs.items()}
            self._runs.run(self._runs.bind(inputs, outputs))
            for name, staged in self._outputs.items():
                staged.download(shapes[name])
            self._device.synchronize()
            return {name: staged.host(shapes[name]).copy() for name, staged in self._outputs.items()}

    def warm_up(self) -> None:
        """Run the largest batch: what does not fit is known now, not under load."""
        shape = (self._batch, self._width)
        self.run({name: np.ones(shape, np.int64) for name in self._inputs})

    def close(self) -> None:
        """Give everything on the device back."""
        self._runs.session = None
        self._device.close()


class _Staged:
    """A tensor's room on the device and in pinned memory, used from the start by whatever shape fits."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.shape = shape
        self._device = device
        self._there = device.array(shape, dtype, "buffers")
        self._here = device.pinned(shape, dtype).reshape(-1)

    def host(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        return self._here[: int(np.prod(shape))].reshape(shape)

    def tensor(self, shape: tuple[int, ...]) -> tuple[int, npt.DTypeLike, tuple[int, ...]]:
        return self._there.address, self._there.dtype, shape

    def upload(self, shape: tuple[int, ...]) -> None:
        self._device.upload(self._there.address, self.host(shape))

    def download(self, shape: tuple[int, ...]) -> None:
        self._device.download(self.host(shape), self._there.address)


def _dtype(tensor: Any) -> npt.DTypeLike:
    """numpy's name of "tensor(float16)" and its like."""
    name = tensor.type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))


@contextlib.contextmanager
def _explained(device: Device) -> Iterator[None]:
    """ONNX Runtime's complaint about memory, with what the device has."""
    try:
        yield
    except Exception as error:
        if not any(sign in str(error) for sign in _MEMORY):
            raise
        free, total = device.memory()
        raise MemoryError(
            f"the GPU is full: {free / MIB:,.0f} of {total / MIB:,.0f} MiB are free, and ONNX Runtime needs more; "
            "other models or programs hold the rest (see `nvidia-smi`), or max_batch, max_length or slots are "
            f"too large for this card ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
