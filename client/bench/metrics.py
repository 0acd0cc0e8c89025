"""Padding that the server computed, from the counters its models publish among Triton's metrics."""

from __future__ import annotations

import os

from .. import metrics

# The models send their counts at most twice a second, with the next batch; a measurement outlasts that.


def read(address: str | None = None) -> metrics.Counters:
    """From ONECARD_URL_METRICS; empty when it is not set or nothing answers there."""
    address = address or os.environ.get("ONECARD_URL_METRICS", "")
    return metrics.read(address) if address else {}


def padding_share(before: dict[str, float], after: dict[str, float]) -> float | None:
    """Share of the positions computed in between that held no token; None when nothing was counted."""
    tokens, padding = (
        after.get(name, 0.0) - before.get(name, 0.0) for name in ("tokens_total", "padding_total")
    )
    return padding / (tokens + padding) if tokens > 0 else None
