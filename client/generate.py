"""Generation without any I/O: arguments checked and made tensors, responses made pieces and answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import numpy as np

from .codec import Array, InferReply, encode_text
from .errors import InvalidInput, UnexpectedAnswer
from .types import Delta, Generation, Sample, Usage

OUTPUTS = ("text", "index", "token_ids", "token_counts", "logprobs", "finish_reason", "usage")
ROLES = ("system", "user", "assistant")
INT32, INT64 = 2**31 - 1, 2**63 - 1
FLOAT32 = float(np.finfo(np.float32).max)


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of every call that generates; what is left out is the server's default.

    `model`, `precision` and `priority` as for the other calls; `timeout` is in seconds: for the whole call,
    or when streaming for the longest wait for the next piece. `system` is a system prompt.

    `max_tokens` bounds the answer. `temperature` 0 is greedy; above it, `top_k` (0 is off), `top_p`, `min_p`
    and `repetition_penalty` shape the distribution as in Transformers, and `seed` makes it repeatable. The
    answer ends before any of `stop` (one string or several) or at one of `stop_token_ids`, and goes on past
    the model's own end with `ignore_eos`. `n` samples share one prompt; `logprobs` asks for the logarithm of
    each token's probability.
    """

    model: str | None
    precision: str | None
    priority: int
    request_id: str | None
    timeout: float | None
    system: str | None
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Iterable[str] | None
    stop_token_ids: Iterable[int] | None
    n: int | None
    logprobs: bool | None
    ignore_eos: bool | None


class PromptOptions(GenerateOptions, total=False):
    """As GenerateOptions; `chat` makes each prompt the user's message in the model's chat template."""

    chat: bool | None


ROUTING = ("model", "precision", "priority", "request_id")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model continues: the text itself, or messages that the server puts into its chat template."""

    name: str  # of the tensor: text or messages
    content: bytes


def text_prompt(text: object, what: str, system: str | None, *, chat: bool = False) -> Prompt:
    """The text as it is; the user's message with `chat`, and behind a system prompt."""
    if chat or system is not None:
        return chat_prompt([{"role": "user", "content": _text(text, what)}], system)
    return Prompt("text", encode_text(text, what))


def chat_prompt(messages: object, system: str | None) -> Prompt:
    """The conversation as JSON, or one text as the user's message; InvalidInput names what is wrong in it."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or isinstance(messages, bytes):
        raise InvalidInput(f"messages must be a str or a list, not {type(messages).__name__}")
    turns = [_message(message, place) for place, message in enumerate(messages)]
    if not turns:
        raise InvalidInput("messages is empty")
    if system is not None:
        turns.insert(0, {"role": "system", "content": _text(system, "system")})
    count = sum(turn["role"] == "system" for turn in turns)
    if count > 1:
        also = " (`system` counts as one)" if system is not None else ""
        raise InvalidInput(f"messages hold {count} system messages, one is allowed{also}")
    return Prompt("messages", json.dumps(turns, ensure_ascii=False).encode())


def _message(message: object, place: int) -> dict[str, str]:
    where = f"message {place}"
    if not isinstance(message, Mapping):
        raise InvalidInput(f"{where} must be a dict of role and content, not {type(message).__name__}")
    unknown = [key for key in message if key not in ("role", "content")]
    missing = [key for key in ("role", "content") if key not in message]
    if unknown or missing:
        raise InvalidInput(
            f"{where} has an unknown field {unknown[0]!r:.60}" if unknown else f"{where} has no {missing[0]}"
        )
    if message["role"] not in ROLES:
        raise InvalidInput(f"{where} has role {message['role']!r}; known: {', '.join(ROLES)}")
    return {"role": message["role"], "content": _text(message["content"], f"the content of {where}")}


def _text(text: object, what: str) -> str:
    return encode_text(text, what).decode()


def parameters(options: Mapping[str, Any]) -> dict[str, Array]:
    """Tensors of the options given, of shape [1] or [N]; InvalidInput names the option and its value."""
    tensors = {}
    for name, (check, dtype) in _PARAMETERS.items():
        if options.get(name) is not None:
            values = check(name, options[name])
            tensors[name] = np.array(values, dtype=dtype)
    return tensors


def request_inputs(prompt: Prompt, tensors: Mapping[str, Array], *, stream: bool) -> dict[str, Array]:
    """All inputs of one request."""
    text = np.array([prompt.content], dtype=np.object_)
    return {prompt.name: text, **tensors, "stream": np.array([stream], dtype=np.bool_)}


def _whole(low: int, high: int) -> Callable[[str, Any], list[int]]:
    def check(name: str, value: Any) -> list[int]:
        if not _is_int(value) or not low <= value <= high:
            raise InvalidInput(f"{name} must be a whole number {_range(low, high)}, not {value!r}")
        return [value]

    return check


def _real(low: float, high: float = FLOAT32, *, above: bool = False) -> Callable[[str, Any], list[float]]:
    """`above`: the lowest value itself is refused."""

    def check(name: str, value: Any) -> list[float]:
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not number or not low <= value <= high or (above and value <= low):
            bounds = f"above {low:g}" if above else f"of at least {low:g}"
            bounds += "" if high == FLOAT32 else f" and at most {high:g}"
            raise InvalidInput(f"{name} must be a number {bounds}, not {value!r:.40}")
        return [float(value)]

    return check


def _flag(name: str, value: Any) -> list[bool]:
    if not isinstance(value, bool):
        raise InvalidInput(f"{name} must be True or False, not {value!r}")
    return [value]


def _strings(name: str, value: Any) -> list[bytes]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, Iterable) or isinstance(given, bytes | Mapping):
        raise InvalidInput(f"{name} must be a str or a list of str, not {type(value).__name__}")
    encoded = []
    for place, text in enumerate(given):
        # A stop string may be white space, which encode_text takes for nothing.
        if isinstance(text, str) and text.isspace():
            encoded.append(text.encode())
        else:
            encoded.append(encode_text(text, f"{name} {place}"))
    return encoded


def _ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise InvalidInput(f"{name} must be a list of whole numbers, not {value!r}")
    given = list(value)
    for token in given:
        if not _is_int(token) or not 0 <= token <= INT32:
            raise InvalidInput(f"{name} must hold token ids {_range(0, INT32)}, not {token!r}")
    return given


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _range(low: int, high: int) -> str:
    if low < 0:
        return "of 64 bits"
    return f"from {low} up" if high >= INT32 else f"from {low} to {high}"


_PARAMETERS: dict[str, tuple[Callable[[str, Any], list[Any]], Any]] = {
    "max_tokens": (_whole(1, INT32), np.int32),
    "temperature": (_real(0), np.float32),
    "top_k": (_whole(0, INT32), np.int32),
    "top_p": (_real(0, 1, above=True), np.float32),
    "min_p": (_real(0, 1), np.float32),
    "repetition_penalty": (_real(0, above=True), np.float32),
    "seed": (_whole(-INT64 - 1, INT64), np.int64),
    "stop": (_strings, np.object_),
    "stop_token_ids": (_ids, np.int32),
    "n": (_whole(1, INT32), np.int32),
    "logprobs": (_flag, np.bool_),
    "ignore_eos": (_flag, np.bool_),
}


def parse_deltas(reply: InferReply, *, logprobs: bool) -> list[Delta]:
    """The pieces in one response: one while streaming, one for each sample otherwise."""
    texts, indices, reasons = (_column(reply, name) for name in ("text", "index", "finish_reason"))
    ids, scores = _column(reply, "token_ids"), _column(reply, "logprobs")
    counts = _column(reply, "token_counts")
    rows = len(texts)
    if not rows == len(indices) == len(reasons) == len(counts) or sum(counts) != len(ids):
        raise _unexpected(reply, f"{rows} texts do not fit {len(counts)} token counts of {len(ids)} tokens")
    if logprobs and len(scores) != len(ids):
        raise _unexpected(reply, f"{len(ids)} tokens came with {len(scores)} log probabilities")
    usage = _usage(reply)
    deltas, start = [], 0
    for place in range(rows):
        end = start + counts[place]
        deltas.append(
            Delta(
                index=indices[place],
                text=_decode(texts[place]),
                token_ids=tuple(ids[start:end]),
                logprobs=tuple(scores[start:end]) if logprobs else None,
                finish_reason=_decode(reasons[place]) or None,
                usage=usage if place == rows - 1 else None,
            )
        )
        start = end
    return deltas


class Assembly:
    """Pieces put together, sample by sample."""

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._texts: dict[int, list[str]] = {}
        self._ids: dict[int, list[int]] = {}
        self._scores: dict[int, list[float]] = {}
        self._reasons: dict[int, str] = {}
        self.usage: Usage | None = None

    def add(self, delta: Delta) -> None:
        self._texts.setdefault(delta.index, []).append(delta.text)
        self._ids.setdefault(delta.index, []).extend(delta.token_ids)
        self._scores.setdefault(delta.index, []).extend(delta.logprobs or ())
        if delta.finish_reason:
            self._reasons[delta.index] = delta.finish_reason
        self.usage = delta.usage or self.usage

    @property
    def finished(self) -> bool:
        """Whether the server said that every sample seen is at its end."""
        return self.usage is not None and self._reasons.keys() == self._texts.keys() != set()

    def generation(self) -> Generation:
        """What is there so far; a sample without a piece yet is not."""
        samples = [
            Sample(
                index=index,
                text="".join(self._texts[index]),
                finish_reason=self._reasons.get(index),
                token_ids=tuple(self._ids[index]),
                logprobs=tuple(self._scores[index]) if self._logprobs else None,
            )
            for index in sorted(self._texts)
        ]
        return Generation(tuple(samples) or (Sample(0, "", None, ()),), self.usage)


def parse_generation(reply: InferReply, *, logprobs: bool) -> Generation:
    """The whole answer from the one response to a request that did not stream."""
    assembly = Assembly(logprobs=logprobs)
    for delta in parse_deltas(reply, logprobs=logprobs):
        assembly.add(delta)
    if not assembly.finished:
        raise _unexpected(reply, "the answer has no finish reason or no usage")
    return assembly.generation()


def _usage(reply: InferReply) -> Usage | None:
    text = _decode(next(iter(_column(reply, "usage")), b""))
    if not text:
        return None
    try:
        document = json.loads(text)
        return Usage(**{f.name: document[f.name] for f in fields(Usage) if f.name in document})
    except (ValueError, TypeError):
        raise _unexpected(reply, f"its usage is not what was promised: {text[:200]}") from None


def _column(reply: InferReply, name: str) -> list[Any]:
    array = reply.outputs.get(name)
    if array is None:
        raise _unexpected(reply, f"the answer has no {name}")
    values: list[Any] = array.reshape(-1).tolist()
    return values


def _decode(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _unexpected(reply: InferReply, message: str) -> UnexpectedAnswer:
    return UnexpectedAnswer(message, model=reply.model, request_id=reply.request_id)
