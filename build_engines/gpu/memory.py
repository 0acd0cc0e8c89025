"""Memory: what the plan promised against what the card's driver counts, with the whole stack in 16 GB.

Every engine is opened in a process of its own, as Triton does, and measured from outside. On a larger card a
ballast takes what the planned card does not have, so that everything must live in what is left.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from build_engines import nvidia
from build_engines.cards import MIB
from build_engines.gpu import contenders
from build_engines.gpu.aims import PEAK, WHOLE
from build_engines.gpu.models import LLM
from build_engines.gpu.results import Clock, Failed, Row, Skipped
from build_engines.gpu.settings import Run
from build_engines.gpu.sides import Side

_OPEN_S: Final = 120.0
_SAMPLE_S: Final = 0.01
_SETTLE_S: Final = 0.3  # the driver gives a finished process's memory back a little later

Used = Callable[[], int]


@dataclass(slots=True)
class _Opened:
    """One engine on the card: its process, and bytes by part."""

    model: str
    contender: str
    folder: Path
    side: Side
    planned: dict[str, int]
    measured: dict[str, int] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)  # of "engine", what it allocated itself


def measure_memory(run: Run, targets: Sequence[str], clock: Clock, used: Used | None = None) -> None:
    """Rows of planned and measured MiB for every engine of the first target that has any, and their sum.

    `used`: bytes of the card that are taken now; by default the driver's count.
    """
    folders = _folders(run, targets)
    with run.results.case("memory", WHOLE) as outcome:
        if not folders:
            raise Skipped("no engine was built")
        used = used or _driver_count(run)
        before = used()
    if not outcome.measured or used is None:
        return
    run.drop_all()
    opened: list[_Opened] = []
    try:
        _hold_ballast(run, clock)
        start = used()
        for folder in folders:
            if one := _open(run, folder, used, clock):
                opened.append(one)
        if opened:
            with run.results.case("memory", WHOLE):
                _run_all(run, opened, used, start, whole=len(opened) == len(folders))
    finally:
        for one in opened:
            run.drop(one.side.name)
        run.drop("ballast")
    time.sleep(_SETTLE_S)
    run.results.facts["memory left behind, MiB"] = round((used() - before) / MIB, 1)


def _folders(run: Run, targets: Sequence[str]) -> list[Path]:
    for target in targets:
        if found := sorted(run.engines_folder.glob(f"*/*/{target}/manifest.json")):
            return [path.parent for path in found]
    return []


def _driver_count(run: Run) -> Used:
    if run.card is None:
        raise Skipped("there is no GPU whose driver could count")
    try:
        count = run.sides.enter_context(nvidia.counting(run.card))
        count()
    except nvidia.NoGpu as reason:
        raise Skipped(str(reason)) from None

    def used() -> int:
        free, total = count()
        return total - free

    return used


def _hold_ballast(run: Run, clock: Clock) -> None:
    """Take all but what the smaller card leaves to engines, where this card has more."""
    card_mib = run.settings.memory_mib
    if run.card is None or run.card.total_bytes <= card_mib * MIB:
        return
    budget = (card_mib - (run.stack.reserve_mib if run.stack else 0)) * MIB
    with run.results.case("memory", "ballast", contender=f"all but {card_mib:,} MiB"):
        held, left = run.side("ballast").call(hold, budget, seconds=clock.need())
        run.results.add(
            Row(
                part="memory",
                case="ballast",
                contender=f"all but {card_mib:,} MiB",
                value=held / MIB,
                unit="MiB",
                note=f"leaves {left / MIB:,.0f} MiB to the stack",
            )
        )


def _open(run: Run, folder: Path, used: Used, clock: Clock) -> _Opened | None:
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    model, contender = manifest["model"], f"{manifest['target']} {manifest['precision']}"
    side = run.side(f"memory-{model}-{manifest['precision']}")
    one = _Opened(model, contender, folder, side, dict(manifest.get("memory") or {}))
    with run.results.case("memory", "opened", model=model, contender=contender) as outcome:
        before = used()
        side.call(touch, manifest["target"], seconds=clock.need())
        context = used()
        with peak(used) as most:
            one.taken = side.call(open_and_run, folder, model == LLM, seconds=_OPEN_S)
        one.measured = {"context": context - before, "engine": used() - context, "peak": most[0] - before}
        _report(run, one)
    return one if outcome.measured else None


def _report(run: Run, one: _Opened) -> None:
    """The engine as a whole, and its parts as far as it took them itself; the rest of it is weights."""
    plan, measured = one.planned, {**one.measured, **one.taken}
    if one.taken:
        measured["weights"] = one.measured["engine"] - sum(one.taken.values())
    sums = {"engine": _ENGINE, "peak": (*_ENGINE, "context")}
    for part, name in _NAMES.items():
        if part not in measured:
            continue
        promised = [plan.get(each, 0) for each in sums.get(part, (part,))]
        note = "" if plan else _UNPLANNED
        run.results.add(
            _row(name, one.model, one.contender, measured[part], sum(promised) if plan else None, note)
        )


_ENGINE: Final = ("weights", "activations", "buffers", "cache")
_NAMES: Final = {
    "context": "CUDA context",
    "weights": "weights, and what the library keeps",
    "activations": "activations",
    "buffers": "buffers",
    "cache": "KV cache",
    "engine": "weights, activations, buffers, cache",
    "peak": PEAK,
}
_UNPLANNED: Final = "the manifest has no plan"


def _row(case: str, model: str, contender: str, size: int, planned: int | None, note: str = "") -> Row:
    return Row(
        part="memory",
        case=case,
        model=model,
        contender=contender,
        value=size / MIB,
        unit="MiB",
        limit=None if planned is None else planned / MIB,
        note=note,
    )


def _run_all(run: Run, opened: Sequence[_Opened], used: Used, start: int, *, whole: bool) -> None:
    """Every engine once more at its largest, while all others are open."""
    with peak(used) as most:
        for one in opened:
            one.side.call(run_largest, seconds=_OPEN_S)
    planned = sum(sum(one.planned.get(part, 0) for part in (*_ENGINE, "context")) for one in opened)
    note = f"{len(opened)} engines open at once" + ("" if whole else "; the others did not open")
    run.results.add(_row(WHOLE, "", "all engines", most[0] - start, planned or None, note))
    if not whole:
        raise Failed("not every engine of the stack could be opened beside the others")


@contextmanager
def peak(used: Used) -> Iterator[list[int]]:
    """The largest value of `used` meanwhile, in a list of one; sampled every 10 ms."""
    most, stop = [used()], threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_S):
            most[0] = max(most[0], used())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()
        most[0] = max(most[0], used())


# --- in the side processes --------------------------------------------------------------------------------

_kept: dict[str, Any] = {}


def hold(leave: int, api: Any = None) -> tuple[int, int]:
    """Allocate all of the GPU but `leave` bytes until this process ends; returns bytes held and left."""
    from triton_repo.runtime.gpu.cuda import Device

    device = _kept["device"] = Device(api=api)
    free, _ = device.memory()
    size = max(0, free - leave)
    if size:
        _kept["ballast"] = device.array((size,), "uint8", "ballast")
    return size, device.memory()[0]


def touch(target: str) -> None:
    """Load the target's libraries and make the CUDA context, so that it is counted apart from the engine."""
    if target == "onnxruntime":
        return
    from triton_repo.runtime.gpu.cuda import Device

    device = _kept["device"] = Device()
    device.synchronize()


def open_and_run(folder: Path, generates: bool) -> dict[str, int]:
    """Open the engine as it is served, and run it at its largest; what it took itself, by purpose."""
    if generates:
        contenders.load_decoder("engine", folder)
    else:
        contenders.load_encoder("engine", folder, 2)
    run_largest()
    return contenders.taken("engine")


def run_largest() -> None:
    """The largest batch of the largest length, or a whole chunk and then a step of all slots."""
    contenders.run_largest("engine")
