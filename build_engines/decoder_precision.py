"""From a checkpoint to the typed graph of a decoder, behind its gate: the perplexity on the evaluation texts.

Nothing is ever loaded whole. One pass over the layers calibrates, quantizes and judges: calibration and
evaluation texts go through a layer in FP32, every Linear is quantized for what it read there, and the
evaluation texts go through it again as it will be served. If the gate fails, Linears return to FP16 by
sensitivity (`build_engines.fallback`), and every choice is judged on all evaluation texts.

As served means: the INT8 (or FP16) weights as the graph holds them, and activations rounded to FP16 between
the layers. Within a layer they are FP32 here; that no product or sum exceeds what FP16 holds is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from build_engines.decoder_sensitivity import measure_sensitivity
from build_engines.decoder_stream import Inputs, Lane, Peak, Stream, Weights, collect, half, stream_scores
from build_engines.errors import DataError, GateError
from build_engines.export.decoder import write_decoder
from build_engines.export.decoder_config import LAYER_LINEARS
from build_engines.export.decoder_weights import narrowed
from build_engines.fallback import Modes, find_passing_modes
from build_engines.gates import Check, GateReport
from build_engines.perplexity import Reference, Rows, Scorer, Scores, judge, predictions
from build_engines.quantize import Linear
from build_engines.quantize.clipping import clip_weight, dequantize_into, plain_rows
from build_engines.quantize.codes import CodeStore
from build_engines.stack import Model

if TYPE_CHECKING:
    from build_engines.export.decoder_weights import Decoder

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]

REFERENCE_FILE = "reference.npz"
# Columns of a Linear quantized together: what is in memory beside the weight stays below 60 MB of codes.
_COLUMNS = 4096
_EMBEDDING_ROWS = 8192


@dataclass(frozen=True, slots=True)
class DecoderMaterial:
    """What a precision is made and judged with: token ids of the calibration and the evaluation texts.

    `reference`: the FP32 scores on the evaluation texts if they are known; its rows are then the evaluation.
    """

    model: Model
    calibration: Rows
    evaluation: Rows
    reference: Reference | None = None


def build_decoder_precision(
    decoder: Decoder, precision: str, out: Path, material: DecoderMaterial, progress: Progress
) -> dict[str, Any]:
    """Write the graph `out` once its gate has passed, and the FP32 scores beside it as REFERENCE_FILE.

    Returns the gate's figures; for int8-weights also which Linears returned to FP16 and what clipping gained.

    Raises:
        GateError: the gate failed and nothing is left that can help, or FP16 cannot hold the activations.
        DataError: no text to calibrate or judge with.
        QuantizeError, ExportError: weights or activations that are not finite, or that FP16 cannot hold.
        ArtifactError: no room on the disk.
    """
    evaluation = tuple(material.reference.rows if material.reference else material.evaluation)
    if not predictions(evaluation):
        raise DataError(
            f"model {material.model.name!r} has no evaluation text of at least two tokens",
            next_step=f"name other texts: [models.{material.model.name}] evaluation = ...",
        )
    run = _Run(decoder, precision, material, evaluation, CodeStore(out.parent / ".codes"), progress)
    try:
        return run.build(out)
    finally:
        run.store.remove()


@dataclass(slots=True)
class _Run:
    """One precision of one decoder."""

    decoder: Decoder
    precision: str
    material: DecoderMaterial
    evaluation: tuple[npt.NDArray[np.int64], ...]
    store: CodeStore
    progress: Progress
    clipping: dict[str, dict[str, float]] = field(default_factory=dict)
    peak: Peak = field(default_factory=Peak)

    def build(self, out: Path) -> dict[str, Any]:
        """Judge, then write; see `build_decoder_precision`."""
        if self.precision == "fp32":
            return self._build_exact(out)
        names = self._quantized_names() if self.precision == "int8-weights" else []
        reference, served = self._first_pass(names)
        report = judge(reference.scores, served, self.material.model.gates)
        result: dict[str, Any] = {}
        kept = names
        if names:
            linears = [self._linear(name) for name in names]
            outcome = find_passing_modes(
                linears, "int8-weights", self._judge(reference, report), self._sensitivity
            )
            report = outcome.report
            kept = [name for name in names if outcome.modes[name] != "float"]
            result = {**outcome.as_dict(linears), "clipping": self.clipping}
        elif not report.passed:
            raise GateError(
                f"the {self.precision} graph fails its accuracy gate; no engine was published\n"
                f"{report.summary()}",
                cause="weights or activations that FP16 rounds too coarsely",
                next_step="serve this model in another precision, or report it with the checkpoint's name",
            )
        self._write(out, reference, kept)
        largest = {"value": self.peak.value, "place": self.peak.place}
        return {"gate": report.as_dict(), **result, "largest_activation": largest}

    def _build_exact(self, out: Path) -> dict[str, Any]:
        """FP32 is the reference itself: there is nothing to compare with here, its perplexity is reported."""
        reference = self.material.reference
        if reference is None:
            scores = stream_scores(
                self.decoder, self.evaluation, lambda done, total: self.progress("reference", done, total)
            )
            reference = Reference(self.evaluation, scores)
        self._write(out, reference, [])
        check = Check("perplexity", reference.scores.perplexity, None, "at most")
        return {"gate": GateReport((check,), len(reference.scores.losses)).as_dict()}

    def _write(self, out: Path, reference: Reference, quantized: Sequence[str]) -> None:
        self.progress("write", 0, 1)
        reference.save(out.parent / REFERENCE_FILE)
        precision = cast(Literal["fp32", "fp16", "int8-weights"], self.precision)
        write_decoder(self.decoder, out, precision=precision, quantized=self.store.sources(quantized))
        self.progress("write", 1, 1)

    # --- the pass -------------------------------------------------------------------------------------------

    def _first_pass(self, names: Sequence[str]) -> tuple[Reference, Scores]:
        """Reference and served scores of the evaluation; on the way the Linears in `names` are quantized."""
        stream, known = Stream(self.decoder), self.material.reference
        lanes = _Lanes(
            calibration=stream.lane(self._calibration_rows()) if names else None,
            exact=None if known else stream.lane(self.evaluation),
            served=self._served_lane(names),
        )
        layers = self.decoder.architecture.layers
        for layer in range(layers):
            self.progress("quantize" if names else "gate", layer, layers + 1)
            weights = stream.weights(layer)
            if lanes.exact:
                stream.advance(lanes.exact, layer, weights)
            inputs = stream.observe(lanes.calibration, layer, weights) if lanes.calibration else {}
            for part in LAYER_LINEARS:
                name = f"layers.{layer}.{part}"
                if name in names:
                    self._quantize_linear(name, weights[f"{part}.weight"], inputs[part])
            self._serve(weights, layer, names)
            self._step(stream, lanes.served, layer, weights)
        self.progress("quantize" if names else "gate", layers, layers + 1)
        exact, served = self._heads(stream, lanes, quantize="head" in names)
        return known or Reference(self.evaluation, exact), served

    def _calibration_rows(self) -> Rows:
        if not sum(len(row) for row in self.material.calibration):
            name = self.material.model.name
            raise DataError(
                f"model {name!r} has no calibration text",
                cause="the calibration data holds no token",
                next_step=f"name texts of your own domain under [models.{name}.calibration] data",
            )
        return self.material.calibration

    def _served_lane(self, names: Sequence[str]) -> Lane:
        if "embedding" in names:
            self._quantize_embedding()
        return self._embedded("embedding" in names)

    def _embedded(self, quantized: bool) -> Lane:
        """The evaluation texts as the served embedding table gives them."""
        if not quantized:
            lane = Lane.of(self.evaluation, self.decoder.embed)
        else:
            codes, scale = self.store.read("embedding")
            factor = np.float32(self.decoder.architecture.embedding_scale)
            lane = Lane.of(self.evaluation, lambda ids: codes[ids] * scale[ids][..., None] * factor)
        lane.round_to_half()
        return lane

    def _step(self, stream: Stream, lane: Lane, layer: int, weights: Weights) -> None:
        """The evaluation texts through one layer as it is served."""
        stream.watch(lane, layer, weights, self.peak)
        if not self.peak.fits:
            raise GateError(
                f"an activation of {self.decoder.folder.name} reaches {self.peak.value:,.0f} at "
                f"{self.peak.place} on the evaluation texts; FP16 ends at 65,504",
                cause="the checkpoint was trained in BF16 or FP32, whose range is wider",
                next_step='set precisions = ["fp32"] for this model and serve it on the CPU, or choose '
                "another checkpoint",
            )
        lane.round_to_half()

    def _heads(self, stream: Stream, lanes: _Lanes, *, quantize: bool) -> tuple[Scores, Scores]:
        """Exact and served scores, the head's columns part by part; quantizes them where asked."""
        shape = self.decoder.architecture.linear_shape("head")
        codes = self.store.create("head", shape) if quantize else None
        scales, inputs, totals = np.empty(shape[1], np.float32), None, _Clipped()
        if lanes.calibration and quantize:
            normed = [stream.last_norm(hidden) for hidden in lanes.calibration.hidden]
            inputs = collect(lanes.calibration, normed)
        targets = lanes.served.targets()
        exact, served = Scorer(targets), Scorer(targets)
        exact_states = stream.last_norm(lanes.exact.predicting()) if lanes.exact else None
        states = half(stream.last_norm(lanes.served.predicting()))
        for part, weight in stream.head_parts():
            if exact_states is not None:
                exact.add(stream.logits(exact_states, weight), part.start)
            if codes is not None and inputs is not None:
                found = clip_weight(weight, inputs.rows, inputs.moments)
                codes[:, part], scales[part] = found.codes, found.scale
                totals.add(found.clipped, found.gain)
                dequantize_into(weight, found.codes, found.scale)
            else:
                weight[...] = self._narrowed(weight, "head")
            served.add(stream.logits(states, weight), part.start)
        if quantize:
            self.store.finish("head", scales)
            self.clipping["head"] = totals.as_dict(shape[1])
        return exact.scores(), served.scores()

    def _quantize_linear(self, name: str, weight: FloatArray, inputs: Inputs) -> None:
        """Codes and scales into the store."""
        shape = (weight.shape[0], weight.shape[1])
        codes, scales, totals = self.store.create(name, shape), np.empty(shape[1], np.float32), _Clipped()
        for start in range(0, shape[1], _COLUMNS):
            part = slice(start, min(start + _COLUMNS, shape[1]))
            found = clip_weight(weight[:, part], inputs.rows, inputs.moments)
            codes[:, part], scales[part] = found.codes, found.scale
            totals.add(found.clipped, found.gain)
        self.store.finish(name, scales)
        self.clipping[name] = totals.as_dict(shape[1])

    def _quantize_embedding(self) -> None:
        architecture = self.decoder.architecture
        shape = (architecture.vocabulary, architecture.hidden)
        codes, scales = self.store.create("embedding", shape), np.empty(shape[0], np.float32)
        for start in range(0, shape[0], _EMBEDDING_ROWS):
            part = slice(start, min(start + _EMBEDDING_ROWS, shape[0]))
            codes[part], scales[part] = plain_rows(self.decoder.embedding(part))
        self.store.finish("embedding", scales)

    def _serve(self, weights: Weights, layer: int, quantized: Sequence[str]) -> None:
        """Turn a layer's FP32 weights, in place, into what the served graph computes with."""
        for key in weights:
            name = f"layers.{layer}.{key.removesuffix('.weight')}"
            if name in quantized:
                dequantize_into(weights[key], *self.store.read(name))
            else:
                weights[key] = self._narrowed(weights[key], name)

    def _narrowed(self, values: FloatArray, name: str) -> FloatArray:
        """As the graph stores it in FP16; ExportError for what FP16 cannot hold."""
        place = f"{self.decoder.folder}: {name}"
        return np.asarray(narrowed(values, np.dtype(np.float16), place), dtype=np.float32)

    # --- falling back ---------------------------------------------------------------------------------------

    def _quantized_names(self) -> list[str]:
        """What int8-weights quantizes, by the stack file."""
        model = self.material.model
        names = [name for name in self.decoder.linears() if name != "head" or model.head == "int8"]
        return [*names, "embedding"] if model.embedding == "int8" else names

    def _linear(self, name: str) -> Linear:
        architecture = self.decoder.architecture
        if name == "embedding":
            shape = (architecture.vocabulary, architecture.hidden)
        else:
            shape = architecture.linear_shape(name)
        return Linear(name, f"{name}.input", f"{name}.weight", *shape)

    def _judge(self, reference: Reference, first: GateReport) -> Callable[[Modes], GateReport]:
        def report(modes: Modes) -> GateReport:
            kept = [name for name, mode in modes.items() if mode != "float"]
            if len(kept) == len(modes):
                return first
            found = self._served_scores(kept, f"gate, {len(modes) - len(kept)} layers returned")
            return judge(reference.scores, found, self.material.model.gates)

        return report

    def _served_scores(self, quantized: Sequence[str], phase: str) -> Scores:
        """The evaluation texts through the decoder with these Linears in INT8 and all others in FP16."""
        stream, layers = Stream(self.decoder), self.decoder.architecture.layers
        lane = self._embedded("embedding" in quantized)
        for layer in range(layers):
            self.progress(phase, layer, layers)
            weights = stream.weights(layer)
            self._serve(weights, layer, quantized)
            self._step(stream, lane, layer, weights)
        scorer, states = Scorer(lane.targets()), half(stream.last_norm(lane.predicting()))
        for part, weight in stream.head_parts():
            if "head" in quantized:
                codes, scales = self.store.read("head")
                dequantize_into(weight, codes[:, part], scales[part])
            else:
                weight[...] = self._narrowed(weight, "head")
            scorer.add(stream.logits(states, weight), part.start)
        self.progress(phase, layers, layers)
        return scorer.scores()

    def _sensitivity(self) -> Mapping[str, float]:
        return measure_sensitivity(
            self.decoder, self.material.calibration, self.store, self._quantized_names(), self.progress
        )


@dataclass(slots=True)
class _Lanes:
    """The texts of the pass: in FP32 the calibration and, unless known, the reference; and those judged."""

    calibration: Lane | None
    exact: Lane | None
    served: Lane


@dataclass(slots=True)
class _Clipped:
    """Channels clipped and the mean gain over them, of one Linear quantized in parts."""

    channels: int = 0
    gained: float = 0.0

    def add(self, channels: int, gain: float) -> None:
        self.channels += channels
        self.gained += channels * gain

    def as_dict(self, of: int) -> dict[str, float]:
        gain = self.gained / self.channels if self.channels else 0.0
        return {"channels": of, "clipped": self.channels, "gain": round(gain, 4)}
