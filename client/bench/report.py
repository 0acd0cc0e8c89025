"""The run as one HTML page that needs nothing else: style and charts are inside."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from . import generate_report
from .charts import model_row
from .table import NAMES, busy_warning, is_busy

STYLE = """
:root { --ink: #1c2530; --soft: #5b6675; --line: #e3e7ed; --accent: #0b7a5b; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.25rem; margin: 0; }
p { margin: .3rem 0; }
.soft { color: var(--soft); }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 1.3rem 1.5rem;
  margin-top: 1.4rem; overflow-x: auto; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: .6rem 1rem; min-width: 10.5rem; }
.tile b { display: block; font-size: 1.5rem; color: var(--accent); }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
tr.served td:first-child { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: .6rem 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px ui-monospace, monospace; }
"""


def render(document: dict[str, Any]) -> str:
    """The page for a bench document."""
    machine = document["machine"]
    models = "".join(_model(name, model) for name, model in document["models"].items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>onecard benchmark</title><style>{STYLE}</style></head>
<body><main>
<h1>onecard benchmark</h1>
<p class="soft">Served models against Transformers in process: same texts, same machine, same run.
{escape(document["date"])}</p>
{f"<section><b>{busy_warning(machine)}</b></section>" if is_busy(machine) else ""}
{models}
<section><h2>How this was measured</h2>
<p>Served: one text (or one query with its passages) per request over gRPC; the client shares the
{machine["cores"]} cores with the server. Closed loop: each caller waits for its answer. Open loop: arrivals
of a Poisson process, latency counted from the intended send time.
{document["seconds_per_point"]:g} s per point after a warm-up. Requests are made distinct by trailing white
space, which the tokenizer drops; no cached answer is counted.</p>
<p>Baseline: sentence-transformers for embedders, AutoModelForSequenceClassification for the others, in a
process of its own, all cores, warmed up, tokenizing included; batches of 32 are sorted by length.</p>
{_machine(document)}
</section>
</main></body></html>
"""


def _model(name: str, model: dict[str, Any]) -> str:
    if model["task"] == "generate":
        return generate_report.section(name, model)
    texts = model["texts"]
    return f"""<section>
<h2>{escape(name)} <span class="soft">{escape(model["task"])}</span></h2>
<p class="soft">{texts["pool"]} requests in the pool, {texts["tokens_mean"]:g} tokens per
{escape(model["unit"][:-1])} on average, at most {texts["tokens_max"]}. In batches of 32, padding is
{texts["padding_unsorted"]:.0%} of the work as the texts come and {texts["padding_sorted"]:.0%} when sorted by
length. Accuracy is of {texts["evaluated"]:,} answers.</p>
<div class="tiles">{_tiles(model)}</div>
{model_row(model)}
{_rates(model)}
{_quality(model)}
</section>"""


def _tiles(model: dict[str, Any]) -> str:
    tiles = []
    for precision, ratios in model["ratios"].items():
        tiles += [
            (f"{ratios['at_32_over_fp32_batch32']:.1f}x", f"{precision} at 32 over FP32 batch 32"),
            (f"{ratios['at_32_over_bf16_batch32']:.1f}x", f"{precision} at 32 over BF16 batch 32"),
            (f"{ratios['at_1_over_fp32_one_by_one']:.1f}x", f"{precision} at 1 over FP32 one by one"),
        ]
    return "".join(f'<div class="tile"><b>{value}</b>{escape(text)}</div>' for value, text in tiles)


def _rates(model: dict[str, Any]) -> str:
    rows = []
    for precision, speed in model["baseline"].items():
        rows.append(["", f"Transformers {precision}", "one by one", f"{speed['one_by_one_per_s']:,.1f}"])
        rows.append(["", f"Transformers {precision}", "batch 32", f"{speed['batch32_per_s']:,.1f}"])
    for precision, closed in model["served"].items():
        points = {f"{n} concurrent": point for n, point in closed.items()}
        points |= {f"open loop, {p}% of peak": point for p, point in model["open_loop"][precision].items()}
        rows += [["served", f"served {precision}", how, *_figures(point)] for how, point in points.items()]
    titles = ["", "how", f"{model['unit']}/s", "p50 ms", "p90 ms", "p99 ms", "batch", "requests", "rejected"]
    return _table(titles, rows)


def _figures(point: dict[str, Any]) -> list[str]:
    batch = "" if point["mean_batch"] is None else f"{point['mean_batch']:.1f}"
    latencies = [f"{point[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms")]
    return [f"{point['per_s']:,.1f}", *latencies, batch, str(point["requests"]), str(point["rejected"])]


def _quality(model: dict[str, Any]) -> str:
    rows = []
    for side, figures in model["accuracy"].items():
        base = side == "baseline_fp32"
        shown = ", ".join(f"{NAMES[key]} {value:.4f}" for key, value in figures.items() if value is not None)
        mib = model["memory_mb"]["baseline"]["fp32"] if base else model["memory_mb"]["served"].get(side)
        cached = model["cached_p50_ms"].get(side)
        padding = model["served_padding"].get(side)
        ceiling = model["ceiling_per_s"].get(side)
        rows.append(
            [
                "" if base else "served",
                "Transformers fp32" if base else f"served {side}",
                shown or "the reference",
                "" if mib is None else f"{mib:,.0f}",
                "" if padding is None else f"{padding:.1%}",
                "" if cached is None else f"{cached:.2f}",
                "" if ceiling is None else f"{ceiling:,.0f}",
            ]
        )
    titles = [
        "",
        "accuracy on the evaluation data",
        "memory, MiB",
        "padding computed",
        "cached answer, ms",
        "engine alone, per s",
    ]
    return _table(titles, rows)


def _table(titles: Iterable[str], rows: Iterable[list[str]]) -> str:
    """Each row begins with its class."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        f'<tr class="{row[0]}">{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _machine(document: dict[str, Any]) -> str:
    machine = document["machine"]
    facts = {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        "busy before": "unknown" if machine["busy_before"] is None else f"{machine['busy_before']:.0%}",
        "system": f"{machine['system']}, Python {machine['python']}",
        "versions": ", ".join(
            f"{name} {found}"
            for name, found in {"tritonserver": machine["tritonserver"], **machine["packages"]}.items()
        ),
        "command": document["command"],
    }
    if document["server_memory_mb"] is not None:
        facts["server memory"] = f"{document['server_memory_mb']:,.0f} MiB resident, all models together"
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f"<dl>{items}</dl>"
