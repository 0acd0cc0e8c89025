"""The stages of an LLM that TensorRT-LLM serves: nothing is compiled, what is served is checked and recorded.

work/<model>/export/                        tokenizer.json, chat_template.jinja, what the checkpoint is
engines/<model>/<precision>/tensorrt-llm/   manifest.json beside those and the checkpoint's own files (links)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from build_engines.atomic import link_or_copy
from build_engines.cards import MIB
from build_engines.decoder_memory import llm_cache_tokens, llm_memory
from build_engines.export.checkpoint import read_header, read_json, well_formed
from build_engines.export.decoder_config import read_architecture
from build_engines.export.decoder_serving import TEMPLATE_FILE, copy_chat_tokenizer, llm_serving
from build_engines.manifest import StageRun, code_digest, digest_of, write_manifest
from build_engines.modelopt import checkpoint_files, weight_files
from build_engines.pipeline.model import BuiltEngine, ModelBuild, versions
from build_engines.profiles import decoder_profile
from build_engines.shapes import resolve_shape
from build_engines.stack import DecoderShape, Precision
from build_engines.targets import Target

_TARGET = "tensorrt-llm"
# Of all files that a folder with them must have, the one that names the model.
_ENGINE_FILE = "config.json"
_CODE = ("build_engines/export", "build_engines/modelopt.py", "build_engines/pipeline/llm.py")


class LlmBuild(ModelBuild):
    """All stages of one LLM with target = "tensorrt-llm"."""

    def check_data(self) -> None:
        """Nothing is calibrated or judged: the checkpoint is served as it is stored."""

    def engines(self, targets: Sequence[Target]) -> list[BuiltEngine]:
        """One, whichever the stack's targets are; none where no engine is wanted."""
        (precision,) = self.model.precisions
        return [self.compile(precision, self.typed(precision), target) for target in targets[:1]]

    def typed(self, precision: Precision) -> StageRun:
        """There is no graph: what the checkpoint is, and its tokenizer."""
        inputs = {
            "source": self.source_digests,
            "code": code_digest(*_CODE),
            "versions": versions("tokenizers", "transformers"),
        }

        def build(out: Path) -> dict[str, Any]:
            copy_chat_tokenizer(self.source, out)
            config = read_json(self.source / "config.json")
            # ModelOpt repeats itself there; build_engines.modelopt has read what it says.
            config.pop("quantization_config", None)
            with well_formed(self.source / "config.json"):
                serving = llm_serving(read_architecture(config, self.source), self.source)
            self.require_unchanged()
            return {"serving": serving}

        return self.run("export", self.work / "export", inputs, build, lambda _: "tokenizer, chat template")

    def compile(self, precision: Precision, graph: StageRun, target: Target) -> BuiltEngine:
        """Link and record what TensorRT-LLM loads; `target` is another model's."""
        shape = resolve_shape(self.stack, self.model)
        assert isinstance(shape, DecoderShape)
        profile = decoder_profile(self.model)
        memory = llm_memory(self.model, shape, precision, self.stack.context_mib * MIB)
        manifest = {
            "model": self.model.name,
            "task": self.model.task,
            "precision": precision,
            "target": _TARGET,
            "profile": profile.as_dict(),
            "compute_capability": self.stack.card.compute_capability,
            "portable": False,
            "memory": {
                name: getattr(memory, name)
                for name in ("weights", "activations", "buffers", "cache", "context")
            },
            "sources": {"checkpoint": digest_of(self.source_digests), **graph.digests()},
            "gates": {},
            "versions": {},
            "serving": {
                **graph.result["serving"],
                **profile.as_dict(),
                "cache_tokens": llm_cache_tokens(profile),
            },
        }
        folder = self.stack.build_dir / "engines" / self.model.name / precision / _TARGET

        def build(out: Path) -> dict[str, Any]:
            for path in weight_files(self.source):
                read_header(path)
            self.require_unchanged()  # before: a link more is a change, too, to the file system
            for path in checkpoint_files(self.source):
                link_or_copy(path, out / path.name)
            for name in ("tokenizer.json", TEMPLATE_FILE):
                if (graph.folder / name).is_file():
                    shutil.copyfile(graph.folder / name, out / name)
            write_manifest(out, manifest, _ENGINE_FILE)
            return {"bytes": memory.tensors}

        inputs = {"manifest": manifest, "code": code_digest(*_CODE)}
        run = self.run(f"{precision} {_TARGET}", folder, inputs, build, _describe)
        return BuiltEngine.read(folder, run)


def _describe(result: dict[str, Any]) -> str:
    return f"{result['bytes'] / MIB:,.1f} MiB, linked; not judged: TensorRT-LLM runs on the card alone"
