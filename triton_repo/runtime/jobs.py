"""A generation request on its way through the scheduler: what was asked, its samples, the handle on it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from triton_repo.runtime.delivery import Delta, Outbox
from triton_repo.runtime.metrics import Histogram, Tally
from triton_repo.runtime.sampling import FloatArray, Sampler, SamplingParams
from triton_repo.runtime.slots import TokenArray
from triton_repo.runtime.texts import BadRequest

# The rate of tokens is that of so many whole seconds past.
_RATE_SECONDS = 5


class TextOut(Protocol):
    """Tokens of one sample to text; `runtime.text_stream.TextStream` is one."""

    stopped: bool

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class NoText:
    """For callers that want token ids only."""

    stopped = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and what is wanted of it.

    on_delta is called with every Delta, in order, on a thread that is not the scheduler's; if it raises,
    the request is cancelled. stop_ids are the tokens that end a sample, the model's own and the request's;
    open_text makes the text stream of each sample. level is its priority, 0 the default one; timeout_s its
    own limit on the wait for a slot, since it arrived by the scheduler's clock (None: when it is submitted).
    """

    prompt: Sequence[int]
    params: SamplingParams
    on_delta: Callable[[Delta], object]
    stop_ids: frozenset[int] = frozenset()
    open_text: Callable[[], TextOut] = NoText
    level: int = 0
    timeout_s: float = math.inf
    arrived: float | None = None


@dataclass(slots=True, eq=False)
class Written:
    """One of a request's n answers, as far as it is: of at most `limit` tokens."""

    job: Job
    index: int
    text: TextOut
    limit: int
    last: int = -1  # the newest token; it is not in the cache yet
    count: int = 0

    def take(self, token: int, logprob: float | None = None) -> Delta:
        """The next token, whoever chose it."""
        self.last = token
        self.count += 1
        reason = ""
        if token in self.job.request.stop_ids:
            text, reason = self.text.flush(), "stop"
        else:
            text = self.text.push(token)
            if not self.text.stopped and self.count >= self.limit:
                text, reason = text + self.text.flush(), "length"
            if self.text.stopped:
                reason = "stop"
        return Delta(self.index, text, (token,), () if logprob is None else (logprob,), reason)

    def rest(self) -> str:
        """What was held back of the text; nothing when that cannot be had either."""
        try:
            return self.text.flush()
        except Exception:  # it may be the reason why the request ends
            return ""


@dataclass(slots=True, eq=False, kw_only=True)
class Sample(Written):
    """An answer whose tokens are chosen here."""

    sampler: Sampler
    slot: int

    def accept(self, logits: FloatArray) -> Delta:
        """Choose the next token. Raises EngineFailed for logits that are no numbers."""
        return self.take(*self.sampler.sample(logits))


class Room(Protocol):
    """What an engine has room for: rows of the cache, tokens in each, and the tokens it knows."""

    slots: int
    capacity: int
    vocabulary: int


def checked_prompt(request: Request, room: Room) -> TokenArray:
    """The request's prompt, if it can ever run here. Raises BadRequest that names the field."""
    request.params.validate()
    params, count = request.params, len(request.prompt)
    if not count:
        raise BadRequest("the prompt has no tokens")
    if count > room.capacity:
        raise BadRequest(f"the prompt has {count} tokens; a slot of this model holds {room.capacity}")
    if params.n > room.slots:
        raise BadRequest(f"'n' is {params.n}; this model has {room.slots} slots")
    last = room.vocabulary - 1
    if max(params.stop_token_ids, default=0) > last:
        raise BadRequest(f"'stop_token_ids' has {max(params.stop_token_ids)}; the model knows 0 to {last}")
    prompt = np.asarray(request.prompt, dtype=np.int64)
    if prompt.min() < 0 or prompt.max() > last:
        wrong = int(prompt[(prompt < 0) | (prompt > last)][0])
        raise BadRequest(f"the prompt has token {wrong}; the model knows 0 to {last}")
    return prompt.astype(np.int32)


class Counts:
    """What became of the requests of one model: running totals, and the rate of the last seconds' tokens."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.tally = Tally()
        self._first_token = Histogram()
        self._prompt = self._cached = self._generated = 0
        self._rate: deque[tuple[int, int]] = deque(maxlen=_RATE_SECONDS + 1)

    def start(self, job: Job, now: float) -> None:
        """`job` has its slots; its prompt is being read, less what was found in the cache."""
        self.tally.queue.observe(now - job.submitted)
        self._prompt += len(job.prompt)
        self._cached += job.cached

    def answer(self, job: Job, now: float) -> None:
        """`job` got its first token."""
        self._first_token.observe(now - job.submitted)

    def generate(self, tokens: int) -> None:
        self._generated += tokens
        second = int(self._clock())
        if self._rate and self._rate[-1][0] == second:
            tokens += self._rate.pop()[1]
        self._rate.append((second, tokens))

    def end(self, job: Job, reason: str, error: Exception | None = None) -> None:
        """`job` ended as "cancelled", or as completed or with `error`."""
        if reason == "cancelled":
            self.tally.cancel()
        else:
            self.tally.end(error, self._clock() - job.submitted)

    def snapshot(self) -> dict[str, Any]:
        now = int(self._clock())
        recent = sum(count for second, count in tuple(self._rate) if now - _RATE_SECONDS <= second < now)
        return {
            "llm_tokens_per_second": recent / _RATE_SECONDS,
            "llm_prompt_tokens_total": self._prompt,
            "llm_cached_tokens_total": self._cached,
            "llm_generated_tokens_total": self._generated,
            **self._first_token.snapshot("first_token_seconds"),
            **self.tally.snapshot(),
        }


@dataclass(slots=True, eq=False)
class Job:
    """A request and how far it is; the scheduler's thread alone changes it."""

    request: Request
    prompt: TokenArray
    submitted: float
    outbox: Outbox
    state: str = "queued"  # then "prefill", "running", "done"
    open: dict[int, Sample | None] = field(default_factory=dict)  # by index; not ended yet
    cached: int = 0
    completion: int = 0
    started: float | None = None
    answered: float | None = None

    def __post_init__(self) -> None:
        self.open = dict.fromkeys(range(self.request.params.n))

    @property
    def samples(self) -> list[Sample]:
        """Those that have a slot."""
        return [sample for sample in self.open.values() if sample]

    def slot_seconds(self, now: float) -> float:
        """For how long it has held slots, all of them together."""
        return 0.0 if self.started is None else (now - self.started) * self.request.params.n

    def usage(self, now: float) -> dict[str, float]:
        """Tokens over all samples and times in milliseconds, for the request's last delta."""
        started = now if self.started is None else self.started
        answered = now if self.answered is None else self.answered
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": self.completion,
            "cached_tokens": self.cached,
            "queue_ms": round((started - self.submitted) * 1000, 3),
            "prefill_ms": round((answered - started) * 1000, 3),
            "total_ms": round((now - self.submitted) * 1000, 3),
        }


class Handle:
    """A submitted request."""

    def __init__(self, job: Job, cancel: Callable[[Job], None]) -> None:
        self._job = job
        self._cancel = cancel

    def cancel(self) -> None:
        """Stop generating; from any thread, at any time, more than once. Samples end as "cancelled"."""
        self._cancel(self._job)

    def wait(self, timeout: float | None = None) -> bool:
        """Until the consumer was given the last delta; False when `timeout` seconds were not enough."""
        return self._job.outbox.done.wait(timeout)
