"""Texts to tensors and tensors to answers, without any I/O: both clients and both protocols share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, UnexpectedAnswer
from .types import Classification, Embedding, ModelInfo, Ranked

Array = npt.NDArray[Any]


_BLANKS = tuple(bytes(0x20 if byte >> bit & 1 else 0x09 for bit in range(8)) for byte in range(256))


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """One request as every transport takes it; inputs are arrays with the batch dimension first. `task` and
    `texts`, how many it holds, are for the log."""

    model: str
    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    request_id: str
    task: str = ""
    texts: int = 1
    priority: int = 0
    idempotent: bool = True
    part: str = ""  # which items of the caller's list, when it was split
    decoupled: bool = False  # the model answers in a stream, be it of one response


@dataclass(frozen=True, slots=True)
class InferReply:
    """`version` is that of the model that answered."""

    model: str
    request_id: str
    outputs: Mapping[str, Array]
    version: str = ""


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors that a task's models take and give."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


SIGNATURES: Mapping[str, Signature] = {
    "classify": Signature(("text",), ("labels", "scores", "truncated")),
    "embed": Signature(("text",), ("embedding", "truncated")),
    "rerank": Signature(("query", "passages"), ("scores", "truncated")),
    "generate": Signature(("text", "messages"), ("text", "token_ids", "finish_reason", "usage")),
}


def encode_text(text: object, what: str) -> bytes:
    """UTF-8 of one text; InvalidInput names `what` when it is no text, is empty or cannot be encoded."""
    if not isinstance(text, str):
        raise InvalidInput(f"{what} must be str, not {type(text).__name__}")
    if not text.strip():
        raise InvalidInput(f"{what} is empty")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{what} has a lone surrogate {text[error.start]!a} at character {error.start}"
        ) from None


def encode_texts(texts: object, what: str) -> list[bytes]:
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | str | Mapping):
        raise InvalidInput(f"expected a list of {what}s, not {type(texts).__name__}")
    return [encode_text(text, f"{what} {place}") for place, text in enumerate(texts)]


def text_column(encoded: Sequence[bytes]) -> Array:
    """BYTES tensor of shape [N, 1]: one text per row of the batch."""
    return _bytes_array(encoded).reshape(-1, 1)


def text_row(encoded: Sequence[bytes]) -> Array:
    """BYTES tensor of shape [1, N]: one row that holds N texts."""
    return _bytes_array(encoded).reshape(1, -1)


def _bytes_array(encoded: Sequence[bytes]) -> Array:
    array = np.empty(len(encoded), dtype=np.object_)
    array[:] = encoded
    return array


def blanks(number: int) -> bytes:
    """32 blanks and tabs that no other number below 2**32 gives.

    Tokenizers of the BERT and SentencePiece kind drop white space at the end of a text, so the tokens stay
    the same while the request's bytes, which are the response cache's key, do not. (Byte-level ones keep it,
    as a few tokens more.)
    """
    return b"".join(_BLANKS[byte] for byte in number.to_bytes(4, "big"))


def with_blanks(texts: Array, number: int) -> Array:
    """A copy of a BYTES tensor whose last text ends in `blanks(number)`."""
    changed = texts.copy()
    changed.flat[-1] = changed.flat[-1] + blanks(number)
    return changed


def split(count: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` that cover `count` items in order."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def parse_classifications(reply: InferReply, count: int) -> list[Classification]:
    labels, scores, truncated = (_output(reply, name, count) for name in ("labels", "scores", "truncated"))
    if labels.shape != scores.shape or labels.ndim != 2 or labels.shape[1] == 0:
        raise _unexpected(reply, f"labels {labels.shape} and scores {scores.shape} do not belong together")
    answers = []
    for names, values, cut in zip(labels, scores.tolist(), truncated, strict=True):
        pairs = {_name(label): value for label, value in zip(names, values, strict=True)}
        best = max(pairs, key=pairs.__getitem__)
        answers.append(Classification(best, pairs[best], pairs, bool(cut[0])))
    return answers


def parse_embeddings(reply: InferReply, count: int) -> list[Embedding]:
    vectors, truncated = _output(reply, "embedding", count), _output(reply, "truncated", count)
    if vectors.ndim != 2:
        raise _unexpected(reply, f"embedding has shape {vectors.shape}")
    return [
        # A copy: a row of the reply's buffer is read-only and keeps the whole reply alive.
        Embedding(np.array(vector, dtype=np.float32), bool(cut[0]))
        for vector, cut in zip(vectors, truncated, strict=True)
    ]


def parse_scores(reply: InferReply, passages: int) -> tuple[list[float], list[bool]]:
    scores, truncated = _output(reply, "scores", 1), _output(reply, "truncated", 1)
    if scores.shape != (1, passages) or truncated.shape != (1, passages):
        raise _unexpected(
            reply, f"{passages} passages were sent and scores of shape {scores.shape} came back"
        )
    return scores[0].tolist(), truncated[0].tolist()


def rank(passages: Sequence[str], scores: Sequence[float], truncated: Sequence[bool]) -> list[Ranked]:
    """Best first; equal scores keep the order in which the passages were given."""
    order = sorted(range(len(passages)), key=lambda place: -scores[place])
    return [Ranked(place, scores[place], passages[place], truncated[place]) for place in order]


def _output(reply: InferReply, name: str, rows: int) -> Array:
    array = reply.outputs.get(name)
    if array is None:
        raise _unexpected(reply, f"the answer has no {name}")
    if array.ndim < 1 or array.shape[0] != rows:
        raise _unexpected(reply, f"{name} has shape {array.shape} where {rows} rows were expected")
    return array


def _name(label: object) -> str:
    return label.decode("utf-8", "replace") if isinstance(label, bytes) else str(label)


def _unexpected(reply: InferReply, message: str) -> UnexpectedAnswer:
    return UnexpectedAnswer(message, model=reply.model, request_id=reply.request_id)


def parse_model_info(config: Mapping[str, Any]) -> ModelInfo:
    """From a model configuration as JSON; gRPC wraps it in `config` and omits fields at their default."""
    config = config.get("config", config)
    parameters = {
        key: str(value.get("string_value", "")) for key, value in config.get("parameters", {}).items()
    }
    return ModelInfo(
        name=str(config.get("name", "")),
        task=parameters.get("task"),
        precision=parameters.get("precision"),
        target=parameters.get("target"),
        max_batch=int(config.get("max_batch_size", 0)),
        inputs=frozenset(tensor["name"] for tensor in config.get("input", ())),
        outputs=frozenset(tensor["name"] for tensor in config.get("output", ())),
        cached=bool(config.get("response_cache", {}).get("enable", False)),
        slots=_count(parameters.get("slots")),
        capacity=_count(parameters.get("capacity")),
    )


def _count(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
