"""Load: closed loop (N callers, each waiting for its answer), open loop (arrivals at a rate, come what may).

The generator shares the cores with the server it measures, so it does as little as possible: one asyncio gRPC
channel, requests serialized beforehand, answers left as bytes. (Measured: 76 microseconds of CPU per request
at 32 concurrent, where tritonclient's asyncio client takes 98 and threads 157.)
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import BenchError, Overloaded
from ..failures import translate
from ..wire import channel_arguments

Send = Callable[[bytes], Awaitable[object]]
METHOD = "/inference.GRPCInferenceService/ModelInfer"
STRAGGLERS_S = 30.0
REJECTED_PAUSE_S = 0.005  # a rejected caller that came back at once would only burn the server's core
CLOSED_LOOP_STRETCH = 5.0  # how far a point may outlast its duration to reach its request count


@dataclass(frozen=True, slots=True)
class Point:
    """One measured point: latencies in ms of answered requests, rates per second over `seconds`."""

    requests: int
    seconds: float
    per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    rejected: int = 0
    offered_per_s: float | None = None
    late_p99_ms: float | None = None  # open loop: how late the generator itself sent


@dataclass(slots=True)
class _Tally:
    latencies: list[float] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)
    rejected: int = 0


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that at least `share` of all values do not exceed."""
    if not ordered:
        raise ValueError("no values")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def arrivals(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Intended send times of a Poisson process, seconds from its start, all before `seconds`."""
    draw = random.Random(seed)
    times: list[float] = []
    at = draw.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += draw.expovariate(rate)
    return times


def never(error: Exception) -> bool:
    """No failure counts as a rejection: each ends the measurement."""
    return False


async def closed_loop(
    send: Send,
    payloads: Iterator[bytes],
    *,
    concurrency: int,
    seconds: float,
    minimum: int = 1,
    is_rejection: Callable[[Exception], bool] = never,
) -> Point:
    """`concurrency` callers for `seconds`, longer if fewer than `minimum` requests were answered by then."""
    tally = _Tally()
    start = time.perf_counter()
    end, latest = start + seconds, start + seconds * CLOSED_LOOP_STRETCH

    async def caller() -> None:
        now = time.perf_counter()
        while now < end or (len(tally.latencies) < minimum and now < latest):
            try:
                await send(next(payloads))
            except Exception as error:
                if not is_rejection(error):
                    raise
                tally.rejected += 1
                await asyncio.sleep(REJECTED_PAUSE_S)
                now = time.perf_counter()
            else:
                done = time.perf_counter()
                tally.latencies.append(done - now)
                now = done

    async with asyncio.TaskGroup() as callers:
        for _ in range(concurrency):
            callers.create_task(caller())
    return _point(tally, time.perf_counter() - start)


async def open_loop(
    send: Send,
    payloads: Iterator[bytes],
    times: Sequence[float],
    is_rejection: Callable[[Exception], bool] = never,
) -> Point:
    """A request at each of `times` (seconds from now), answered or not.

    Latency counts from the intended time, so that a stall of the server, or of this generator, shows in every
    request that it delays (no coordinated omission).
    """
    tally = _Tally()
    start = time.perf_counter()

    async def one(intended: float, payload: bytes) -> None:
        tally.lateness.append(time.perf_counter() - intended)
        try:
            await send(payload)
        except Exception as error:
            if not is_rejection(error):
                raise
            tally.rejected += 1
        else:
            tally.latencies.append(time.perf_counter() - intended)

    async with asyncio.timeout(times[-1] + STRAGGLERS_S), asyncio.TaskGroup() as tasks:
        for at in times:
            delay = start + at - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.create_task(one(start + at, next(payloads)))
    return _point(tally, time.perf_counter() - start, offered=len(times) / max(times[-1], 1e-9))


def _point(tally: _Tally, seconds: float, offered: float | None = None) -> Point:
    if not tally.latencies:
        raise BenchError("no request was answered")
    ordered = sorted(tally.latencies)
    p50, p90, p99 = (percentile(ordered, share) * 1e3 for share in (0.5, 0.9, 0.99))
    late = percentile(sorted(tally.lateness), 0.99) * 1e3 if tally.lateness else None
    return Point(len(ordered), seconds, len(ordered) / seconds, p50, p90, p99, tally.rejected, offered, late)


class Sender:
    """One gRPC channel that carries serialized requests and counts nothing."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def __aenter__(self) -> Send:
        import grpc.aio

        self._channel = grpc.aio.insecure_channel(self._address, options=channel_arguments(self._address))
        call = self._channel.unary_unary(METHOD, request_serializer=None, response_deserializer=None)

        async def send(payload: bytes) -> object:
            return await call(payload)

        return send

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()


def first_failure(error: BaseException) -> BaseException:
    """The failure inside the group that a TaskGroup raises."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def grpc_failure(error: BaseException, url: str, model: str) -> Exception:
    """Our error for a failed raw call."""
    import grpc
    from tritonclient.grpc._utils import get_error_grpc

    if isinstance(error, grpc.RpcError):
        return translate(get_error_grpc(error), url=url, model=model, request_id=None)
    return translate(error, url=url, model=model, request_id=None)


def was_rejected(error: Exception) -> bool:
    """Whether the server sent a raw call away because too much was waiting."""
    return isinstance(grpc_failure(error, "", ""), Overloaded)
