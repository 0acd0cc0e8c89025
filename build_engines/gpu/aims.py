"""What the figures of a run are to reach, and whether they did: by the worst case, never by a mean.

A figure counts for the fastest engine of its case, since that is the one to serve.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from build_engines.gpu.baselines import COMPILED, EAGER
from build_engines.gpu.results import Part, Results, Row

# Rows of memory that are judged here.
PEAK: Final = "most at any time"
WHOLE: Final = "whole stack"
_SMALL_BATCH: Final = 8
_TIMES: Final = {"ms", "us", "s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """`bound`: whether figures must be at least or at most as `wanted`.

    `worst`: the figure that is furthest from that, and `where` it is; None where nothing was measured.
    """

    what: str
    bound: Literal["at least", "at most"]
    wanted: float
    worst: float | None = None
    where: str = ""
    met: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(results: Results) -> list[Aim]:
    """Every aim, in the order of the report."""
    encoders, decoders = _fastest(results, "encoders"), _fastest(results, "decoders")
    steps = [row for row in decoders if row.case.startswith("decode")]
    small = [row for row in encoders if _batch(row) <= _SMALL_BATCH]
    return [
        _least("encoders at small batch, x torch fp16", 3.0, small, _multiple_of(results, EAGER)),
        _least("encoders, x torch fp16 compiled", 1.3, encoders, _multiple_of(results, COMPILED)),
        _least("LLM decoding, of limit", 0.65, [row for row in steps if row.way == "device"], _share),
        _least("LLM decoding, x torch fp16", 2.0, steps, _multiple_of(results, EAGER)),
        _least("served, of the bare engine", 0.8, _busiest(results), _share),
        _planned(results),
        _fits(results),
    ]


def multiple(row: Row, base: Row | None) -> float | None:
    """How many times as fast as `base`."""
    if base is None or not base.value or not row.value:
        return None
    return base.value / row.value if row.unit in _TIMES else row.value / base.value


def _least(what: str, wanted: float, rows: Iterable[Row], figure: Callable[[Row], float | None]) -> Aim:
    found = [(value, row) for row in rows if (value := figure(row)) is not None]
    aim = Aim(what=what, bound="at least", wanted=wanted)
    if not found:
        return aim
    worst, row = min(found, key=lambda pair: pair[0])
    return replace(aim, worst=worst, where=_where(row), met=worst >= wanted)


def _planned(results: Results) -> Aim:
    """No engine takes a tenth more or less than the plan promised for it and its context."""
    aim = Aim(what="memory of an engine, off its plan", bound="at most", wanted=0.1)
    rows = [row for row in results.measured("memory") if row.case == PEAK and row.share is not None]
    if not rows:
        return aim
    off, row = max(((abs((row.share or 0.0) - 1), row) for row in rows), key=lambda pair: pair[0])
    return replace(aim, worst=off, where=_where(row), met=off <= aim.wanted)


def _fits(results: Results) -> Aim:
    """The stack that the plan let through is open as a whole in what the planned card has."""
    aim = Aim(what="engines that do not open beside the others", bound="at most", wanted=0)
    rows = [row for row in results.rows if row.part == "memory" and row.case in {"opened", WHOLE}]
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        return replace(aim, worst=len(failed), where=_where(failed[0]), met=False)
    if any(row.status == "measured" for row in rows):
        return replace(aim, worst=0, met=True)
    return aim


def _fastest(results: Results, part: Part) -> list[Row]:
    """Of each model, case and way the fastest engine's row."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in results.measured(part):
        key = (row.model, row.case, row.way)
        faster = key not in best or (multiple(row, best[key]) or 0) > 1
        if row.way and row.contender not in {EAGER, COMPILED} and faster:
            best[key] = row
    return list(best.values())


def _busiest(results: Results) -> list[Row]:
    """Of each served engine the load at which it comes closest to what it can."""
    best: dict[tuple[str, str], Row] = {}
    for row in results.measured("served"):
        key = (row.model, row.contender)
        if row.share is not None and row.share > ((best[key].share if key in best else None) or 0):
            best[key] = row
    return list(best.values())


def _multiple_of(results: Results, contender: str) -> Callable[[Row], float | None]:
    known = {
        (row.part, row.model, row.case, row.way): row
        for row in results.measured()
        if row.contender == contender
    }
    return lambda row: multiple(row, known.get((row.part, row.model, row.case, row.way)))


def _share(row: Row) -> float | None:
    return row.share


def _batch(row: Row) -> int:
    found = re.match(r"\d+", row.case)
    return int(found[0]) if found else _SMALL_BATCH + 1


def _where(row: Row) -> str:
    return ", ".join(part for part in (row.model, row.contender, row.case, row.way) if part)
