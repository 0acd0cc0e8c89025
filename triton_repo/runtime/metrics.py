"""What a served model counts, and how that becomes Triton metrics.

A metric costs a round trip to the server process (0.1 ms of processor time), so counts are kept here and only
differences are sent, once a second. That also is why a histogram is a counter for each bucket: Triton's own
kind takes one round trip for each observation.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from triton_repo.runtime.admission import Busy
from triton_repo.runtime.texts import BadRequest

# A value, or one for each value of the family's label.
Snapshot = Mapping[str, float | dict[str, float]]

_INTERVAL_S = 1.0
# No further apart than 2.5 times: a quantile between two is interpolated.
_BOUNDS: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0),
)
_BUCKETS: Final = (*(f"{bound:g}" for bound in _BOUNDS), "+Inf")
_OUTCOMES: Final = ("completed", "failed", "cancelled", "rejected")
_REASONS: Final = ("bad_input", "queue_full", "deadline", "expired", "displaced", "unloading")
_STATM = Path("/proc/self/statm")


class Histogram:
    """Seconds, counted by the bucket they fall in; Prometheus' cumulative buckets in `snapshot`."""

    def __init__(self) -> None:
        self._counts = [0] * len(_BUCKETS)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def snapshot(self, name: str) -> dict[str, float | dict[str, float]]:
        cumulative = list(accumulate(self._counts))
        return {
            f"{name}_bucket": dict(zip(_BUCKETS, map(float, cumulative), strict=True)),
            f"{name}_sum": self._sum,
            f"{name}_count": float(cumulative[-1]),
        }


class Tally:
    """What became of a model's requests, how long they waited and how long they took."""

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(_OUTCOMES, 0.0)
        self.rejections = dict.fromkeys(_REASONS, 0.0)
        self.queue = Histogram()
        self.request = Histogram()

    def end(self, error: Exception | None, seconds: float = 0.0) -> None:
        """A request ended after `seconds`: completed, or with `error`."""
        if isinstance(error, BadRequest | Busy):
            self.rejections["bad_input" if isinstance(error, BadRequest) else error.reason] += 1
            self.outcomes["rejected"] += 1
            return
        self.outcomes["failed" if error else "completed"] += 1
        self.request.observe(seconds)

    def cancel(self) -> None:
        """Its client went away."""
        self.outcomes["cancelled"] += 1

    def snapshot(self) -> dict[str, float | dict[str, float]]:
        return {
            "requests_total": dict(self.outcomes),
            "rejections_total": dict(self.rejections),
            **self.queue.snapshot("queue_seconds"),
            **self.request.snapshot("request_seconds"),
        }


def resident_bytes() -> float:
    """Resident memory of this process, to the MiB: less is noise, and each change is a round trip."""
    pages = int(_STATM.read_text(encoding="ascii").split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE") >> 20 << 20)


def labels(args: Mapping[str, str], instances: int = 1) -> dict[str, str]:
    """The labels of all metrics of one model, from what Triton gives its `initialize`."""
    own = {"model": args["model_name"], "version": args["model_version"]}
    # Gauges of instances side by side would overwrite each other.
    return own if instances == 1 else own | {"replica": args["model_instance_name"]}


class Publisher:
    """Sends snapshots as Triton metrics: counters by their suffix, gauges all others."""

    def __init__(self, pb_utils: Any, labels: Mapping[str, str]) -> None:
        self._pb = pb_utils
        self._labels = dict(labels)
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._sent: dict[tuple[str, str], float] = {}

    def begin(self, snapshot: Snapshot) -> None:
        """Counters are published from here on: what `snapshot` has of them is left out."""
        for name, value in snapshot.items():
            if _is_counter(name):
                by_label = value if isinstance(value, dict) else {"": value}
                self._sent.update({(name, label): float(number) for label, number in by_label.items()})

    def publish(self, snapshot: Snapshot) -> None:
        """Send what changed since the last time, and when it was sent: a process that died leaves its last
        values behind, and nothing else tells them from those of an idle one."""
        for name, value in snapshot.items():
            by_label = value if isinstance(value, dict) else {"": value}
            # From the last one: whoever reads in between finds no bucket that holds more than a larger one.
            for label, number in reversed(by_label.items()):
                self._send(name, label, float(number))
        self._send("reported_timestamp_seconds", "", time.time())

    def complain(self, error: Exception) -> None:
        with contextlib.suppress(Exception):  # what broke the one may break the other
            self._pb.Logger.log_error(f"publishing metrics failed: {type(error).__name__}")

    def _send(self, name: str, label: str, number: float) -> None:
        key = name, label
        if key not in self._metrics:
            kind, text = _FAMILIES[name]
            own = {kind: label} if kind else {}
            self._metrics[key] = self._family(name, text).Metric(labels=self._labels | own)
            self._sent.setdefault(key, 0.0)
        difference = number - self._sent[key]
        if difference:
            if _is_counter(name):
                self._metrics[key].increment(difference)
            else:
                self._metrics[key].set(number)
            self._sent[key] = number

    def _family(self, name: str, text: str) -> Any:
        if name not in self._families:
            family = self._pb.MetricFamily
            kind = family.COUNTER if _is_counter(name) else family.GAUGE
            self._families[name] = family(name=f"onecard_{name}", description=text, kind=kind)
        return self._families[name]


class Reporter:
    """Publishes what `snapshot` returns once a second, from a thread of its own, and once more at the end.

    Counters begin at 0 here: what was counted before, the model asked itself.
    """

    def __init__(self, publisher: Publisher, snapshot: Callable[[], Snapshot]) -> None:
        self._publisher = publisher
        self._snapshot = snapshot
        self._attempt(publisher.begin)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while True:
            self._attempt(self._publisher.publish)
            if ended:
                return
            ended = self._closing.wait(_INTERVAL_S)

    def _attempt(self, pass_on: Callable[[Snapshot], None]) -> None:
        try:
            pass_on(self._snapshot())
        except Exception as error:  # the next one may succeed, and nothing else depends on it
            self._publisher.complain(error)


def _is_counter(name: str) -> bool:
    return name.endswith(("_total", "_bucket", "_sum", "_count"))


def _histogram(name: str, text: str) -> dict[str, tuple[str, str]]:
    return {
        f"{name}_bucket": ("le", f"{text}: requests by upper bound in seconds"),
        f"{name}_sum": ("", f"{text}: seconds of all requests"),
        f"{name}_count": ("", f"{text}: requests"),
    }


# By name: the label that tells its values apart, if any, and what it is.
_FAMILIES: Final[Mapping[str, tuple[str, str]]] = {
    "requests_total": ("outcome", "Requests by how they ended"),
    "rejections_total": ("reason", "Rejected requests by reason"),
    "queue_requests": ("", "Requests that wait"),
    "queue_limit_requests": ("", "Requests that may wait (max_size of the stack file)"),
    "deadline_seconds": (
        "",
        "From arrival to the answer, or the first token (deadline_ms of the stack file)",
    ),
    "reported_timestamp_seconds": ("", "When the model's process last reported, in Unix time"),
    **_histogram("queue_seconds", "Time from arrival to start"),
    **_histogram("request_seconds", "Time from arrival to the last response"),
    **_histogram("first_token_seconds", "Time from arrival to the first token"),
    "rows_total": ("", "Texts or pairs that were computed"),
    "runs_total": ("", "Runs of the engine that computed them"),
    "tokens_total": ("", "Tokens of texts that were computed"),
    "padding_total": ("", "Padding tokens that were computed beside them"),
    "truncated_total": ("", "Texts that lost tokens to the length limit"),
    "resident_bytes": ("", "Resident memory of the model's process"),
    "planned_bytes": ("", "Memory of the card that the plan promised the engine"),
    "llm_slots": ("", "Sequences that can run at once"),
    "llm_slots_active": ("", "Sequences that run now"),
    "llm_cache_tokens": ("", "Tokens whose keys and values are in the cache"),
    "llm_cache_capacity_tokens": ("", "Tokens that the cache has room for"),
    "llm_tokens_per_second": ("", "Tokens generated per second, over the last seconds"),
    "llm_prompt_tokens_total": ("", "Tokens of prompts that were started"),
    "llm_cached_tokens_total": ("", "Of those, tokens found in the cache instead of computed"),
    "llm_generated_tokens_total": ("", "Tokens that were generated"),
}
