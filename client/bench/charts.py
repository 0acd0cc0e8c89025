"""One row of charts per model, as SVG text to be put into the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

COLORS = {
    "fp32": "#b8c0cc",
    "bf16": "#8793a6",
    "int8": "#0b7a5b",
    "fp16": "#2f6fde",
    "int8-weights": "#b4690e",
}
OTHER = "#7a4fb5"
INK, GRID = "#1c2530", "#e3e7ed"


def model_row(model: dict[str, Any]) -> str:
    """Throughput bars, latency against concurrency, batch size against concurrency."""
    return figure_row(
        [
            lambda axes: _throughput(axes, model),
            lambda axes: _latency(axes, model),
            lambda axes: _batches(axes, model),
        ]
    )


def figure_row(draw: Sequence[Callable[[Any], None]]) -> str:
    """Three charts side by side; each function draws on the axes that it is given."""
    # Imported here: only the report needs it, and it takes a second. Figure alone draws without a display.
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"font.size": 9, "axes.edgecolor": GRID, "text.color": INK, "axes.labelcolor": INK}
    with matplotlib.rc_context({**settings, "xtick.color": INK, "ytick.color": INK, "svg.fonttype": "path"}):
        figure = Figure(figsize=(12, 3.4), layout="constrained")
        figure.patch.set_alpha(0)
        for function, axes in zip(draw, figure.subplots(1, 3, width_ratios=(1.3, 1, 0.8)), strict=True):
            function(axes)
            axes.set_facecolor("none")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_axisbelow(True)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return inline(out.getvalue())


def inline(svg: str) -> str:
    """The <svg> element alone, without what only a file of its own needs (prolog, metadata, name spaces)."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 width="100%" role="img"', svg, count=1)


def _throughput(axes: Any, model: dict[str, Any]) -> None:
    names, rates, colors = [], [], []
    for precision, speed in model["baseline"].items():
        for how, key in (("one by one", "one_by_one_per_s"), ("batch 32", "batch32_per_s")):
            names.append(f"Transformers {precision}, {how}")
            rates.append(speed[key])
            colors.append(COLORS[precision])
    for precision, points in model["served"].items():
        for concurrency, point in points.items():
            names.append(f"served {precision}, {concurrency} concurrent")
            rates.append(point["per_s"])
            colors.append(COLORS.get(precision, OTHER))
    places = range(len(names))
    axes.barh(places, rates, color=colors, height=0.72)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_title(f"{model['unit']} per second", loc="left", fontsize=10)
    axes.grid(axis="x", color=GRID)
    axes.set_xlim(0, max(rates) * 1.16)
    for place, rate in zip(places, rates, strict=True):
        axes.text(rate, place, f" {rate:,.0f}", va="center", fontsize=8)


def _latency(axes: Any, model: dict[str, Any]) -> None:
    for precision, points in model["served"].items():
        x = [int(concurrency) for concurrency in points]
        color = COLORS.get(precision, OTHER)
        for key, style in (("p50_ms", "-"), ("p99_ms", "--")):
            label = f"{precision} {key[:3]}"
            axes.plot(
                x,
                [point[key] for point in points.values()],
                style,
                marker="o",
                ms=3,
                color=color,
                label=label,
            )
    _concurrency_axis(axes, model)
    axes.set_title("latency per request, ms", loc="left", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _batches(axes: Any, model: dict[str, Any]) -> None:
    for precision, points in model["served"].items():
        known = {
            int(n): point["mean_batch"] for n, point in points.items() if point["mean_batch"] is not None
        }
        axes.plot(
            list(known),
            list(known.values()),
            marker="o",
            ms=3,
            color=COLORS.get(precision, OTHER),
            label=precision,
        )
    _concurrency_axis(axes, model)
    axes.set_title("rows in a run of the engine", loc="left", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _concurrency_axis(axes: Any, model: dict[str, Any]) -> None:
    ticks = sorted({int(concurrency) for points in model["served"].values() for concurrency in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("concurrent requests")
    axes.grid(color=GRID)
