"""ONNX Runtime on the GPU: the FP16 graph for its CUDA kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_engines.errors import CompileError

if TYPE_CHECKING:
    from build_engines.profiles import DecoderProfile, Profile
    from build_engines.targets import Progress


class OnnxRuntimeCudaTarget:
    name = "onnxruntime-cuda"
    engine_file = "engine.onnx"
    needs_card = False

    def check(self) -> None:
        raise CompileError(
            "the target onnxruntime-cuda cannot be built yet", next_step="see docs/targets.md for the targets"
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
        raise NotImplementedError
