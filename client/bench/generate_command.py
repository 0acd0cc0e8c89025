"""One generating model measured: baseline, each served variant, what memory allows; the JSON of it all."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BenchError
from . import machine
from .generate_baseline import BATCHES, GenerateBaseline, Speed
from .generate_data import SMALLEST_NUMBER, SYNTHETIC_TOKENS, BenchGenerator, Prompt, choose
from .generate_load import Streamer, StreamPoint, serialize
from .generate_probe import (
    ANSWER_TOKENS,
    TURNS,
    Background,
    conversations,
    first_tokens,
    pauses,
    steady_rates,
)
from .loadgen import arrivals, first_failure, grpc_failure, was_rejected

CONCURRENCIES = (1, 4, 8, 16)
BASELINES = ("fp32", "bf16")
BACKGROUND = 7
LONG_PROMPT = 512
HISTORY = 1000
BANDWIDTH_S = 1.0
STEADY_S = 0.5
ARRIVALS = 6  # of an open loop, about, at least

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratePlan:
    """How long and how hard to measure. `prompt_tokens` None takes the evaluation conversations."""

    seconds: float
    warm_up: float
    baseline_seconds: float
    baseline_limit: float
    new_tokens: int
    repeats: int
    rates: tuple[float, ...]  # per cent of the closed loop's peak
    prompt_tokens: int | None = None
    pool: int = 64


QUICK = GeneratePlan(
    seconds=1.0,
    warm_up=0.3,
    baseline_seconds=0.6,
    baseline_limit=10,
    new_tokens=32,
    repeats=3,
    rates=(50, 80),
    pool=32,
)
FULL = GeneratePlan(
    seconds=6.0,
    warm_up=1.5,
    baseline_seconds=6.0,
    baseline_limit=120,
    new_tokens=48,
    repeats=7,
    rates=(50, 80),
)


def make_plan(settings: dict[str, Any]) -> GeneratePlan:
    """From the command's options; None leaves the plan's own."""
    plan = QUICK if settings["quick"] else FULL
    changes = {
        "seconds": settings["seconds"],
        "baseline_seconds": settings["seconds"],
        "rates": tuple(settings["rates"]),
        "prompt_tokens": settings.get("prompt_tokens"),
        "new_tokens": settings.get("new_tokens"),
    }
    return replace(plan, **{name: value for name, value in changes.items() if value})


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts of a run: the pool, long ones, and the turns of a conversation."""

    pool: tuple[Prompt, ...]
    source: str
    new_tokens: int
    long: tuple[Prompt, ...]
    turns: tuple[str, ...]
    chat: bool


@dataclass(frozen=True, slots=True)
class Served:
    """Everything measured on one variant; times in seconds unless a name says ms."""

    closed: dict[int, StreamPoint]
    open: dict[float, StreamPoint]
    steady: dict[int, float]
    idle_s: float
    busy_s: float
    busy_streams: int
    pause: dict[str, float]
    conversation: dict[str, Any]


def workload(model: BenchGenerator, baseline: GenerateBaseline, plan: GeneratePlan) -> Workload:
    """Prompts that a slot holds together with their answers."""
    room = model.capacity - plan.new_tokens - 8
    if room < 16:
        raise BenchError(f"a slot of {model.capacity} tokens has no room to measure in", model=model.name)
    # The messages alone make the history; answers and the template come on top, where there is room.
    message = min(HISTORY // (TURNS - 1), (model.capacity - 64) // TURNS - ANSWER_TOKENS - 8)
    wanted = [(min(LONG_PROMPT, room), 8), (max(12, message), TURNS)]
    if plan.prompt_tokens is None and model.prompts:
        long, turns = baseline.texts(model, wanted)
        pool, source = choose(model.prompts, plan.pool), "evaluation conversations of middle length"
    else:
        tokens = min(plan.prompt_tokens or SYNTHETIC_TOKENS, room)
        long, turns, texts = baseline.texts(model, [*wanted, (tokens, plan.pool)])
        pool, source = [Prompt(text=text) for text in texts], f"synthetic texts of {tokens} tokens"
    return Workload(
        pool=tuple(pool),
        source=source,
        new_tokens=plan.new_tokens,
        long=tuple(Prompt(text=text) for text in long),
        turns=tuple(turns),
        chat=any(prompt.messages for prompt in model.prompts),
    )


def measure(
    model: BenchGenerator,
    baseline: GenerateBaseline,
    plan: GeneratePlan,
    address: str,
    pids: Sequence[int],
    say: Say,
) -> dict[str, Any]:
    """One model of the document: baseline first, then each served variant, minutes apart at most."""
    given = workload(model, baseline, plan)
    speeds = {}
    for precision in BASELINES:
        say(f"{model.name}: baseline {precision}")
        speeds[precision] = baseline.measure(model, precision, given.pool, given.new_tokens)
    bandwidth = baseline.read_bandwidth(model, BANDWIDTH_S)
    served, memory, roofline = {}, {}, {}
    for precision, name in model.variants.items():
        say(f"{model.name}: served {precision}")
        served[precision] = found = Variant(model, address, name, given, plan).measure()
        pids_of = machine.model_pids(pids, name)
        memory[precision] = round(machine.tree_resident_mib(pids_of), 1) if pids_of else None
        weights = baseline.weight_bytes(model, precision)
        roofline[precision] = bound(model, precision, weights, bandwidth, found)
    return document(given, speeds, served, {"served": memory, "roofline": roofline, "read": bandwidth})


class Variant:
    """Loads one served variant."""

    def __init__(
        self, model: BenchGenerator, address: str, name: str, given: Workload, plan: GeneratePlan
    ) -> None:
        self._model, self._address, self._name = model, address, name
        self._given, self._plan = given, plan
        # Distinct from the requests of an earlier run against the same server, too.
        self._numbers = itertools.count(SMALLEST_NUMBER + int(time.time()) % 800_000 * 100)

    def measure(self) -> Served:
        """Every point of the plan; BenchError when a request fails."""
        # A full collection over everything imported would stop the generator for tens of milliseconds.
        gc.collect()
        gc.freeze()
        try:
            return asyncio.run(self._measure())
        except (BenchError, KeyboardInterrupt):
            raise
        except BaseException as error:
            failure = grpc_failure(first_failure(error), self._address, self._name)
            raise BenchError(f"a stream failed under load: {failure}", model=self._name) from error

    async def _measure(self) -> Served:
        plan, given = self._plan, self._given
        async with Streamer(self._address) as streamer:
            closed = {
                count: await streamer.closed_loop(
                    self._payloads(given.pool, given.new_tokens),
                    concurrency=count,
                    warm_up=plan.warm_up,
                    seconds=plan.seconds,
                )
                for count in CONCURRENCIES
            }
            peak = max(found.tokens_per_s for found in closed.values()) / given.new_tokens
            opened = {percent: await self._open(streamer, peak * percent / 100) for percent in plan.rates}
            counts = [count for count in CONCURRENCIES if count <= self._model.slots]
            steady = await steady_rates(
                streamer, self._payloads(given.pool, self._lasting(closed)), counts, plan.repeats
            )
            idle, busy, streams, pause = await self._probes(streamer)
            conversation = await conversations(
                streamer,
                self._name,
                given.turns,
                chat=given.chat,
                repeats=max(1, plan.repeats // 2),
                numbers=self._numbers.__next__,
            )
        return Served(closed, opened, steady, idle, busy, streams, pause, conversation)

    async def _probes(self, streamer: Streamer) -> tuple[float, float, int, dict[str, float]]:
        """First token alone, first token beside streams, how many those are, and their pauses."""
        plan, given = self._plan, self._given
        idle = await first_tokens(streamer, self._payloads(given.pool, 2), repeats=plan.repeats)
        streams = min(BACKGROUND, self._model.slots - 1)
        if streams < 1:
            return idle, idle, 0, {}
        # As long as a slot has room, so that they seldom begin anew.
        lasting = max(given.new_tokens, self._model.capacity - 2 * SYNTHETIC_TOKENS)
        async with Background(streamer, self._payloads(given.pool, lasting), streams) as background:
            same = self._payloads(given.pool, 2)
            busy = await first_tokens(streamer, same, repeats=plan.repeats, background=background)
            long = self._payloads(given.long, 1)
            pause = await pauses(streamer, long, repeats=plan.repeats, background=background)
        return idle, busy, streams, pause

    async def _open(self, streamer: Streamer, rate: float) -> StreamPoint:
        # Long enough for a few requests, were the model slow.
        seconds = min(max(self._plan.seconds, ARRIVALS / rate), ARRIVALS * self._plan.seconds)
        times = arrivals(rate, seconds) or [0.0]
        payloads = self._payloads(self._given.pool, self._given.new_tokens)
        return await streamer.open_loop(payloads, times, rate, was_rejected)

    def _payloads(self, prompts: Sequence[Prompt], new_tokens: int) -> Iterator[bytes]:
        for prompt in itertools.cycle(prompts):
            yield serialize(self._name, prompt.distinct(next(self._numbers)), new_tokens)

    def _lasting(self, closed: dict[int, StreamPoint]) -> int:
        """Tokens of streams that last a while, as far as a slot has room behind the longest prompt."""
        room = self._model.capacity - max(found.prompt_tokens_max for found in closed.values()) - 8
        wanted = max(2 * self._given.new_tokens, int(closed[1].tokens_per_s * STEADY_S))
        return max(2, min(room, wanted))


def bound(
    model: BenchGenerator, precision: str, weights: int | None, bandwidth: float, served: Served
) -> dict[str, Any] | None:
    """What memory allows: every step reads the weights once and each stream's cache; None where unknown."""
    found = model.manifest(precision)
    if weights is None or found is None:
        return None
    serving = found[1]["serving"]
    # ONNX Runtime's CPU attention keeps the cache in FP32; engines as the graph has it.
    width = 4 if found[1]["target"] == "onnxruntime" or serving.get("cache_type") == "fp32" else 2
    cached = 2 * serving["layers"] * serving["kv_heads"] * serving["head_dim"] * width
    length = served.closed[1].prompt_tokens_mean + served.closed[1].tokens_per_request / 2
    rows = {}
    for count, rate in served.steady.items():
        step = weights + count * length * cached
        allowed = count * bandwidth / step
        rows[str(count)] = {
            "bytes_per_token": round(step / count),
            "bound_tokens_per_s": round(allowed, 1),
            "tokens_per_s": round(rate, 1),
            "share": round(rate / allowed, 3),
        }
    return {"weight_bytes": weights, "cache_bytes_per_token": cached, "by_streams": rows}


def document(
    given: Workload, speeds: dict[str, Speed], served: dict[str, Served], rest: dict[str, Any]
) -> dict[str, Any]:
    """The model's part of the document: rates in tokens per second, times in ms."""
    return {
        "task": "generate",
        "unit": "tokens",
        "prompts": _prompts(given, next(iter(served.values())).closed[1]),
        "baseline": {
            precision: {
                size: {name: round(value, 2) for name, value in figures.items()}
                for size, figures in speed.points.items()
            }
            for precision, speed in speeds.items()
        },
        "served": {p: {str(n): found.as_json() for n, found in s.closed.items()} for p, s in served.items()},
        "open_loop": {
            p: {f"{percent:g}": found.as_json() for percent, found in s.open.items()}
            for p, s in served.items()
        },
        "steady_tokens_per_s": {
            p: {str(n): round(rate, 2) for n, rate in s.steady.items()} for p, s in served.items()
        },
        "first_token_beside_streams": {
            p: {
                "streams": s.busy_streams,
                "idle_ms": round(s.idle_s * 1e3, 2),
                "busy_ms": round(s.busy_s * 1e3, 2),
            }
            for p, s in served.items()
        },
        "pause_for_long_prompt": {
            p: {name: round(value, 2) for name, value in s.pause.items()} for p, s in served.items()
        },
        "conversation": {p: s.conversation for p, s in served.items()},
        "read_gb_per_s": round(rest["read"] / 1e9, 2),
        "roofline": rest["roofline"],
        "memory_mb": {
            "served": rest["served"],
            "baseline": {precision: round(speed.memory_mib, 1) for precision, speed in speeds.items()},
        },
        "ratios": {precision: ratios(speeds, s) for precision, s in served.items()},
    }


def _prompts(given: Workload, some: StreamPoint) -> dict[str, Any]:
    return {
        "source": given.source,
        "pool": len(given.pool),
        "tokens_mean": round(some.prompt_tokens_mean, 1),
        "tokens_max": some.prompt_tokens_max,
        "new_tokens": given.new_tokens,
    }


def ratios(speeds: dict[str, Speed], served: Served) -> dict[str, float]:
    """What the figures are worth against each other; those whose parts were not measured are left out."""
    found = {}
    for precision, speed in speeds.items():
        for size in BATCHES:
            if base := speed.points.get(str(size)):
                key = f"tokens_at_{size}_over_{precision}_batch{size}"
                found[key] = served.closed[size].tokens_per_s / base["tokens_per_s"]
        if one := speed.points.get("1"):
            key = f"first_token_over_{precision}"
            found[key] = served.closed[1].first_p50_ms / one["first_token_ms"]
    if 1 in served.steady and 8 in served.steady:
        found["steady_at_8_over_1"] = served.steady[8] / served.steady[1]
    if served.busy_streams:
        found["first_token_busy_over_idle"] = served.busy_s / served.idle_s
    found["first_token_reused_over_not"] = served.conversation["ratio"]
    return {name: round(value, 3) for name, value in found.items()}
