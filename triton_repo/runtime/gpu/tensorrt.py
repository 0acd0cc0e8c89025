"""An engine of TensorRT-RTX or TensorRT on the GPU: one class, the module is a parameter.

All contexts of an engine run one after the other on the device's one stream, so they share one buffer for
activations, as large as the largest optimization profile needs: that is what the plan counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triton_repo.runtime.gpu.cuda import Device
from triton_repo.runtime.gpu.graph_cache import GraphCache
from triton_repo.runtime.gpu.runtime_cache import RuntimeCache
from triton_repo.runtime.gpu.tensorrt_callbacks import errors_of, file_reader, shared_logger
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.texts import EngineFailed

Shape = tuple[int, ...]
_DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_REBUILD = "run `build-engines build STACK` again"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output. `shape` has -1 where it varies; `ranges`, of inputs alone, the (smallest, usual,
    largest) shape in each optimization profile."""

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    shape: Shape
    ranges: tuple[tuple[Shape, Shape, Shape], ...]


def choose_profile(engine: Any, shapes: Mapping[str, Sequence[int]]) -> int:
    """The first profile whose ranges, in `engine.tensors`, hold these inputs. Raises ValueError."""
    inputs = {name: engine.tensors[name] for name in shapes}
    for profile in range(engine.profiles):
        if all(_within(shapes[name], tensor.ranges[profile]) for name, tensor in inputs.items()):
            return profile
    wanted = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    offered = "; ".join(
        ", ".join(
            f"{name} {list(low)} to {list(high)}"
            for name, tensor in inputs.items()
            for low, _, high in (tensor.ranges[profile],)
        )
        for profile in range(engine.profiles)
    )
    raise ValueError(f"no optimization profile of {engine.path} takes {wanted}; it has {offered}")


def _within(shape: Sequence[int], sizes: tuple[Shape, Shape, Shape]) -> bool:
    low, _, high = sizes
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


class TensorRTEngine:
    """One deserialized engine: `tensors` by name, `profiles` (their number), contexts."""

    def __init__(self, path: Path, module: Any, device: Device, *, runtime_cache: Path | None = None) -> None:
        """Check, then load `path` onto the device, without ever holding it in memory as a whole.

        Args:
            module: `tensorrt_rtx` or `tensorrt`.
            runtime_cache: where TensorRT-RTX keeps the kernels that it compiles here; None keeps none.

        Raises:
            EngineRefused: the library refuses it, with what it logged.
            DeviceMemoryFull: its weights or activations do not fit.
        """
        self.path, self.device, self._trt = Path(path), device, module
        self.is_rtx = hasattr(module, "CudaGraphStrategy")
        device.bind()
        self._runtime = module.Runtime(shared_logger(module))
        if hasattr(self._runtime, "get_engine_validity"):
            self._check_validity()
        device.require(self.path.stat().st_size, "weights")
        self._engine = self._deserialize()
        self.runtime_cache: RuntimeCache | None = None
        self._cache_path = runtime_cache
        self._configs: dict[int, Any] = {}  # by profile
        self._contexts: list[ExecutionContext] = []
        try:
            self.profiles: int = self._engine.num_optimization_profiles
            self.tensors = self._read_tensors()
            sizes = [self._engine.get_device_memory_size_for_profile_v2(p) for p in range(self.profiles)]
            nbytes = max(self._engine.device_memory_size_v2, *sizes)
            self._activations = device.array((nbytes,), np.uint8, "activations")
            if self.is_rtx:
                self._config(0)
        except BaseException:
            self._configs.clear()
            self._engine = None  # the error's traceback must not keep the weights on the GPU
            raise

    def context(self, profile: int = 0) -> ExecutionContext:
        """A new context that runs shapes of `profile`. Runs of profile 0 become CUDA graphs.

        Those of others do not: a prompt's differ in length and row, and each would be recorded anew.
        Raises EngineRefused.
        """
        graphs = GraphCache(self.device) if profile == 0 and not self.is_rtx else None
        context = ExecutionContext(self, profile, graphs)
        self._contexts.append(context)
        return context

    def profile_for(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The first optimization profile that takes inputs of these shapes. Raises ValueError."""
        return choose_profile(self, shapes)

    def save_cache(self) -> None:
        """Keep what TensorRT-RTX has compiled so far for the next start; a failure is logged, not raised."""
        if self.runtime_cache is not None:
            self.runtime_cache.save()

    def close(self) -> None:
        """Save the runtime cache, then free contexts, weights and activations; a second time does nothing."""
        if self._engine is None:
            return
        with contextlib.ExitStack() as last:  # all of it, also when the device is lost
            last.callback(self._activations.close)
            last.callback(self._forget)
            for context in self._contexts:
                last.callback(context._close)
            self.device.synchronize()
            self.save_cache()

    def _forget(self) -> None:
        self._contexts.clear()
        self._configs.clear()
        self.runtime_cache = self._engine = self._runtime = None

    def _check_validity(self) -> None:
        """TensorRT-RTX knows from the first bytes whether version, card, driver and memory fit."""
        trt = self._trt
        with self.path.open("rb") as file:
            start = file.read(self._runtime.engine_header_size)
        with errors_of(trt) as errors:
            validity, diagnostics = self._runtime.get_engine_validity(start)
        if validity != trt.EngineValidity.INVALID:
            return
        flags = trt.EngineInvalidityDiagnostics.__members__
        reasons = [name.lower().replace("_", " ") for name, flag in flags.items() if diagnostics & int(flag)]
        info = self.device.info
        raise EngineRefused(
            f"{self.path} cannot run here: {', '.join(reasons) or '; '.join(errors) or 'it gives no reason'} "
            f"({info.name}, compute capability {info.compute_capability}, driver for CUDA {info.driver}, "
            f"TensorRT-RTX {trt.__version__}); {_REBUILD} for this card and library"
        )

    def _deserialize(self) -> Any:
        with errors_of(self._trt) as errors, self.path.open("rb") as file:
            reader = file_reader(self._trt, file)
            engine = self._runtime.deserialize_cuda_engine(reader)
        if reader.raised is not None:
            raise reader.raised
        if engine is None:
            raise self._refused("it cannot be loaded", errors)
        return engine

    def _library_context(self, profile: int) -> Any:
        """A context of the library, with the memory that all share. Raises EngineRefused."""
        self.device.bind()
        how = (
            self._config(profile)
            if self.is_rtx
            else self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        with errors_of(self._trt) as errors:
            handle = self._engine.create_execution_context(how)
            try:
                made = handle is not None and handle.set_optimization_profile_async(
                    profile, self.device.stream
                )
            except RuntimeError:  # which the binding makes of a refusal; the log says why
                made = False
            if not made:
                raise self._refused(f"no execution context for its optimization profile {profile}", errors)
        handle.set_device_memory(self._activations.address, max(1, self._activations.nbytes))
        self.device.synchronize()
        return handle

    def _config(self, profile: int) -> Any:
        """How TensorRT-RTX runs the contexts of a profile; all have one runtime cache."""
        if profile in self._configs:
            return self._configs[profile]
        trt = self._trt
        config = self._configs[profile] = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # It knows when the kernels for a shape are compiled and addresses stay: recording the stream from
        # outside would keep the fallback kernels for ever.
        strategies = trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.DISABLED if profile else strategies.WHOLE_GRAPH_CAPTURE
        if self._cache_path is not None:
            if self.runtime_cache is None:
                self.runtime_cache = RuntimeCache(config.create_runtime_cache(), self._cache_path)
            config.set_runtime_cache(self.runtime_cache.cache)
        return config

    def _read_tensors(self) -> dict[str, Tensor]:
        engine, trt = self._engine, self._trt
        tensors = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_dtype(name).name
            if kind not in _DTYPES or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise EngineRefused(
                    f"{self.path}: the tensor {name} of type {kind} is none that is served; {_REBUILD}"
                )
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            ranges = [engine.get_tensor_profile_shape(name, p) for p in range(self.profiles) if is_input]
            tensors[name] = Tensor(
                name,
                is_input,
                _DTYPES[kind],
                tuple(engine.get_tensor_shape(name)),
                tuple((tuple(low), tuple(usual), tuple(high)) for low, usual, high in ranges),
            )
        return tensors

    def _refused(self, what: str, errors: Sequence[str]) -> EngineRefused:
        free, total = self.device.memory()
        told = "; ".join(message.strip() for message in errors) or "it gives no reason"
        return EngineRefused(
            f"{self.path}: {what}. TensorRT says: {told} "
            f"({free / 2**20:,.0f} of {total / 2**20:,.0f} MiB of the GPU are free)"
        )


class ExecutionContext:
    """Runs the engine with shapes of one profile. Made by TensorRTEngine.context, closed with the engine."""

    def __init__(self, engine: TensorRTEngine, profile: int, graphs: GraphCache | None) -> None:
        self.engine, self._profile, self._graphs = engine, profile, graphs
        self._bound = _Bound(engine, profile)

    def output_shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
        """The shapes of all outputs for inputs of `shapes`. Raises EngineFailed."""
        self._bound.set_shapes({name: tuple(shape) for name, shape in shapes.items()})
        outputs = [tensor.name for tensor in self.engine.tensors.values() if not tensor.is_input]
        found = {name: tuple(self._bound.handle.get_tensor_shape(name)) for name in outputs}
        if any(size < 0 for shape in found.values() for size in shape):
            raise EngineFailed(f"TensorRT does not know the outputs' shapes for {dict(shapes)}: {found}")
        return found

    def enqueue(self, shapes: Mapping[str, Sequence[int]], addresses: Mapping[str, int]) -> None:
        """Put one run on the device's stream: every input with its shape, every tensor at its address.

        Raises EngineFailed, with what the library logged; nothing was put on the stream then.
        """
        self.engine.device.bind()
        wanted = {name: tuple(shape) for name, shape in shapes.items()}
        if len(addresses) < len(self.engine.tensors):
            missing = ", ".join(sorted(self.engine.tensors.keys() - addresses.keys()))
            raise _failed(f"no address for {missing}", [])
        if self._graphs is None:
            self._bound.run(wanted, addresses)
            return
        key = (tuple(wanted.items()), tuple(addresses.items()))
        self._graphs.run(
            key, lambda: self._bound.run(wanted, addresses), lambda: self._fixed(wanted, dict(addresses))
        )

    def _fixed(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> Callable[[], None]:
        """The run over a context of the library that does nothing else.

        A graph may use memory of the context that it was recorded from: a change of shapes there would change
        what the graph computes.
        """
        bound = _Bound(self.engine, self._profile)
        return lambda: bound.run(shapes, addresses)

    def _close(self) -> None:
        graphs, self._graphs, self._bound.handle = self._graphs, None, None
        if graphs is not None:
            graphs.close()


class _Bound:
    """A context of the library, and what was set on it last."""

    def __init__(self, engine: TensorRTEngine, profile: int) -> None:
        self._engine, self.handle = engine, engine._library_context(profile)
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}

    def run(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        self.set_shapes(shapes)
        self._set_addresses(addresses)
        with errors_of(self._engine._trt) as errors:
            done = self.handle.execute_async_v3(self._engine.device.stream)
        if not done:
            raise _failed(f"the run failed with inputs of {dict(self._shapes)}", errors)

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items():
            if self._shapes.get(name) == shape:
                continue
            with errors_of(self._engine._trt) as errors:
                accepted = self.handle.set_input_shape(name, shape)
            if not accepted:
                self._shapes.pop(name, None)
                raise _failed(f"{name} cannot have the shape {list(shape)}", errors)
            self._shapes[name] = shape

    def _set_addresses(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if self._addresses.get(name) == address:
                continue
            if not self.handle.set_tensor_address(name, address):
                self._addresses.pop(name, None)
                raise _failed(f"{name} cannot be at {address:#x}", [])
            self._addresses[name] = address


def _failed(what: str, errors: Sequence[str]) -> EngineFailed:
    told = "; ".join(message.strip() for message in errors)
    return EngineFailed(f"TensorRT: {what}" + (f": {told}" if told else ""))
