"""Hand answers to their consumers on other threads: a slow one holds up neither the engine nor the others."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

# How long an answer waits behind another consumer before one more thread takes over.
STALL_S = 0.05
_SPARE_THREADS = 2


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sample of a request gained since its last delta.

    index: which of the n samples. text: never ends inside a Hangul syllable, an emoji or a possible stop
    string; may be empty. token_ids: the new tokens, a stop token included; logprobs: one per token if asked
    for, else (). finish_reason: "" while the sample runs, else "stop", "length", "cancelled" or "error".
    usage: on the request's last delta only. error: why, for "error" (BadRequest, Busy or EngineFailed).
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str = ""
    usage: dict[str, float] | None = None
    error: Exception | None = None


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """At most one delta per sample; the request's last one stays last."""
    parts: dict[int, list[Delta]] = {}
    for delta in deltas:
        same = parts.pop(delta.index, [])
        same.append(delta)
        # By latest appearance, so that the delta with the usage ends up behind all others.
        parts[delta.index] = same
    return [same[0] if len(same) == 1 else _merge(same) for same in parts.values()]


def _merge(deltas: list[Delta]) -> Delta:
    last = deltas[-1]
    return Delta(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(value for delta in deltas for value in delta.logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
        error=last.error,
    )


class Outbox:
    """The deltas that one consumer has not been given yet."""

    __slots__ = ("consumer", "done", "lost", "on_lost", "pending", "ready_since")

    def __init__(self, consumer: Callable[[Delta], object], on_lost: Callable[[], object]) -> None:
        self.consumer = consumer
        self.on_lost = on_lost
        self.pending: list[Delta] = []
        self.ready_since = 0.0  # when it was put in line; 0: it is not in line
        self.lost = False
        self.done = threading.Event()

    def give(self, deltas: Iterable[Delta]) -> None:
        """Call the consumer; one that raises gets nothing more, and `on_lost` is told."""
        for delta in deltas:
            if not self.lost:
                try:
                    self.consumer(delta)
                except Exception:
                    self.lost = True
                    with contextlib.suppress(Exception):  # the thread that gives is others' too
                        self.on_lost()
            if delta.usage is not None:
                self.done.set()


class Delivers(Protocol):
    """What the scheduler needs of a delivery; neither call waits for a consumer."""

    def post(self, batch: Iterable[tuple[Outbox, Delta]]) -> None: ...

    def close(self) -> None: ...


class Delivery:
    """Gives deltas to consumers, each consumer's in order and never two at a time.

    One thread at a time works through all consumers (waking one per consumer would cost more than the
    work); when a consumer keeps the others waiting for STALL_S, a spare thread takes over from it. Deltas
    that gathered meanwhile are merged, so that a slow consumer gets fewer and larger ones.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[Outbox] = deque()
        self._main: int | None = None
        self._parked = 0
        self._watched = False  # a parked thread looks at the line by itself, every STALL_S
        self._closed = False

    def post(self, batch: Iterable[tuple[Outbox, Delta]]) -> None:
        """Put deltas in line; returns at once."""
        with self._changed:
            if self._closed:
                return
            now = time.monotonic()
            for outbox, delta in batch:
                outbox.pending.append(delta)
                if not outbox.ready_since:
                    outbox.ready_since = now
                    self._line.append(outbox)
            if not self._parked:
                self._start_thread()
            elif self._main is None or not self._watched:
                self._changed.notify()

    def close(self) -> None:
        """Let the threads go when what is in line has been given."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _start_thread(self) -> None:
        """Called with the lock, which the new thread waits for. Where the process may have no more threads,
        those that are there go on, and the next one in need tries again."""
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self._work, name="delivery", daemon=True).start()
            self._parked += 1

    def _work(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._parked -= 1
            while True:
                while self._line and (self._main in (None, me) or self._stalled()):
                    self._main = me
                    self._give_next()
                if self._main == me:
                    self._main = None
                if (self._closed and not self._line) or self._parked >= _SPARE_THREADS:
                    return
                self._parked += 1
                watching = self._main is not None and not self._watched
                self._watched = self._watched or watching
                self._changed.wait(STALL_S if watching else None)
                self._watched = self._watched and not watching
                self._parked -= 1

    def _stalled(self) -> bool:
        return time.monotonic() - self._line[0].ready_since > STALL_S

    def _give_next(self) -> None:
        """Give the first consumer in line what it has; called with the lock, which is open meanwhile."""
        outbox = self._line.popleft()
        deltas = merged(outbox.pending)
        outbox.pending = []
        if not self._parked:
            self._start_thread()
        elif self._line and not self._watched:
            self._changed.notify()
        self._changed.release()
        try:
            outbox.give(deltas)
        finally:
            self._changed.acquire()
            outbox.ready_since = 0.0
            if outbox.pending:
                outbox.ready_since = time.monotonic()
                self._line.append(outbox)
