"""TensorRT-RTX ahead of time for a card that need not be here, and full TensorRT on the card itself.

Both are one Python API: the module's name decides. Networks are strongly typed, so precision is what the
graph's tensors say; nothing is chosen here but shapes (one optimization profile for an encoder, two for an
LLM: decoding and prefill) and, for TensorRT-RTX, the card.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_engines.errors import CompileError
from build_engines.nvidia import gpu_compute_capability
from build_engines.profiles import DecoderProfile, Profile, Range
from build_engines.targets.decoder_network import DecoderNetwork, read_decoder
from triton_repo.runtime.gpu.tensorrt_callbacks import shared_logger

if TYPE_CHECKING:
    from build_engines.targets import Progress

_MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
# What the builder says about every INT64 input; ours are meant to be INT64.
_NOISE = re.compile(r"has Int64 binding")
_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")
_NO_FUSED_KERNEL = "not supported by a dedicated kernel"


class TensorRTTarget:
    """`TensorRTTarget("tensorrt-rtx")` or `TensorRTTarget("tensorrt")`; see build_engines.targets.Target."""

    engine_file = "engine.trt"
    needs_card = True

    def __init__(self, name: str, *, portable: bool = False) -> None:
        """`portable` (TensorRT-RTX alone): for the library's default set of cards, not for one."""
        self.name = name
        self.ahead_of_time = name == "tensorrt-rtx"
        self.portable = portable

    def check(self) -> None:
        """Raise CompileError unless the library is installed and, for full TensorRT, a GPU is here."""
        _load(self.name)
        if not self.ahead_of_time and gpu_compute_capability() is None:
            raise CompileError(
                "the target tensorrt compiles on the GPU that the engine is for, and this machine has none",
                cause="TensorRT times its kernels on the device; no NVIDIA driver answered here",
                next_step='run `build-engines build STACK` on a machine with the card, or use "tensorrt-rtx"',
            )

    def compile(
        self,
        graph: Path,
        out: Path,
        *,
        profile: Profile | DecoderProfile,
        compute_capability: str | None,
        progress: Progress,
    ) -> dict[str, Any]:
        """Compile `graph` into `out`/engine.trt; a failed or interrupted build leaves no file.

        Args:
            profile: smallest, usual and largest batch and sequence; of an LLM its slots, their length and the
                prefill chunk, which make two profiles (0 decodes, 1 prefills).
            compute_capability: of the stack's card, "12.0".
            progress: called with (phase, steps done, steps in all) as the builder reports, on any thread.

        Returns:
            versions; layers {type: count} of the parsed network; attention "fused" or "decomposed" (None
            where there is none); activation_bytes (the largest profile's) and weights_bytes as the builder
            states them, or None; profile_activation_bytes, one for each; warnings; seconds.

        Raises:
            CompileError: the library, the card or the graph does not allow it, with the builder's messages;
                or an LLM's engine would not do what the plan counts on (targets.decoder_network).
        """
        self.check()
        trt = _load(self.name)
        self._check_card(trt, compute_capability)
        started = time.perf_counter()
        # Asked for no card, TensorRT-RTX compiles for all of its default set.
        one_card = self.ahead_of_time and not self.portable
        job = _job(trt, graph, profile, compute_capability if one_card else None, progress)
        build = _built(job, out / self.engine_file, self.name)
        return {
            "versions": {self.name: str(trt.__version__)},
            "layers": build.layers,
            "attention": build.attention,
            "activation_bytes": max(build.activations, default=None),
            "profile_activation_bytes": build.activations,
            "weights_bytes": build.weights,
            "warnings": build.warnings,
            "seconds": round(time.perf_counter() - started, 2),
        }

    def _check_card(self, trt: Any, compute_capability: str | None) -> None:
        if compute_capability is None:
            raise CompileError(f"the target {self.name} needs the card's compute capability")
        if self.portable:
            return
        if self.ahead_of_time:
            _capability(trt, compute_capability)
            return
        found = gpu_compute_capability()
        if found != compute_capability:
            raise CompileError(
                f"the stack's card has compute capability {compute_capability}, the GPU here has {found}",
                cause="a TensorRT engine runs only on the kind of GPU it was compiled on",
                next_step='run it on a machine with that card, or use the target "tensorrt-rtx"',
            )


@dataclass(frozen=True, slots=True)
class _Job:
    """`ranges`: for each optimization profile, the sizes of the symbolic dimensions by name."""

    trt: Any
    graph: Path
    ranges: tuple[dict[str, Range], ...]
    compute_capability: str | None
    progress: Progress
    decoder: DecoderNetwork | None


def _job(
    trt: Any,
    graph: Path,
    profile: Profile | DecoderProfile,
    compute_capability: str | None,
    progress: Progress,
) -> _Job:
    if isinstance(profile, DecoderProfile):
        decoder = read_decoder(graph, profile.capacity)
        return _Job(trt, graph, profile.ranges, compute_capability, progress, decoder)
    ranges = {"batch": profile.batch, "sequence": profile.sequence}
    return _Job(trt, graph, (ranges,), compute_capability, progress, None)


@dataclass(slots=True)
class _Build:
    """What one attempt left behind."""

    failed: bool = True
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    activations: list[int] = field(default_factory=list)
    weights: int | None = None
    layers: dict[str, int] = field(default_factory=dict)
    attention: str | None = None

    @property
    def lacks_kernel(self) -> bool:
        return any(_NO_FUSED_KERNEL in message for message in self.errors)

    def record(self, trt: Any, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)
        elif severity == trt.ILogger.Severity.WARNING and not _NOISE.search(message):
            self.warnings.append(message)
        elif found := _MEMORY.search(message):
            if found[1] == "Activation":  # one for each profile, in order
                self.activations.append(int(found[2]))
            else:
                self.weights = int(found[2])


def _built(job: _Job, engine: Path, library: str) -> _Build:
    """Fused, or else with attention as matrix products. Raises CompileError."""
    build = _run(job, engine, decompose=False)
    if build.failed and build.lacks_kernel:
        if job.decoder is not None:
            raise job.decoder.no_kernel(job.graph.name)
        build = _run(job, engine, decompose=True)
    if build.failed:
        raise _refused(library, job.graph, build.errors)
    if build.attention == "decomposed":
        build.warnings.append("attention runs as matrix products: no fused kernel for these heads or types")
    return build


def _run(job: _Job, target: Path, *, decompose: bool) -> _Build:
    """One attempt: parse, build into a file beside `target`, rename."""
    trt, build = job.trt, _Build()
    logger = shared_logger(trt)
    logger.sink = lambda severity, message: build.record(trt, severity, message)
    builder = trt.Builder(logger)
    network = builder.create_network(_strongly_typed(trt))
    _parse(network, job, logger)
    build.layers = _layer_types(network)
    if job.decoder is not None:
        job.decoder.check_layers(build.layers, job.graph.name)
        build.attention = "fused"
    elif "ATTENTION" in build.layers:
        build.attention = "decomposed" if _allow_decomposition(trt, network, decompose) else "fused"
    config = builder.create_builder_config()
    for ranges in job.ranges:
        _add_profile(builder, network, config, ranges)
    # All memory is the caller's, which the plan counts, and any run can be a CUDA graph; TensorRT-RTX alone
    # would otherwise allocate behind it.
    if (owned := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        config.set_flag(owned)
    if job.compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(trt, job.compute_capability), 0)
    monitor = _monitor(trt, job.progress)
    config.progress_monitor = monitor
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as file:
            writer = _writer(trt, file)
            build.failed = not builder.build_serialized_network_to_stream(network, config, writer)
        # Whatever was raised inside a callback is raised here: C++ frames cannot carry it.
        for raised in (monitor.raised, writer.raised):
            if raised is not None:
                raise raised
        if not build.failed:
            if job.decoder is not None:
                job.decoder.check_size(draft.stat().st_size, job.graph.name)
            os.replace(draft, target)
    except OSError as error:
        raise CompileError(
            f"{target} cannot be written: {error.strerror or error}",
            next_step="free some disk space or choose another build folder, then run the same command",
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    return build


def _parse(network: Any, job: _Job, logger: Any) -> None:
    parser, graph = job.trt.OnnxParser(network, logger), job.graph
    if job.decoder is not None:
        parsed = parser.parse(job.decoder.model, str(graph))  # the path tells where its weights are
    else:
        parsed = parser.parse_from_file(str(graph))
    if parsed:
        return
    problems = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = error.node_name() or "the graph"
        problems.append(f"{node} ({error.node_operator() or 'no operator'}): {error.desc()}")
    raise CompileError(
        f"{graph.name} cannot be read by TensorRT's ONNX parser:\n  "
        + "\n  ".join(problems or ["no reason given"]),
        cause="the graph uses an operator or type that this version does not know",
        next_step="compile the graph that `build-engines build` wrote, or upgrade the library",
    )


def _add_profile(builder: Any, network: Any, config: Any, ranges: dict[str, Range]) -> None:
    """One optimization profile: each symbolic dimension of each input gets its three sizes by name."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes: list[tuple[int, int, int]] = []
        for axis, size in enumerate(tensor.shape):
            name = tensor.get_dimension_name(axis)
            if size >= 0:
                sizes.append((size, size, size))
            elif name in ranges:
                sizes.append(ranges[name])
            else:
                raise CompileError(f"input {tensor.name}: the plan has no sizes for its dimension {name!r}")
        profile.set_shape(tensor.name, *(tuple(size[pick] for size in sizes) for pick in range(3)))
    if config.add_optimization_profile(profile) < 0:
        raise CompileError(f"the builder refuses the profile {ranges}")


def _layer_types(network: Any) -> dict[str, int]:
    """{layer type: count} of the parsed network; an attention counts once, not as its two ends."""
    types = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    types.pop("ATTENTION_OUTPUT", None)
    if ends := types.pop("ATTENTION_INPUT", 0):
        types["ATTENTION"] = ends
    return dict(sorted(types.items()))


def _allow_decomposition(trt: Any, network: Any, every: bool) -> int:
    """Let attention layers without a fused kernel (or every one) become matrix products; return how many may.

    The builder refuses them otherwise, and prints so itself, so those known to have none are marked at once:
    float32, heads of fewer than 16 elements, a single head. Marking one that has a kernel changes nothing.
    """
    marked = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name != "ATTENTION_INPUT":
            continue
        query = layer.get_input(0)
        _, heads, _, size = query.shape
        if every or query.dtype == trt.float32 or size < 16 or heads == 1:
            # The bindings hand out the base class; the documented cast is to assign the class.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
            marked += 1
    return marked


def _strongly_typed(trt: Any) -> int:
    """The creation flag where it still exists; newer versions have nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _capability(trt: Any, compute_capability: str) -> Any:
    members = trt.ComputeCapability.__members__
    wanted = f"SM{compute_capability.replace('.', '')}"
    if wanted not in members:
        offered = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in members if name.startswith("SM"))
        raise CompileError(
            f"TensorRT-RTX {trt.__version__} does not compile for compute capability {compute_capability}",
            cause=f"it offers {offered}",
            next_step='choose a card of one of these, or the target "tensorrt" on a machine with the card',
        )
    return members[wanted]


def _load(name: str) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as error:
        if name == "tensorrt-rtx":
            step = "pip install tensorrt-rtx"
        else:
            step = (
                "on a machine with the GPU: pip install tensorrt (from the package index of NVIDIA), "
                'or use the target "tensorrt-rtx", which needs no GPU'
            )
        raise CompileError(
            f"the target {name} needs the Python module {_MODULES[name]}: {error}", next_step=step
        ) from error


def _refused(name: str, graph: Path, errors: Iterable[str]) -> CompileError:
    # After any failure the builder also complains that it cannot reach a driver.
    told = [message.strip() for message in errors if "cudaError" not in message]
    unique = list(dict.fromkeys(told)) or ["it gave no reason"]
    return CompileError(
        f"{name} cannot compile {graph.name}:\n  " + "\n  ".join(unique[:8]),
        cause="a layer has no kernel for this type, shape or card",
        next_step="try a smaller max_batch or max_length, or another precision",
    )


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.raised: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self.steps.get(phase_name, 1))

        def _tell(self, phase: str, done: int) -> None:
            try:
                progress(phase, done, self.steps.get(phase, 1))
            except BaseException as error:  # an interrupt too: it must stop the build, then surface
                self.raised = error

    return Monitor()


def _writer(trt: Any, file: Any) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.raised: BaseException | None = None

        def write(self, data: bytes) -> int:
            try:
                return int(file.write(data))
            except BaseException as error:
                self.raised = error
                return 0

    return Writer()
