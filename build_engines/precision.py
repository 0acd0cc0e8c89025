"""From the FP32 graph to one typed graph per precision, each behind its gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from build_engines.errors import GateError
from build_engines.export import half_tensors, to_fp16
from build_engines.fallback import Modes, find_passing_modes
from build_engines.gates import GateReport, judge
from build_engines.graphs import open_session, read_graph, save_graph
from build_engines.quantize import Quantizer
from build_engines.quantize.quantizer import Mode
from build_engines.stack import Model
from build_engines.targets.onnxruntime import lower, rounded, widen
from build_engines.verify import TextSet, answers, graph_encoder, token_batches
from triton_repo.runtime.tokenization import Row, TextTokenizer

if TYPE_CHECKING:
    import onnx

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]

# Rows whose answers tell how much a layer suffers; the order of layers needs no more.
_SENSITIVITY_ROWS = 48
# Stands for an error that is not finite: those layers go first, and JSON has no infinity.
_OVERFLOW = 1e9


@dataclass(frozen=True, slots=True)
class Material:
    """What a precision is made and judged with. `reference`: PyTorch FP32's answers on `evaluation`."""

    model: Model
    serving: dict[str, Any]
    tokenizer: TextTokenizer
    evaluation: TextSet
    reference: FloatArray
    calibration: Callable[[], TextSet]

    def judge(self, precision: str, found: FloatArray) -> GateReport:
        return judge(
            self.model.task, precision, self.reference, found, self.model.gates, self.evaluation.truth
        )


def build_precision(
    graph: Path, precision: str, out: Path, material: Material, progress: Progress
) -> dict[str, Any]:
    """Write `out`, the graph in `precision`, once its gate has passed; return the gate's figures.

    Raises:
        GateError: the gate failed and nothing is left that can help.
        DataError, QuantizeError: no data to calibrate or judge with, or activations that are not finite.
    """
    model = read_graph(graph)
    if precision in {"int8", "int8-weights"}:
        return _Int8(model, precision, material, progress).write(out)
    typed = model if precision == "fp32" else to_fp16(model)
    progress("gate", 0, 2)
    judged = model if precision == "fp32" else rounded(widen(typed), half_tensors(typed))
    encoder = graph_encoder(open_session(judged), material.serving, material.tokenizer)
    if precision == "fp16":
        _check_finite(answers(encoder, material.calibration().rows(material.tokenizer)))
    progress("gate", 1, 2)
    report = material.judge(precision, answers(encoder, material.evaluation.rows(material.tokenizer)))
    if not report.passed:
        raise GateError(
            f"the {precision} graph fails its accuracy gate; no engine was published\n{report.summary()}",
            cause="activations beyond what FP16 holds" if precision == "fp16" else "a fault in the export",
            next_step="serve this model in another precision, or report it with the checkpoint's name",
        )
    save_graph(typed, out)
    progress("gate", 2, 2)
    return {"gate": report.as_dict()}


def _check_finite(found: FloatArray) -> None:
    broken = int((~np.isfinite(found)).reshape(len(found), -1).any(axis=1).sum())
    if broken:
        raise GateError(
            f"the FP16 graph gives NaN or infinity on {broken} of {len(found)} calibration texts",
            cause="an activation exceeds 65504, the largest FP16 number",
            next_step="leave fp16 out of this model's precisions",
        )


class _Int8:
    """One INT8 precision of one model: calibrate, assemble, judge, fall back."""

    def __init__(
        self, model: onnx.ModelProto, precision: str, material: Material, progress: Progress
    ) -> None:
        self.model = model
        self.precision = precision
        self.mode: Mode = "int8" if precision == "int8" else "int8-weights"
        self.material = material
        self.progress = progress
        self.quantizer = Quantizer(model)
        self.rows = material.evaluation.rows(material.tokenizer)
        self.calibration_rows: list[Row] = []

    def write(self, out: Path) -> dict[str, Any]:
        self._calibrate()
        outcome = find_passing_modes(self.quantizer.linears, self.mode, self._judge, self._sensitivity)
        save_graph(self._typed(outcome.modes), out)
        scales = {
            name: {"alpha": found.alpha, "shifted": _is_shifted(found), "error": found.error}
            for name, found in self.quantizer.scales.items()
            if outcome.modes[name] == "int8"
        }
        return {"gate": outcome.report.as_dict(), **outcome.as_dict(self.quantizer.linears), "scales": scales}

    def _calibrate(self) -> None:
        settings = self.material.model.calibration
        self.calibration_rows = self.material.calibration().rows(self.material.tokenizer)
        if self.precision != "int8":
            return
        encoder = graph_encoder(None, self.material.serving, self.material.tokenizer)
        self.quantizer.calibrate(
            token_batches(encoder, self.calibration_rows[: settings.samples]),
            method=settings.method,
            percentile=settings.percentile,
            smoothing=settings.smoothing,
            advance=lambda done, total: self.progress("calibrate", done, total),
        )

    def _typed(self, modes: Modes) -> onnx.ModelProto:
        return to_fp16(self.quantizer.assemble(modes))

    def _answers(self, modes: Modes, rows: Sequence[Row]) -> FloatArray:
        """Judged is the graph as the CPU target lowers it: the same INT8 arithmetic, in fast kernels."""
        session = open_session(lower(self._typed(modes)))
        return answers(graph_encoder(session, self.material.serving, self.material.tokenizer), rows)

    def _judge(self, modes: Modes) -> GateReport:
        returned = sum(mode != self.mode for mode in modes.values())
        self.progress(f"gate, {returned} layers returned" if returned else "gate", 0, 1)
        report = self.material.judge(self.precision, self._answers(modes, self.rows))
        self.progress("gate", 1, 1)
        return report

    def _sensitivity(self) -> Mapping[str, float]:
        """Relative squared error of the answers on calibration texts when one layer alone is quantized."""
        step = max(1, len(self.calibration_rows) // _SENSITIVITY_ROWS)
        rows = self.calibration_rows[::step]
        names = [linear.name for linear in self.quantizer.linears]
        nothing: Modes = dict.fromkeys(names, "float")
        exact = self._answers(nothing, rows)
        errors = {}
        for index, name in enumerate(names):
            self.progress("sensitivity", index, len(names))
            found = self._answers({**nothing, name: self.mode}, rows)
            error = float(np.square(found - exact).sum() / max(np.square(exact).sum(), 1e-12))
            errors[name] = error if np.isfinite(error) else _OVERFLOW
        return errors


def _is_shifted(found: Any) -> bool:
    return found.rewrite is not None and found.rewrite.offset is not None
