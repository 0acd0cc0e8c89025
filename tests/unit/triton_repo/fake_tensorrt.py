"""A TensorRT module whose engines are ONNX graphs, run by ONNX Runtime at the addresses of a FakeCudart.

`FakeTensorRT(api)` stands for the module tensorrt_rtx, `FakeTensorRT(api, rtx=False)` for tensorrt; names and
arguments are those of the real tensorrt_rtx (test_gpu_tensorrt.py compares them).
`write_engine` makes the file.
What TensorRT leaves undefined or answers with an error only in the log is Misuse (see fake_gpu).
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fake_gpu import FakeCudart, Misuse
from onnx import TensorProto

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[int, int, int]]  # of symbolic dimensions, by name
_HEADER = struct.Struct("<4sIQQ4B4sI")  # as TensorRT-RTX writes it
_CARDS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
VERSION = "1.7.1.116"
_ONNX_TYPES = {
    TensorProto.FLOAT: ("FLOAT", np.float32),
    TensorProto.FLOAT16: ("HALF", np.float16),
    TensorProto.INT64: ("INT64", np.int64),
    TensorProto.INT32: ("INT32", np.int32),
    TensorProto.BOOL: ("BOOL", np.bool_),
    TensorProto.BFLOAT16: ("BF16", np.float16),
}


def write_engine(
    path: Path,
    graph: Path | onnx.ModelProto,
    profiles: Sequence[Ranges],
    *,
    cards: Sequence[str] = ("12.0",),
    activations: Sequence[int] | None = None,
    version: str = VERSION,
) -> None:
    """Write a fake engine of the ONNX `graph` (with its external data) with these optimization profiles.

    `activations`: device memory that each profile needs, 4096 bytes unless given.
    """
    model = graph if isinstance(graph, onnx.ModelProto) else onnx.load(str(graph))
    plan = {
        "profiles": [{name: list(sizes) for name, sizes in ranges.items()} for ranges in profiles],
        "activations": list(activations or [4096] * len(profiles)),
    }
    text, body = json.dumps(plan).encode(), model.SerializeToString()
    size = 64 + 8 + len(text) + len(body)
    bits = sum(1 << _CARDS.index(card) for card in cards)
    header = _HEADER.pack(b"vtrt", 2, 0, size, *map(int, version.split(".")), b"vtrt", bits)
    path.write_bytes(header.ljust(64, b"\0") + struct.pack("<Q", len(text)) + text + body)


class _Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = _Severity

    def __init__(self) -> None:
        pass


class IStreamReaderV2:
    def __init__(self) -> None:
        pass


SeekPosition = Enum("SeekPosition", "SET CUR END")
TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation = Enum("TensorLocation", "DEVICE HOST")
DataType = Enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64 BOOL UINT8")
ExecutionContextAllocationStrategy = Enum(
    "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
)
CudaGraphStrategy = Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
EngineValidity = Enum("EngineValidity", "VALID SUBOPTIMAL INVALID")
EngineInvalidityDiagnostics = IntEnum(
    "EngineInvalidityDiagnostics",
    {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4, "OLD_CUDA_RUNTIME": 8}
    | {"INSUFFICIENT_GPU_MEMORY": 16, "MALFORMED_ENGINE": 32, "CUDA_ERROR": 64},
)
_RTX_ONLY = ("CudaGraphStrategy", "EngineValidity", "EngineInvalidityDiagnostics")


class FakeTensorRT:
    """The module. What tests may set:

    fail_enqueue: {n}: these calls of execute_async_v3, counted from 1 over all contexts, return False.
    fail_capture: every recording fails.
    fail_deserialize: the engine cannot be loaded.
    diagnostics: what get_engine_validity complains of (0: nothing).
    runtime_cache_fits: what IRuntimeCache.deserialize answers.
    `runs` counts the runs that the device did, `enqueued` the calls of execute_async_v3; `engines` are all
    that were loaded.
    """

    ILogger = ILogger
    IStreamReaderV2 = IStreamReaderV2
    SeekPosition = SeekPosition
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation
    DataType = DataType
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    CudaGraphStrategy = CudaGraphStrategy
    EngineValidity = EngineValidity
    EngineInvalidityDiagnostics = EngineInvalidityDiagnostics

    def __init__(self, api: FakeCudart, *, rtx: bool = True) -> None:
        self.api, self.rtx = api, rtx
        self.__version__ = VERSION if rtx else "11.4.0.106"
        self.__name__ = "tensorrt_rtx" if rtx else "tensorrt"
        self.fail_enqueue: set[int] = set()
        self.fail_capture = False
        self.fail_deserialize = False
        self.diagnostics = 0
        self.runtime_cache_fits = True
        self.enqueued = 0
        self.runs = 0
        self.engines: list[ICudaEngine] = []

    def __getattribute__(self, name: str) -> Any:
        if name in _RTX_ONLY and not self.rtx:
            raise AttributeError(name)
        return super().__getattribute__(name)

    def Runtime(self, logger: Any) -> Any:
        return Runtime(self, logger) if self.rtx else PlainRuntime(self, logger)


class PlainRuntime:
    """What both libraries have."""

    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        assert isinstance(logger, ILogger)
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, stream_reader_v2: Any) -> Any:
        assert isinstance(stream_reader_v2, IStreamReaderV2)
        content = b""
        while len(content) < 36:
            content += stream_reader_v2.read(36 - len(content), 0)
        size = _HEADER.unpack(content)[3]
        assert stream_reader_v2.seek(0, SeekPosition.SET)
        content = b""
        while len(content) < size:
            part = stream_reader_v2.read(size - len(content), 0)
            if not part:
                break
            content += part
        if self._trt.fail_deserialize or len(content) < size:
            self._logger.log(_Severity.INFO, "Loaded engine size: 0 MiB")
            self._logger.log(_Severity.ERROR, "Error Code 1: Serialization (the fake was told to fail)")
            return None
        error, weights = self._trt.api.cudaMalloc(len(content))
        if weights is None:
            self._logger.log(_Severity.ERROR, f"Error Code 2: OutOfMemory ({error.name})")
            return None
        return ICudaEngine(self._trt, self._logger, content, weights)


class Runtime(PlainRuntime):
    engine_header_size = 64

    def get_engine_validity(self, buffer: bytes) -> Any:
        assert len(buffer) >= self.engine_header_size
        found = self._trt.diagnostics
        return (EngineValidity.INVALID if found else EngineValidity.VALID), found


class IRuntimeCache:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self._content = b""

    def deserialize(self, blob: bytes) -> bool:
        if self._trt.runtime_cache_fits:
            self._content = bytes(blob)
        return self._trt.runtime_cache_fits

    def serialize(self) -> Any:
        return memoryview(self._content)


class IRuntimeConfig:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._trt)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy


class ICudaEngine:
    def __init__(self, trt: FakeTensorRT, logger: Any, content: bytes, weights: int) -> None:
        self._trt, self._logger = trt, logger
        self._weights = weights  # they only take room here
        (length,) = struct.unpack_from("<Q", content, 64)
        plan = json.loads(content[72 : 72 + length])
        self._profiles, self._activations = plan["profiles"], plan["activations"]
        model = onnx.load_model_from_string(content[72 + length :])
        constants = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in constants]
        self._io = {value.name: (True, value) for value in inputs}
        self._io |= {value.name: (False, value) for value in model.graph.output}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.contexts: list[IExecutionContext] = []
        trt.engines.append(self)

    def __del__(self) -> None:
        self._trt.api.cudaFree(self._weights)

    @property
    def num_io_tensors(self) -> int:
        return len(self._io)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return max(self._activations)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return int(self._activations[profile_index])

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[_ONNX_TYPES[self._io[name][1].type.tensor_type.elem_type][0]]

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.DEVICE

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if self._io[name][0] else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> Shape:
        return tuple(size if isinstance(size, int) else -1 for size in self._dimensions(name))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        if not self._io[name][0]:
            raise Misuse(f"{name} is an output and has no profile")
        ranges = self._profiles[profile_index]
        sizes = [
            (size,) * 3 if isinstance(size, int) else tuple(ranges[size]) for size in self._dimensions(name)
        ]
        return [tuple(size[pick] for size in sizes) for pick in range(3)]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        past = name.replace("present_", "past_")
        return past if name.startswith("present_") and past in self._io else None

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self._trt)

    def create_execution_context(self, strategy: Any) -> Any:
        if isinstance(strategy, IRuntimeConfig) != self._trt.rtx:
            raise Misuse("TensorRT-RTX takes its runtime config here, TensorRT the allocation strategy")
        chosen = strategy._strategy if isinstance(strategy, IRuntimeConfig) else strategy
        if chosen != ExecutionContextAllocationStrategy.USER_MANAGED:
            raise Misuse("contexts must share the activation buffer")
        cache = strategy._cache if isinstance(strategy, IRuntimeConfig) else None
        context = IExecutionContext(self, cache)
        context.config = strategy
        self.contexts.append(context)
        return context

    def _dimensions(self, name: str) -> list[int | str]:
        sizes = self._io[name][1].type.tensor_type.shape.dim
        return [dim.dim_param or dim.dim_value for dim in sizes]


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, cache: IRuntimeCache | None) -> None:
        self._engine, self._trt, self._cache = engine, engine._trt, cache
        self.config: Any = None
        self._profile = 0
        self._memory: tuple[int, int] | None = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._settled: dict[str, Shape] = {}  # the shapes of the run before
        self._changes = 0  # what a graph recorded before the last of them would compute is undefined

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._trt.api.put(stream_handle, lambda: None)
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            raise RuntimeError("Error in set optimization profile async.")
        self._changes += 1
        self._profile, self._shapes = profile_index, {}
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % 256 or size < self._engine.device_memory_size_v2:
            self._trt.api.misuse(f"activation memory of {size} bytes at {memory:#x}")
        self._trt.api.check(memory, size)
        self._changes += 1
        self._memory = memory, size

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self._changes += 1
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = len(shape) == len(low) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))
        if not fits:
            text = f"Parameter check failed: {name} {list(shape)} is not in [{low}, {high}]"
            self._engine._logger.log(_Severity.ERROR, text)
            self._shapes.pop(name, None)  # nothing says that the shape before it is kept
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._changes += 1
        if name not in self._engine._io or not memory:
            return False
        if memory % 256:
            self._trt.api.misuse(f"{name} at {memory:#x}, which is no multiple of 256")
        self._addresses[name] = int(memory)
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        known = self._symbols()
        return tuple(
            size if isinstance(size, int) else known.get(size, -1) for size in self._engine._dimensions(name)
        )

    def execute_async_v3(self, stream_handle: int) -> bool:
        api, trt, engine = self._trt.api, self._trt, self._engine
        trt.enqueued += 1
        stream = api.stream(stream_handle)
        if stream.captured is not None:
            settled = self._settled == self._shapes
            if trt.rtx:
                api.misuse("TensorRT-RTX records graphs by itself; its stream must not be recorded")
            if trt.fail_capture or not settled:
                stream.broken_capture = True
                engine._logger.log(_Severity.ERROR, "Error Code 1: Cuda Runtime (capture)")
                return False
        if trt.enqueued in trt.fail_enqueue:
            engine._logger.log(_Severity.ERROR, "Error Code 1: Cuda Runtime (the fake was told to fail)")
            return False
        if self._memory is None or stream_handle == 0:
            api.misuse("no activation memory, or the default stream")
        missing = [name for name in engine._io if name not in self._addresses]
        missing += [
            name for name, (is_input, _) in engine._io.items() if is_input and name not in self._shapes
        ]
        if missing:
            engine._logger.log(_Severity.ERROR, f"Parameter check failed: {missing} not set")
            return False
        self._check_aliases()
        for name in engine._io:  # at once, as the kernels' arguments
            api.check(self._addresses[name], self._nbytes(name))
        shapes = {name: self.get_tensor_shape(name) for name in engine._io}
        addresses = dict(self._addresses)
        self._settled = dict(self._shapes)
        changes = self._changes

        def work() -> None:
            if stream.captured is None and recorded and self._changes != changes:
                api.misuse("a graph is launched whose context was changed since it was recorded")
            self._run(shapes, addresses)

        recorded = stream.captured is not None
        api.put(stream_handle, work)
        if self._cache is not None:  # a kernel was compiled for these shapes
            line = repr(sorted(self._shapes.items())).encode() + b"\n"
            if line not in self._cache._content:
                self._cache._content += line
        return True

    def _run(self, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
        api, engine = self._trt.api, self._engine
        assert self._memory is not None
        api.view(self._memory[0], (self._memory[1],), np.uint8).fill(0xEE)  # nothing lasts in it
        arrays = {
            name: api.view(addresses[name], shapes[name], _dtype(value))
            for name, (_, value) in engine._io.items()
        }
        fed = {name: arrays[name].copy() for name, (is_input, _) in engine._io.items() if is_input}
        outputs = [name for name, (is_input, _) in engine._io.items() if not is_input]
        for name, result in zip(outputs, engine._session.run(outputs, fed), strict=True):
            if result.shape != shapes[name]:
                api.misuse(f"{name} has the shape {result.shape}, {shapes[name]} was said")
            arrays[name][...] = result
        self._trt.runs += 1

    def _check_aliases(self) -> None:
        for name in self._engine._io:
            past = self._engine.get_aliased_input_tensor(name)
            if past is not None and self._addresses[past] != self._addresses[name]:
                self._trt.api.misuse(f"{name} is written in place, but is not where {past} is")

    def _symbols(self) -> dict[str, int]:
        """The sizes of symbolic dimensions, by name, as the inputs' shapes have them."""
        found: dict[str, int] = {}
        for name, shape in self._shapes.items():
            for dimension, size in zip(self._engine._dimensions(name), shape, strict=True):
                if isinstance(dimension, str) and found.setdefault(dimension, size) != size:
                    self._trt.api.misuse(f"{dimension} is {found[dimension]} and {size}")
        return found

    def _nbytes(self, name: str) -> int:
        return int(np.prod(self.get_tensor_shape(name))) * _dtype(self._engine._io[name][1]).itemsize


def _dtype(value: Any) -> np.dtype[Any]:
    return np.dtype(_ONNX_TYPES[value.type.tensor_type.elem_type][1])


CLASSES = SimpleNamespace(
    Runtime=Runtime,
    ICudaEngine=ICudaEngine,
    IExecutionContext=IExecutionContext,
    IRuntimeConfig=IRuntimeConfig,
    IRuntimeCache=IRuntimeCache,
)


def emulate(monkeypatch: Any, *, rtx: bool = True, **settings: Any) -> tuple[FakeCudart, FakeTensorRT]:
    """Put an emulated GPU (FakeCudart's `settings`) and its TensorRT in the place of the real ones."""
    from triton_repo.runtime.gpu import cuda

    api = FakeCudart(**settings)
    trt = FakeTensorRT(api, rtx=rtx)
    monkeypatch.setattr(cuda, "cudart", lambda: api)
    monkeypatch.setitem(sys.modules, trt.__name__, trt)
    return api, trt
