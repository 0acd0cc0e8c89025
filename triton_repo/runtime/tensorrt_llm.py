"""A checkpoint served by TensorRT-LLM's LLM API (1.2, PyTorch backend), behind the scheduler's interface.

The library schedules and computes; here requests wait for a slot, its tokens become text, and answers go out.
It writes no text itself: token ids alone are asked for, so that texts never break a syllable and stop strings
work as they do for every other engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from triton_repo.runtime.admission import AdmissionQueue, Busy, Limits, displaced, expired, unloading
from triton_repo.runtime.delivery import Delivers, Delivery, Delta, Outbox, merged
from triton_repo.runtime.jobs import Counts, Handle, Job, Request, Written, checked_prompt
from triton_repo.runtime.sampling import SamplingParams
from triton_repo.runtime.session import EngineRefused, check_files, read_manifest
from triton_repo.runtime.slots import TokenArray
from triton_repo.runtime.texts import BadRequest, EngineFailed

# The library takes the smaller of this share of what is free and max_tokens, which is what the plan counted.
_FREE_SHARE = 0.9
_PAGE = 32
_CLOSING_S = 10.0
_HURRY_S = 0.05
# What TensorRT-LLM 1.2 takes and ignores, or answers with numbers of another meaning. Refused, because an
# answer that looks as asked for and is not would be worse.
_IGNORED = {
    "min_p": "its sampler ignores it",
    "repetition_penalty": "its sampler ignores it",
    "seed": "all requests are drawn from one generator",
    "logprobs": "it does not say of which distribution they are",
}


class LlmEngine:
    """The LLM API's engine for a folder that `build-engines build` recorded."""

    def __init__(self, manifest: dict[str, Any], llm: Any, params: Callable[..., Any]) -> None:
        serving = manifest["serving"]
        self.manifest = manifest
        self.slots: int = serving["slots"]
        self.capacity: int = serving["capacity"]
        self.vocabulary: int = serving["vocabulary"]
        self.llm = llm
        self._params = params
        self._end = serving["eos_ids"][0] if serving["eos_ids"] else -1

    @classmethod
    def open(cls, folder: Path) -> LlmEngine:
        """Check digests, then load the checkpoint: minutes for a large one. Raises EngineRefused."""
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        # One GPU needs no worker process beside this one; spawning one takes MPI and a second CUDA context.
        os.environ.setdefault("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
        try:
            from tensorrt_llm import LLM, SamplingParams
            from tensorrt_llm.llmapi import KvCacheConfig
        except Exception as error:  # without its CUDA libraries it fails in many ways
            raise EngineRefused(
                f"{folder}: TensorRT-LLM cannot be imported ({error}); serve with an image that has it "
                "(triton-repo container STACK)"
            ) from None
        serving = manifest["serving"]
        cache = KvCacheConfig(max_tokens=serving["cache_tokens"], free_gpu_memory_fraction=_FREE_SHARE)
        try:
            llm = LLM(
                model=str(folder),
                skip_tokenizer_init=True,
                max_batch_size=serving["slots"],
                max_input_len=serving["capacity"],
                max_seq_len=serving["capacity"],
                # A part of a prompt is whole pages of the cache: room for one, beside all who are running.
                max_num_tokens=max(serving["chunk"], _PAGE) + serving["slots"],
                enable_chunked_prefill=True,
                kv_cache_config=cache,
            )
        except Exception as error:  # and loads in as many
            raise EngineRefused(f"{folder}: TensorRT-LLM refuses it: {error}") from error
        return cls(manifest, llm, SamplingParams)

    def check(self, params: SamplingParams) -> None:
        """Raises BadRequest for what would be ignored."""
        default = SamplingParams()
        for name, why in _IGNORED.items():
            if getattr(params, name) != getattr(default, name):
                raise BadRequest(f"'{name}' cannot be had from TensorRT-LLM 1.2: {why}; leave it out")

    def generate(self, request: Request, prompt: list[int], limit: int) -> Any:
        """The library's result, to be iterated over in the running event loop."""
        wanted = request.params
        # None of the three is greedy; a temperature alone was, to earlier versions.
        drawn = {"temperature": wanted.temperature, "top_p": wanted.top_p, "top_k": wanted.top_k or None}
        params = self._params(
            max_tokens=limit,
            end_id=self._end,
            stop_token_ids=sorted(request.stop_ids),
            include_stop_str_in_output=True,
            ignore_eos=wanted.ignore_eos,
            detokenize=False,
            # Ignored by 1.2; a later one draws the samples of a request by it, which must differ.
            seed=secrets.randbits(63),
            **(drawn if wanted.temperature else {}),
        )
        return self.llm.generate_async(prompt, params, streaming=True)


class LlmScheduler:
    """What `runtime.scheduler.Scheduler` is to other engines: the same methods, the same deltas.

    An event loop in a thread has a task for every request that has its slots, until its last delta.
    """

    def __init__(
        self, engine: LlmEngine, *, limits: Limits | None = None, delivery: Delivers | None = None
    ) -> None:
        self._engine = engine
        self._delivery = delivery or Delivery()
        self._lock = threading.Lock()
        self._queue: AdmissionQueue[Job] = AdmissionQueue(limits or Limits(), slots=engine.slots)
        self._free = engine.slots
        self._closing = False
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._counts = Counts(time.monotonic)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tensorrt-llm", daemon=True)

    # From any thread.

    def start(self) -> None:
        """Run the event loop in a thread of its own."""
        self._thread.start()

    def check(self, level: int, timeout_s: float, arrived: float | None = None) -> None:
        """Raises Busy if a request would be rejected, before anything of it is read."""
        with self._lock:
            self._queue.check(level=level, timeout_s=timeout_s, room=self._free, arrived=arrived)

    def submit(self, request: Request) -> Handle:
        """Put a request in the queue. Raises BadRequest, or Busy for what is rejected."""
        try:
            prompt = self._checked(request)
            since = time.monotonic() if request.arrived is None else request.arrived
            job = Job(request, prompt, since, Outbox(request.on_delta, lambda: self._cancel(job)))
            with self._lock:
                if self._closing:
                    raise unloading()
                gave_up = self._queue.offer(
                    job,
                    level=request.level,
                    timeout_s=request.timeout_s,
                    room=self._free,
                    arrived=since,
                )
                self._loop.call_soon_threadsafe(self._begin, gave_up)
        except (BadRequest, Busy) as error:
            self.refuse(error)
            raise
        return Handle(job, self._cancel)

    def refuse(self, error: Exception) -> None:
        """Count a request that did not become a job."""
        with self._lock:
            self._counts.tally.end(error)

    def snapshot(self) -> dict[str, Any]:
        """As Scheduler.snapshot; of the cache only what running sequences fill is known."""
        engine = self._engine
        running = [job for job in tuple(self._tasks) if job.state == "running"]
        tokens = sum(len(job.prompt) * job.request.params.n + job.completion for job in running)
        return {
            **self._queue.snapshot(),
            "llm_slots": engine.slots,
            "llm_slots_active": engine.slots - self._free,
            "llm_cache_tokens": tokens,
            "llm_cache_capacity_tokens": engine.slots * engine.capacity,
            **self._counts.snapshot(),
        }

    def close(self) -> None:
        """End what runs as "cancelled", reject what waits, then unload the model."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result(_CLOSING_S)
        self._delivery.close()
        self._engine.llm.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSING_S)

    def _checked(self, request: Request) -> TokenArray:
        prompt = checked_prompt(request, self._engine)
        self._engine.check(request.params)
        if len(prompt) == self._engine.capacity:
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens and fills the slot; one less leaves room to answer"
            )
        return prompt

    def _cancel(self, job: Job) -> None:
        self._loop.call_soon_threadsafe(self._stop, job)

    # In the event loop.

    def _begin(self, gave_up: Job | None = None) -> None:
        """Reject whose place or time is gone, start what has slots now, and come back for the next."""
        with self._lock:
            late = self._queue.expired()
            while found := self._queue.take(lambda job: job.request.params.n <= self._free, most=1):
                self._free -= found[0].request.params.n
                found[0].state = "running"
                self._launch(found[0])
            soonest = self._queue.soonest
        if gave_up is not None:
            self._end(gave_up, "error", displaced())
        for job in late:
            self._end(job, "error", expired(self._queue.limits, job.request.timeout_s))
        self._look_again(soonest - time.monotonic())

    def _look_again(self, seconds: float) -> None:
        """Come back for those whose time runs out. The queue knows only when that may be, so not in a hurry;
        and once, however many came meanwhile."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if seconds < math.inf:
            self._timer = self._loop.call_later(max(_HURRY_S, seconds), self._begin)

    def _launch(self, job: Job) -> None:
        task = self._tasks[job] = self._loop.create_task(self._serve(job))
        # Not the task's own last act: one that is cancelled before its first step has none.
        task.add_done_callback(lambda _: self._tasks.pop(job, None))

    def _stop(self, job: Job) -> None:
        self._end(job, "cancelled")
        if task := self._tasks.get(job):
            task.cancel()

    async def _end_all(self) -> None:
        with self._lock:
            waiting = self._queue.drain()
        for job in waiting:
            self._end(job, "error", unloading())
        tasks = list(self._tasks.values())
        for job in tuple(self._tasks):
            self._stop(job)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, job: Job) -> None:
        job.started = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(job.request.params.n):
                    group.create_task(self._write(job, index))
        except* EngineFailed as failed:
            self._end(job, "error", failed.exceptions[0])
        except* Exception as failed:  # whatever the library raises
            self._end(job, "error", EngineFailed(f"the engine failed: {failed.exceptions[0]}"))

    async def _write(self, job: Job, index: int) -> None:
        """One sample, to its end. The library gets a request for each: so they end each on its own."""
        request = job.request
        limit = min(request.params.max_tokens, self._engine.capacity - len(job.prompt))
        sample = Written(job, index, request.open_text(), limit)
        result = self._engine.generate(request, job.prompt.tolist(), limit)
        try:
            async for output in result:
                if job.answered is None:
                    job.answered, job.cached = time.monotonic(), output.cached_tokens
                    self._counts.start(job, job.started or job.answered)
                    self._counts.answer(job, job.answered)
                if self._accept(sample, output.outputs[0]):
                    return
            raise EngineFailed("the engine ended the answer without a reason")
        except Exception:
            if job.state != "done" and (rest := sample.rest()):
                self._post(job, [Delta(index, rest)])
            raise
        finally:
            if not result.finished:
                result.abort()

    def _accept(self, sample: Written, output: Any) -> bool:
        """Hand out what is new of a sample; whether that was its end."""
        job, deltas = sample.job, []
        if job.state == "done":  # ended early, and its tasks do not know yet
            return True
        for token in output.token_ids[sample.count :]:
            deltas.append(sample.take(token))
            if deltas[-1].finish_reason:
                break
        job.completion += len(deltas)
        self._counts.generate(len(deltas))
        ended = bool(deltas and deltas[-1].finish_reason)
        if output.finish_reason and not ended:
            if output.finish_reason not in ("stop", "length"):
                raise EngineFailed(f"the engine ended the answer: {output.finish_reason}")
            deltas.append(Delta(sample.index, sample.text.flush(), finish_reason=output.finish_reason))
            ended = True
        deltas = merged(deltas)
        if ended:
            del job.open[sample.index]
            if not job.open:
                self._leave(job, "completed")
                deltas[-1] = replace(deltas[-1], usage=job.usage(time.monotonic()))
        self._post(job, deltas)
        return ended

    def _post(self, job: Job, deltas: list[Delta]) -> None:
        self._delivery.post([(job.outbox, delta) for delta in deltas])

    def _leave(self, job: Job, reason: str, error: Exception | None = None) -> None:
        """Give back what `job` holds: before its last delta goes out, as its client may ask again at once."""
        with self._lock:
            if job.state == "running":
                self._free += job.request.params.n
                self._loop.call_soon(self._begin)
            self._queue.discard(job)
            if reason == "completed":
                self._queue.served(1.0, job.slot_seconds(time.monotonic()))
            job.state = "done"
            self._counts.end(job, reason, error)

    def _end(self, job: Job, reason: str, error: Exception | None = None) -> None:
        """End a whole request early, wherever it is."""
        if job.state == "done":
            return
        self._leave(job, reason, error)
        deltas = [Delta(index, finish_reason=reason, error=error) for index in job.open]
        deltas[-1] = replace(deltas[-1], usage=job.usage(time.monotonic()))
        self._post(job, deltas)
