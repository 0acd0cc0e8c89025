"""What an encoder computed, as Triton metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

_INTERVAL_S = 1.0


class Counters:
    """Tokens computed, padding computed and texts truncated, with the label `model`.

    A metric costs a round trip to the server process, so differences are sent at most once a second.
    """

    def __init__(self, pb_utils: Any, model: str) -> None:
        self._metrics: dict[str, Any] = {}
        self._families = []
        self._sent = {"tokens": 0, "padding": 0, "truncated": 0}
        self._due = 0.0
        for name, description in (
            ("tokens", "Tokens of texts that were computed"),
            ("padding", "Padding tokens that were computed beside them"),
            ("truncated", "Texts that lost tokens to the length limit"),
        ):
            family = pb_utils.MetricFamily(
                name=f"onecard_{name}_total", description=description, kind=pb_utils.MetricFamily.COUNTER
            )
            self._families.append(family)
            self._metrics[name] = family.Metric(labels={"model": model})

    def report(self, counts: Mapping[str, int], *, now: bool = False) -> None:
        """Send what `counts` (all three, since the start) gained since the last time it was sent."""
        clock = time.monotonic()
        if clock < self._due and not now:
            return
        self._due = clock + _INTERVAL_S
        for name, sent in self._sent.items():
            if counts[name] > sent:
                self._metrics[name].increment(counts[name] - sent)
                self._sent[name] = counts[name]
