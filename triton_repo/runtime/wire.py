"""One generate request's tensors to the fields that the service reads, and its deltas to output tensors.

Nothing of Triton is imported: a model file passes arrays in and sends the arrays that come out.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.delivery import Delta, merged
from triton_repo.runtime.texts import BadRequest, EngineFailed, decode_text

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Answer = Arrays | Exception


# The request's id, which HTTP's generate endpoint passes on in this way.
_NOT_OURS: Final = {"id"}


class Cancelled(Exception):
    """The client gave up; nobody reads this but a client that cancelled and still listens."""


def read_fields(tensors: Mapping[str, Array], parameters: str = "") -> tuple[dict[str, Any], bool]:
    """The request's fields as Python values, and whether it wants a stream.

    `tensors`: the inputs that were sent, by name; `parameters`: Triton's request parameters as JSON. Raises
    BadRequest naming what cannot be read; whether values make sense is for the service to say.
    """
    _refuse_parameters(parameters)
    fields = {name: READERS[name](array, f"'{name}'") for name, array in tensors.items()}
    return fields, bool(fields.pop("stream", True))


def _refuse_parameters(parameters: str) -> None:
    """HTTP's generate endpoint turns every JSON key that is no input into a parameter: a misspelt one."""
    for name in json.loads(parameters or "{}"):
        if name in _NOT_OURS:
            continue
        near = difflib.get_close_matches(name, READERS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        hint = hint or f"; this model reads {', '.join(READERS)}"
        raise BadRequest(f"unknown parameter {name[:100]!r}{hint}")


def _text(array: Array, where: str) -> str:
    return decode_text(array.reshape(-1)[0], where)


def _messages(array: Array, where: str) -> Any:
    text = decode_text(array.reshape(-1)[0], where)
    try:
        messages = json.loads(text)
        # JSON can spell half a character ("\ud83d"), which no tokenizer takes.
        json.dumps(messages, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"{where} is not JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            'it is a list such as [{"role": "user", "content": "..."}]'
        ) from None
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise BadRequest(f"{where} holds half a surrogate pair ({found!a}), which is no character") from None
    except RecursionError:
        raise BadRequest(f"{where} is nested too deeply to be a list of messages") from None
    return messages


def _integer(array: Array, where: str) -> int:
    return int(array.reshape(-1)[0])


def _number(array: Array, where: str) -> float:
    # The shortest decimal that is this FP32 value: 0.7, not 0.699999988.
    return float(str(np.float32(array.reshape(-1)[0])))


def _flag(array: Array, where: str) -> bool:
    return bool(array.reshape(-1)[0])


def _texts(array: Array, where: str) -> tuple[str, ...]:
    flat = array.reshape(-1)
    names = [where] if flat.size == 1 else [f"{where} {place}" for place in range(flat.size)]
    return tuple(decode_text(value, name) for value, name in zip(flat, names, strict=True))


def _integers(array: Array, where: str) -> tuple[int, ...]:
    return tuple(array.reshape(-1).tolist())


READERS: Final[dict[str, Callable[[Array, str], Any]]] = {
    "text": _text,
    "messages": _messages,
    "max_tokens": _integer,
    "temperature": _number,
    "top_k": _integer,
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "seed": _integer,
    "stop": _texts,
    "stop_token_ids": _integers,
    "n": _integer,
    "logprobs": _flag,
    "ignore_eos": _flag,
    "stream": _flag,
}


class Reply:
    """Turns the deltas of one request into responses: one for each, or one for all of them.

    `send(answer, final)` is called on the thread that delivers, once with `final`, and then no more. A sample
    that failed or was cancelled makes the whole answer an error, sent in place of its end.
    """

    def __init__(self, send: Callable[[Answer, bool], None], *, stream: bool) -> None:
        self._send = send
        self._stream = stream
        self._kept: list[Delta] = []
        self._failure: Exception | None = None

    def __call__(self, delta: Delta) -> None:
        final = delta.usage is not None
        if delta.finish_reason in ("error", "cancelled"):
            self._failure = self._failure or delta.error or _reason(delta)
        if self._stream:
            self._send_delta(delta, final)
            return
        self._kept.append(delta)
        if final:
            deltas = sorted(merged(self._kept), key=lambda sample: sample.index)
            self._send(self._failure or output_arrays(deltas, delta.usage), True)

    def _send_delta(self, delta: Delta, final: bool) -> None:
        if self._failure is None:
            self._send(output_arrays([delta], delta.usage), final)
            return
        if delta.text and delta.finish_reason != "cancelled":
            self._send(output_arrays([delta], None), False)
        if final:
            self._send(self._failure, True)


def _reason(delta: Delta) -> Exception:
    if delta.finish_reason == "cancelled":
        return Cancelled("the request was cancelled")
    return EngineFailed("the request failed")


def output_arrays(deltas: Sequence[Delta], usage: Mapping[str, float] | None) -> Arrays:
    """Output tensors of `deltas`, one entry each; their tokens and logprobs are laid end to end.

    Shapes, for k deltas with t tokens together: text, index, token_counts, finish_reason [k]; token_ids [t];
    logprobs [t], or [0] when none were asked for; usage [1], JSON, empty unless this is the last response.
    """
    return {
        "text": _bytes_array(delta.text for delta in deltas),
        "index": np.array([delta.index for delta in deltas], np.int32),
        "token_ids": np.array([token for delta in deltas for token in delta.token_ids], np.int32),
        "token_counts": np.array([len(delta.token_ids) for delta in deltas], np.int32),
        "logprobs": np.array([value for delta in deltas for value in delta.logprobs], np.float32),
        "finish_reason": _bytes_array(delta.finish_reason for delta in deltas),
        "usage": _bytes_array(["" if usage is None else json.dumps(dict(usage))]),
    }


def _bytes_array(texts: Iterable[str]) -> Array:
    return np.array([text.encode() for text in texts], dtype=object)
