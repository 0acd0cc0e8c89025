"""Batches of an encoder's requests: what does not fit into one waits in a queue of our own.

Requests that an idle model can answer in one batch are answered while Triton waits: that costs least. What is
more is taken in at once and answered by a thread, so that how much waits, for how long and in which order is
decided here. Triton's own queue policies would cost more: with any of them Triton 2.51 leaves a request in an
idle queue for up to 500 ms.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from triton_repo.runtime.admission import AdmissionQueue, Busy, Limits, displaced, expired, unloading
from triton_repo.runtime.exchange import Answer, Cancelled, explain
from triton_repo.runtime.metrics import Snapshot, Tally

Inputs = Mapping[str, npt.NDArray[Any]]

# To ask whether a client has gone is a round trip to the server process: worth it where a request waited.
_LONG_WAIT_S = 0.25
# How long Triton may be kept waiting for the answers of a batch.
_AT_ONCE_S = 0.1
# The share of a deadline that a batch may take: who comes behind it, urgent or not, waits for all of it.
_BATCH_SHARE = 0.15
# What a row costs beside its characters, in characters.
_ROW_CHARACTERS = 32


class Exchanges(Protocol):
    """Where one answer goes, and whether anyone waits for it; `runtime.exchange.Exchange` is one."""

    def send(self, answer: Answer) -> None: ...

    def is_gone(self) -> bool: ...


@dataclass(slots=True, eq=False)
class Ticket:
    """One request: its input tensors, its urgency (`level` 0: the default) and its own limit in seconds."""

    inputs: Inputs
    level: int = 0
    timeout_s: float = math.inf
    arrived: float = 0.0
    work: float = 0.0
    exchange: Exchanges | None = None  # of one that waits for its answer

    @property
    def rows(self) -> int:
        """Texts, or passages: what a run of the engine has a limit of."""
        return max(tensor.size for tensor in self.inputs.values())


class Answers(Protocol):
    """Inputs of a batch of requests to their answers, in order; `EncoderService` is one.

    max_rows: how many rows a batch should have at most; most_characters: how many of a text are read at most.
    """

    max_rows: int
    most_characters: int

    def answer(self, requests: Sequence[Inputs]) -> Sequence[Answer]: ...

    def snapshot(self) -> Snapshot: ...


class Batcher:
    """Answers tickets in batches: at once, or later from a thread of its own. `clock` gives monotonic
    seconds."""

    def __init__(self, service: Answers, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._clock = clock
        self._queue: AdmissionQueue[Ticket] = AdmissionQueue(limits, clock)
        self._changed = threading.Condition()
        self._closing = False
        self._busy = False  # the thread computes
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._tally = Tally()

    def start(self) -> None:
        self._thread.start()

    def answer_now(self, tickets: Sequence[Ticket]) -> list[Answer] | None:
        """The answers, in order; None when others are before them, or they are more than one short run.

        For the thread that also calls `submit`: whatever comes meanwhile waits for it to return, unseen by
        the queue. So nothing is answered here that takes long, or that may.
        """
        if not tickets:
            return []
        work = sum(map(self._measure, tickets))
        with self._changed:
            if self._busy or self._queue or sum(ticket.rows for ticket in tickets) >= self._service.max_rows:
                return None
            if self._queue.seconds_for(work) > _AT_ONCE_S:
                return None
        arrived = self._clock()
        answers = self._answers(tickets)
        with self._changed:
            self._queue.served(work, self._clock() - arrived)
        for answer in answers:
            self._tally.queue.observe(0.0)
            self._count(answer, arrived)
        return answers

    def check(self, level: int, timeout_s: float) -> None:
        """Raises Busy for a request that would be rejected however short its texts are: before they are read,
        so that a crowd does not keep the processor busy with being rejected."""
        with self._changed:
            self._queue.check(level=level, work=0.0, timeout_s=timeout_s)

    def submit(self, tickets: Sequence[tuple[Ticket, Exchanges]]) -> list[Busy | None]:
        """Take them in; returns at once, for each: None if it waits, else why it may not, for the caller to
        say."""
        gone: list[Ticket] = []
        with self._changed:
            reasons = [self._admit(ticket, exchange, gone) for ticket, exchange in tickets]
            self._changed.notify()
        for ticket in gone:
            self._end(ticket, displaced())
        for reason in filter(None, reasons):
            self._tally.end(reason)
        return reasons

    def _admit(self, ticket: Ticket, exchange: Exchanges, gone: list[Ticket]) -> Busy | None:
        """Let one wait, or say why not; who gives up its place for it joins `gone`."""
        ticket.arrived, ticket.exchange = self._clock(), exchange
        if self._closing:
            return unloading()
        try:
            gave_up = self._queue.offer(
                ticket, level=ticket.level, work=self._measure(ticket), timeout_s=ticket.timeout_s
            )
        except Busy as error:
            return error
        if gave_up is not None:
            gone.append(gave_up)
        return None

    def refuse(self, error: Exception) -> None:
        """Count a request that could not be made a ticket of."""
        self._tally.end(error)

    def snapshot(self) -> Snapshot:
        """What happened so far, and how many wait now."""
        return {**self._queue.snapshot(), **self._tally.snapshot(), **self._service.snapshot()}

    def close(self) -> None:
        """Answer what is being computed, reject the rest, and stop the thread."""
        with self._changed:
            self._closing = True
            left = self._queue.drain()
            self._changed.notify()
        self._thread.join()
        for ticket in left:
            self._end(ticket, unloading())

    def _measure(self, ticket: Ticket) -> float:
        """Its work, once: in characters (bytes, that is), which are known before anything is tokenized."""
        if not ticket.work:
            ticket.work = sum(
                _ROW_CHARACTERS + min(len(text), self._service.most_characters)
                for tensor in ticket.inputs.values()
                for text in tensor.flat
            )
        return ticket.work

    def _run(self) -> None:
        while self._has_work():
            batch: list[Ticket] = []
            try:
                with self._changed:
                    late = self._queue.expired()
                for ticket in late:
                    self._end(ticket, expired(self._queue.limits, ticket.timeout_s))
                with self._changed:
                    batch = self._next_batch()
                self._serve(batch)
            except Exception as error:  # a fault of ours, which must not cost the thread
                self._fail(batch, error)

    def _has_work(self) -> bool:
        """Wait until there is some; False when the thread shall end."""
        with self._changed:
            self._busy = False
            while not (self._queue or self._closing):
                self._changed.wait()
            self._busy = not self._closing
            return self._busy

    def _fail(self, batch: Sequence[Ticket], error: Exception) -> None:
        """Answer those that were not; without a batch, the fault is in what waits, and would come again."""
        with self._changed:
            lost = batch or self._queue.drain()
        for ticket in lost:
            self._end(ticket, explain(error))

    def _next_batch(self) -> list[Ticket]:
        rows = 0

        def fits(ticket: Ticket) -> bool:
            nonlocal rows
            rows += ticket.rows
            return rows <= self._service.max_rows or rows == ticket.rows

        return self._queue.take(fits, seconds=_BATCH_SHARE * self._queue.limits.deadline_s)

    def _serve(self, batch: Sequence[Ticket]) -> None:
        started = self._clock()
        here = [ticket for ticket in batch if not self._has_left(ticket, started)]
        for ticket in here:
            self._tally.queue.observe(started - ticket.arrived)
        answers = self._answers(here)
        with self._changed:
            # The engine is free again; sending takes none of it.
            self._busy = False
            if here:
                self._queue.served(sum(ticket.work for ticket in here), self._clock() - started)
        for ticket, answer in zip(here, answers, strict=True):
            self._end(ticket, answer)

    def _answers(self, tickets: Sequence[Ticket]) -> list[Answer]:
        try:
            return list(self._service.answer([ticket.inputs for ticket in tickets])) if tickets else []
        except Exception as error:  # a fault of ours; every request is answered all the same
            return [explain(error)] * len(tickets)

    def _has_left(self, ticket: Ticket, now: float) -> bool:
        exchange, is_gone = ticket.exchange, False
        if exchange is None or now - ticket.arrived < _LONG_WAIT_S:
            return False
        with contextlib.suppress(Exception):  # who cannot be asked about is answered
            is_gone = exchange.is_gone()
        if is_gone:
            ticket.exchange = None
            self._tally.cancel()
            with contextlib.suppress(Exception):
                exchange.send(Cancelled("the request was cancelled"))
        return is_gone

    def _end(self, ticket: Ticket, answer: Answer) -> None:
        """Answer one that waited, and count it; nothing where that has been done."""
        exchange, ticket.exchange = ticket.exchange, None
        if exchange is None:
            return
        try:
            exchange.send(answer)
        except Exception as error:  # Triton's, without a class of its own; the client has been told
            answer = error
        self._count(answer, ticket.arrived)

    def _count(self, answer: Answer, arrived: float) -> None:
        self._tally.end(answer if isinstance(answer, Exception) else None, self._clock() - arrived)
