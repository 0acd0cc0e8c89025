"""Figures of records and samples, the promises that they are held to, and how both are shown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from load_generator import ANSWERED, REJECTED, Record

from build_engines.atomic import write_text
from client.bench import machine
from client.bench.loadgen import percentile

OUT = Path("build/reliability")


@dataclass(frozen=True, slots=True)
class Promise:
    """One line of the list: what was promised, what was measured, whether that is enough."""

    promised: str
    measured: str
    kept: bool


@dataclass(slots=True)
class Report:
    """Figures and promises of one run; `finish` prints and writes them, and fails on a broken promise."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    promises: list[Promise] = field(default_factory=list)

    def hold(self, promised: str, measured: str, kept: bool) -> None:
        self.promises.append(Promise(promised, measured, bool(kept)))

    def finish(self) -> None:
        document = {"machine": machine.describe("", None), **self.figures}
        document["promises"] = [asdict(promise) for promise in self.promises]
        OUT.mkdir(parents=True, exist_ok=True)
        write_text(OUT / f"{self.name}.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        rows = [("kept" if held.kept else "BROKEN", held.promised, held.measured) for held in self.promises]
        print_table(("", "promised", "measured"), rows)
        print(f"  {OUT / self.name}.json has every figure")
        broken = [f"{held.promised}: {held.measured}" for held in self.promises if not held.kept]
        assert not broken, "\n".join(broken)


def milliseconds(values: Iterable[float], share: float) -> float:
    """A percentile of times in seconds; 0 where there are none."""
    ordered = sorted(values)
    return percentile(ordered, share) * 1e3 if ordered else 0.0


def outcomes(records: Iterable[Record]) -> Counter[str]:
    return Counter(record.outcome for record in records)


def lost(records: Sequence[Record]) -> float:
    """The share that was rejected."""
    return sum(record.outcome.startswith(REJECTED) for record in records) / max(1, len(records))


def work_rate(records: Iterable[Record], work: Callable[[Record], int], begin: float, end: float) -> float:
    """Work per second of the requests that were answered between two times since the run's start."""
    answered = (record for record in records if record.outcome == ANSWERED)
    return sum(work(r) for r in answered if begin <= r.at + r.done < end) / (end - begin)


@dataclass(frozen=True, slots=True)
class Trend:
    """A series over time. `spread`: how far the values are from their median at most, as a share of it;
    `drift`: how much the straight line through them rises from its beginning to its end, as a share too."""

    median: float
    spread: float
    drift: float
    per_hour: float


def trend(times: Sequence[float], values: Sequence[float]) -> Trend:
    moments, found = np.asarray(times), np.asarray(values, float)
    median = float(np.median(found))
    slope = float(np.polyfit(moments - moments[0], found, 1)[0]) if len(found) > 1 else 0.0
    scale = median or 1.0
    spread = float(np.abs(found - median).max()) / scale
    return Trend(median, spread, slope * float(moments[-1] - moments[0]) / scale, slope * 3600)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    print()
    for row in (head, *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def rounded(values: Mapping[str, float], digits: int = 3) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}
