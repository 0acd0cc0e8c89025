"""The load generator, a process of its own: so its processor time can be told from the server's and reported.

Several connections, requests serialized beforehand, raw gRPC calls on one asyncio loop. Every answer is
checked, but one whose bytes were seen before costs a hash alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc
from load_work import Refusal, Shot, token_ids

from client.wire import CHANNEL_ARGUMENTS

CONNECTIONS = 8
# A request without an answer after this long is one that hangs.
HANGS_S = 30.0
# How a rejection begins, by the contract with clients; each may be sent again.
RETRYABLE = (
    "the queue is full",
    "the wait is too long",
    "the wait was too long",
    "the model is being unloaded",
)
ANSWERED, REFUSED, LEFT, REJECTED = "answered", "refused", "left", "rejected: "
_INFER = "/inference.GRPCInferenceService/ModelInfer"
_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
_REJECTED_PAUSE_S = 0.005


class Record(NamedTuple):
    """One request. Times are seconds: `at` since the run's start, when it was meant to be sent; the others
    since `at`: when it was sent, when its answer (a stream's first token) came, when nothing more came."""

    shot: int
    at: float
    sent: float
    first: float
    done: float
    outcome: str
    tries: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Open loop: `arrivals` are (seconds from the start, place in `shots`), ascending. `retries`: a rejected
    request is sent again, after longer and longer pauses, as a client would."""

    address: str
    shots: Sequence[Shot]
    arrivals: Sequence[tuple[float, int]]
    retries: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Closed loop: of each of `groups` (places in `shots`) so many callers, each waiting for its answer."""

    address: str
    shots: Sequence[Shot]
    groups: Sequence[tuple[Sequence[int], int]]
    seconds: float
    once: bool = False  # end when each shot of each group was sent once


@dataclass(slots=True)
class Result:
    """What came of it. `began` is time.monotonic(), which all processes share; `cpu_s` this process's own."""

    began: float
    records: list[Record] = field(default_factory=list)
    cpu_s: float = 0.0
    seconds: float = 0.0


@contextmanager
def generator() -> Iterator[tuple[Callable[[Plan | Loop], Any], int]]:
    """A function that runs a plan in the generator's process and gives a future of its Result; its pid."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _go_first) as pool:
        yield lambda plan: pool.submit(run, plan), pool.submit(os.getpid).result()


def _go_first() -> None:
    """Where that is allowed: clients of a real server have cores of their own."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)


def run(plan: Plan | Loop) -> Result:
    """Everything of a plan, in this process."""
    gc.collect()
    gc.freeze()
    return asyncio.run(_Run(plan).all())


class _Run:
    def __init__(self, plan: Plan | Loop) -> None:
        self._plan = plan
        self._shots = plan.shots
        self._start = 0.0
        self._records: list[Record] = []

    async def all(self) -> Result:
        options = [*CHANNEL_ARGUMENTS, ("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(self._plan.address, options) for _ in range(CONNECTIONS)]
        try:
            for channel in channels:
                await channel.channel_ready()
            self._unary = itertools.cycle([channel.unary_unary(_INFER) for channel in channels])
            self._stream = itertools.cycle([channel.stream_stream(_STREAM) for channel in channels])
            result = Result(time.monotonic())
            cpu, self._start = time.process_time(), time.perf_counter()
            await (self._open(self._plan) if isinstance(self._plan, Plan) else self._closed(self._plan))
            result.cpu_s, result.seconds = time.process_time() - cpu, time.perf_counter() - self._start
            result.records = self._records
            return result
        finally:
            for channel in channels:
                await channel.close()

    async def _open(self, plan: Plan) -> None:
        async with asyncio.TaskGroup() as tasks:
            for at, shot in plan.arrivals:
                delay = self._start + at - time.perf_counter()
                if delay > 0:
                    await asyncio.sleep(delay)
                tasks.create_task(self._one(shot, at, retries=plan.retries))

    async def _closed(self, loop: Loop) -> None:
        async with asyncio.TaskGroup() as callers:
            for places, count in loop.groups:
                turns = iter(places) if loop.once else itertools.cycle(places)
                for _ in range(count):
                    callers.create_task(self._caller(turns, loop.seconds))

    async def _caller(self, turns: Iterator[int], seconds: float) -> None:
        for shot in turns:
            at = time.perf_counter() - self._start
            if at >= seconds:
                return
            if (await self._one(shot, at)).startswith(REJECTED):
                await asyncio.sleep(_REJECTED_PAUSE_S)

    async def _one(self, place: int, at: float, *, retries: bool = False) -> str:
        shot, intended = self._shots[place], self._start + at
        send: Callable[[Shot], Awaitable[tuple[str, float]]] = self._streamed if shot.stream else self._asked
        sent = time.perf_counter() - intended
        pauses = iter(_PAUSES_S if retries else ())
        outcome, first = await send(shot)
        tries = 1
        while outcome.startswith(REJECTED) and (pause := next(pauses, None)) is not None:
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            outcome, first = await send(shot)
            tries += 1
        done = time.perf_counter() - intended
        came = first - intended if first else done
        self._records.append(Record(place, at, sent, came, done, sys.intern(outcome), tries))
        return outcome

    async def _asked(self, shot: Shot) -> tuple[str, float]:
        """One unary call: how it ended, and when its answer came."""
        try:
            answer = await next(self._unary)(shot.payload, timeout=HANGS_S)
        except grpc.aio.AioRpcError as error:
            return _failure(shot, error.code().name, error.details() or ""), time.perf_counter()
        came = time.perf_counter()
        return _judged(shot, shot.expected.fault(answer)), came

    async def _streamed(self, shot: Shot) -> tuple[str, float]:
        """One stream: how it ended, and when its first token came (0: none)."""
        call = next(self._stream)(iter([shot.payload]), timeout=HANGS_S)
        ids: list[int] = []
        first, pieces, message = 0.0, 0, ""
        try:
            while (raw := await call.read()) is not grpc.aio.EOF:
                message, new = _read(raw)
                pieces += 1
                if new and not first:
                    first = time.perf_counter()
                ids += new
                if pieces == shot.leave_after:
                    call.cancel()
                    return LEFT if not (fault := shot.expected.fault(ids)) else f"wrong: {fault}", first
        except grpc.aio.AioRpcError as error:
            return _failure(shot, error.code().name, error.details() or ""), first
        if message:
            return _failure(shot, "", message), first
        return _judged(shot, shot.expected.fault(ids)), first


def _read(raw: bytes) -> tuple[str, list[int]]:
    """Error message and new tokens of one response of a stream."""
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelStreamInferResponse.FromString(raw)
    if response.error_message:
        return response.error_message, []
    return "", token_ids(response.infer_response).tolist()


def _failure(shot: Shot, code: str, message: str) -> str:
    """A rejection may meet any request; another error only those that must be refused, and then that one."""
    beginning = next((text for text in RETRYABLE if message.startswith(text)), None)
    if beginning and code in ("UNAVAILABLE", ""):
        return REJECTED + beginning
    if isinstance(shot.expected, Refusal):
        fault = shot.expected.fault((code, message))
        return f"wrong: {fault}" if fault else REFUSED
    return f"failed: {code} {message}"[:200]


def _judged(shot: Shot, fault: str) -> str:
    if isinstance(shot.expected, Refusal):
        return "wrong: answered instead of refused"
    return f"wrong: {fault}" if fault else ANSWERED
