"""Where graphs become engines. A target is a name, a file name and one method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from build_engines.errors import CompileError
from build_engines.profiles import DecoderProfile, Profile

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all


class Target(Protocol):
    """Compiles one typed graph. `compile` writes `engine_file` (and nothing else) into `out`.

    Returns what the manifest records: "versions" {library: version}, and whatever the target knows about the
    result ("layers": {layer type: count}, "activation_bytes", ...). Raises CompileError.
    """

    name: str
    engine_file: str
    #: The compute capability that engines of this target are tied to is recorded in their manifests.
    needs_card: bool

    def check(self) -> None:
        """Raise CompileError, saying what to install and where to run, if the target cannot be used here."""

    def compile(
        self,
        graph: Path,
        out: Path,
        *,
        profile: Profile | DecoderProfile,
        compute_capability: str | None,
        progress: Progress,
    ) -> dict[str, Any]: ...


def get_target(name: str, *, portable: bool = False) -> Target:
    """The target called `name`; imports only that target's module.

    `portable`: TensorRT-RTX compiles for compute capability 8.0 and newer; no other target has that.
    """
    if name == "onnxruntime":
        from build_engines.targets.onnxruntime import OnnxRuntimeTarget

        return OnnxRuntimeTarget()
    if name == "onnxruntime-cuda":
        from build_engines.targets.onnxruntime_cuda import OnnxRuntimeCudaTarget

        return OnnxRuntimeCudaTarget()
    if name in {"tensorrt", "tensorrt-rtx"}:
        from build_engines.targets.tensorrt import TensorRTTarget

        return TensorRTTarget(name, portable=portable and name == "tensorrt-rtx")
    raise CompileError(f"there is no target called {name!r}", next_step="see docs/targets.md for the targets")


__all__ = ["DecoderProfile", "Profile", "Progress", "Target", "get_target"]
