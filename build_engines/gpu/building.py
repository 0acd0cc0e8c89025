"""Engines for the benchmark: built by the pipeline as a user's are, one row each, in a side process."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from build_engines.gpu.results import Clock, Row, Skipped, said
from build_engines.gpu.settings import Run
from build_engines.manifest import StageRun

_SIDE: Final = "build"


def build_engine(run: Run, clock: Clock, model: str, precision: str, target: str) -> Path | None:
    """The folder of that engine, built now or kept from the run before; None where it could not be."""
    assert run.stack is not None
    built: Path | None = None
    with run.results.case("build", precision, model=model, contender=target):
        stack = run.stack
        found = run.side(_SIDE).call(
            build_one, stack.path, stack.build_dir, (model, precision, target), seconds=clock.need(5)
        )
        built = Path(found["folder"])
        run.results.add(
            Row(
                part="build",
                case=precision,
                model=model,
                contender=target,
                value=found["seconds"],
                unit="s",
                note=found["note"],
            )
        )
    return built


def usable_targets(run: Run) -> list[str]:
    """Those of the settings' targets that can compile here; the others are rows with what is missing."""
    usable = []
    for target in run.settings.targets:
        with run.results.case("machine", "target", contender=target):
            side = run.side(_SIDE)
            if reason := side.call(check_target, target, run.settings.on_gpu, seconds=run.clock.need()):
                raise Skipped(reason)
            usable.append(target)
    return usable


# --- in the side process ----------------------------------------------------------------------------------


class _Quiet:
    """A reporter that writes lines to the side's log."""

    def start(self, model: str, stage: str) -> None:
        print(model, stage, flush=True)

    def progress(self, phase: str, done: int, total: int) -> None:
        del phase, done, total

    def finish(self, run: StageRun, detail: str) -> None:
        print("unchanged" if run.skipped else f"{run.seconds:.1f} s", detail, flush=True)


def check_target(target: str, on_gpu: bool) -> str:
    """Why `target` cannot be compiled, or run on a GPU, here; or nothing."""
    from build_engines.errors import CompileError
    from build_engines.targets import get_target
    from triton_repo.runtime.gpu.cuda import CudaError, cudart
    from triton_repo.runtime.gpu.onnxruntime import load_library
    from triton_repo.runtime.session import EngineRefused

    try:
        get_target(target).check()
        if on_gpu:
            cudart()
            if target == "onnxruntime-cuda":
                load_library()
    except (CompileError, CudaError, EngineRefused) as error:
        return said(error)
    return ""


def build_one(path: Path, build_dir: Path, wanted: tuple[str, str, str]) -> dict[str, Any]:
    """Build one model in one precision for one target: its folder, seconds, and what to know of it."""
    from build_engines.pipeline import build_stack
    from build_engines.stack import load_stack

    name, precision, target = wanted
    stack = load_stack(path, build_dir=build_dir)
    model = replace(stack.models[name], precisions=(precision,))  # type: ignore[arg-type]
    started = time.monotonic()
    built = build_stack(replace(stack, models={name: model}), _Quiet(), targets=[target])
    if not built:
        raise Skipped(f"{target} has no {precision}")
    manifest = built[0].manifest
    size = (built[0].folder / manifest["engine"]["file"]).stat().st_size
    notes = [f"{size / 2**20:,.0f} MiB"]
    notes += ["kept from the run before"] if built[0].skipped else []
    notes += ["portable"] if manifest.get("portable") else []
    notes += ["judged on this machine"] if "engine" in manifest["gates"] else ["not judged on a GPU"]
    notes += [f"attention {manifest['attention']}"] if manifest.get("attention") else []
    return {
        "folder": str(built[0].folder),
        "seconds": round(time.monotonic() - started, 2),
        "note": ", ".join(notes),
    }
