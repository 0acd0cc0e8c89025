"""ONNX Runtime on the GPU, with the interface of runtime.gpu.tensorrt: shapes and addresses in, work out.

So its encoders and LLMs are run by the same code as TensorRT's. Everything is bound to addresses of the
device; a decode step is recorded as a CUDA graph by ONNX Runtime itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triton_repo.runtime.gpu.cuda import MIB, Device, DeviceMemoryFull
from triton_repo.runtime.gpu.tensorrt import Shape, Tensor, choose_profile
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.texts import EngineFailed

_LOG = logging.getLogger("onecard")
PROVIDER = "CUDAExecutionProvider"
# An input that the lowered LLM has beside those of its typed graph: tokens of each row in this run, less one.
LAST_OFFSET = "last_offset"
_INSTALL = "pip uninstall --yes onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
_FULL = ("Failed to allocate memory", "out of memory", "cudaErrorMemoryAllocation")
# Bindings that are kept; a server's shapes are few. Each decode step that is a CUDA graph keeps its own.
_MOST_BINDINGS = 128
_MOST_GRAPHS = 64
Ranges = Mapping[str, Sequence[int]]  # symbolic dimension: smallest, usual, largest


class OnnxRuntimeEngine:
    """One session: `tensors` by name, `profiles` (their number), contexts. See TensorRTEngine."""

    def __init__(
        self,
        path: Path,
        device: Device,
        *,
        profiles: Sequence[Ranges],
        exact: bool = False,
        graphs: bool = False,
        session: Any = None,
    ) -> None:
        """Load `path` onto the device.

        Args:
            profiles: the sizes of the symbolic dimensions by name, one mapping for each profile.
            exact: FP32 is not rounded to TF32.
            graphs: runs of profile 0 are recorded as CUDA graphs.
            session: runs the graph instead of a session of its own.

        Raises:
            EngineRefused: no CUDA provider, or ONNX Runtime refuses the graph, with its words.
            DeviceMemoryFull: its weights do not fit.
        """
        self.path, self.device, self.graphs = Path(path), device, graphs
        self.profiles = len(profiles)
        if session is None:
            device.bind()
            session = open_session(self.path, device, exact=exact, graphs=graphs)
        self._session = session
        self.tensors = {
            tensor.name: _tensor(tensor, is_input, profiles)
            for is_input, found in ((True, session.get_inputs()), (False, session.get_outputs()))
            for tensor in found
            if tensor.name != LAST_OFFSET
        }
        self._dimensions = {tensor.name: tuple(tensor.shape) for tensor in session.get_inputs()}
        self._outputs = {tensor.name: tuple(tensor.shape) for tensor in session.get_outputs()}
        self._offsets = self._offset_table(profiles) if LAST_OFFSET in self._dimensions else None
        self._contexts: list[ExecutionContext] = []

    def context(self, profile: int = 0) -> ExecutionContext:
        """A new context that runs shapes of `profile`."""
        context = ExecutionContext(self, recorded=self.graphs and profile == 0)
        self._contexts.append(context)
        return context

    def profile_for(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The first profile that takes inputs of these shapes. Raises ValueError."""
        return choose_profile(self, shapes)

    def save_cache(self) -> None:
        """Nothing is compiled at run time here."""

    def close(self) -> None:
        """Let go of session and weights; a second time does nothing."""
        if self._session is None:
            return
        self.device.synchronize()
        for context in self._contexts:
            context._bound.clear()  # a binding keeps its session
        self._contexts.clear()
        self._session = None

    def output_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The outputs' shapes, from the names that they share with dimensions of the inputs."""
        sizes: dict[Any, int] = {}
        for name, shape in shapes.items():
            sizes |= dict(zip(self._dimensions[name], shape, strict=True))
        return {
            name: tuple(sizes[size] if isinstance(size, str) else size for size in shape)
            for name, shape in self._outputs.items()
        }

    def bind(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> Any:
        """A binding of every tensor to its address, for inputs of `shapes`. Raises EngineFailed."""
        if missing := sorted(self.tensors.keys() - addresses.keys()):
            raise EngineFailed(f"ONNX Runtime: no address for {', '.join(missing)}")
        binding = self._session.io_binding()
        index = self.device.info.index

        def place(bind: Any, name: str, shape: Shape) -> None:
            bind(name, "cuda", index, self.tensors[name].dtype.type, list(shape), addresses[name])

        for name, shape in shapes.items():
            place(binding.bind_input, name, shape)
        for name, shape in self.output_shapes(shapes).items():
            place(binding.bind_output, name, shape)
        if self._offsets is not None:
            last = shapes["input_ids"][1] - 1
            address = self._offsets.address + last * self._offsets.dtype.itemsize
            binding.bind_input(LAST_OFFSET, "cuda", index, self._offsets.dtype.type, [1], address)
        return binding

    def run(self, binding: Any, options: Any) -> None:
        """Put a run on the device's stream. Raises EngineFailed or DeviceMemoryFull."""
        self.device.bind()
        try:
            with _explained(self.device):
                self._session.run_with_iobinding(binding, options)
        except EngineFailed:
            raise
        except Exception as error:  # ONNX Runtime raises its own untyped exceptions
            raise EngineFailed(f"ONNX Runtime: the run failed: {_first_line(error)}") from error

    def _offset_table(self, profiles: Sequence[Ranges]) -> Any:
        """0, 1, 2, ... on the device: a run of n tokens is bound to the place of n - 1."""
        longest = max(ranges["sequence"][-1] for ranges in profiles)
        table = self.device.array((longest,), np.int32, "buffers")
        values = self.device.pinned((longest,), np.int32)
        values[:] = np.arange(longest)
        self.device.upload(table.address, values)
        self.device.synchronize()
        return table


class ExecutionContext:
    """Runs of one engine. See runtime.gpu.tensorrt.ExecutionContext."""

    def __init__(self, engine: OnnxRuntimeEngine, *, recorded: bool) -> None:
        self.engine = engine
        self._recorded = recorded
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._bound: dict[Any, tuple[Any, int]] = {}  # binding, id of its CUDA graph or -1
        self._options: dict[int, Any] = {}

    def output_shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
        """The shapes of all outputs for inputs of `shapes`."""
        return self.engine.output_shapes({name: tuple(shape) for name, shape in shapes.items()})

    def enqueue(self, shapes: Mapping[str, Sequence[int]], addresses: Mapping[str, int]) -> None:
        """Put one run on the device's stream: inputs of `shapes`, every tensor at its address.

        Shapes and addresses that are not named stay as in the run before. Raises EngineFailed.
        """
        self._shapes |= {name: tuple(shape) for name, shape in shapes.items()}
        self._addresses |= addresses
        key = (tuple(self._shapes.items()), tuple(self._addresses.items()))
        if key not in self._bound:
            self._keep(key)
        binding, graph = self._bound[key]
        self.engine.run(binding, self._run_options(graph))

    def _keep(self, key: Any) -> None:
        binding = self.engine.bind(self._shapes, self._addresses)
        graph = len(self._bound) if self._recorded and len(self._bound) < _MOST_GRAPHS else -1
        if graph < 0 and len(self._bound) >= _MOST_BINDINGS:
            del self._bound[next(reversed(self._bound))]  # never one of the first, which may be graphs
        self._bound[key] = binding, graph

    def _run_options(self, graph: int) -> Any:
        if graph not in self._options:
            import onnxruntime as ort

            options = self._options[graph] = ort.RunOptions()
            # Copies follow on the same stream, and one wait at their end is enough.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            options.add_run_config_entry("gpu_graph_id", str(graph))
        return self._options[graph]


def open_recorded(open_decoder: Callable[[bool], Any], name: str) -> Any:
    """An LLM whose decode steps are CUDA graphs, if that works here, and plain runs if not.

    Args:
        open_decoder: opens it, warm, with graphs or without.
        name: for the log.

    Raises:
        EngineRefused: it does not open without graphs either.
    """
    try:
        decoder = open_decoder(True)
        try:
            check_steps(decoder)
        except BaseException:
            decoder.close()
            raise
        return decoder
    except (EngineRefused, EngineFailed) as error:
        reason = str(error)
    # Not before the error is gone: its traceback may hold the session, and there is room for one.
    gc.collect()
    plain = open_decoder(False)
    _LOG.warning("%s: decode steps are no CUDA graphs, which costs time: %s", name, reason)
    return plain


def check_steps(decoder: Any) -> None:
    """Raise EngineRefused unless decoding gives the logits that prefill does.

    A recorded step replays what was launched when it was recorded, at another length. Nothing else would
    notice if that were wrong: gates read texts as prompts.
    """
    tokens = [token % decoder.vocabulary for token in range(1, 8)]
    expected = decoder.logits(tokens)
    decoder.prefill(0, tokens[:4], 0)
    for length in range(4, 7):
        found = decoder.decode([0], [tokens[length]], [length])[0]
        off = float(np.abs(found - expected[length]).max())
        if not off <= 0.05 * max(1.0, float(np.abs(expected).max())):  # NaN too
            raise EngineRefused(f"decoding at {length} gives other logits than prefill, by {off:.3g}")


def open_session(model: Path, device: Device, *, exact: bool, graphs: bool) -> Any:
    """A session that puts everything on the device's one stream. Raises EngineRefused or DeviceMemoryFull."""
    ort = load_library()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # the host launches kernels and computes shapes, no more
    # Weights are allocated one by one: the arena would keep what it rounds up.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    settings = {
        "device_id": str(device.info.index),
        "user_compute_stream": str(device.stream),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0" if exact else "1",
        "enable_cuda_graph": "1" if graphs else "0",
    }
    try:
        with _explained(device):
            session = ort.InferenceSession(
                str(model), options, providers=[(PROVIDER, settings), "CPUExecutionProvider"]
            )
    except DeviceMemoryFull:
        raise
    except Exception as error:  # ONNX Runtime raises its own untyped exceptions
        raise EngineRefused(f"{model}: ONNX Runtime refuses it: {_first_line(error)}") from error
    if PROVIDER not in session.get_providers():
        raise EngineRefused(
            f"{model}: ONNX Runtime could not start its {PROVIDER} and would compute on the CPU; "
            "it said why on standard error"
        )
    session.disable_fallback()
    return session


def load_library() -> Any:
    """The module onnxruntime with its CUDA provider, and what that one is linked to, loaded.

    ONNX Runtime itself would compute on the CPU and only print why. Raises EngineRefused.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineRefused(f"the Python module onnxruntime is missing ({error}); {_INSTALL}") from None
    version, providers = onnxruntime.__version__, onnxruntime.get_available_providers()
    if PROVIDER not in providers:
        raise EngineRefused(
            f"the onnxruntime {version} installed here is the one for CPUs ({', '.join(providers)}); "
            f"onnxruntime and onnxruntime-gpu are one Python module, so one replaces the other: {_INSTALL}"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(None):  # it prints what it does not find; below that has a name
            onnxruntime.preload_dlls()
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        raise EngineRefused(
            f"the CUDA provider of onnxruntime {version} cannot be loaded ({error}); a library of CUDA "
            f"or the driver is missing: {_INSTALL}, and see what `nvidia-smi` says"
        ) from None
    return onnxruntime


def _tensor(tensor: Any, is_input: bool, profiles: Sequence[Ranges]) -> Tensor:
    """ONNX Runtime's description of a tensor ("tensor(float16)", dimensions by name) as the engine's."""
    name = tensor.type.removeprefix("tensor(").removesuffix(")")
    dtype: np.dtype[Any] = np.dtype({"float": "float32"}.get(name, name))
    ranges = []
    for sizes in profiles if is_input else ():
        low, usual, high = (
            tuple(sizes[size][pick] if isinstance(size, str) else size for size in tensor.shape)
            for pick in range(3)
        )
        ranges.append((low, usual, high))
    shape = tuple(-1 if isinstance(size, str) else size for size in tensor.shape)
    return Tensor(tensor.name, is_input, dtype, shape, tuple(ranges))


@contextlib.contextmanager
def _explained(device: Device) -> Iterator[None]:
    """ONNX Runtime's complaints about memory become DeviceMemoryFull, with what the device has."""
    try:
        yield
    except Exception as error:
        if not any(sign in str(error) for sign in _FULL):
            raise
        free, total = device.memory()
        raise DeviceMemoryFull(
            f"the GPU is full: ONNX Runtime needs more than the {free / MIB:,.0f} of {total / MIB:,.0f} MiB "
            "that are free; other models or programs hold the rest; see `nvidia-smi`, stop what is not "
            f"needed, or make slots, max_length or max_batch smaller and build again ({_first_line(error)})",
            "cudaErrorMemoryAllocation",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
