"""The stages of a causal LM: export, precision, compile.

    work/<model>/export/       tokenizer.json, chat_template.jinja; the record says what the checkpoint is
    work/<model>/<precision>/  model.onnx and its data, the gate passed; reference.npz: FP32's predictions

There is no FP32 graph between them: a large checkpoint would take more disk than the card's owner has. Each
precision is written straight from the checkpoint's tensors, one at a time, in a pass that also judges it.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from build_engines.decoder_kernels import Material, compile_for_cpu
from build_engines.decoder_precision import REFERENCE_FILE, DecoderMaterial, build_decoder_precision
from build_engines.decoder_reference import MOST_PARAMETERS, check_decoder_parity
from build_engines.decoder_texts import DecoderTexts, load_decoder_texts, parameters
from build_engines.errors import StackError
from build_engines.export.decoder import open_decoder
from build_engines.export.decoder_serving import TEMPLATE_FILE, copy_chat_tokenizer, decoder_serving
from build_engines.export.decoder_weights import Decoder
from build_engines.gates import GateReport
from build_engines.golden import record_generator
from build_engines.manifest import StageRun, code_digest, digest_of
from build_engines.perplexity import GivesLogits, Reference, engine_nll, judge
from build_engines.pipeline.engine import EngineStage, closing
from build_engines.pipeline.model import BuiltEngine, ModelBuild, versions
from build_engines.profiles import decoder_profile
from build_engines.stack import Precision
from build_engines.targets import Target

_EXPORT_CODE = (
    "build_engines/export",
    "build_engines/graphs.py",
    "build_engines/decoder_reference.py",
    "build_engines/decoder_stream.py",
)
_PRECISION_CODE = (
    *_EXPORT_CODE,
    "build_engines/quantize",
    "build_engines/decoder_precision.py",
    "build_engines/decoder_sensitivity.py",
    "build_engines/decoder_texts.py",
    "build_engines/perplexity.py",
    "build_engines/gates.py",
    "build_engines/fallback.py",
    "calibration/samples.py",
    "calibration/reading.py",
    "triton_repo/runtime/chat.py",
    "triton_repo/runtime/template.py",
)
_COMPILE_CODE = (
    "build_engines/targets",
    "build_engines/graphs.py",
    "build_engines/decoder_kernels.py",
    "build_engines/fallback.py",
    "build_engines/gates.py",
    "build_engines/golden.py",
    "build_engines/perplexity.py",
    "calibration/samples.py",
    "calibration/reading.py",
    "triton_repo/runtime",
)


class DecoderBuild(ModelBuild):
    """All stages of one causal LM."""

    def check_data(self) -> None:
        _ = self.texts

    # --- stages ---------------------------------------------------------------------------------------------

    @cached_property
    def exported(self) -> StageRun:
        inputs = {
            "source": self.source_digests,
            "code": code_digest(*_EXPORT_CODE),
            "versions": versions("onnx", "tokenizers", "transformers"),
        }

        def build(out: Path) -> dict[str, Any]:
            copy_chat_tokenizer(self.source, out)
            parity = self._parity(out / "tokenizer.json")
            self.require_unchanged()
            return {"serving": decoder_serving(self.decoder), "parity": parity}

        return self.run("export", self.work / "export", inputs, build, _describe_export)

    def typed(self, precision: Precision) -> StageRun:
        tables = [self.model.embedding, self.model.head] if precision == "int8-weights" else None
        inputs = {
            "source": self.source_digests,
            "export": self.exported.digests(),
            "evaluation": self.data_digest(self.model.evaluation),
            "calibration": self.data_digest(self.model.calibration.data),
            "settings": [precision, tables, self.capacity, asdict(self.model.gates)],
            "samples": self.model.calibration.samples,
            "code": code_digest(*_PRECISION_CODE),
            "versions": versions("onnxruntime"),
        }

        def build(out: Path) -> dict[str, Any]:
            material = DecoderMaterial(self.model, self.texts.calibration, self.texts.evaluation)
            found = build_decoder_precision(
                self.decoder, precision, out / "model.onnx", material, self.reporter.progress
            )
            self.require_unchanged()
            return found

        return self.run(precision, self.work / precision, inputs, build, _describe_gate)

    def compile(self, precision: Precision, graph: StageRun, target: Target) -> BuiltEngine:
        profile = decoder_profile(self.model)
        bounds = {"slots": profile.slots, "capacity": profile.capacity, "chunk": profile.chunk}
        serving = {**self.exported.result["serving"], **bounds}
        checkpoint = digest_of(self.source_digests)
        on_cpu = target.name == "onnxruntime"
        inputs = {
            "graph": graph.digests(),
            "checkpoint": checkpoint,
            "verified": graph.result,
            "tokenizer": self.exported.digests(),
            "serving": serving,
            "gates": asdict(self.model.gates),
            "code": code_digest(*_COMPILE_CODE),
        }
        manifest = {
            **self.facts(precision, target, self.model),
            "profile": profile.as_dict(),
            "sources": {"checkpoint": checkpoint, **graph.digests()},
            "gates": {"graph": graph.result},
            "serving": serving,
        }

        def compile(out: Path) -> dict[str, Any]:
            source, progress = graph.folder / "model.onnx", self.reporter.progress
            if on_cpu:
                made = compile_for_cpu(source, out, self._material(graph, serving), progress)
                gate = made.pop("gate")
                return {**made, "gates": {"engine": gate}}
            return target.compile(
                source,
                out,
                profile=profile,
                compute_capability=manifest["compute_capability"],
                progress=progress,
            )

        served = [self.exported.folder / name for name in ("tokenizer.json", TEMPLATE_FILE)]
        return self.publish(
            EngineStage(
                target=target,
                inputs=inputs,
                manifest=manifest,
                files=[path for path in served if path.is_file()],
                compile=compile,
                judge=None if on_cpu else lambda out: self._judged_engine(out, graph),
                record=self._record,
            )
        )

    # --- parts ----------------------------------------------------------------------------------------------

    def _material(self, graph: StageRun, serving: dict[str, Any]) -> Material:
        sample = max(self.texts.calibration or self.texts.evaluation, key=len)
        return Material(serving, lambda engine: self._judged(engine, graph), sample.tolist())

    def _judged_engine(self, folder: Path, graph: StageRun) -> GateReport:
        """The engine as the server opens it, all its slots included."""
        from triton_repo.runtime.engines import open_decoder_engine

        self.reporter.progress("verify", 0, 1)
        with closing(open_decoder_engine(folder)) as engine:
            report = self._judged(engine, graph)
        self.reporter.progress("verify", 1, 1)
        return report

    def _record(self, folder: Path) -> None:
        assert self.model.evaluation is not None  # without it there was no gate to pass
        record_generator(folder, self.model.evaluation)

    def _judged(self, engine: GivesLogits, graph: StageRun) -> GateReport:
        reference = Reference.load(graph.folder / REFERENCE_FILE)
        return judge(reference.scores, engine_nll(engine, reference.rows), self.model.gates)

    @cached_property
    def decoder(self) -> Decoder:
        _ = self.source_digests  # a missing folder has a better message than a missing config.json
        return open_decoder(self.source)

    @cached_property
    def capacity(self) -> int:
        """Tokens per slot: the stack file's, which may not exceed what the model was trained with."""
        positions = int(self.exported.result["serving"]["positions"])
        if self.model.max_length > positions:
            raise StackError(
                f"{self.stack.path}: models.{self.model.name}.max_length = {self.model.max_length}, "
                f"but the model has {positions} positions",
                next_step=f"set max_length to at most {positions}, or leave it out",
            )
        return self.model.max_length

    @cached_property
    def texts(self) -> DecoderTexts:
        return load_decoder_texts(self.model, self.decoder, self.exported.folder / "tokenizer.json")

    def _parity(self, tokenizer: Path) -> float | None:
        """Against Transformers, where the machine can be expected to hold the model twice."""
        if parameters(self.decoder) > MOST_PARAMETERS:
            return None
        self.reporter.progress("compare with Transformers", 0, 1)
        texts = load_decoder_texts(self.model, self.decoder, tokenizer)
        found = check_decoder_parity(
            self.decoder, texts.evaluation, allow_remote_code=self.model.allow_remote_code
        )
        self.reporter.progress("compare with Transformers", 1, 1)
        return found


def _describe_export(result: dict[str, Any]) -> str:
    if result["parity"] is None:
        return "not compared with Transformers: too large, or only in its own code"
    return f"equal to Transformers within {result['parity']:.1e}"


def _describe_gate(result: dict[str, Any]) -> str:
    checks = {check["name"]: check["value"] for check in result["gate"]["checks"]}
    shown = f"perplexity {checks['perplexity']:.3f}"
    if "perplexity increase" in checks:
        shown += f" ({checks['perplexity increase']:+.2%} over FP32)"
    returned = len(result.get("returned", []))
    return f"{shown}; {returned} layers returned" if returned else shown
