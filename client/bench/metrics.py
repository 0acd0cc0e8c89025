"""Batches and padding that the server computed, from the counters its models publish among its metrics."""

from __future__ import annotations

import os
import time

from .. import metrics
from ..metrics import Scrape
from ..rates import Window

# The models send what they counted once a second at most.
SETTLED_S = 2.0
POLL_S = 0.1


def read(address: str | None = None) -> Scrape:
    """From ONECARD_URL_METRICS; empty when it is not set or nothing answers there."""
    address = address or os.environ.get("ONECARD_URL_METRICS", "")
    return metrics.read(address) if address else Scrape(0.0, error="ONECARD_URL_METRICS is not set")


def settled(model: str, requests: int, before: Scrape, limit: float = SETTLED_S) -> Scrape:
    """A reading that has counted so many requests since `before`, or the last within the limit in seconds."""
    deadline = time.monotonic() + limit
    while True:
        scrape = read()
        if not scrape.series(model, "onecard_requests_total"):
            return scrape  # it publishes none, or cannot be read: nothing to wait for
        counted = Window(before, scrape, model).increase("onecard_requests_total")
        if counted >= requests or time.monotonic() >= deadline:
            return scrape
        time.sleep(POLL_S)


def padding_share(model: str, before: Scrape, after: Scrape) -> float | None:
    """Share of the positions computed in between that held no token; None when nothing was counted."""
    window = Window(before, after, model)
    tokens, padding = window.increase("onecard_tokens_total"), window.increase("onecard_padding_total")
    return padding / (tokens + padding) if tokens > 0 else None
