"""Padding that the server computed, from the counters its models publish among Triton's metrics."""

from __future__ import annotations

import http.client
import os
import re

TIMEOUT_S = 5.0
# The models send their counts at most twice a second, with the next batch; a measurement outlasts that.
_SAMPLE = re.compile(
    r'^onecard_(tokens|padding)_total\{[^}]*model="([^"]*)"[^}]*\} ([0-9.eE+-]+)$', re.MULTILINE
)


def parse(text: str) -> dict[str, dict[str, float]]:
    """Counters by model, from Prometheus's text format."""
    counters: dict[str, dict[str, float]] = {}
    for name, model, value in _SAMPLE.findall(text):
        counters.setdefault(model, {})[name] = float(value)
    return counters


def read(address: str | None = None) -> dict[str, dict[str, float]]:
    """From ONECARD_URL_METRICS; empty when it is not set or nothing answers there."""
    address = address or os.environ.get("ONECARD_URL_METRICS", "")
    if not address:
        return {}
    connection = http.client.HTTPConnection(address.rpartition("://")[2], timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        return parse(connection.getresponse().read().decode("utf-8", "replace"))
    except (OSError, http.client.HTTPException):
        return {}
    finally:
        connection.close()


def padding_share(before: dict[str, float], after: dict[str, float]) -> float | None:
    """Share of the positions computed in between that held no token; None when nothing was counted."""
    tokens, padding = (after.get(name, 0.0) - before.get(name, 0.0) for name in ("tokens", "padding"))
    return padding / (tokens + padding) if tokens > 0 else None
