"""The document's shape, and the page made of it."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from client.bench import table
from client.bench.baseline import Speed
from client.bench.command import point_json, ratios
from client.bench.loadgen import Point
from client.bench.report import render
from client.bench.served import CONCURRENCIES, ServedPoint


def document() -> dict[str, Any]:
    speeds = {"fp32": Speed(50.0, 200.0, 600.0), "bf16": Speed(80.0, 400.0, 500.0)}
    closed = {
        str(n): point_json(ServedPoint(Point(100, 1.0, 100.0 * n, 1.0, 2.0, 3.0), 1.5), 2.0)
        for n in CONCURRENCIES
    }
    opened = {"50": point_json(ServedPoint(Point(9, 1.0, 9.0, 1.0, 2.0, 3.0, 1, 10.0, 0.5), None), 2.0)}
    model = {
        "task": "rerank",
        "unit": "passages",
        "units_per_request": 2.0,
        "texts": {
            "pool": 3,
            "evaluated": 3,
            "tokens_mean": 40.0,
            "tokens_p50": 30,
            "tokens_max": 90,
            "padding_unsorted": 0.4,
            "padding_sorted": 0.1,
        },
        "baseline": {
            p: {"one_by_one_per_s": s.one_by_one_per_s, "batch32_per_s": s.batch32_per_s}
            for p, s in speeds.items()
        },
        "served": {"int8": closed, "fp16": copy.deepcopy(closed)},
        "open_loop": {"int8": opened, "fp16": copy.deepcopy(opened)},
        "cached_p50_ms": {"int8": 0.2, "fp16": None},
        "served_padding": {"int8": 0.04, "fp16": None},
        "ceiling_per_s": {"int8": 20000.0, "fp16": None},
        "accuracy": {
            "baseline_fp32": {"ndcg10": 0.95},
            "int8": {"ndcg10": 0.94, "spearman": 0.99},
            "fp16": {"ndcg10": None},
        },
        "memory_mb": {"served": {"int8": 100.0, "fp16": None}, "baseline": {"fp32": 600.0, "bf16": 500.0}},
        "ratios": ratios(speeds, {"int8": closed, "fp16": closed}),
    }
    return {
        "machine": {
            "cpu": "A <CPU>",
            "cores": 2,
            "memory_gib": 8.0,
            "system": "Linux",
            "python": "3.11",
            "tritonserver": "2.51.0",
            "packages": {"torch": "2.13.0"},
            "busy_before": 0.03,
        },
        "date": "2026-01-01T00:00:00+00:00",
        "command": "client bench a&b.json",
        "seconds_per_point": 1.0,
        "server_memory_mb": 900.0,
        "models": {"<script>": model},
    }


class Resources(HTMLParser):
    """Collects whatever a browser would load, and whether every element that opens closes again."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


@pytest.fixture(scope="module")
def page() -> str:
    pytest.importorskip("matplotlib")
    return render(document())


def test_the_page_loads_nothing(page: str) -> None:
    seen = Resources()
    seen.feed(page)
    assert seen.loads == []
    assert not {"link", "script", "iframe", "img", "object"} & set(seen.tags)
    assert "http" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert seen.open == []


def test_the_page_shows_machine_command_charts_and_escapes_names(page: str) -> None:
    assert page.count("<svg") == 1
    assert "A &lt;CPU&gt;" in page
    assert "client bench a&amp;b.json" in page
    assert "&lt;script&gt;" in page
    assert "torch 2.13.0" in page
    assert "32.0x" in page  # 6,400 passages/s at 32 over 200


def test_rates_are_in_units_and_latencies_per_request() -> None:
    point = point_json(ServedPoint(Point(10, 1.0, 10.0, 1.0, 2.0, 3.0), 4.0), 5.0)
    assert (point["per_s"], point["p50_ms"], point["p90_ms"], point["p99_ms"]) == (50.0, 1.0, 2.0, 3.0)
    assert "offered_per_s" not in point


def test_ratios_compare_like_with_like() -> None:
    speeds = {"fp32": Speed(50.0, 200.0, 1.0), "bf16": Speed(80.0, 400.0, 1.0)}
    points = {
        "1": {"per_s": 200.0},
        "8": {"per_s": 1.0, "p50_ms": 2.0, "p99_ms": 5.0},
        "32": {"per_s": 800.0},
    }
    assert ratios(speeds, {"int8": points}) == {
        "int8": {
            "at_32_over_fp32_batch32": 4.0,
            "at_32_over_bf16_batch32": 2.0,
            "at_1_over_fp32_one_by_one": 4.0,
            "at_1_over_bf16_one_by_one": 2.5,
            "p99_over_p50_at_8": 2.5,
        }
    }


def test_the_table_prints_every_point(capsys: pytest.CaptureFixture[str]) -> None:
    given = document()
    given["models"] = {"reranker": given["models"]["<script>"]}
    table.print_report(given, Console(width=140))
    out = capsys.readouterr().out
    for wanted in (
        "passages/s",
        "64 concurrent",
        "open loop, 50%",
        "(1 rejected)",
        "nDCG@10 0.9400",
        "served 64% of it",
    ):
        assert wanted in out
    assert json.loads(json.dumps(given)) == given


def test_a_busy_machine_is_said_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    quiet, busy = document(), document()
    busy["machine"]["busy_before"] = 0.71
    for given, shown in ((quiet, False), (busy, True)):
        given["models"] = {}
        table.print_report(given, Console(width=140))
        assert ("71% busy before the run" in capsys.readouterr().out) is shown
        assert ("71% busy before the run" in render(given)) is shown
