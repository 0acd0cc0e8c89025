"""Counters and gauges that the models publish among the server's Prometheus metrics."""

from __future__ import annotations

import http.client
import os
import re
from collections.abc import Mapping

from .transport import Endpoint
from .types import GenerationStatus

TIMEOUT_S = 5.0
USUAL_PORTS = ("8000", "8001")
METRICS_PORT = "8002"
_SAMPLE = re.compile(r"^onecard_(\w+)\{([^}]*)\} ([0-9.eE+-]+)$", re.MULTILINE)
_MODEL = re.compile(r'(?:^|,)model="([^"]*)"')

Counters = dict[str, dict[str, float]]


def parse(text: str) -> Counters:
    """Values by model and by name (without its `onecard_`), from Prometheus's text format.

    Samples of one name that differ in other labels, such as an outcome, are added up.
    """
    counters: Counters = {}
    for name, labels, value in _SAMPLE.findall(text):
        if model := _MODEL.search(labels):
            values = counters.setdefault(model[1], {})
            values[name] = values.get(name, 0.0) + float(value)
    return counters


def read(address: str) -> Counters:
    """From host:port; empty when nothing answers there."""
    connection = http.client.HTTPConnection(address.rpartition("://")[2].rstrip("/"), timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        return parse(connection.getresponse().read().decode("utf-8", "replace"))
    except (OSError, ValueError, http.client.HTTPException):
        return {}
    finally:
        connection.close()


def address_for(endpoint: Endpoint, environment: Mapping[str, str] | None = None) -> str:
    """ONECARD_URL_METRICS, else the usual port beside a server on its usual ports, else nothing.

    Beside other ports, what answers at the usual one may be another server's.
    """
    variables = os.environ if environment is None else environment
    if given := variables.get("ONECARD_URL_METRICS"):
        return given
    host, _, port = endpoint.address.partition("/")[0].rpartition(":")
    return f"{host}:{METRICS_PORT}" if port in USUAL_PORTS else ""


def generation_status(values: Mapping[str, float]) -> GenerationStatus | None:
    """None where the model publishes no such metrics."""
    if "llm_slots" not in values:
        return None

    def whole(name: str) -> int:
        return int(values.get(f"llm_{name}", 0))

    return GenerationStatus(
        slots=whole("slots"),
        slots_active=whole("slots_active"),
        queued=whole("queue"),
        cache_tokens=whole("cache_tokens"),
        cache_capacity_tokens=whole("cache_capacity_tokens"),
        tokens_per_second=float(values.get("llm_tokens_per_second", 0.0)),
        prompt_tokens=whole("prompt_tokens_total"),
        cached_tokens=whole("cached_tokens_total"),
        generated_tokens=whole("generated_tokens_total"),
    )
