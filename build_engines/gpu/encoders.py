"""Encoders: every precision and target against Transformers at fixed shapes, contenders in turn.

One run is one batch of full rows. "device": ids are on the GPU and the answer stays there, so that only the
network is timed. "host": arrays come from the host's memory and the answer goes there, as in a server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from build_engines.gpu import baselines, contenders
from build_engines.gpu.building import build_engine, write_checkpoint
from build_engines.gpu.ceilings import TORCH
from build_engines.gpu.models import ENCODERS
from build_engines.gpu.results import Clock, Failed, Row
from build_engines.gpu.settings import Race, Run
from build_engines.gpu.timing import summary

WAYS: Final = ("device", "host")
LOAD_S: Final = 150.0
COMPILE_S: Final = 90.0
COMPILE_LEAST_S: Final = 20.0  # less is time lost

Shape = tuple[int, int]


@dataclass(slots=True)
class _Contender:
    """One of those that race. `time` is run in the process `side`; `weight`: bytes of one weight."""

    name: str
    side: str
    time: Callable[[str, str, Shape, float], list[float]]
    shapes: Sequence[Shape]
    weight: int = 2
    integer: bool = False
    note: str = ""
    ways: list[str] = field(default_factory=lambda: list(WAYS))
    times: dict[tuple[Shape, str], list[float]] = field(default_factory=dict)


def measure_encoders(run: Run, targets: Sequence[str], clock: Clock, race: Race) -> None:
    """Rows for all encoders. Each gets an equal part of the time, or in a race beyond the first all of it."""
    names = list(ENCODERS)
    for place, name in enumerate(names):
        with run.results.case("encoders", all_of("shapes", race), model=name):
            share = clock if race != Race() else clock.part(clock.left / (len(names) - place))
            share.need(10 if run.settings.on_gpu else 1)
            if write_checkpoint(run, share, name):
                _measure(run, name, targets, share, race)


def all_of(cases: str, race: Race) -> str:
    """How a whole race is called where there is no time for it."""
    if race.every:
        return f"all {cases}, every target"
    return f"all {cases}, compiled" if race.compiled else f"all {cases}"


def _measure(run: Run, name: str, targets: Sequence[str], clock: Clock, race: Race) -> None:
    # Engines first: without them there is nothing to compare.
    racing: list[_Contender] = []
    for target in targets:
        racing += _engines(run, name, target, clock)
        if racing and not race.every:
            break
    try:
        racing += _torch(run, name, clock, compiled=race.compiled)
        # The first turn does not count: libraries compile kernels for a shape behind the first runs of it.
        for turn in range(1 + run.settings.rounds):
            if turn > 1 and not clock.left:
                break
            for shape in run.settings.sizes.shapes:
                for contender in [one for one in racing if shape in one.shapes]:
                    if not _timed(run, name, contender, shape, counts=turn > 0):
                        racing.remove(contender)
    finally:
        release(run, targets)
    for contender in racing:
        _report(run, name, contender)


def release(run: Run, targets: Sequence[str]) -> None:
    """Give the card back: engines' processes end; PyTorch's, which is long in starting, forgets its model."""
    for target in targets:
        run.drop(target)
    with contextlib.suppress(Failed):  # it ended by itself, and says so where it is called next
        run.side(TORCH).call(baselines.free, seconds=LOAD_S)


def _torch(run: Run, name: str, clock: Clock, *, compiled: bool) -> list[_Contender]:
    """Eager always, compiled at the shapes where it compiles."""
    settings, side, found = run.settings, run.side(TORCH), list[_Contender]()
    shapes = settings.sizes.shapes
    assert run.stack is not None
    folder = run.stack.checkpoint_dir(run.stack.models[name])
    load = (baselines.load_encoder, folder, ENCODERS[name], settings.device)
    with run.results.case("encoders", "load", model=name, contender=baselines.EAGER):
        side.call(*load, seconds=LOAD_S)
        found.append(_Contender(baselines.EAGER, TORCH, baselines.time_encoder, shapes))
    if not found or not compiled:
        return found
    modes: dict[Shape, str] = {}
    for shape in shapes:
        with run.results.case("encoders", label(shape), model=name, contender=baselines.COMPILED) as outcome:
            limit = min(COMPILE_S, clock.need(COMPILE_LEAST_S))
            modes[shape] = side.call(baselines.compile_encoder, shape, seconds=limit)
        if not outcome.measured:
            break  # what does not compile for one shape does not for the next, and takes its time
    if side.lost:  # a compilation that hung was ended, and the loaded model with it
        with run.results.case("encoders", "load again", model=name, contender=baselines.EAGER) as outcome:
            side.call(*load, seconds=LOAD_S)
        return found if outcome.measured else []
    if modes:
        note = f"torch.compile, mode {', '.join(sorted(set(modes.values())))}"
        found.append(_Contender(baselines.COMPILED, TORCH, baselines.time_encoder, list(modes), note=note))
    return found


def _engines(run: Run, name: str, target: str, clock: Clock) -> list[_Contender]:
    sizes, found = run.settings.sizes, list[_Contender]()
    for precision in sizes.encoder_precisions:
        folder = build_engine(run, clock, name, precision, target)
        if folder is None:
            continue
        contender = f"{target} {precision}"
        with run.results.case("encoders", "load", model=name, contender=contender):
            seconds = run.side(target).call(
                contenders.load_encoder, contender, folder, sizes.encoder.vocabulary, seconds=LOAD_S
            )
            run.results.add(_opened(name, contender, seconds))
            found.append(
                _Contender(
                    contender,
                    target,
                    contenders.time_encoder,
                    sizes.shapes,
                    weight=1 if precision.startswith("int8") else 2,
                    integer=precision == "int8",
                )
            )
    return found


def _opened(model: str, contender: str, seconds: float) -> Row:
    return Row(part="encoders", case="open", model=model, contender=contender, value=seconds, unit="s")


def _timed(run: Run, model: str, contender: _Contender, shape: Shape, *, counts: bool) -> bool:
    """One block of each way; False when this contender is out."""
    seconds = run.settings.block if counts else 0.0
    for way in tuple(contender.ways):
        with run.results.case("encoders", label(shape), model=model, contender=contender.name) as outcome:
            times = run.side(contender.side).call(
                contender.time, contender.name, way, shape, seconds, seconds=LOAD_S
            )
            if counts:
                contender.times.setdefault((shape, way), []).extend(times)
        if outcome.status == "skipped":  # it has no such way, and says so once
            contender.ways.remove(way)
        elif outcome.status == "failed":
            return False
    return True


def _report(run: Run, model: str, contender: _Contender) -> None:
    size = run.settings.sizes.encoder
    for (shape, way), times in contender.times.items():
        least = run.ceilings.seconds(
            operations=size.products(*shape),
            moved=size.weight_bytes(contender.weight),
            integer=contender.integer,
        )
        value, spread = summary(times, 1e3)
        run.results.add(
            Row(
                part="encoders",
                case=label(shape),
                model=model,
                contender=contender.name,
                way=way,
                value=value,
                unit="ms",
                limit=None if least is None else 1e3 * least,
                spread=spread,
                runs=len(times),
                note=contender.note,
            )
        )


def label(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"
