"""Engines for the benchmark: built by the pipeline as a user's are, one row each, in a side process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from build_engines.cards import RTX_COMPUTE_CAPABILITIES
from build_engines.gpu.models import EncoderSize, Sizes, write_model, write_stack_file
from build_engines.gpu.results import Clock, Row, Skipped, said
from build_engines.gpu.settings import Run
from build_engines.gpu.timing import encoder_arrays
from build_engines.manifest import StageRun
from build_engines.nvidia import Card
from build_engines.stack_types import compiles

_SIDE: Final = "build"
_MODEL_S: Final = 120.0
_SMALL_S: Final = 90.0
# Heads of 16 elements are the smallest that TensorRT's fused attention takes.
_SMALL: Final = Sizes(
    encoder=EncoderSize(layers=2, hidden=64, heads=4, ffn=128, vocabulary=2000, positions=64),
    shapes=((2, 16),),
    encoder_precisions=("fp16",),
)


def write_checkpoint(run: Run, clock: Clock, model: str) -> bool:
    """Write the model's random checkpoint, in a side process (that needs PyTorch); whether it is there."""
    given = (run.settings.folder.absolute(), model, run.settings.sizes)
    with run.results.case("build", "checkpoint", model=model) as outcome:
        run.side(_SIDE).call(write_model, *given, seconds=min(_MODEL_S, clock.need(5)))
    return outcome.measured


def build_engine(run: Run, clock: Clock, model: str, precision: str, target: str) -> Path | None:
    """The folder of that engine, built now or kept from before; None where it could not be."""
    assert run.stack is not None
    wanted = (model, precision, target)
    if wanted in run.built:
        return run.built[wanted]
    built: Path | None = None
    with run.results.case("build", precision, model=model, contender=target) as outcome:
        stack = run.stack
        if not compiles(target, stack.models[model].task, precision):  # type: ignore[arg-type]
            raise Skipped(f"{target} has no {precision}")
        found = run.side(_SIDE).call(build_one, stack.path, stack.build_dir, wanted, seconds=clock.need(5))
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
    if outcome.status != "skipped":  # for want of time there may be more of later
        run.built[wanted] = built
    return built


def usable_targets(run: Run) -> list[str]:
    """Those of the settings' targets that compile and run here; the others are rows with the reason.

    On a GPU each makes a small engine first and runs it: what a library says to this card is known before
    minutes are spent on large ones.
    """
    usable = []
    for target in run.settings.targets:
        with run.results.case("machine", "target", contender=target) as outcome:
            side = run.side(_SIDE)
            if reason := side.call(check_target, target, run.settings.on_gpu, seconds=run.clock.need()):
                raise Skipped(reason)
        if outcome.measured and (run.card is None or _runs_small(run, target, run.card)):
            usable.append(target)
    return usable


def _runs_small(run: Run, target: str, card: Card) -> bool:
    capability, side = card.compute_capability, run.side(_SIDE)
    name = "a small portable engine" if is_portable([target], capability) else "a small engine"
    with run.results.case("machine", name, contender=target) as outcome:
        folder, limit = run.settings.folder.absolute() / "small", min(_SMALL_S, run.clock.need())
        seconds = side.call(run_small, folder, target, capability, seconds=limit)
        run.results.add(Row(part="machine", case=name, contender=target, value=seconds, unit="s"))
    if not outcome.measured:
        run.drop(_SIDE)  # in whatever state that left CUDA there
    return outcome.measured


def is_portable(targets: Sequence[str], capability: str) -> bool:
    """Whether TensorRT-RTX does not compile for this card: its engines for several cards may run on it."""
    return "tensorrt-rtx" in targets and capability not in RTX_COMPUTE_CAPABILITIES


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


def run_small(folder: Path, target: str, capability: str) -> float:
    """Build a small encoder, open it as it is served and run it; seconds. Raises what the library says."""
    from build_engines.pipeline.engine import closing
    from triton_repo.runtime.engines import open_encoder_engine

    started = time.monotonic()
    write_model(folder, "embedder", _SMALL)
    path = write_stack_file(folder, _SMALL, [target], capability, is_portable([target], capability))
    built = build_one(path, folder / "build", ("embedder", "fp16", target))
    with closing(open_encoder_engine(Path(built["folder"]))) as engine:
        engine.run(encoder_arrays(engine.manifest["serving"]["inputs"], *_SMALL.shapes[0], 1000))
    return round(time.monotonic() - started, 2)
