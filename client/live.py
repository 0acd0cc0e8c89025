"""`client status --watch`: what the models do now, from their metrics, until interrupted."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime

import click
from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from . import metrics
from .display import new_console
from .errors import Unreachable
from .metrics import Scrape
from .rates import ModelRates, rates
from .transport import Endpoint

# The models send their counts once a second: over less, a rate would jump.
WINDOW_S = 5.0
SLACK = 1.2  # looks are not taken at the exact moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What is shown at one moment; rates are over the last `window_s` seconds.

    `error` says why the metrics could not be read this time; `models` are then what was seen `age_s` ago.
    """

    time: str
    window_s: float
    age_s: float
    error: str | None
    models: tuple[ModelRates, ...]


class History:
    """The readings of the last window, and what they say."""

    def __init__(self, window: float = WINDOW_S) -> None:
        self._window = window
        self._kept: deque[Scrape] = deque()
        self._seconds = 0.0
        self._models: tuple[ModelRates, ...] = ()

    def add(self, scrape: Scrape) -> Snapshot:
        """Take one reading, made or failed, and say what is to be shown then."""
        if not scrape.error:
            self._kept.append(scrape)
            while scrape.at - self._kept[0].at > self._window * SLACK:
                self._kept.popleft()  # also what came before the server was away
            self._seconds = scrape.at - self._kept[0].at
            self._models = rates(self._kept[0], scrape)
        return Snapshot(
            time=datetime.now().astimezone().isoformat(timespec="milliseconds"),
            window_s=round(self._seconds, 3),
            age_s=round(scrape.at - self._kept[-1].at, 3) if self._kept else 0.0,
            error=scrape.error or None,
            models=self._models,
        )


def watch(endpoint: Endpoint, interval: float, as_json: bool) -> None:
    """Until interrupted. A server that goes away is said to be away, and shown again when it is back."""
    address = metrics.address_for(endpoint)
    if not address:
        raise Unreachable(
            f"where the metrics of {endpoint.url} are is not known",
            next_step="set ONECARD_URL_METRICS=HOST:PORT",
        )
    history = History(max(WINDOW_S, interval))
    if as_json:
        _every(interval, address, lambda scrape: _print_line(history.add(scrape)))
        return
    with Live(console=new_console(), auto_refresh=False, screen=True) as live:
        title = f"{address}, every {interval:g} s"
        _every(
            interval, address, lambda scrape: live.update(render(history.add(scrape), title), refresh=True)
        )


def _every(interval: float, address: str, show: Callable[[Scrape], object]) -> None:
    due = time.monotonic()
    try:
        while True:
            show(metrics.read(address, timeout=max(interval, 1.0)))
            due = max(due + interval, time.monotonic())
            time.sleep(due - time.monotonic() if due > time.monotonic() else 0)
    except KeyboardInterrupt:
        return


def _print_line(snapshot: Snapshot) -> None:
    click.echo(json.dumps(asdict(snapshot), ensure_ascii=False))


def render(snapshot: Snapshot, title: str) -> RenderableType:
    parts: list[RenderableType] = [
        Text(f"{title}, rates over the last {snapshot.window_s:.0f} s, times in ms")
    ]
    if snapshot.error:
        since = f"; what follows is {snapshot.age_s:.0f} s old" if snapshot.models else ""
        parts.append(Text(f"the server is away ({snapshot.error}){since}", style="red"))
    parts.append(_models_table(snapshot.models))
    if any(model.slots is not None for model in snapshot.models):
        parts.append(_generating_table(snapshot.models))
    parts += [_rejections(model) for model in snapshot.models if model.rejected_per_s]
    return Group(*parts)


def _models_table(models: tuple[ModelRates, ...]) -> Table:
    table = _narrow_table(
        "req/s", "fail/s", "rej/s", "queue", "wait", "batch", "p50", "p99", "hits", "MiB/plan"
    )
    for model in models:
        table.add_row(
            escape(model.name),
            f"{model.requests_per_s:,.1f}",
            _alarming(model.failed_per_s),
            _alarming(sum(model.rejected_per_s.values())),
            "" if model.queue_requests is None else str(model.queue_requests),
            _tenths(model.queue_ms),
            _tenths(model.batch),
            _tenths(model.p50_ms),
            _tenths(model.p99_ms),
            _cache(model),
            _memory(model),
        )
    return table


def _generating_table(models: tuple[ModelRates, ...]) -> Table:
    table = _narrow_table("slots busy", "tokens/s", "first token p50", "p99")
    for model in models:
        if model.slots is not None:
            table.add_row(
                escape(model.name),
                f"{model.slots_active or 0}/{model.slots}",
                f"{model.tokens_per_s or 0:,.1f}",
                _tenths(model.first_token_p50_ms),
                _tenths(model.first_token_p99_ms),
            )
    return table


def _narrow_table(*headings: str) -> Table:
    """For 80 columns: where they do not suffice, names are cut and figures are not."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("model", no_wrap=True, min_width=8)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    return table


def _rejections(model: ModelRates) -> Text:
    reasons = sorted(model.rejected_per_s.items(), key=lambda item: -item[1])
    told = ", ".join(f"{reason} {rate:,.1f}/s" for reason, rate in reasons)
    return Text(f"{model.name} rejects: {told}", style="red")


def _alarming(rate: float) -> str:
    return f"[red]{rate:,.1f}[/]" if rate else "0"


def _tenths(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _cache(model: ModelRates) -> str:
    """The share of lookups that the cache answered."""
    if model.cache_hits_per_s is None:
        return ""
    asked = model.cache_hits_per_s + (model.cache_misses_per_s or 0.0)
    return f"{model.cache_hits_per_s / asked:.0%}" if asked else "-"


def _memory(model: ModelRates) -> str:
    if model.resident_bytes is None:
        return ""
    plan = f"/{model.planned_bytes / 2**20:.0f}" if model.planned_bytes else ""
    return f"{model.resident_bytes / 2**20:.0f}{plan}"
