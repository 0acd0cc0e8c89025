"""The order of a run: what tells most comes first, and what the time is too short for is named.

Limits; engines of the first target that runs here beside PyTorch as it is, the LLM before the encoders; the
same beside compiled PyTorch; memory; Triton; the other targets. Tables are written after each part.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Final

from build_engines import nvidia
from build_engines.errors import ArtifactError
from build_engines.gpu import machine
from build_engines.gpu.baselines import EAGER
from build_engines.gpu.building import is_portable, usable_targets
from build_engines.gpu.ceilings import TORCH, measure_ceilings
from build_engines.gpu.decoders import measure_decoders
from build_engines.gpu.encoders import measure_encoders
from build_engines.gpu.memory import measure_memory
from build_engines.gpu.models import write_stack_file
from build_engines.gpu.report import write_files
from build_engines.gpu.results import Clock, Results, Say, Skipped
from build_engines.gpu.served import cannot_serve, measure_served
from build_engines.gpu.settings import Race, Run, Settings
from build_engines.stack import load_stack

_CEILINGS_S: Final = 60.0
# Kept back for later parts, as shares of all the time there is.
_ENCODERS, _MEMORY, _SERVED = 0.20, 0.12, 0.22
_STAND_IN: Final = "12.0"  # where there is no GPU: the planned card's


def run_bench(settings: Settings, say: Say) -> Results:
    """Measure everything that this machine has; write bench.json and bench.txt into the settings' folder.

    What is missing or fails is a row with its reason. What was measured before an interrupt is written too.

    Raises:
        ArtifactError: nothing at all could be measured (the files are written all the same).
    """
    results = Results(say)
    card, why = _find(settings)
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
    if not [row for row in results.measured() if row.part not in {"machine", "build"}]:
        reason = next((row.reason for row in results.rows), "no part ran")
        raise ArtifactError(
            f"nothing could be measured: {reason}",
            next_step=f"read {settings.folder}/bench.txt for every reason, and see what nvidia-smi says",
        )
    return results


def _find(settings: Settings) -> tuple[nvidia.Card | None, str]:
    if not settings.on_gpu:
        return None, "this run was told to use the CPU"
    try:
        return nvidia.find_card(), ""
    except nvidia.NoGpu as reason:
        return None, str(reason)


def _parts(run: Run, why: str) -> None:
    settings, clock = run.settings, run.clock
    with run.results.case("machine", "gpu") as outcome:
        if settings.on_gpu and run.card is None:
            raise Skipped(why)
    if not outcome.measured:
        return
    side = run.side(TORCH)
    run.ceilings = measure_ceilings(side, settings.device, run.results, settings.ceilings, _CEILINGS_S)
    targets = usable_targets(run)
    with run.results.case("build", "stack file") as outcome:
        _write_stack(run, targets)
    if not outcome.measured:
        return
    encoders, memory, served = (60 * settings.minutes * share for share in (_ENCODERS, _MEMORY, _SERVED))
    if not targets:
        memory = served = 0.0
    elif cannot_serve():
        served = 0.0

    def part(measure: Callable[..., None], kept: float, *race: Race) -> None:
        measure(run, targets, clock.part(clock.left - kept), *race)
        write_files(run.results, settings.folder)  # whatever ends the next part, this is there

    part(measure_decoders, encoders + memory + served, Race())
    part(measure_encoders, memory + served, Race())
    if settings.compiled and any(row.contender == EAGER for row in run.results.measured()):
        left = clock.left - memory - served  # half of it for the LLM
        part(measure_decoders, left / 2 + memory + served, Race(compiled=True))
        part(measure_encoders, memory + served, Race(compiled=True))
    part(measure_memory, served)
    part(measure_served, 0.0)
    if len(targets) > 1:
        part(measure_decoders, clock.left / 2, Race(every=True))
        part(measure_encoders, 0.0, Race(every=True))


def _write_stack(run: Run, targets: list[str]) -> None:
    """The stack of the usable targets; its checkpoints are written when their turn comes."""
    folder = run.settings.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    capability = run.card.compute_capability if run.card else _STAND_IN
    portable = is_portable(targets, capability)
    path = write_stack_file(folder, run.settings.sizes, targets, capability, portable)
    run.stack = load_stack(path, build_dir=folder / "build")
