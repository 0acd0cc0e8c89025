"""What the client gives back: frozen values, one class per kind of answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Protocol = Literal["grpc", "http"]
Task = Literal["classify", "embed", "rerank", "generate"]


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Classification:
    """The best label of one text, and every label's score, best first."""

    label: str
    score: float
    scores: Mapping[str, float]
    truncated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """One text's vector, float32 of shape [dimension]; of unit length if the model normalizes."""

    vector: npt.NDArray[np.float32]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Ranked:
    """One passage's score for the query; `index` is its place in the list that was given."""

    index: int
    score: float
    passage: str
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a generation cost; times in ms.

    `cached_tokens` of the prompt were in the model's cache already, from an earlier turn or a shared prefix.
    `queue_ms` is the wait for a slot, `prefill_ms` the time from there to the first token.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_ms: float | None = None
    prefill_ms: float | None = None
    total_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of one sample. `finish_reason` is None while it runs, `usage` until the last piece.

    `text` may be empty, while a character or a possible stop string is incomplete; `logprobs`, one for each
    of `token_ids`, is None unless asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation. `finish_reason` is "stop", "length" or "cancelled"; None for one cut off here."""

    index: int
    text: str
    finish_reason: str | None
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to one prompt: its samples (one, unless `n` was given) and what they cost together."""

    samples: tuple[Sample, ...]
    usage: Usage | None

    @property
    def text(self) -> str:
        """The first sample's, as are the other properties."""
        return self.samples[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.samples[0].finish_reason

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.samples[0].token_ids

    @property
    def logprobs(self) -> tuple[float, ...] | None:
        return self.samples[0].logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a served model's configuration says about it; `slots` and `capacity` (tokens a slot holds) are
    None unless it generates."""

    name: str
    task: str | None
    precision: str | None
    target: str | None
    max_batch: int
    inputs: frozenset[str]
    outputs: frozenset[str]
    cached: bool
    slots: int | None = None
    capacity: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStatus:
    """A generating model at this moment, and its counts since the server started.

    `cache_tokens` of `cache_capacity_tokens` are held, those of finished sequences that wait to be used again
    included.
    """

    slots: int
    slots_active: int
    queued: int
    cache_tokens: int
    cache_capacity_tokens: int
    tokens_per_second: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """A loaded model and its counts since the server started. Times are means per request, in ms.

    From the model's own metrics: `rejected` by reason, `queue_ms` from a request's arrival to its start,
    `request_ms` and `p99_ms` to its last response, `mean_batch_size` of the `texts` computed in `runs` of
    the engine. A model of Triton's own backends publishes none; then these are Triton's figures. Where the
    metrics cannot be read they are None, and `requests` and `failed` are Triton's. `generation` is None for
    models that do not generate.
    """

    name: str
    version: str
    task: str | None
    precision: str | None
    requests: int
    failed: int
    rejected: Mapping[str, int] | None = None
    texts: int | None = None
    runs: int | None = None
    mean_batch_size: float | None = None
    queue_ms: float | None = None
    request_ms: float | None = None
    p99_ms: float | None = None
    cache_hits: int = 0
    cache_misses: int = 0
    resident_bytes: int | None = None
    planned_bytes: int | None = None
    generation: GenerationStatus | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """`metrics` is where the models' metrics were looked for, empty where no address is known;
    `metrics_error` says why there are none."""

    url: str
    protocol: Protocol
    server: str
    version: str
    models: tuple[ModelStatus, ...]
    metrics: str = ""
    metrics_error: str | None = None
