"""monitoring/ against real servers under traffic, scraped by a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import yaml
from prometheus import MONITORING, Prometheus, unused_port
from small_llm import Refused, Talk, outputs
from small_models import Served
from tritonclient.utils import InferenceServerException

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="no prometheus and promtool here (Debian: apt install prometheus)",
    ),
]

# What no server without a card publishes.
OF_A_CARD = {
    "nv_gpu_utilization",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_power_usage",
    "nv_gpu_power_limit",
}
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}
VARIABLES = {
    variable["name"]: variable["query"]["query"]
    for variable in DASHBOARD["templating"]["list"]
    if variable["type"] == "query"
}
(GROUP,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
RULES = {rule["alert"]: rule["expr"] for rule in GROUP["rules"]}
METRIC = re.compile(r"\b(?:onecard|nv)_\w+")
LONG = "the noodles " * 9000


@dataclass(frozen=True)
class Watched:
    """Two servers that had traffic, one address where none is, and the time when all of it was scraped."""

    prometheus: Prometheus
    at: float
    dead: str

    def values(self, expression: str) -> list[float]:
        return [value for _, value in self.prometheus.query(expression, self.at)]


@pytest.fixture(scope="module")
def watched(talking: Served, served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    dead = f"127.0.0.1:{unused_port()}"
    alive = [server.server.urls["metrics"] for server in (talking, served)]
    with Prometheus(tmp_path_factory.mktemp("prometheus"), [*alive, dead]) as prometheus:
        # A rate needs a value from before the traffic.
        prometheus.wait_for(lambda: prometheus.scraped() == {**dict.fromkeys(alive, 1.0), dead: 0.0})
        time.sleep(1)
        with ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(talk_to, talking.grpc), threads.submit(ask, served.grpc)]:
                done.result()
        # A second until all is published, one until it is scraped, one until the rules are evaluated.
        time.sleep(4)
        yield Watched(prometheus, time.time(), dead)


def talk_to(address: str) -> None:
    """Prompts with a common beginning, one that is refused, and one too many for a queue of one."""
    talk, tight = Talk(address), Talk(address, "tight")
    for place in range(4):
        talk.whole(text=f"the noodles were good, and {place}", max_tokens=20, ignore_eos=True)
    assert "'max_tokens' is 0" in talk.error(text="a", max_tokens=0)
    running = tight.call(text="busy", max_tokens=8000, ignore_eos=True)
    next(running)
    waiting = tight.call(text="waits", max_tokens=1)
    time.sleep(0.1)
    assert "the queue is full" in tight.error(text="one too many", max_tokens=1)
    running.cancel()
    with contextlib.suppress(Refused):
        outputs(list(waiting)[-1])
    talk.close()
    tight.close()


def ask(address: str) -> None:
    """Every encoder: texts that are cut, repeated, refused, and more at once than a queue of one holds."""
    client = grpc_client.InferenceServerClient(address)

    def infer(model: str, **inputs: Any) -> bool:
        tensors = []
        for name, value in inputs.items():
            tensors.append(grpc_client.InferInput(name, [len(value), len(value[0])], "BYTES"))
            tensors[-1].set_data_from_numpy(np.array(value, dtype=object))
        try:
            client.infer(model, tensors)
        except InferenceServerException:
            return False
        return True

    for place in range(3):
        assert infer("label", text=[["the noodles were very good"], ["cold"], [LONG]])
        assert infer("vector", text=[["the noodles were very good"], ["cold"]])
        assert infer("order", query=[["noodles"]], passages=[["good noodles", "never again"]])
        assert infer("strict", text=[["the same noodles again"]])
        # Triton's cache would answer the same bytes, which failed before, with success.
        assert not infer("strict", text=[[f"{place} {LONG}"]])
    many = [["the noodles were good"]] * 64
    with ThreadPoolExecutor(24) as threads:
        answered = list(threads.map(lambda _: infer("narrow", text=many), range(72)))
    assert 0 < sum(answered) < 72


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_of_the_dashboard_returns_data(watched: Watched, name: str) -> None:
    expression = QUERIES[name].replace("$__rate_interval", "15s")
    values = watched.values(expression.replace("$server", ".*").replace("$model", ".*"))
    if not set(METRIC.findall(expression)) & OF_A_CARD:
        assert any(map(math.isfinite, values)), f"{expression}: {values}"


@pytest.mark.parametrize("name", VARIABLES)
def test_every_variable_of_the_dashboard_has_values(watched: Watched, name: str) -> None:
    series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", VARIABLES[name]).groups()  # type: ignore[union-attr]
    values = watched.prometheus.get(f"label/{label}/values", **{"match[]": series.replace("$server", ".*")})
    assert len(values) > 1


def test_every_rule_is_evaluated_and_looks_at_what_there_is(watched: Watched) -> None:
    (group,) = watched.prometheus.get("rules")["groups"]
    assert {rule["name"]: rule["health"] for rule in group["rules"]} == dict.fromkeys(RULES, "ok")
    known = set(watched.prometheus.get("label/__name__/values"))
    named = {name for expression in RULES.values() for name in METRIC.findall(expression)}
    assert named - known <= OF_A_CARD


def test_alerts_name_what_happened_and_nothing_else(watched: Watched) -> None:
    alerts = [alert["labels"] for alert in watched.prometheus.get("alerts")["alerts"]]
    found = {(alert["alertname"], alert.get("model", alert["instance"])) for alert in alerts}
    # On a busy machine the few answers of this one take longer than its 300 ms.
    assert found - {("OnecardSlow", "tight")} == {
        ("OnecardServerDown", watched.dead),
        ("OnecardRejects", "narrow"),
        ("OnecardRejects", "tight"),
    }


def exposition(server: Served) -> str:
    with urllib.request.urlopen(f"http://{server.server.urls['metrics']}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_the_documentation_s_table_is_what_models_publish(watched: Watched) -> None:
    page = (MONITORING.parent / "docs" / "monitoring.md").read_text("utf-8")
    documented = set(re.findall(r"^\| `(onecard_\w+)` \|", page, re.MULTILINE))
    names = watched.prometheus.get("label/__name__/values")
    published = {re.sub(r"_seconds_(bucket|sum|count)$", "_seconds", name) for name in names}
    assert documented == {name for name in published if name.startswith("onecard_")}


# Buckets are counters, since a Triton histogram is one round trip for each value: promtool would have them
# be called otherwise, but then no query would know them.
BUCKETS = re.compile(r"onecard_(?:request|queue|first_token)_seconds_(?:bucket|sum|count) (?P<finding>.+)")
OF_BUCKETS = {
    'counter metrics should have "_total" suffix',
    'non-histogram metrics should not have "_bucket" suffix',
    'non-histogram metrics should not have "le" label',
    'non-histogram and non-summary metrics should not have "_sum" suffix',
    'non-histogram and non-summary metrics should not have "_count" suffix',
}


@pytest.mark.parametrize("name", ["talking", "served"])
def test_promtool_finds_nothing_but_the_buckets_of_ours(request: pytest.FixtureRequest, name: str) -> None:
    command = ["promtool", "check", "metrics"]
    text = exposition(request.getfixturevalue(name))
    checked = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    lines = (checked.stdout + checked.stderr).splitlines()
    assert any(line.startswith("nv_") for line in lines), "promtool has not seen Triton's own"
    ours = [line for line in lines if not line.startswith("nv_")]
    known = [line for line in ours if (found := BUCKETS.match(line)) and found["finding"] in OF_BUCKETS]
    assert ours == known
