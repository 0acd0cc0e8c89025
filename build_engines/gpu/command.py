"""The order of a run: ceilings, models, engines against Transformers, memory, Triton; tables at its end."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import Final

from build_engines.cards import RTX_COMPUTE_CAPABILITIES
from build_engines.errors import ArtifactError
from build_engines.gpu import machine
from build_engines.gpu.building import usable_targets
from build_engines.gpu.ceilings import measure_ceilings
from build_engines.gpu.decoders import measure_decoders
from build_engines.gpu.encoders import measure_encoders
from build_engines.gpu.memory import measure_memory
from build_engines.gpu.models import write_models, write_stack_file
from build_engines.gpu.report import write_files
from build_engines.gpu.results import Clock, Results, Say, Skipped
from build_engines.gpu.served import measure_served
from build_engines.gpu.settings import Run, Settings
from build_engines.stack import load_stack

_CEILINGS_S: Final = 60.0
_MODELS_S: Final = 180.0
# Kept back for the last two parts, as shares of all the time there is.
_MEMORY, _SERVED = 0.10, 0.20
_STAND_IN: Final = "12.0"  # where there is no GPU: the planned card's


def run_bench(settings: Settings, say: Say) -> Results:
    """Measure everything that this machine has; write bench.json and bench.txt into the settings' folder.

    What is missing or fails is a row with its reason. What was measured before an interrupt is written too.

    Raises:
        ArtifactError: nothing at all could be measured (the files are written all the same).
    """
    results = Results(say)
    card, why = _find_card(settings)
    results.facts = machine.describe(card, why)
    results.facts["settings"] = {**asdict(settings), "folder": str(settings.folder)}
    try:
        with ExitStack() as sides:
            run = Run(
                settings=settings, results=results, clock=Clock(60 * settings.minutes), card=card, sides=sides
            )
            _parts(run, why)
    finally:
        write_files(results, settings.folder)
    if not [row for row in results.measured() if row.part != "build"]:
        reason = next((row.reason for row in results.rows), "no part ran")
        raise ArtifactError(
            f"nothing could be measured: {reason}",
            next_step=f"read {settings.folder}/bench.txt for every reason, and see what nvidia-smi says",
        )
    return results


def _find_card(settings: Settings) -> tuple[machine.Card | None, str]:
    if not settings.on_gpu:
        return None, "this run was told to use the CPU"
    try:
        return machine.find_card(), ""
    except machine.NoGpu as reason:
        return None, str(reason)


def _parts(run: Run, why: str) -> None:
    settings, clock = run.settings, run.clock
    with run.results.case("machine", "gpu") as outcome:
        if settings.on_gpu and run.card is None:
            raise Skipped(why)
    if not outcome.measured:
        return
    side = run.side("ceilings")
    run.ceilings = measure_ceilings(side, settings.device, run.results, settings.ceilings, _CEILINGS_S)
    run.drop("ceilings")
    targets = usable_targets(run)
    with run.results.case("build", "models"):
        _write_models(run, targets)
    if run.stack is None:
        return
    whole = 60 * settings.minutes
    kept = (_MEMORY + _SERVED) * whole
    for measure, seconds in (
        (measure_encoders, lambda: 0.5 * (clock.left - kept)),
        (measure_decoders, lambda: clock.left - kept),
        (measure_memory, lambda: clock.left - _SERVED * whole),
        (measure_served, lambda: clock.left),
    ):
        measure(run, targets, clock.part(seconds()))
        write_files(run.results, settings.folder)  # whatever ends the next part, this is there


def _write_models(run: Run, targets: list[str]) -> None:
    """Checkpoints, in a side process because that needs PyTorch; then the stack of the usable targets."""
    settings = run.settings
    folder = settings.folder.absolute()
    run.side("build").call(write_models, folder, settings.sizes, seconds=_MODELS_S)
    capability = run.card.compute_capability if run.card else _STAND_IN
    # Where the library does not compile for this card, its engines for several cards may run on it.
    portable = "tensorrt-rtx" in targets and capability not in RTX_COMPUTE_CAPABILITIES
    path = write_stack_file(folder, settings.sizes, targets or ["onnxruntime"], capability, portable)
    run.stack = load_stack(path, build_dir=folder / "build")
