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

from triton_repo.runtime.admission import PRIORITY, TIMEOUT
from triton_repo.runtime.delivery import Delta, merged
from triton_repo.runtime.exchange import Answer, Cancelled
from triton_repo.runtime.generation import FIELDS
from triton_repo.runtime.texts import BadRequest, EngineFailed

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

# The request's id, which HTTP's generate endpoint passes on in this way, and what the queue reads.
_NOT_OURS: Final = {"id", PRIORITY, TIMEOUT}
_LISTS: Final = {"stop", "stop_token_ids"}


def read_fields(tensors: Mapping[str, Array], parameters: str = "") -> tuple[dict[str, Any], bool]:
    """The request as the service's fields, and whether it wants a stream.

    `tensors`: the inputs that were sent, by name; `parameters`: Triton's request parameters as JSON. Raises
    BadRequest for a parameter or an empty tensor; what the fields may hold is for the service to say.
    """
    _refuse_parameters(parameters)
    fields = {name: _plain(name, array) for name, array in tensors.items()}
    return fields, bool(fields.pop("stream", True))


def _refuse_parameters(parameters: str) -> None:
    """HTTP's generate endpoint turns every JSON key that is no input into a parameter: a misspelt one."""
    for name in json.loads(parameters or "{}"):
        if name in _NOT_OURS:
            continue
        known = (*FIELDS, "stream")
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"this model reads {', '.join(known)}"
        raise BadRequest(f"unknown parameter {name[:100]!r}; {hint}")


def _plain(name: str, array: Array) -> Any:
    """Lists for the fields that are lists, one value for every other."""
    values = array.reshape(-1)
    if name in _LISTS:
        return values.tolist()
    if not values.size:
        raise BadRequest(f"'{name}' holds no value")
    if values.dtype == np.float32:
        # The shortest decimal that is this FP32 value: 0.7, not 0.699999988.
        return float(str(values[0]))
    value = values[0]
    return value.item() if isinstance(value, np.generic) else value


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
