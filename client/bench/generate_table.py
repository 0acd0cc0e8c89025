"""A generating model's measurement as a table and as lines for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from ..display import new_table

LARGEST = 8  # batch of the baseline
Row = tuple[str, str, dict[str, Any]]


def rows(model: dict[str, Any]) -> list[Row]:
    """Who, how, and the figures, for the table and for the page; keys that a row lacks are left empty."""
    found: list[Row] = []
    for precision, points in model["baseline"].items():
        for size, point in points.items():
            how = "one by one" if size == "1" else f"batch {size}"
            figures = {"tokens_per_s": point["tokens_per_s"], "first_token_p50_ms": point["first_token_ms"]}
            found.append((f"Transformers {precision}", how, figures))
    for precision, points in model["served"].items():
        for count, point in points.items():
            found.append((f"served {precision}", "1 stream" if count == "1" else f"{count} streams", point))
        for percent, point in model["open_loop"][precision].items():
            found.append((f"served {precision}", f"open loop, {percent}%", point))
    return found


def print_model(name: str, model: dict[str, Any], console: Console) -> None:
    """The model's table, and what else was measured."""
    prompts = model["prompts"]
    console.print()
    console.print(
        f"[bold]{escape(name)}[/] (generate), prompts of {prompts['tokens_mean']:g} tokens on average, "
        f"at most {prompts['tokens_max']} ({prompts['source']}), {prompts['new_tokens']} new tokens",
        highlight=False,
    )
    table = new_table("", "how")
    titles = ("tokens/s", "first ms", "p99", "next ms", "p99", "x FP32", "x BF16")
    for title in titles:
        table.add_column(title, justify="right")
    for who, how, point in rows(model):
        shown = f"[bold]{escape(who)}[/]" if who.startswith("served") else escape(who)
        table.add_row(shown, how, *figures(point), *speedups(how, point, model))
    console.print(table)
    for line in lines(model):
        console.print(f"  {line}", highlight=False, markup=False)
    console.print(
        "  first: to the first token; next: between tokens; x: against a batch of as many, or of 8.\n"
        "  Greedy, past the model's own end; prompts begin differently: none is answered from the cache.",
        style="dim",
        highlight=False,
    )


def figures(point: dict[str, Any]) -> list[str]:
    """Rate and times; empty where there is none."""
    rate = f"{point['tokens_per_s']:,.1f}"
    rate += f" ({point['rejected']} rejected)" if point.get("rejected") else ""
    keys = ("first_token_p50_ms", "first_token_p99_ms", "inter_token_p50_ms", "inter_token_p99_ms")
    return [rate, *(f"{point[key]:.1f}" if key in point else "" for key in keys)]


def speedups(how: str, point: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Against FP32 and BF16 with as many prompts at once, or the largest batch; empty where not measured."""
    if "stream" not in how:
        return ["", ""]
    count, shown = int(how.split(maxsplit=1)[0]), []
    for precision in ("fp32", "bf16"):
        sizes = model["baseline"][precision]
        base = sizes.get(str(min(count, LARGEST)))
        shown.append(f"{point['tokens_per_s'] / base['tokens_per_s']:.2f}" if base else "")
    return shown


def lines(model: dict[str, Any]) -> list[str]:
    """Everything beside the table, one line for each fact."""
    found = [f"memory reads {model['read_gb_per_s']:g} GB/s with all cores"]
    for precision, rates in model["steady_tokens_per_s"].items():
        who = f"served {precision}"
        shown = ", ".join(f"{rate:,.0f} with {count}" for count, rate in rates.items())
        found.append(f"{who}: tokens/s while all streams decode: {shown}")
        if bound := model["roofline"][precision]:
            shown = ", ".join(
                f"{row['bytes_per_token'] / 1e6:,.1f} MB per token with {count}: at most "
                f"{row['bound_tokens_per_s']:,.0f}/s, {row['share']:.0%} of it reached"
                for count, row in bound["by_streams"].items()
            )
            found.append(f"{who}: a step reads {bound['weight_bytes'] / 1e6:,.1f} MB of weights; {shown}")
        beside, pause = (
            model["first_token_beside_streams"][precision],
            model["pause_for_long_prompt"][precision],
        )
        if beside["streams"]:
            found.append(
                f"{who}: first token {beside['idle_ms']:.1f} ms alone, {beside['busy_ms']:.1f} ms beside "
                f"{beside['streams']} streams, {beside['busy_ms'] / beside['idle_ms']:.2f}x"
            )
            found.append(
                f"{who}: longest pause of those streams {pause['longest_ms']:.0f} ms while a prompt of "
                f"{pause['prompt_tokens']:.0f} tokens is read (usually {pause['usual_ms']:.1f} ms)"
            )
        found.append(f"{who}: {conversation(model['conversation'][precision])}")
        if (mib := model["memory_mb"]["served"][precision]) is not None:
            found.append(f"{who}: {mib:,.0f} MiB resident; Transformers {memory(model)}")
    return found


def conversation(figures: dict[str, Any]) -> str:
    """The reuse of a conversation's turns, in a sentence."""
    turns = figures["turns"]
    prefilled = sum(turn["prefilled"] for turn in turns[1:])
    whole = sum(turn["prompt_tokens"] for turn in turns[1:])
    return (
        f"in a conversation of {len(turns)} turns, turns 2 to {len(turns)} prefilled {prefilled:,} of "
        f"{whole:,} prompt tokens; first token of the last {figures['first_token_ms']:.1f} ms, without reuse "
        f"{figures['first_token_without_reuse_ms']:.1f} ms ({figures['ratio']:.2f}x, "
        f"{figures['history_tokens']:,} tokens of history)"
    )


def memory(model: dict[str, Any]) -> str:
    return ", ".join(f"{precision} {mib:,.0f}" for precision, mib in model["memory_mb"]["baseline"].items())
