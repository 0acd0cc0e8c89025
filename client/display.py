"""Answers as tables for people; `--json` goes past this module."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .types import Classification, Embedding, Generation, ModelStatus, Ranked, ServerStatus

TEXT_WIDTH = 60
_CONTROLS = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}


def print_classifications(texts: Sequence[str], answers: Sequence[Classification]) -> None:
    table = new_table("text", "label", "score")
    for text, answer in zip(texts, answers, strict=True):
        table.add_row(clip(text, answer.truncated), escape(answer.label), f"{answer.score:.4f}")
    new_console().print(table)


def print_embeddings(texts: Sequence[str], answers: Sequence[Embedding]) -> None:
    table = new_table("text", "dimension", "vector")
    for text, answer in zip(texts, answers, strict=True):
        start = ", ".join(f"{value:+.4f}" for value in answer.vector[:4])
        table.add_row(clip(text, answer.truncated), str(answer.vector.size), f"\\[{start}, …]")
    new_console().print(table)


def print_ranking(answers: Sequence[Ranked]) -> None:
    table = new_table("rank", "score", "given as", "passage")
    for rank, answer in enumerate(answers, start=1):
        table.add_row(
            str(rank), f"{answer.score:.4f}", str(answer.index + 1), clip(answer.passage, answer.truncated)
        )
    new_console().print(table)


def print_status(status: ServerStatus) -> None:
    console = new_console()
    console.print(f"{status.server} {status.version} at {status.url} ({status.protocol})", highlight=False)
    table = new_table("model", "task", "version")
    for title in (
        "requests",
        "rejected",
        "batch",
        "queue ms",
        "mean ms",
        "p99 ms",
        "cache hit/miss",
        "memory",
    ):
        table.add_column(title, justify="right")
    for model in status.models:
        table.add_row(
            escape(model.name),
            escape(f"{model.task or ''} {model.precision or ''}".strip()),
            escape(model.version),
            f"{model.requests}" + (f" [red]({model.failed} failed)[/]" if model.failed else ""),
            "" if model.rejected is None else str(sum(model.rejected.values())),
            number(model.mean_batch_size),
            number(model.queue_ms),
            number(model.request_ms),
            number(model.p99_ms),
            f"{model.cache_hits}/{model.cache_misses}",
            memory(model.resident_bytes, model.planned_bytes),
        )
    console.print(table)
    _print_generation(status.models, console)
    if status.metrics_error:
        where = f" at {status.metrics}" if status.metrics else ""
        console.print(
            f"[yellow]The models' metrics{where} cannot be read ({escape(status.metrics_error)}): "
            "times, batches, rejections, memory and slots are missing.[/]",
            highlight=False,
        )


def memory(resident: int | None, planned: int | None) -> str:
    """In MiB, against what the plan promised where it is known."""
    if resident is None:
        return ""
    plan = f" of {planned / 2**20:,.0f}" if planned else ""
    return f"{resident / 2**20:,.0f}{plan} MiB"


def _print_generation(models: Sequence[ModelStatus], console: Console) -> None:
    """Slots, rate and cache of the models that generate, as they are now."""
    table = new_table("model")
    for title in (
        "slots busy",
        "queued",
        "tokens/s",
        "cache tokens",
        "prompt tokens",
        "from cache",
        "generated",
    ):
        table.add_column(title, justify="right")
    for model in models:
        state = model.generation
        if state is None:
            continue
        share = state.cache_tokens / max(1, state.cache_capacity_tokens)
        table.add_row(
            escape(model.name),
            f"{state.slots_active}/{state.slots}",
            str(state.queued),
            f"{state.tokens_per_second:,.1f}",
            f"{state.cache_tokens:,}/{state.cache_capacity_tokens:,} ({share:.0%})",
            f"{state.prompt_tokens:,}",
            f"{state.cached_tokens:,}",
            f"{state.generated_tokens:,}",
        )
    if table.row_count:
        console.print(table)


def print_generations(prompts: Sequence[str], answers: Sequence[Generation]) -> None:
    """Answers in full: they are what was asked for; the prompts only head them when there are several."""
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(prompts) > 1:
            click.echo(f"# {shorten(prompt)}")
        for sample in answer.samples:
            if len(answer.samples) > 1:
                click.echo(f"## {sample.index + 1}")
            click.echo(printable(sample.text))


def printable(text: str) -> str:
    """A model's text as it may be shown: at a terminal it must not move the cursor or change colours."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


def new_console() -> Console:
    """Rich takes a pipe to be 80 columns wide, which would break the tables' words apart."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def new_table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"


def clip(text: str, truncated: bool = False) -> str:
    return escape(shorten(text)) + (" [yellow](truncated by the model)[/]" if truncated else "")


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
