"""What the client gives back: frozen values, one class per kind of answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Protocol = Literal["grpc", "http"]
Task = Literal["classify", "embed", "rerank"]


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
class ModelInfo:
    """What a served model's configuration says about it."""

    name: str
    task: str | None
    precision: str | None
    target: str | None
    max_batch: int
    inputs: frozenset[str]
    outputs: frozenset[str]
    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """A model's state and its statistics since the server started; times are means per request, in ms.

    `failed` counts as Triton does: requests it rejected or could not run; an answer in which the model itself
    refuses its input counts as a request served.
    """

    name: str
    version: str
    state: str
    reason: str
    task: str | None
    precision: str | None
    requests: int
    failed: int
    inferences: int
    executions: int
    mean_batch_size: float | None
    queue_ms: float | None
    compute_ms: float | None
    cache_hits: int
    cache_misses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    url: str
    protocol: Protocol
    server: str
    version: str
    models: tuple[ModelStatus, ...]
