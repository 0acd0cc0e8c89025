"""monitoring/ by itself: promtool's checks, tests and runbook of every alert, the dashboard's grid."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
(GROUP,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
TESTS = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
ALERTS = [rule["alert"] for rule in GROUP["rules"]]
OURS = re.compile(r"\bonecard_\w+")

promtool_needed = pytest.mark.skipif(
    not shutil.which("promtool"), reason="no promtool here (Debian: apt install prometheus)"
)


def promtool(*arguments: str) -> str:
    command = ["promtool", *arguments]
    done = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@promtool_needed
def test_promtool_takes_the_configuration_and_the_rules() -> None:
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool(
        "check", "config", "--lint-fatal", "prometheus.yml"
    )


@promtool_needed
def test_alerts_fire_where_they_should_and_nowhere_else() -> None:
    promtool("test", "rules", "alerts_test.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_is_tried_on_a_bad_server_beside_a_good_one(alert: str) -> None:
    expression = next(rule["expr"] for rule in GROUP["rules"] if rule["alert"] == alert)
    tests = [test for test in TESTS for case in test["alert_rule_test"] if case["alertname"] == alert]
    expected = [
        fired["exp_labels"]["instance"]
        for test in tests
        for case in test["alert_rule_test"]
        for fired in case.get("exp_alerts", [])
        if case["alertname"] == alert
    ]
    assert set(expected) == {"bad:1"}
    for name in set(re.findall(r"\b(?:up|nv_\w+|onecard_\w+)(?=[{\[ )]|$)", expression, re.MULTILINE)):
        assert any(
            name in entry["series"] and "good:1" in entry["series"]
            for test in tests
            for entry in test["input_series"]
        ), name


def headings(page: Path) -> set[str]:
    return {heading.lower() for heading in re.findall(r"^## (\w+)$", page.read_text("utf-8"), re.MULTILINE)}


def test_an_alert_says_how_bad_what_and_where_to_read_on() -> None:
    for rule in GROUP["rules"]:
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
        page, anchor = rule["annotations"]["runbook"].split("#")
        assert anchor == rule["alert"].lower()
        assert anchor in headings(ROOT / page)


def documented() -> set[str]:
    page = (ROOT / "docs" / "monitoring.md").read_text("utf-8")
    return set(re.findall(r"^\| `(onecard_\w+)` \|", page, re.MULTILINE))


def base(name: str) -> str:
    """A metric without what its histogram's parts are called by."""
    return re.sub(r"_seconds_(?:bucket|sum|count)$", "_seconds", name)


def test_the_dashboard_shows_every_metric_of_the_documentation() -> None:
    shown = {base(name) for expression in expressions() for name in OURS.findall(expression)}
    assert shown == documented()


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def test_panels_of_the_dashboard_fill_a_grid_and_have_their_own_names() -> None:
    taken: dict[tuple[int, int], Any] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert 0 <= x < 24
                assert taken.setdefault((x, y), panel) is panel, panel["title"]
    for key in ("id", "title"):
        values = [panel[key] for panel in DASHBOARD["panels"]]
        assert len(values) == len(set(values))


def test_the_dashboard_names_no_data_source_but_its_variable() -> None:
    assert set(re.findall(r'"uid": "(.*?)"', json.dumps(DASHBOARD["panels"]))) == {"${datasource}"}
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    used = {name for expression in expressions() for name in re.findall(r"\$(\w+)", expression)}
    assert used | {"datasource"} == {*names, "__rate_interval"}
