"""The run as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from ..display import new_table
from . import generate_table

NAMES = {
    "accuracy": "accuracy",
    "agreement": "agreement with FP32",
    "mean_cosine": "mean cosine to FP32",
    "min_cosine": "min cosine to FP32",
    "ndcg10": "nDCG@10",
    "spearman": "Spearman with FP32",
}


BUSY = 0.2


def print_report(document: dict[str, Any], console: Console) -> None:
    machine = document["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"tritonserver {machine['tritonserver']}; server, clients and baseline on this machine",
        highlight=False,
    )
    if is_busy(machine):
        console.print(f"[yellow]{busy_warning(machine)}[/]", highlight=False)
    for name, model in document["models"].items():
        if model["task"] == "generate":
            generate_table.print_model(name, model, console)
        else:
            print_model(name, model, console)
    memory = document["server_memory_mb"]
    if memory is not None:
        console.print(f"server's processes together: {memory:,.0f} MiB resident", highlight=False)


def is_busy(machine: dict[str, Any]) -> bool:
    """Whether something else was running when the run began."""
    return (machine["busy_before"] or 0.0) > BUSY


def busy_warning(machine: dict[str, Any]) -> str:
    share = machine["busy_before"]
    return (
        f"The machine was {share:.0%} busy before the run: these figures are not to be compared with others."
    )


def print_model(name: str, model: dict[str, Any], console: Console) -> None:
    texts = model["texts"]
    console.print()
    console.print(
        f"[bold]{escape(name)}[/] ({model['task']}), {model['unit']} of {texts['tokens_mean']:g} tokens "
        f"on average, at most {texts['tokens_max']}",
        highlight=False,
    )
    table = new_table("", "how")
    for title in (f"{model['unit']}/s", "p50 ms", "p90 ms", "p99 ms", "batch", "x FP32", "x BF16"):
        table.add_column(title, justify="right")
    for precision, speed in model["baseline"].items():
        for how, key in (("one by one", "one_by_one_per_s"), ("batch 32", "batch32_per_s")):
            row = [f"Transformers {precision}", how, _rate(speed[key]), "", "", "", ""]
            table.add_row(*row, *_speedups(speed[key], model, one=key.startswith("one")))
    for precision, points in model["served"].items():
        for concurrency, point in points.items():
            one = concurrency == "1"
            table.add_row(
                f"[bold]served {precision}[/]",
                f"{concurrency} concurrent",
                *_point(point),
                *_speedups(point["per_s"], model, one=one),
            )
        for percent, point in model["open_loop"][precision].items():
            table.add_row(f"[bold]served {precision}[/]", f"open loop, {percent}%", *_point(point), "", "")
    console.print(table)
    print_details(model, console)


def print_details(model: dict[str, Any], console: Console) -> None:
    """Accuracy, memory, cache and ceiling: one line for each side."""
    for side, figures in model["accuracy"].items():
        shown = [f"{NAMES[key]} {value:.4f}" for key, value in figures.items() if value is not None]
        kind, memory = ("baseline", "fp32") if side == "baseline_fp32" else ("served", side)
        mib = model["memory_mb"][kind].get(memory)
        shown += [f"{mib:,.0f} MiB resident"] if mib is not None else []
        cached = model["cached_p50_ms"].get(side)
        shown += [f"cached answer {cached:.2f} ms"] if cached is not None else []
        padding = model["served_padding"].get(side)
        shown += [f"padding {padding:.0%} of what was computed"] if padding is not None else []
        ceiling = model["ceiling_per_s"].get(side)
        if ceiling:
            peak = max(point["per_s"] for point in model["served"][side].values())
            shown.append(f"engine alone {ceiling:,.0f}/s, served {peak / ceiling:.0%} of it")
        label = "Transformers fp32" if side == "baseline_fp32" else f"served {side}"
        console.print(f"  {label}: {', '.join(shown)}", highlight=False)
    console.print(
        "  x: against the baseline's batch 32; one by one and 1 concurrent against its one by one.\n"
        "  Every request is distinct: no cached answer is counted.",
        style="dim",
        highlight=False,
    )


def _point(point: dict[str, Any]) -> list[str]:
    batch = "" if point["mean_batch"] is None else f"{point['mean_batch']:.1f}"
    rate = _rate(point["per_s"]) + (f" ({point['rejected']} rejected)" if point["rejected"] else "")
    return [rate, *(f"{point[key]:.1f}" for key in ("p50_ms", "p90_ms", "p99_ms")), batch]


def _speedups(rate: float, model: dict[str, Any], *, one: bool) -> list[str]:
    key = "one_by_one_per_s" if one else "batch32_per_s"
    return [f"{rate / model['baseline'][precision][key]:.2f}" for precision in ("fp32", "bf16")]


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
