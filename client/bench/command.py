"""`client bench`: the order of the run, and the document it ends in."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np

from .. import display
from ..client import Client
from ..errors import BenchError
from ..transport import Endpoint
from ..types import ServerStatus
from . import generate_command, machine, metrics, scoring, table
from .baseline import NEEDS, Answers, Baseline
from .generate_baseline import NEEDS as GENERATE_NEEDS
from .generate_baseline import GenerateBaseline
from .generate_data import BenchGenerator, read_generators
from .process import check_installed
from .served import FULL, QUICK, Plan, ServedPoint, Variant
from .summary import BenchModel, Item, read_summary
from .workload import choose_pool, unit_name, units

BASELINES = ("fp32", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every measurement of the run needs."""

    client: Client
    address: str
    plan: Plan
    ceilings: dict[tuple[str, str], float]
    pids: Sequence[int]


def run(summary: Path, settings: dict[str, Any]) -> None:
    """Measure every model of the summary, print tables, write files if asked, end with one JSON line."""
    models = read_summary(summary, settings["models"])
    generators = read_generators(summary, settings["models"])
    ceilings = parse_ceilings(settings["ceilings"], models)
    output: Path | None = settings["output"]
    check_installed(NEEDS if models else GENERATE_NEEDS)
    if output is not None and find_spec("matplotlib") is None:
        raise BenchError("the report needs matplotlib", next_step="pip install 'onecard[bench]' installs it")
    plan = make_plan(settings)
    endpoint = Endpoint.parse(settings["url"], "grpc")
    if endpoint.tls:
        raise BenchError("the load generator speaks plain gRPC", next_step="measure beside the server")
    with Client(endpoint.url, timeout=120) as client:
        status = client.status()
        busy = machine.busy_share()
        check_served((*models, *generators), status, summary)
        context = Context(
            client=client, address=endpoint.address, plan=plan, ceilings=ceilings, pids=server_pids()
        )
        measured: dict[str, Any] = {}
        if models:
            with Baseline(plan.seconds) as baseline:
                measured |= {model.name: measure(model, baseline, context) for model in models}
        if generators:
            measured |= measure_generators(generators, context, settings)
        document = {
            "machine": machine.describe(status.version, busy),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["client", *sys.argv[1:]]),
            "seconds_per_point": plan.seconds,
            "server_memory_mb": round(machine.tree_resident_mib(context.pids), 1) if context.pids else None,
            "models": measured,
        }
    table.print_report(document, display.new_console())
    if output is not None:
        write_files(document, output)
    click.echo(json.dumps(document, ensure_ascii=False))


def measure_generators(
    generators: Sequence[BenchGenerator], context: Context, settings: dict[str, Any]
) -> dict[str, Any]:
    plan = generate_command.make_plan(settings)
    with GenerateBaseline(plan.baseline_seconds, plan.baseline_limit) as baseline:
        return {
            model.name: generate_command.measure(model, baseline, plan, context.address, context.pids, _say)
            for model in generators
        }


def make_plan(settings: dict[str, Any]) -> Plan:
    plan = QUICK if settings["quick"] else FULL
    if settings["seconds"]:
        plan = replace(plan, seconds=settings["seconds"])
    return replace(plan, rates=tuple(settings["rates"])) if settings["rates"] else plan


def parse_ceilings(given: Sequence[str], models: Sequence[BenchModel]) -> dict[tuple[str, str], float]:
    """From MODEL:PRECISION=PER_S; naming a model or precision that is not measured is an error."""
    ceilings = {}
    known = {(model.name, precision) for model in models for precision in model.variants}
    for text in given:
        name, _, value = text.partition("=")
        model, _, precision = name.partition(":")
        try:
            rate = float(value)
        except ValueError:
            rate = 0.0
        if not 0 < rate < float("inf") or (model, precision) not in known:
            raise BenchError(f"--ceiling {text}: write MODEL:PRECISION=PER_S for a model of the summary")
        ceilings[model, precision] = rate
    return ceilings


def check_served(models: Sequence[BenchModel | BenchGenerator], status: ServerStatus, summary: Path) -> None:
    loaded = {model.name for model in status.models}
    for model in models:
        for name in model.variants.values():
            if name not in loaded:
                raise BenchError(
                    f"the server at {status.url} has no model {name}, which {summary} lists",
                    next_step="serve the repository that lies beside the summary",
                )


def server_pids() -> list[int]:
    """The server's process tree, when ONECARD_SERVER_PID tells where it starts and it is on this machine."""
    text = os.environ.get("ONECARD_SERVER_PID", "")
    if not text.isdigit() or machine.resident_mib(int(text)) is None:
        return []
    return machine.process_tree(int(text))


def measure(model: BenchModel, baseline: Baseline, context: Context) -> dict[str, Any]:
    """One model: baseline first, then each served variant, minutes apart at most."""
    model = replace(model, items=tuple(choose_pool(model.items, context.plan.evaluated)))
    _say(f"{model.name}: FP32 answers on {len(model.items)} evaluation items")
    answers = baseline.answers(model)
    items, answers = fitting(model, answers)
    pool = choose_pool(items, context.plan.pool)
    speeds = {}
    for precision in BASELINES:
        _say(f"{model.name}: baseline {precision}")
        speeds[precision] = baseline.measure(model, precision, pool)
    served, opened, accuracy, memory, cached, padding = {}, {}, {}, {}, {}, {}
    per_request = units(model, pool)
    for precision, name in model.variants.items():
        _say(f"{model.name}: served {precision}")
        variant = Variant(context.client, context.address, model, name)
        counted = metrics.read()
        load = variant.load(pool, context.plan)
        padding[precision] = metrics.padding_share(name, counted, metrics.read())
        accuracy[precision] = scoring.score(model, items, answers, variant.answers(items))
        served[precision] = {str(n): point_json(p, per_request) for n, p in load.closed.items()}
        opened[precision] = {f"{percent:g}": point_json(p, per_request) for percent, p in load.open.items()}
        cached[precision] = load.cached_p50_ms
        pids = machine.model_pids(context.pids, name)
        memory[precision] = round(machine.tree_resident_mib(pids), 1) if pids else None
    return {
        "task": model.task,
        "unit": unit_name(model),
        "units_per_request": round(per_request, 3),
        "texts": text_figures(answers, pool),
        "baseline": {
            precision: {
                "one_by_one_per_s": round(speed.one_by_one_per_s, 2),
                "batch32_per_s": round(speed.batch32_per_s, 2),
            }
            for precision, speed in speeds.items()
        },
        "served": served,
        "open_loop": opened,
        "cached_p50_ms": rounded(cached, 3),
        "served_padding": rounded(padding, 3),
        "ceiling_per_s": {p: context.ceilings.get((model.name, p)) for p in model.variants},
        "accuracy": {"baseline_fp32": scoring.baseline_score(model, items, answers), **accuracy},
        "memory_mb": {
            "served": memory,
            "baseline": {precision: round(speed.memory_mib, 1) for precision, speed in speeds.items()},
        },
        "ratios": ratios(speeds, served),
    }


def fitting(model: BenchModel, answers: Answers) -> tuple[list[Item], Answers]:
    """The items a model that refuses long texts will take, with their answers; all items for the others."""
    if model.overflow != "refuse":
        return list(model.items), answers
    short = answers.tokens <= model.max_length
    sizes = [len(item.passages) or 1 for item in model.items]
    ends = np.cumsum(sizes)
    keep = [bool(short[end - size : end].all()) for size, end in zip(sizes, ends, strict=True)]
    if not any(keep):
        raise BenchError(f"every evaluation text is longer than {model.max_length} tokens", model=model.name)
    rows = np.repeat(keep, sizes)
    kept = replace(answers, values=answers.values[rows], tokens=answers.tokens[rows])
    return [item for item, fits in zip(model.items, keep, strict=True) if fits], kept


def text_figures(answers: Answers, pool: Sequence[Item]) -> dict[str, Any]:
    tokens = answers.tokens
    return {
        "pool": len(pool),
        "evaluated": len(tokens),
        "tokens_mean": round(float(tokens.mean()), 1),
        "tokens_p50": int(np.percentile(tokens, 50)),
        "tokens_max": int(tokens.max()),
        "padding_unsorted": round(scoring.padding(tokens.tolist(), 32), 3),
        "padding_sorted": round(scoring.padding(sorted(tokens.tolist()), 32), 3),
    }


def point_json(measured: ServedPoint, per_request: float) -> dict[str, Any]:
    """Rates in units per second (texts or passages), latencies per request in ms."""
    point = measured.point
    values: dict[str, Any] = {
        "per_s": round(point.per_s * per_request, 2),
        "p50_ms": round(point.p50_ms, 3),
        "p90_ms": round(point.p90_ms, 3),
        "p99_ms": round(point.p99_ms, 3),
        "requests": point.requests,
        "rejected": point.rejected,
        "mean_batch": None if measured.mean_batch is None else round(measured.mean_batch, 2),
    }
    if point.offered_per_s is not None:
        values["offered_per_s"] = round(point.offered_per_s * per_request, 2)
        values["generator_late_p99_ms"] = round(point.late_p99_ms or 0.0, 3)
    return values


def rounded(values: dict[str, float | None], digits: int) -> dict[str, float | None]:
    return {name: None if value is None else round(value, digits) for name, value in values.items()}


def ratios(speeds: dict[str, Any], served: dict[str, Any]) -> dict[str, Any]:
    """What the table's last columns say, for machines."""
    return {
        precision: {
            "at_32_over_fp32_batch32": round(points["32"]["per_s"] / speeds["fp32"].batch32_per_s, 3),
            "at_32_over_bf16_batch32": round(points["32"]["per_s"] / speeds["bf16"].batch32_per_s, 3),
            "at_1_over_fp32_one_by_one": round(points["1"]["per_s"] / speeds["fp32"].one_by_one_per_s, 3),
            "at_1_over_bf16_one_by_one": round(points["1"]["per_s"] / speeds["bf16"].one_by_one_per_s, 3),
            "p99_over_p50_at_8": round(points["8"]["p99_ms"] / points["8"]["p50_ms"], 3),
        }
        for precision, points in served.items()
    }


def write_files(document: dict[str, Any], output: Path) -> None:
    from .report import render

    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("bench.json", json.dumps(document, ensure_ascii=False) + "\n"),
            ("report.html", render(document)),
        ):
            aside = output / f".{name}.part"
            aside.write_text(text, "utf-8")
            aside.replace(output / name)
    except OSError as error:
        raise BenchError(f"{output}: cannot be written ({error.strerror})") from error
    click.echo(f"wrote {output / 'bench.json'} and {output / 'report.html'}", err=True)


def _say(text: str) -> None:
    click.echo(text, err=True)
