"""Continuous batching over the engine's slots: a request joins and leaves at any step.

One thread runs `step` for ever: drop what was cancelled or waited too long, prefill one chunk of the request
whose turn it is, decode one token of every running sequence, hand out what came of it. So a running stream
waits for at most one chunk between two of its tokens, and a cancelled one frees its slots within one step.

Requests start by priority, then in the order they came. One is prefilled at a time: it takes its slots when
its turn comes, so that it finds whatever its predecessors have left in the cache.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from triton_repo.runtime.admission import AdmissionQueue, Busy, Limits, displaced, expired, unloading
from triton_repo.runtime.delivery import Delivers, Delivery, Delta, Outbox
from triton_repo.runtime.jobs import Counts, Handle, Job, Request, Sample, checked_prompt
from triton_repo.runtime.sampling import FloatArray, Sampler
from triton_repo.runtime.slots import SlotTable
from triton_repo.runtime.texts import BadRequest, EngineFailed


class DecodesTokens(Protocol):
    """What this module needs of an engine; `runtime.decoder.DecoderEngine` is one."""

    slots: int
    capacity: int
    chunk: int
    vocabulary: int

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray: ...

    def decode(self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> FloatArray: ...

    def copy(self, source: int, target: int, length: int) -> None: ...

    def close(self) -> None: ...


class Scheduler:
    """Owns an engine; `submit`, a handle's methods and `snapshot` may be called from any thread.

    limits say what may wait, beyond the requests that the free slots take at once; clock gives monotonic
    seconds. Without `start`, nothing happens but in `step`.
    """

    def __init__(
        self,
        engine: DecodesTokens,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        delivery: Delivers | None = None,
    ) -> None:
        self._engine = engine
        self._table = SlotTable(engine.slots, engine.capacity)
        self._clock = clock
        self._delivery = delivery or Delivery()
        self._changed = threading.Condition()
        self._queue: AdmissionQueue[Job] = AdmissionQueue(limits or Limits(), clock, slots=engine.slots)
        self._cancelled: deque[Job] = deque()
        self._displaced: deque[Job] = deque()  # gave up their place in the queue to more urgent ones
        self._prefilling: Job | None = None
        self._running: list[Sample] = []
        self._closing = False
        self._thread: threading.Thread | None = None
        self._counts = Counts(clock)

    # From any thread.

    def submit(self, request: Request) -> Handle:
        """Put a request in the queue; returns at once.

        Raises BadRequest for what can never run here (naming the field), Busy for what is rejected.
        """
        try:
            prompt = checked_prompt(request, self._engine)
            since = self._clock() if request.arrived is None else request.arrived
            job = Job(request, prompt, since, Outbox(request.on_delta, lambda: self._cancel(job)))
            with self._changed:
                if self._closing:
                    raise unloading()
                gave_up = self._queue.offer(
                    job,
                    level=request.level,
                    timeout_s=request.timeout_s,
                    room=self._table.free,
                    arrived=since,
                )
                if gave_up is not None:
                    self._displaced.append(gave_up)
                self._changed.notify()
        except (BadRequest, Busy) as error:
            self.refuse(error)
            raise
        return Handle(job, self._cancel)

    def check(self, level: int, timeout_s: float, arrived: float | None = None) -> None:
        """Raises Busy if a request would be rejected, before anything of it is read."""
        with self._changed:
            self._queue.check(level=level, timeout_s=timeout_s, room=self._table.free, arrived=arrived)

    def refuse(self, error: Exception) -> None:
        """Count a request that did not become a job."""
        with self._changed:
            self._counts.tally.end(error)

    def snapshot(self) -> dict[str, Any]:
        """What happened so far and what is running now, as metrics."""
        return {
            **self._queue.snapshot(),
            "llm_slots": self._table.slots,
            "llm_slots_active": self._table.slots - self._table.free,
            "llm_cache_tokens": self._table.cached,
            "llm_cache_capacity_tokens": self._table.slots * self._table.capacity,
            **self._counts.snapshot(),
        }

    def start(self) -> None:
        """Run the loop in a thread of its own."""
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End what runs as "cancelled", reject what waits; deliver what was answered; close the engine."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread:
            self._thread.join()
        else:
            self._end_all()
        self._delivery.close()
        self._engine.close()

    def _cancel(self, job: Job) -> None:
        with self._changed:
            self._cancelled.append(job)
            self._changed.notify()

    # From the scheduler's thread.

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._queue or self._cancelled or self._busy or self._displaced):
                    self._changed.wait()
                if self._closing:
                    break
            try:
                self.step()
            except Exception as error:
                self._start_over(EngineFailed(f"the scheduler failed: {error!r}"))
        self._end_all()

    @property
    def _busy(self) -> bool:
        return bool(self._running or self._prefilling)

    def step(self) -> bool:
        """One turn of the loop; whether there is more to do."""
        while self._cancelled:
            job = self._cancelled.popleft()
            if job.state != "done":
                self._end(job, "cancelled")
        self._reject_waiting()
        self._prefill()
        self._decode()
        return self._busy or bool(self._queue)

    def _reject_waiting(self) -> None:
        """Tell those that gave up their place, and those whose time ran out."""
        while self._displaced:
            job = self._displaced.popleft()
            if job.state != "done":
                self._end(job, "error", displaced())
        with self._changed:
            late = self._queue.expired()
        for job in late:
            self._end(job, "error", expired(self._queue.limits, job.request.timeout_s))

    def _prefill(self) -> None:
        """At most one chunk; the last one of a prompt gives all its samples their first token."""
        try:
            job = self._prefilling or self._admit()
            if job is None:
                return
            logits = self._prefill_chunk(job)
            if logits is None:
                return
            self._share_prompt(job)
        except Exception as error:  # whatever the engine library raises
            if self._prefilling is None:
                raise
            failure = EngineFailed(f"the engine failed on the prompt: {error}")
            self._end(self._prefilling, "error", failure, forget=True)
            return
        self._prefilling = None
        job.state, job.answered = "running", self._clock()
        self._counts.answer(job, job.answered)
        samples = job.samples
        self._running += samples
        # Before the next step, so that the first token does not wait for the others' next ones.
        self._accept(samples, [logits] * len(samples))

    def _admit(self) -> Job | None:
        """The next request in the queue, if there are slots for all its samples."""
        with self._changed:
            found = self._queue.take(lambda job: job.request.params.n <= self._table.free, most=1)
        if not found:
            return None
        job = self._prefilling = found[0]
        job.state, job.started = "prefill", self._clock()
        request, length = job.request, len(job.prompt)
        limit = min(request.params.max_tokens, self._engine.capacity - length + 1)
        for index in range(request.params.n):
            sampler = Sampler(request.params, request.prompt, self._engine.vocabulary, sample=index)
            text = request.open_text()
            # The prompt's last token is computed in any case: its logits are wanted.
            slot = self._table.take(job.prompt, length - 1 if index == 0 else length)
            job.open[index] = Sample(job, index, text, limit, sampler=sampler, slot=slot)
        first = job.samples[0].slot
        source = self._table.source(job.prompt, length - 1, first)
        if source:
            self._copy(source[0], first, source[1])
        job.cached = self._table.length(first)
        self._counts.start(job, job.started)
        return job

    def _prefill_chunk(self, job: Job) -> FloatArray | None:
        """Logits [vocabulary] behind the prompt's last token, or None when there is more of it."""
        slot = job.samples[0].slot
        start = self._table.length(slot)
        tokens = job.prompt[start : start + self._engine.chunk]
        logits = self._engine.prefill(slot, tokens.tolist(), start)
        self._table.extend(slot, tokens)
        return logits if self._table.length(slot) == len(job.prompt) else None

    def _share_prompt(self, job: Job) -> None:
        first, *others = job.samples
        for sample in others:
            if self._table.length(sample.slot) < len(job.prompt):
                self._copy(first.slot, sample.slot, len(job.prompt))

    def _copy(self, source: int, target: int, length: int) -> None:
        self._engine.copy(source, target, length)
        self._table.copied(source, target, length)

    def _decode(self) -> None:
        running = list(self._running)
        if not running:
            return
        slots = [sample.slot for sample in running]
        tokens = [sample.last for sample in running]
        try:
            logits = self._engine.decode(slots, tokens, [self._table.length(slot) for slot in slots])
        except Exception as error:  # whatever the engine library raises
            failure = EngineFailed(f"the engine failed on a step of {len(slots)} sequences: {error}")
            for job in dict.fromkeys(sample.job for sample in running):
                self._end(job, "error", failure, forget=True)
            return
        self._table.append(slots, tokens)
        self._accept(running, logits)

    def _accept(self, samples: Sequence[Sample], logits: Sequence[FloatArray] | FloatArray) -> None:
        """Give each sample its next token, end those that are complete, deliver."""
        batch: list[tuple[Outbox, Delta]] = []
        for sample, row in zip(samples, logits, strict=True):
            job = sample.job
            if job.state == "done":
                continue
            try:
                delta = sample.accept(row)
            except Exception as error:  # of this sequence alone: logits that are no numbers
                ours = EngineFailed(f"the next token could not be chosen: {error!r}")
                failure = error if isinstance(error, EngineFailed) else ours
                self._deliver(batch)
                batch = []
                self._end(job, "error", failure, forget=True)
                continue
            job.completion += 1
            if delta.finish_reason:
                delta = self._end_sample(sample, delta)
            batch.append((job.outbox, delta))
        self._deliver(batch)

    def _deliver(self, batch: list[tuple[Outbox, Delta]]) -> None:
        """Post deltas of one token each; counted before, so that who has them all finds them counted."""
        self._counts.generate(len(batch))
        self._delivery.post(batch)

    def _end_sample(self, sample: Sample, delta: Delta) -> Delta:
        """Free the slot; the request's last delta gets the usage."""
        job = sample.job
        self._table.release(sample.slot)
        self._running.remove(sample)
        del job.open[sample.index]
        if job.open:
            return delta
        job.state = "done"
        self._counts.end(job, "completed")
        now = self._clock()
        with self._changed:
            self._queue.served(1.0, job.slot_seconds(now))
        return replace(delta, usage=job.usage(now))

    def _end(self, job: Job, reason: str, error: Exception | None = None, *, forget: bool = False) -> None:
        """End a whole request early, wherever it is; `forget` what its slots hold if an engine call broke."""
        if job.state == "queued":
            with self._changed:
                self._queue.discard(job)
        if job is self._prefilling:
            self._prefilling = None
        self._running = [sample for sample in self._running if sample.job is not job]
        job.state = "done"
        deltas = []
        for index, sample in job.open.items():
            deltas.append(Delta(index, sample.rest() if sample else "", finish_reason=reason, error=error))
            if sample:
                if forget:
                    self._table.forget(sample.slot)
                self._table.release(sample.slot)
        job.open.clear()
        deltas[-1] = replace(deltas[-1], usage=job.usage(self._clock()))
        self._counts.end(job, reason, error)
        self._delivery.post([(job.outbox, delta) for delta in deltas])

    def _end_all(self) -> None:
        """What waits may be asked elsewhere; what has begun cannot go on there."""
        with self._changed:
            waiting = self._queue.drain()
        for job in [*self._displaced, *waiting]:
            if job.state != "done":
                self._end(job, "error", unloading())
        for job in self._started():
            self._end(job, "cancelled")

    def _start_over(self, error: EngineFailed) -> None:
        """After a fault of ours: what was started is lost, what waits will be served. Where nothing was
        started, the fault is in what waits, and would come again. Never raises: this thread is the only one.
        """
        self._table = SlotTable(self._engine.slots, self._engine.capacity)
        lost = self._started()
        if not lost:
            with self._changed:
                lost = self._queue.drain()
        for job in lost:
            # Their slots went with the old table.
            job.open = dict.fromkeys(job.open or (0,))
            with contextlib.suppress(Exception):
                self._end(job, "error", error)

    def _started(self) -> list[Job]:
        jobs = [sample.job for sample in self._running] + [self._prefilling]
        return list(dict.fromkeys(job for job in jobs if job))
