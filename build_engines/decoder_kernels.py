"""A causal LM's engine for the CPU: lowered, its integer kernels chosen by the gate, judged as it is served.

ONNX Runtime computes INT8 weights in INT8: activations are quantized at run time, which the typed graph does
not say and the gate must see. Two kernels do it. MatMulNBits gives every row and block of inputs a scale of
its own and reads the weights as fast as memory allows: decoding. DynamicQuantizeMatMul gives the whole run
one scale, and is twice as fast for a prompt: prefill, in a second graph over the same weights file, for the
Linears that bear it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from build_engines.atomic import link_or_copy
from build_engines.errors import CompileError, GateError
from build_engines.fallback import Modes, find_passing_modes
from build_engines.gates import GateReport
from build_engines.graphs import operator_counts, read_structure
from build_engines.targets.decoder_lowering import LinearMode, int8_linears, lower_decoder, widen_decoder
from triton_repo.runtime.decoder import PREFILL_FILE, DecoderEngine, kernel_settings
from triton_repo.runtime.session import EngineRefused, onnx_session

if TYPE_CHECKING:
    import onnx

    from build_engines.targets import Progress

FloatArray = npt.NDArray[np.float32]
Judge = Callable[[DecoderEngine], GateReport]

ENGINE_FILE = "engine.onnx"
# Each graph packs its own copy of the weights in memory. Beyond this a machine that fits one may not fit two.
_LARGEST_TWICE = 4 << 30
# Finest last: inputs that share an activation scale in MatMulNBits, and its arithmetic (4: INT8, 1: float32).
_KERNELS = ({"block": 256, "accuracy": 4}, {"block": 32, "accuracy": 4}, {"block": 32, "accuracy": 1})
_SAMPLE = 128  # tokens that tell how much a Linear suffers from one activation scale


@dataclass(frozen=True, slots=True)
class Material:
    """What a CPU engine is chosen with: how it will be served, the gate, and texts (token ids) to rank by."""

    serving: Mapping[str, Any]
    judge: Judge
    sample: Sequence[int]


def compile_for_cpu(graph: Path, out: Path, material: Material, progress: Progress) -> dict[str, Any]:
    """Write engine.onnx, its data (a hard link where possible) and perhaps prefill.onnx into `out`.

    Returns for the manifest "versions", "layers", "kernels" (which runtime settings serve it), "prefill"
    (which Linears use one activation scale per run) and "gate", the report of the engine as it is served.

    Raises:
        GateError: not even the finest kernels pass. CompileError: ONNX Runtime refuses the graph.
    """
    return _CpuBuild(graph, out, material, progress).build()


class _CpuBuild:
    def __init__(self, graph: Path, out: Path, material: Material, progress: Progress) -> None:

        self.model = widen_decoder(read_structure(graph), graph.parent)
        self.source = graph
        self.out = out
        self.material = material
        self.progress = progress
        self.linears = int8_linears(self.model)
        self.kernels: Mapping[str, int] = _KERNELS[0]

    def build(self) -> dict[str, Any]:
        import onnxruntime

        data = self.source.with_name(f"{self.source.name}.data")
        link_or_copy(data, self.out / f"{ENGINE_FILE}.data")
        decode = self._write(ENGINE_FILE, {})
        session, report = self._decoding()
        made: dict[str, Any] = {
            "versions": {"onnxruntime": onnxruntime.__version__},
            "layers": operator_counts(decode),
            "kernels": dict(self.kernels),
            "prefill": None,
            "gate": report.as_dict(),
        }
        if self.linears and data.stat().st_size <= _LARGEST_TWICE:
            made |= self._prefilling(session)
        return made

    def _decoding(self) -> tuple[Any, GateReport]:
        """The fastest kernels that pass, coarsest first."""
        choices = _KERNELS if self.linears else _KERNELS[:1]
        for self.kernels in choices:
            session = self._session(ENGINE_FILE)
            report = self._judge(session, session, "gate")
            if report.passed:
                return session, report
        raise GateError(
            f"the engine for the CPU fails the gate that its graph passed\n{report.summary()}",
            cause="the kernels of ONNX Runtime on this machine compute something else",
            next_step="report it with the output of: build-engines inspect",
        )

    def _prefilling(self, decode: Any) -> dict[str, Any]:
        """Which Linears may quantize a whole run with one scale; none left: no second graph."""

        def judge(modes: Modes) -> GateReport:
            self._write(PREFILL_FILE, _one_scale(modes))
            return self._judge(decode, self._session(PREFILL_FILE), "prefill gate")

        linears = [_Named(name) for name in self.linears]
        outcome = find_passing_modes(linears, "int8", judge, self._sensitivity)
        modes = _one_scale(outcome.modes)
        if not modes:
            (self.out / PREFILL_FILE).unlink(missing_ok=True)
            return {}
        self._write(PREFILL_FILE, modes)
        returned = sorted(set(self.linears) - set(modes))
        return {
            "prefill": {"one_scale": len(modes), "returned": returned},
            "gate": outcome.report.as_dict(),
        }

    def _sensitivity(self) -> dict[str, float]:
        """Relative squared error that one activation scale per run causes in what each Linear reads."""
        read = self._read_by_linears()
        return {name: _one_scale_error(read[name]) for name in self.linears}

    def _read_by_linears(self) -> dict[str, FloatArray]:
        from onnx import TensorProto, helper

        model = lower_decoder(self.model, {})
        tensors = {node.name: node.input[0] for node in model.graph.node if node.name in set(self.linears)}
        known = {value.name for value in model.graph.output}
        wanted = [name for name in dict.fromkeys(tensors.values()) if name not in known]
        model.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted
        )
        path = self._save(model, "probe.onnx")
        try:
            session = onnx_session(path, settings=kernel_settings(self.kernels))
            serving = self.material.serving
            tokens = np.array([list(self.material.sample)[:_SAMPLE]], np.int64)
            shape = (1, serving["kv_heads"], tokens.shape[1], serving["head_dim"])
            feeds: dict[str, Any] = {
                f"past_{kind}.{layer}": np.zeros(shape, np.float32)
                for layer in range(serving["layers"])
                for kind in ("key", "value")
            }
            feeds |= {"input_ids": tokens, "past_lengths": np.zeros(1, np.int64)}
            feeds["logit_indices"] = np.zeros((1, 1), np.int64)
            found = dict(zip(wanted, session.run(wanted, feeds), strict=True))
        finally:
            path.unlink()
        return {name: found[tensor] for name, tensor in tensors.items()}

    def _judge(self, decode: Any, prefill: Any, phase: str) -> GateReport:
        self.progress(phase, 0, 1)
        engine = DecoderEngine({"serving": {**self.material.serving, "slots": 1}}, decode, prefill)
        report = self.material.judge(engine)
        self.progress(phase, 1, 1)
        return report

    def _session(self, name: str) -> Any:
        try:
            settings = kernel_settings(self.kernels, prefill=name == PREFILL_FILE)
            return onnx_session(self.out / name, settings=settings)
        except EngineRefused as error:
            raise CompileError(f"the lowered graph does not open: {error}") from None

    def _write(self, name: str, modes: Mapping[str, LinearMode]) -> onnx.ModelProto:
        model = lower_decoder(self.model, modes)
        self._save(model, name)
        return model

    def _save(self, model: onnx.ModelProto, name: str) -> Path:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{ENGINE_FILE}.data"
        path = self.out / name
        path.write_bytes(model.SerializeToString())
        return path


@dataclass(frozen=True, slots=True)
class _Named:
    name: str


def _one_scale(modes: Modes) -> dict[str, LinearMode]:
    return {name: "int8" for name, mode in modes.items() if mode == "int8"}


def _one_scale_error(values: FloatArray) -> float:
    """Quantize as DynamicQuantizeLinear does: 256 steps over the range of the values and 0."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.rint(-low / step)
    codes = np.clip(np.rint(values / step) + zero, 0, 255)
    # Row by row: what ruins a token is what the loudest token of the run does to it.
    error = np.square((codes - zero) * step - values).sum(axis=-1)
    size = np.square(values).sum(axis=-1)
    return float(np.mean(error / np.maximum(size, 1e-12)))
