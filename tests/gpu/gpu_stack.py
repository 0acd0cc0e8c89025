"""Three small encoders and a small LLM, built by the pipeline for the CPU and for one GPU target."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from build_engines.cards import RTX_COMPUTE_CAPABILITIES
from build_engines.gpu.models import EncoderSize, Sizes, write_model, write_stack_file
from build_engines.manifest import StageRun
from build_engines.nvidia import Card
from build_engines.random_model import RandomLlama
from build_engines.stack import Stack, load_stack

# Heads of 16 elements are the smallest that TensorRT's fused attention takes.
SIZES = Sizes(
    encoder=EncoderSize(layers=2, hidden=64, heads=4, ffn=128, vocabulary=2000, positions=64),
    llm=RandomLlama(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, vocabulary=1024, positions=128),
    shapes=((1, 8), (3, 16), (8, 32)),
    slots=4,
    capacity=64,
    chunk=16,
    prompt=24,
    new=4,
    batches=(1, 2),
)


class SmallStack:
    """`folder(model, precision, target)` is the engine's folder; engines are built when first asked for."""

    def __init__(self, folder: Path, target: str, card: Card, stand_in: bool, sizes: Sizes = SIZES) -> None:
        self._sizes, self._home = sizes, folder
        folder.mkdir(parents=True, exist_ok=True)
        capability = card.compute_capability
        portable = target == "tensorrt-rtx" and capability not in RTX_COMPUTE_CAPABILITIES
        path = write_stack_file(folder, sizes, [target], capability, portable)
        self.target, self.stand_in = target, stand_in
        self.stack: Stack = load_stack(path, build_dir=folder / "build")

    def folder(self, model: str, precision: str, target: str | None = None) -> Path:
        """Raises what the pipeline raises."""
        from build_engines.pipeline import build_stack

        target = target or self.target
        write_model(self._home, model, self._sizes)
        one = replace(self.stack.models[model], precisions=(precision,))  # type: ignore[arg-type]
        stack = replace(self.stack, models={model: one})
        made_here = "onnxruntime" if self.stand_in else target
        built = build_stack(stack, _Silent(), targets=[made_here])
        if target == made_here:
            return built[0].folder
        return self._stand_in_engine(model, precision, built[0].folder)

    def _stand_in_engine(self, model: str, precision: str, cpu: Path) -> Path:
        """The typed graph in the file format of the TensorRT that stands in."""
        import onnx
        from fake_tensorrt import write_engine

        from build_engines.graphs import fix_dimension
        from build_engines.manifest import write_manifest
        from build_engines.profiles import decoder_profile, engine_profile

        folder = cpu.parent / self.target
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(cpu, folder)
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
        one = self.stack.models[model]
        if one.task == "generate":
            ranges: Any = decoder_profile(one).ranges
        else:
            profile = engine_profile(one)
            ranges = ({"batch": profile.batch, "sequence": profile.sequence},)
        for stale in ("engine.onnx", "engine.onnx.data", "prefill.onnx", "manifest.json", "stage.json"):
            (folder / stale).unlink(missing_ok=True)
        graphs = self.stack.build_dir / "stand-in" / model / precision
        # A copy: the file of weights is shared with the CPU's engine, and onnx reads no hard links.
        shutil.copytree(self.stack.build_dir / "work" / model / precision, graphs, dirs_exist_ok=True)
        graph = onnx.load(str(graphs / "model.onnx"))
        if one.task == "generate":
            fix_dimension(graph, "capacity", SIZES.capacity)
        write_engine(folder / "engine.trt", graph, ranges)
        for derived in ("format", "files", "digest", "engine", "kernels"):
            manifest.pop(derived, None)
        memory = {"weights": 1 << 26, "activations": 1 << 20, "buffers": 1 << 22, "cache": 1 << 24}
        manifest |= {
            "target": self.target,
            "compute_capability": "12.0",
            "portable": False,
            "versions": {"tensorrt-rtx": "1.7.1.116"},
            "memory": memory | {"context": 0},
        }
        write_manifest(folder, manifest, "engine.trt")
        return folder


class _Silent:
    def start(self, model: str, stage: str) -> None:
        del model, stage

    def progress(self, phase: str, done: int, total: int) -> None:
        del phase, done, total

    def finish(self, run: StageRun, detail: str) -> None:
        del run, detail
