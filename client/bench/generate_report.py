"""A generating model's section of the page: tiles, charts, the table and the facts beside it."""

from __future__ import annotations

from html import escape
from typing import Any

from .charts import COLORS, GRID, OTHER, figure_row
from .generate_table import figures, lines, rows, speedups

TITLES = (
    "",
    "how",
    "tokens/s",
    "first token ms",
    "p99",
    "between tokens ms",
    "p99",
    "x FP32",
    "x BF16",
    "longest pause ms",
    "requests",
)


def section(name: str, model: dict[str, Any]) -> str:
    """The <section> of one model."""
    prompts = model["prompts"]
    facts = "".join(f"<li>{escape(line)}</li>" for line in lines(model))
    return f"""<section>
<h2>{escape(name)} <span class="soft">generate</span></h2>
<p class="soft">{prompts["pool"]} prompts ({escape(prompts["source"])}), {prompts["tokens_mean"]:g} tokens
on average, at most {prompts["tokens_max"]}; {prompts["new_tokens"]} new tokens each, greedy, past the model's
own end. Every prompt begins differently, so that none is answered from the cache. Baseline: Transformers
generate, in static batches.</p>
<div class="tiles">{_tiles(model)}</div>
{_charts(model)}
{_table(model)}
<ul>{facts}</ul>
</section>"""


def _tiles(model: dict[str, Any]) -> str:
    shown = {
        "tokens_at_1_over_fp32_batch1": "tokens/s, one stream over FP32",
        "tokens_at_8_over_bf16_batch8": "tokens/s, 8 streams over BF16 batch 8",
        "first_token_over_fp32": "first token of FP32's",
        "first_token_reused_over_not": "first token of a last turn, of that without reuse",
    }
    tiles = [
        f'<div class="tile"><b>{ratios[key]:.2f}x</b>{escape(f"{precision} {text}")}</div>'
        for precision, ratios in model["ratios"].items()
        for key, text in shown.items()
        if key in ratios
    ]
    return "".join(tiles)


def _table(model: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in TITLES)
    body = []
    for who, how, point in rows(model):
        last = (
            [f"{point['longest_pause_ms']:.0f}", str(point["requests"])] if "requests" in point else ["", ""]
        )
        cells = [who, how, *figures(point), *speedups(how, point, model), *last]
        kind = ' class="served"' if who.startswith("served") else ""
        body.append(f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _charts(model: dict[str, Any]) -> str:
    """Rates as bars, times against the number of streams, the turns of the conversation."""
    return figure_row(
        [
            lambda axes: _rates(axes, model),
            lambda axes: _times(axes, model),
            lambda axes: _turns(axes, model),
        ]
    )


def _rates(axes: Any, model: dict[str, Any]) -> None:
    names, rates, colors = [], [], []
    for who, how, point in rows(model):
        if not how.startswith("open"):
            names.append(f"{who}, {how}")
            rates.append(point["tokens_per_s"])
            colors.append(COLORS.get(who.split()[-1], OTHER))
    places = range(len(names))
    axes.barh(places, rates, color=colors, height=0.72)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_title("tokens per second", loc="left", fontsize=10)
    axes.grid(axis="x", color=GRID)
    axes.set_xlim(0, max(rates) * 1.16)
    for place, rate in zip(places, rates, strict=True):
        axes.text(rate, place, f" {rate:,.0f}", va="center", fontsize=8)


def _times(axes: Any, model: dict[str, Any]) -> None:
    for precision, points in model["served"].items():
        color = COLORS.get(precision, OTHER)
        counts = [int(count) for count in points]
        for key, label, style in (
            ("first_token_p50_ms", "first token", "-"),
            ("inter_token_p99_ms", "between tokens, p99", "--"),
        ):
            values = [max(point[key], 1e-2) for point in points.values()]
            axes.plot(counts, values, style, marker="o", ms=3, color=color, label=f"{precision} {label}")
    axes.set_yscale("log", base=4)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("streams")
    axes.set_title("ms", loc="left", fontsize=10)
    axes.grid(color=GRID)
    axes.legend(frameon=False, fontsize=8)


def _turns(axes: Any, model: dict[str, Any]) -> None:
    turns = next(iter(model["conversation"].values()))["turns"]
    places = range(1, len(turns) + 1)
    axes.bar(places, [turn["prompt_tokens"] for turn in turns], color=GRID, label="prompt")
    axes.bar(places, [turn["prefilled"] for turn in turns], color=COLORS["int8"], label="prefilled")
    axes.set_title("tokens, by turn of a conversation", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
