"""Load of streams: each request's pieces with the times at which they came, and the figures made of them.

As the encoders' load generator it shares the cores with the server: requests are serialized beforehand,
responses are kept as bytes with their times and read when the measurement is over.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..codec import InferRequest
from ..errors import BenchError
from ..generate import OUTPUTS, parameters, request_inputs
from ..generate import Prompt as WirePrompt
from ..wire import channel_arguments, infer_message
from .generate_data import Prompt
from .loadgen import REJECTED_PAUSE_S, STRAGGLERS_S, never, percentile

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"


@dataclass(slots=True)
class Timed:
    """One request: when it was meant to start, and its pieces. Times are of perf_counter, in seconds."""

    start: float
    times: list[float] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # of each piece, once `read` was called
    usage: dict[str, float] = field(default_factory=dict)
    text: str = ""

    def read(self) -> Timed:
        """Make tokens and usage of the responses' bytes."""
        from tritonclient.grpc import InferResult, service_pb2

        for raw in self.raw:
            response = service_pb2.ModelStreamInferResponse.FromString(raw)
            result = InferResult(response.infer_response)
            self.tokens.append(int(result.as_numpy("token_counts").sum()))
            self.text += b"".join(result.as_numpy("text")).decode("utf-8", "replace")
            usage = result.as_numpy("usage")
            if usage is not None and usage[0]:
                self.usage = json.loads(usage[0])
        self.raw.clear()
        return self

    @property
    def first_s(self) -> float | None:
        """Seconds to the first token; None when there was none."""
        came = (at for at, count in zip(self.times, self.tokens, strict=True) if count)
        first = next(came, None)
        return None if first is None else first - self.start

    @property
    def last(self) -> float:
        return self.times[-1] if self.times else self.start

    def gaps(self, begin: float, end: float) -> Iterator[tuple[float, int, float]]:
        """Seconds since the piece before, tokens, and the time, of the pieces that came in [begin, end]."""
        previous = None
        for at, count in zip(self.times, self.tokens, strict=True):
            if count:
                if previous is not None and begin <= at <= end:
                    yield at - previous, count, at
                previous = at


@dataclass(frozen=True, slots=True)
class StreamPoint:
    """One measured point. Times are in ms; an inter-token time is a piece's, divided by its tokens."""

    requests: int
    tokens: int
    seconds: float
    first_p50_ms: float
    first_p99_ms: float
    inter_p50_ms: float
    inter_p99_ms: float
    pause_ms: float
    prompt_tokens_mean: float
    prompt_tokens_max: int
    cached_share: float
    rejected: int = 0
    offered_per_s: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_request(self) -> float:
        return self.tokens / self.requests

    def as_json(self) -> dict[str, Any]:
        """Figures for the document, rounded."""
        values: dict[str, Any] = {
            "tokens_per_s": round(self.tokens_per_s, 2),
            "first_token_p50_ms": round(self.first_p50_ms, 2),
            "first_token_p99_ms": round(self.first_p99_ms, 2),
            "inter_token_p50_ms": round(self.inter_p50_ms, 3),
            "inter_token_p99_ms": round(self.inter_p99_ms, 3),
            "longest_pause_ms": round(self.pause_ms, 2),
            "requests": self.requests,
            "rejected": self.rejected,
            "cached_prompt_share": round(self.cached_share, 3),
        }
        if self.offered_per_s is not None:
            values["offered_requests_per_s"] = round(self.offered_per_s, 3)
        return values


def point(
    done: Sequence[Timed], begin: float, end: float, *, rejected: int = 0, offered: float | None = None
) -> StreamPoint:
    """The figures of [begin, end]: tokens that came then, and first tokens of requests that started then."""
    firsts = sorted(
        timed.first_s for timed in done if begin <= timed.start <= end and timed.first_s is not None
    )
    if not firsts:
        raise BenchError("no stream was answered")
    gaps = [found for timed in done for found in timed.gaps(begin, end)]
    inter = sorted(gap / count for gap, count, _ in gaps for _ in range(count)) or [0.0]
    tokens = sum(
        count
        for timed in done
        for at, count in zip(timed.times, timed.tokens, strict=True)
        if begin <= at <= end
    )
    lengths = [int(timed.usage["prompt_tokens"]) for timed in done if timed.usage] or [0]
    cached = sum(timed.usage.get("cached_tokens", 0) for timed in done)
    return StreamPoint(
        requests=len(firsts),
        tokens=tokens,
        seconds=end - begin,
        first_p50_ms=percentile(firsts, 0.5) * 1e3,
        first_p99_ms=percentile(firsts, 0.99) * 1e3,
        inter_p50_ms=percentile(inter, 0.5) * 1e3,
        inter_p99_ms=percentile(inter, 0.99) * 1e3,
        pause_ms=max((gap for gap, _, _ in gaps), default=0.0) * 1e3,
        prompt_tokens_mean=sum(lengths) / len(lengths),
        prompt_tokens_max=max(lengths),
        cached_share=cached / max(1, sum(lengths)),
        rejected=rejected,
        offered_per_s=offered,
    )


def serialize(model: str, prompt: Prompt, new_tokens: int, *, ignore_eos: bool = True) -> bytes:
    """A greedy streaming request as bytes."""
    if prompt.messages:
        content = WirePrompt("messages", json.dumps(prompt.messages, ensure_ascii=False).encode())
    else:
        content = WirePrompt("text", prompt.text.encode())
    tensors = parameters({"max_tokens": new_tokens, "temperature": 0.0, "ignore_eos": ignore_eos})
    request = InferRequest(
        model=model,
        inputs=request_inputs(content, tensors, stream=True),
        outputs=OUTPUTS,
        request_id="",
        decoupled=True,
    )
    payload: bytes = infer_message(request).SerializeToString()
    return payload


class Streamer:
    """One gRPC channel that carries serialized requests and keeps their responses as bytes."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def __aenter__(self) -> Streamer:
        import grpc.aio

        self._end = grpc.aio.EOF
        self._channel = grpc.aio.insecure_channel(self._address, options=channel_arguments(self._address))
        self._call = self._channel.stream_stream(METHOD, request_serializer=None, response_deserializer=None)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def run(self, payload: bytes, timed: Timed | None = None) -> Timed:
        """Send one request and keep what comes, in `timed` if given, until its end or until this task's."""
        timed = timed or Timed(time.perf_counter())
        call = self._call(iter([payload]))
        try:
            while (raw := await call.read()) is not self._end:
                timed.times.append(time.perf_counter())
                timed.raw.append(raw)
        finally:
            call.cancel()
        if timed.raw:
            raise_failure(timed.raw[-1])
        return timed

    async def closed_loop(
        self, payloads: Iterator[bytes], *, concurrency: int, warm_up: float, seconds: float
    ) -> StreamPoint:
        """`concurrency` callers; the window begins after the warm-up, under load, and ends under load too."""
        done: list[Timed] = []
        begin = time.perf_counter() + warm_up
        end = begin + seconds

        async def caller() -> None:
            # One request in the window at least, were it longer than the window itself.
            while time.perf_counter() < end:
                done.append(await self.run(next(payloads)))

        async with asyncio.TaskGroup() as callers:
            for _ in range(concurrency):
                callers.create_task(caller())
        started = [timed.start for timed in done if timed.start >= begin]
        if not started:  # requests longer than the window: all that was measured counts
            begin, end = min(timed.start for timed in done), max(timed.last for timed in done)
        return point([timed.read() for timed in done], begin, end)

    async def open_loop(
        self,
        payloads: Iterator[bytes],
        times: Sequence[float],
        rate: float,
        is_rejection: Callable[[Exception], bool] = never,
    ) -> StreamPoint:
        """A request at each of `times` (seconds from now), `rate` per second of them; first tokens count from
        the intended times."""
        done: list[Timed] = []
        rejected = 0
        start = time.perf_counter()

        async def one(intended: float, payload: bytes) -> None:
            nonlocal rejected
            try:
                done.append(await self.run(payload, Timed(intended)))
            except Exception as error:
                if not is_rejection(error):
                    raise
                rejected += 1
                await asyncio.sleep(REJECTED_PAUSE_S)

        async with asyncio.timeout(times[-1] + STRAGGLERS_S), asyncio.TaskGroup() as tasks:
            for at in times:
                delay = start + at - time.perf_counter()
                if delay > 0:
                    await asyncio.sleep(delay)
                tasks.create_task(one(start + at, next(payloads)))
        read = [timed.read() for timed in done]
        last = max((timed.last for timed in read), default=start)
        return point(read, start, last, rejected=rejected, offered=rate)

    async def steady(self, payloads: Sequence[bytes]) -> float | None:
        """Tokens per second while all of these streams decode: from the last one's first token to the first
        one's last. None when they never all do."""
        tasks = [asyncio.create_task(self.run(payload)) for payload in payloads]
        done = [timed.read() for timed in await gathered(tasks)]
        begin = max(timed.start + (timed.first_s or 0.0) for timed in done)
        end = min(timed.last for timed in done)
        if end <= begin:
            return None
        tokens = sum(
            count
            for timed in done
            for at, count in zip(timed.times, timed.tokens, strict=True)
            if begin < at <= end
        )
        return tokens / (end - begin)


def raise_failure(raw: bytes) -> None:
    """Raise tritonclient's exception when the response is a failure's text: it is a stream's last."""
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import InferenceServerException

    message = service_pb2.ModelStreamInferResponse.FromString(raw).error_message
    if message:
        raise InferenceServerException(msg=message, status="400")


async def gathered(tasks: Iterable[asyncio.Task[Timed]]) -> list[Timed]:
    """Their results; the first failure cancels the others."""
    waiting = list(tasks)
    try:
        return await asyncio.gather(*waiting)
    finally:
        for task in waiting:
            task.cancel()
