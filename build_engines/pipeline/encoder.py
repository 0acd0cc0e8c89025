"""The stages of an encoder: export, reference, precision, compile.

work/<model>/export/       model.onnx (FP32, equal to PyTorch), tokenizer.json
work/<model>/reference/    answers.npy: PyTorch FP32 on the evaluation data
work/<model>/<precision>/  model.onnx: the typed graph, its gate passed
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from build_engines.gates import GateReport, judge
from build_engines.golden import record_encoder
from build_engines.manifest import StageRun, code_digest, digest_of
from build_engines.pipeline.engine import EngineStage, closing
from build_engines.pipeline.model import BuiltEngine, ModelBuild, versions
from build_engines.plan import engine_profile
from build_engines.stack import Precision
from build_engines.targets import Target
from build_engines.verify import (
    TextSet,
    answers,
    check_evaluation,
    load_calibration,
    load_evaluation,
    open_tokenizer,
)
from triton_repo.runtime.encode import Encoder
from triton_repo.runtime.tokenization import TextTokenizer

_EXPORT_CODE = ("build_engines/export", "build_engines/graphs.py", "build_engines/reference.py")
_DATA_CODE = ("build_engines/verify.py", "calibration/samples.py", "calibration/reading.py")
_JUDGING_CODE = (
    *_DATA_CODE,
    "build_engines/gates.py",
    "build_engines/metrics.py",
    "build_engines/targets/onnxruntime.py",
    "triton_repo/runtime",
)
_PRECISION_CODE = (
    *_EXPORT_CODE,
    *_JUDGING_CODE,
    "build_engines/quantize",
    "build_engines/precision.py",
    "build_engines/fallback.py",
)


class EncoderBuild(ModelBuild):
    """All stages of one classifier, embedder or reranker."""

    def check_data(self) -> None:
        if any(precision != "fp32" for precision in self.model.precisions):
            load_calibration(self.model)
        check_evaluation(self.model)

    # --- stages ---------------------------------------------------------------------------------------------

    @cached_property
    def exported(self) -> StageRun:
        inputs = {
            "source": self.source_digests,
            "task": self.model.task,
            "pooling": self.model.pooling,
            "normalize": self.model.normalize,
            "code": code_digest(*_EXPORT_CODE),
            "versions": versions("onnx", "tokenizers", "transformers"),
        }

        def build(out: Path) -> dict[str, Any]:
            from build_engines.export import export_encoder

            graph = export_encoder(
                self.source, self.model.task, out, pooling=self.model.pooling, normalize=self.model.normalize
            )
            parity = self._parity(graph.path, graph.serving)
            self.require_unchanged()
            return {"serving": graph.serving, "parity": parity}

        return self.run("export", self.work / "export", inputs, build, _describe_export)

    @cached_property
    def reference(self) -> StageRun:
        inputs = {
            "source": self.source_digests,
            "data": self.data_digest(self.model.evaluation),
            "max_length": self.max_length,
            "model": [self.model.task, self.model.pooling, self.model.normalize],
            "code": code_digest("build_engines/reference.py", *_DATA_CODE),
            "versions": versions("torch", "transformers", "sentence-transformers"),
        }

        def build(out: Path) -> dict[str, Any]:
            found = self._torch.answers(self.evaluation, self.max_length)
            self.require_unchanged()
            np.save(out / "answers.npy", found)
            return {"rows": len(found)}

        return self.run("reference", self.work / "reference", inputs, build, lambda r: f"{r['rows']} answers")

    def typed(self, precision: Precision) -> StageRun:
        inputs = {
            "export": self.exported.digests(),
            "serving": self.exported.result["serving"],  # labels decide accuracy and are not in the graph
            "reference": self.reference.digests(),
            "evaluation": self.data_digest(self.model.evaluation),
            "calibration": self.data_digest(self.model.calibration.data),
            "settings": [precision, self.max_length, asdict(self.model.gates), self._calibration_settings()],
            "code": code_digest(*_PRECISION_CODE),
            "versions": versions("onnxruntime"),
        }

        def build(out: Path) -> dict[str, Any]:
            from build_engines.precision import Material, build_precision

            material = Material(
                self.model,
                self.serving,
                self.tokenizer,
                self.evaluation,
                self._reference_answers(),
                lambda: load_calibration(self.model),
            )
            graph = self.exported.folder / "model.onnx"
            return build_precision(graph, precision, out / "model.onnx", material, self.reporter.progress)

        return self.run(precision, self.work / precision, inputs, build, _describe_gate)

    def compile(self, precision: Precision, graph: StageRun, target: Target) -> BuiltEngine:
        model = replace(self.model, max_length=self.max_length)
        profile = engine_profile(model)
        checkpoint = digest_of(self.source_digests)
        inputs = {
            "graph": graph.digests(),
            "checkpoint": checkpoint,
            "verified": graph.result,  # the same graph judged on other texts is another manifest
            "tokenizer": self.exported.digests()["tokenizer.json"],
            "profile": profile.as_dict(),
            "serving": self.serving,
            "gates": asdict(self.model.gates),
            "code": code_digest("build_engines/targets", "build_engines/golden.py", *_JUDGING_CODE),
        }

        manifest = {
            **self.facts(precision, target, model),
            "profile": profile.as_dict(),
            "sources": {"checkpoint": checkpoint, **graph.digests()},
            "gates": {"graph": graph.result},
            "serving": self.serving,
        }
        return self.publish(
            EngineStage(
                target=target,
                inputs=inputs,
                manifest=manifest,
                files=[self.exported.folder / "tokenizer.json"],
                compile=lambda out: target.compile(
                    graph.folder / "model.onnx",
                    out,
                    profile=profile,
                    compute_capability=manifest["compute_capability"],
                    progress=self.reporter.progress,
                ),
                judge=lambda out: self._judged(out, precision),
                record=lambda out: record_encoder(out, self.evaluation.texts, self.evaluation.groups),
            )
        )

    # --- parts ----------------------------------------------------------------------------------------------

    def _judged(self, engine: Path, precision: Precision) -> GateReport:
        """What the compiled engine answers, opened as the server opens it, against PyTorch."""
        self.reporter.progress("verify", 0, 1)
        encoder = Encoder.open(engine)
        with closing(encoder):
            found = answers(encoder, self.evaluation.rows(encoder.tokenizer))
        reference, truth = self._reference_answers(), self.evaluation.truth
        report = judge(self.model.task, precision, reference, found, self.model.gates, truth)
        self.reporter.progress("verify", 1, 1)
        return report

    def _parity(self, graph: Path, serving: dict[str, Any]) -> float:
        from build_engines.graphs import open_session
        from build_engines.reference import check_parity

        tokenizer = open_tokenizer(graph.parent / "tokenizer.json", self.model.max_length)
        return check_parity(self._torch, open_session(graph), serving, tokenizer.vocabulary)

    @cached_property
    def _torch(self) -> Any:
        from build_engines.reference import TorchReference

        self.reporter.progress("load PyTorch", 0, 1)
        return TorchReference(self.source, self.model)

    def _reference_answers(self) -> Any:
        return np.load(self.reference.folder / "answers.npy", allow_pickle=False)

    @cached_property
    def max_length(self) -> int:
        """The stack file's, bounded by the positions that the checkpoint was trained with."""
        return int(min(self.model.max_length, self.exported.result["serving"]["max_positions"]))

    @cached_property
    def serving(self) -> dict[str, Any]:
        bounds = {
            "max_length": self.max_length,
            "max_batch": self.model.max_batch,
            "overflow": self.model.overflow,
        }
        return {**self.exported.result["serving"], **bounds}

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return open_tokenizer(self.exported.folder / "tokenizer.json", self.max_length)

    @cached_property
    def evaluation(self) -> TextSet:
        return load_evaluation(self.model, self.serving["labels"], multi_label=self.serving["multi_label"])

    def _calibration_settings(self) -> list[Any]:
        settings = self.model.calibration
        return [settings.samples, settings.method, settings.percentile, settings.smoothing]


def _describe_export(result: dict[str, Any]) -> str:
    return f"equal to PyTorch within {result['parity']:.1e}"


def _describe_gate(result: dict[str, Any]) -> str:
    returned = len(result.get("returned", []))
    shown = ", ".join(f"{check['name']} {check['value']:.4f}" for check in result["gate"]["checks"][:2])
    return f"{shown}; {returned} layers returned" if returned else shown
