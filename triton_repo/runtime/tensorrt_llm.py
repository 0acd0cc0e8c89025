"""A checkpoint served by TensorRT-LLM's LLM API (1.2, PyTorch backend), behind the scheduler's interface.

The library schedules and computes; here requests wait for a slot, its tokens become text, and answers go out.
It writes no text itself: token ids alone are asked for, so that texts never break a syllable and stop strings
work as they do for every other engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from triton_repo.runtime.delivery import Delivers, Delivery, Delta, Outbox, merged
from triton_repo.runtime.jobs import Busy, Counts, Handle, Job, Request, Written, checked_prompt
from triton_repo.runtime.sampling import SamplingParams
from triton_repo.runtime.session import EngineRefused, check_files, read_manifest
from triton_repo.runtime.texts import BadRequest, EngineFailed

# The library takes the smaller of this share of what is free and max_tokens, which is what the plan counted.
_FREE_SHARE = 0.9
_PAGE = 32
_CLOSING_S = 10.0
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


class _Slots:
    """Counts free slots and gives them out in the order they were asked for. Of one event loop."""

    def __init__(self, count: int) -> None:
        self.free = count
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, count: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        self.give(0)
        try:
            await turn
        except asyncio.CancelledError:
            # Also where it had not come yet: those behind it may fit now.
            self.give(count if turn.done() and not turn.cancelled() else 0)
            raise

    def give(self, count: int) -> None:
        self.free += count
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.cancelled():
                if wanted > self.free:
                    return
                self.free -= wanted
                turn.set_result(None)
            self._waiting.popleft()


class LlmScheduler:
    """What `runtime.scheduler.Scheduler` is to other engines: the same methods, the same deltas.

    An event loop in a thread has a task for every request, from its place in the queue to its last delta.
    """

    def __init__(
        self,
        engine: LlmEngine,
        *,
        max_queue: int = 256,
        queue_timeout_s: float = 60.0,
        delivery: Delivers | None = None,
    ) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._queue_timeout = queue_timeout_s
        self._delivery = delivery or Delivery()
        self._slots = _Slots(engine.slots)
        self._lock = threading.Lock()
        self._queued = self._taken = 0  # requests that wait; slots of those that do not
        self._closing = False
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._counts = Counts(time.monotonic)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tensorrt-llm", daemon=True)

    # From any thread.

    def start(self) -> None:
        """Run the event loop in a thread of its own."""
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        """Put a request in the queue. Raises BadRequest, or Busy when the queue is full."""
        try:
            prompt = checked_prompt(request, self._engine)
            self._engine.check(request.params)
            if len(prompt) == self._engine.capacity:
                raise BadRequest(
                    f"the prompt has {len(prompt)} tokens and fills the slot; one less leaves room to answer"
                )
        except BadRequest:
            self.refuse()
            raise
        job = Job(request, prompt, time.monotonic(), Outbox(request.on_delta, lambda: self._cancel(job)))
        with self._lock:
            if self._closing:
                raise Busy("the model is being unloaded")
            if self._queued >= self._max_queue + self._engine.slots - self._taken:
                self._counts.outcomes["refused"] += 1
                waiting = f"{self._queued} requests are waiting for a slot"
                raise Busy(f"the queue is full: {waiting}; try again later")
            self._queued += 1
            self._loop.call_soon_threadsafe(self._begin, job)
        return Handle(job, self._cancel)

    def refuse(self) -> None:
        """Count a bad request that did not come as far as `submit`."""
        with self._lock:
            self._counts.outcomes["refused"] += 1

    def snapshot(self) -> dict[str, Any]:
        """As Scheduler.snapshot; of the cache only what running sequences fill is known."""
        engine = self._engine
        running = [job for job in tuple(self._tasks) if job.state == "running"]
        return {
            "slots": engine.slots,
            "slots_active": self._taken,
            "queue": self._queued,
            "cache_tokens": sum(len(job.prompt) * job.request.params.n + job.completion for job in running),
            "cache_capacity_tokens": engine.slots * engine.capacity,
            **self._counts.snapshot(),
        }

    def close(self) -> None:
        """End what runs or waits as "cancelled", then unload the model."""
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

    def _cancel(self, job: Job) -> None:
        self._loop.call_soon_threadsafe(self._stop, job)

    # In the event loop.

    def _begin(self, job: Job) -> None:
        task = self._tasks[job] = self._loop.create_task(self._serve(job))
        task.add_done_callback(lambda _: self._tasks.pop(job))

    def _stop(self, job: Job) -> None:
        if task := self._tasks.get(job):
            self._end(job, "cancelled")
            task.cancel()

    async def _end_all(self) -> None:
        tasks = list(self._tasks.values())
        for job in list(self._tasks):
            self._stop(job)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, job: Job) -> None:
        wanted = job.request.params.n
        try:
            async with asyncio.timeout(job.submitted + self._queue_timeout - time.monotonic()):
                await self._slots.take(wanted)
        except TimeoutError:
            late = Busy(f"no slot became free within {self._queue_timeout:g} s; try again later")
            self._end(job, "error", late)
            return
        with self._lock:
            self._queued -= 1
            self._taken += wanted
        job.state, job.started = "running", time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(wanted):
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
                    self._counts.start(job)
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

    def _leave(self, job: Job, outcome: str) -> None:
        """Give back what `job` holds: before its last delta goes out, as its client may ask again at once."""
        with self._lock:
            if job.state == "queued":
                self._queued -= 1
            else:
                self._taken -= job.request.params.n
                self._slots.give(job.request.params.n)
        job.state = "done"
        self._counts.outcomes[outcome] += 1

    def _end(self, job: Job, reason: str, error: Exception | None = None) -> None:
        """End a whole request early, wherever it is."""
        if job.state == "done":
            return
        outcome = "cancelled" if reason == "cancelled" else "expired" if isinstance(error, Busy) else "failed"
        self._leave(job, outcome)
        deltas = [Delta(index, finish_reason=reason, error=error) for index in job.open]
        deltas[-1] = replace(deltas[-1], usage=job.usage(time.monotonic()))
        self._post(job, deltas)
