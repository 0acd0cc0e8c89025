"""The metrics that the server and its models publish, read in Prometheus's text format."""

from __future__ import annotations

import http.client
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import InvalidInput
from .transport import Endpoint, refusal
from .types import GenerationStatus

TIMEOUT_S = 5.0
MOST_BYTES = 1 << 24
USUAL_PORTS = ("8000", "8001")
METRICS_PORT = "8002"
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)\{(.*)\}[ \t]+(\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")

Labels = tuple[tuple[str, str], ...]  # sorted by name, without `model`
Series = Mapping[Labels, float]


@dataclass(frozen=True, slots=True)
class Scrape:
    """One reading: values by model, name and labels. `at` is a time of the monotonic clock; `error` says why
    there is nothing."""

    at: float
    models: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)
    error: str = ""

    def series(self, model: str, name: str) -> Series:
        return self.models.get(model, {}).get(name, {})

    def total(self, model: str, name: str, **labels: str) -> float:
        """The sum over the series that have these labels, versions of the model together."""
        wanted = set(labels.items())
        return sum(value for given, value in self.series(model, name).items() if wanted <= set(given))


def parse(text: str, at: float = 0.0) -> Scrape:
    """Samples without the label `model` are not ours to read; lines that are no sample are passed over."""
    models: dict[str, dict[str, dict[Labels, float]]] = {}
    for name, given, value in _SAMPLE.findall(text):
        labels = {key: _ESCAPED.sub(_unescaped, text) for key, text in _LABEL.findall(given)}
        model = labels.pop("model", None)
        try:
            number = float(value)
        except ValueError:
            continue
        if model is not None and math.isfinite(number):
            models.setdefault(model, {}).setdefault(name, {})[tuple(sorted(labels.items()))] = number
    return Scrape(at, models)


def _unescaped(found: re.Match[str]) -> str:
    return "\n" if found[1] == "n" else found[1]


def read(address: str, timeout: float = TIMEOUT_S) -> Scrape:
    """From host:port; an empty one with the reason when it cannot be read."""
    try:
        connection = http.client.HTTPConnection(_host_and_port(address), timeout=timeout)
    except ValueError as error:  # also http.client.InvalidURL
        return Scrape(time.monotonic(), error=str(error))
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        text = response.read(MOST_BYTES).decode("utf-8", "replace")
        if response.status != http.client.OK:
            return Scrape(time.monotonic(), error=f"status {response.status}")
        return parse(text, time.monotonic())
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Scrape(time.monotonic(), error=str(error) or type(error).__name__)
    finally:
        connection.close()


def address_for(endpoint: Endpoint, environment: Mapping[str, str] | None = None) -> str:
    """ONECARD_URL_METRICS, else the usual port beside a server on its usual ports, else nothing.

    Beside other ports, what answers at the usual one may be another server's. Raises InvalidInput for a
    variable that holds no address.
    """
    variables = os.environ if environment is None else environment
    if given := variables.get("ONECARD_URL_METRICS"):
        try:
            return _host_and_port(given)
        except ValueError as error:
            raise InvalidInput(
                f"cannot use ONECARD_URL_METRICS={given!r}: {error}",
                next_step="set it to host:port or [IPv6]:port, or unset it",
            ) from None
    port = endpoint.address.partition("/")[0].rpartition(":")[2]
    return f"{endpoint.host}:{METRICS_PORT}" if port in USUAL_PORTS else ""


def _host_and_port(address: str) -> str:
    """Of host:port, with or without http://. Raises ValueError with the reason for anything else."""
    scheme, separator, rest = address.rpartition("://")
    rest = rest.rstrip("/")
    if separator and scheme != "http":
        raise ValueError(f"metrics are read over http, not {scheme}")
    if reason := refusal(rest):
        raise ValueError(reason)
    return rest


def generation_status(scrape: Scrape, model: str) -> GenerationStatus | None:
    """None where the model publishes no such metrics."""
    if not scrape.series(model, "onecard_llm_slots"):
        return None

    def whole(name: str) -> int:
        return int(scrape.total(model, f"onecard_{name}"))

    return GenerationStatus(
        slots=whole("llm_slots"),
        slots_active=whole("llm_slots_active"),
        queued=whole("queue_requests"),
        cache_tokens=whole("llm_cache_tokens"),
        cache_capacity_tokens=whole("llm_cache_capacity_tokens"),
        tokens_per_second=scrape.total(model, "onecard_llm_tokens_per_second"),
        prompt_tokens=whole("llm_prompt_tokens_total"),
        cached_tokens=whole("llm_cached_tokens_total"),
        generated_tokens=whole("llm_generated_tokens_total"),
    )
