"""Answers as they are generated: iterators of pieces that also keep what has come."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from . import generate
from .codec import InferReply, InferRequest
from .errors import Cancelled, ClientError, UnexpectedAnswer
from .flows import located
from .records import outcome_of
from .retry import Attempts, Clock
from .transport import AsyncReplyStream, ReplyStream, Transport
from .types import Delta, Generation


class _Pieces:
    """The part that neither blocks nor awaits."""

    def __init__(self, attempts: Attempts, clock: Clock, *, logprobs: bool) -> None:
        self._attempts, self._clock, self._logprobs = attempts, clock, logprobs
        self._assembly = generate.Assembly(logprobs=logprobs)
        self._waiting: deque[Delta] = deque()
        self._version = ""
        self._begun = self._ended = self._closed = False

    @property
    def generation(self) -> Generation:
        """What has come so far; complete once the iteration has ended by itself."""
        return self._assembly.generation()

    @property
    def text(self) -> str:
        """The first sample's text so far."""
        return self.generation.text

    def _take(self, reply: InferReply) -> None:
        self._begun = True
        self._version = reply.version
        for delta in generate.parse_deltas(reply, logprobs=self._logprobs) if reply.outputs else ():
            self._assembly.add(delta)
            self._waiting.append(delta)

    def _exhausted(self) -> None:
        """No more comes: an answer that is not finished then is an error, unless we closed the stream."""
        self._ended = True
        if self._assembly.finished:
            self._attempts.end("completed", version=self._version)
        elif not self._closed:
            error: ClientError = UnexpectedAnswer("the stream ended before the answer did")
            if self._attempts.request is not None:
                error = located(error, self._attempts.request)
            self._attempts.end("failed", error=error)
            raise error

    def _wait_after(self, error: ClientError) -> float:
        """Seconds until the next attempt; the error raised when there must be none: pieces come once."""
        if self._attempts.request is not None:
            located(error, self._attempts.request)
        if not self._begun and not self._closed:
            return self._attempts.wait_after(error, idempotent=True)
        self._ended = True
        self._attempts.end(outcome_of(error), error=error)
        raise error


class Stream(_Pieces):
    """Iterates over the Deltas of one answer, whose request is on its way.

    Leaving early with `close`, as the end of a `with` block does, ends the generation at the server too;
    `close` may be called from another thread.
    """

    def __init__(
        self,
        start: Callable[[], ReplyStream],
        attempts: Attempts,
        clock: Clock,
        *,
        logprobs: bool,
    ) -> None:
        super().__init__(attempts, clock, logprobs=logprobs)
        self._start = start
        self._replies = self._connect()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        while not self._waiting:
            if self._ended or self._closed:
                raise StopIteration
            self._receive()
        return self._waiting.popleft()

    def result(self) -> Generation:
        """The whole answer, once it has come."""
        for _ in self:
            pass
        return self.generation

    def close(self) -> None:
        self._closed = True
        self._replies.close()
        self._attempts.end("cancelled")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> ReplyStream:
        while True:
            try:
                self._attempts.begin()
                return self._start()
            except ClientError as error:
                self._clock.sleep(self._wait_after(error))

    def _receive(self) -> None:
        try:
            self._take(next(self._replies))
            while self._assembly.finished:  # to the call's own end: see ReplyStream.close
                self._take(next(self._replies))
        except StopIteration:
            self._exhausted()
        except ClientError as error:
            if self._assembly.finished:  # the answer is whole, whatever became of the call behind it
                self._exhausted()
                return
            self._clock.sleep(self._wait_after(error))
            if not self._closed:
                self._replies = self._connect()
            if self._closed:  # by another thread, meanwhile
                self._replies.close()


class Single:
    """A request with one response; `close`, from another thread, ends it or keeps it from starting."""

    def __init__(self, transport: Transport, request: InferRequest) -> None:
        self._transport, self._request = transport, request
        self._replies: ReplyStream | None = None
        self._closed = False

    def reply(self, attempts: Attempts, clock: Clock) -> InferReply:
        while True:
            try:
                reply = self._attempt(attempts.begin())
                attempts.end("completed", version=reply.version)
                return reply
            except ClientError as error:
                clock.sleep(attempts.wait_after(located(error, self._request), idempotent=True))

    def _attempt(self, timeout: float) -> InferReply:
        if self._closed:
            raise Cancelled("another prompt of the list failed")
        self._replies = self._transport.stream(self._request, timeout)
        try:
            # Closed while the stream was opened, it is not waited for; else to its own end.
            replies: list[InferReply] = [] if self._closed else [*self._replies]
        finally:
            self._replies.close()
        if replies:
            return replies[0]
        if self._closed:
            raise Cancelled("another prompt of the list failed")
        raise UnexpectedAnswer("the stream ended without an answer")

    def close(self) -> None:
        self._closed = True
        if self._replies is not None:
            self._replies.close()


class AsyncStream(_Pieces):
    """As Stream, for `async for`; the request leaves with the first wait."""

    def __init__(
        self,
        start: Callable[[], Awaitable[tuple[InferRequest, AsyncReplyStream]]],
        attempts: Attempts,
        clock: Clock,
        *,
        logprobs: bool,
    ) -> None:
        super().__init__(attempts, clock, logprobs=logprobs)
        self._start = start
        self._replies: AsyncReplyStream | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while not self._waiting:
            if self._ended or self._closed:
                raise StopAsyncIteration
            await self._receive()
        return self._waiting.popleft()

    async def result(self) -> Generation:
        """The whole answer, once it has come."""
        async for _ in self:
            pass
        return self.generation

    async def close(self) -> None:
        self._closed = True
        if self._replies is not None:
            await self._replies.close()
        self._attempts.end("cancelled")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _receive(self) -> None:
        try:
            if self._replies is None:
                self._attempts.begin()
                self._attempts.request, self._replies = await self._start()
                if self._closed:  # by another task, meanwhile
                    await self._replies.close()
            self._take(await anext(self._replies))
            while self._assembly.finished:
                self._take(await anext(self._replies))
        except StopAsyncIteration:
            self._exhausted()
        except ClientError as error:
            if self._assembly.finished:
                self._exhausted()
                return
            self._replies = None
            await self._clock.sleep_async(self._wait_after(error))
