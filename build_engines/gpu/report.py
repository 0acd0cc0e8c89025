"""The run as tables for people and as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from build_engines.gpu.aims import Aim, judge, multiple
from build_engines.gpu.baselines import COMPILED, EAGER
from build_engines.gpu.results import Results, Row

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_TITLES: Final = {
    "encoders": "Encoders, one batch of full rows",
    "decoders": "LLM, in process",
    "served": "Served through Triton (limit: the bare engine)",
}


def document(results: Results) -> dict[str, Any]:
    """Everything, for machines."""
    return {
        "format": 1,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **results.facts,
        "aims": [aim.as_dict() for aim in judge(results)],
        "rows": [row.as_dict() for row in results.rows],
    }


def write_files(results: Results, folder: Path, name: str = "bench") -> tuple[Path, Path]:
    """`folder`/<name>.json and the same tables as <name>.txt; returns both paths."""
    from rich.console import Console

    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}.json", folder / f"{name}.txt"
    aside = paths[0].with_suffix(".part")
    aside.write_text(json.dumps(document(results), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    aside.replace(paths[0])
    with paths[1].open("w", encoding="utf-8") as file:
        Console(file=file, width=160, highlight=False).print(render(results))
    return paths


def render(results: Results) -> RenderableType:
    """All tables: machine, ceilings, figures, memory, and what could not be measured with the reason."""
    from rich.console import Group

    parts: list[RenderableType] = [_machine(results.facts)]
    aims = judge(results)
    if any(aim.met is not None for aim in aims):
        parts.append(_aims(aims))
    if rows := results.measured("ceilings"):
        parts.append(_ceilings(rows))
    for part, title in _TITLES.items():
        if rows := results.measured(part):  # type: ignore[arg-type]
            parts += _figures(title, rows)
    if rows := results.measured("memory"):
        parts.append(_memory(rows))
    if rows := results.measured("build"):
        parts.append(_builds(rows))
    if rows := [row for row in results.rows if row.status != "measured"]:
        parts.append(_missing(rows))
    return Group(*parts)


def _machine(facts: dict[str, Any]) -> str:
    gpu = facts.get("gpu")
    if gpu:
        shown = (
            f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"{gpu['total_bytes'] / 2**20:,.0f} MiB, driver {gpu['driver']} (CUDA {gpu['driver_cuda']})"
        )
    else:
        shown = f"no GPU: {facts.get('no_gpu') or 'not asked for'}"
    packages = ", ".join(f"{name} {found}" for name, found in facts.get("packages", {}).items())
    missing = ", ".join(facts.get("missing", ())) or "nothing"
    return (
        f"{shown}\n{facts.get('cpu')}, {facts.get('cores')} cores, Python {facts.get('python')}\n"
        f"{packages}\nnot installed: {missing}; C compiler: {facts.get('c_compiler') or 'none'}"
    )


def _table(title: str, columns: Sequence[tuple[str, bool]]) -> Table:
    """`columns`: heading, and whether it holds numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading, is_number in columns:
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number)
    return table


def _aims(aims: Sequence[Aim]) -> Table:
    headings = [("aim", False), ("wanted", True), ("worst", True), ("met", False), ("where", False)]
    table = _table("What was aimed at", headings)
    for aim in aims:
        met = {None: "not measured", True: "yes", False: "NO"}[aim.met]
        table.add_row(aim.what, f"{aim.bound} {number(aim.wanted)}", number(aim.worst), met, aim.where)
    return table


def _ceilings(rows: Sequence[Row]) -> Table:
    table = _table(
        "What this card can do, measured in this run",
        [("what", False), ("median", True), ("10 to 90%", True)],
    )
    for row in rows:
        table.add_row(row.case, f"{number(row.value)} {row.unit}", _spread(row))
    return table


def _figures(title: str, rows: Sequence[Row]) -> Iterator[Table]:
    """A table for each model: multiples of the baseline at the same case and way, share of the limit."""
    headings = [("what", False), ("contender", False), ("way", False), ("median", True), ("10 to 90%", True)]
    headings += [("x torch", True), ("x compiled", True), ("of limit", True), ("", False)]
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        table = _table(f"{title}: {model}", headings)
        known = {(row.case, row.way, row.contender): row for row in own}
        cases = list(dict.fromkeys(row.case for row in own))
        last = ""
        for row in sorted(own, key=lambda row: (cases.index(row.case), row.way)):
            if last and last != row.case:
                table.add_section()
            bases = [known.get((row.case, row.way, base)) for base in (EAGER, COMPILED)]
            table.add_row(
                "" if row.case == last else row.case,
                row.contender,
                row.way,
                f"{number(row.value)} {row.unit}",
                _spread(row),
                *(_multiple(row, base) for base in bases),
                "" if row.share is None else f"{row.share:.0%}",
                row.note,
            )
            last = row.case
        yield table


def _multiple(row: Row, base: Row | None) -> str:
    ratio = multiple(row, base)
    return "" if ratio is None else f"{ratio:.2f}"


def _memory(rows: Sequence[Row]) -> Table:
    headings = [("model", False), ("engine", False), ("what", False), ("measured MiB", True)]
    table = _table("Memory of the card", [*headings, ("planned MiB", True), ("of plan", True), ("", False)])
    for row in rows:
        planned = "" if row.limit is None else f"{row.limit:,.0f}"
        share = "" if row.share is None else f"{row.share:.0%}"
        measured = f"{row.value or 0.0:,.0f}"
        table.add_row(row.model, row.contender, row.case, measured, planned, share, row.note)
    return table


def _builds(rows: Sequence[Row]) -> Table:
    table = _table(
        "Engines built",
        [("model", False), ("target", False), ("precision", False), ("seconds", True), ("", False)],
    )
    for row in rows:
        table.add_row(row.model, row.contender, row.case, f"{row.value or 0.0:.1f}", row.note)
    return table


def _missing(rows: Iterable[Row]) -> Table:
    headings = ("part", "model", "contender", "what", "", "why")
    table = _table("Not measured", [(heading, False) for heading in headings])
    # What is missing is missing for all cases of a contender: one line.
    together: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        key = (row.part, row.model, row.contender, row.status, row.reason)
        together.setdefault(key, []).append(row.case)
    for (part, model, contender, status, reason), cases in together.items():
        table.add_row(part, model, contender, ", ".join(cases), status, reason)
    return table


def _spread(row: Row) -> str:
    return "" if row.spread is None else f"{number(row.spread[0])} - {number(row.spread[1])}"


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
