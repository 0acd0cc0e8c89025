"""Streams over HTTP: Triton's generate extension, JSON in and server-sent events out.

Answers of one response come over it too: Triton notices that a client went away from /generate_stream, and
not from /generate.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .codec import Array, InferReply, InferRequest
from .errors import UnexpectedAnswer
from .wire import PRIORITY, microseconds

# The answer's JSON has no types, and a single value stands for a list of one.
_TYPES: dict[str, Any] = {
    "index": np.int32,
    "token_ids": np.int32,
    "token_counts": np.int32,
    "logprobs": np.float32,
}


def path(request: InferRequest) -> str:
    from urllib.parse import quote

    return f"/v2/models/{quote(request.model, safe='')}/generate_stream"


def body(request: InferRequest, timeout: float) -> bytes:
    """What is no input becomes a parameter of the request; `id` its id as well."""
    document = {name: _plain(array) for name, array in request.inputs.items()}
    document |= {"id": request.request_id, "timeout": microseconds(timeout)}
    if request.priority:
        document[PRIORITY] = request.priority
    return json.dumps(document).encode()


def _plain(array: Array) -> Any:
    values = [value.decode() if isinstance(value, bytes) else value for value in array.tolist()]
    return values[0] if len(values) == 1 else values


def event(line: bytes) -> bytes | None:
    """The data of one line of the answer; None for the lines between."""
    return line[5:].strip() if line.startswith(b"data:") else None


def reply(request: InferRequest, data: bytes, status: int) -> InferReply:
    """From one event's data; InferenceServerException for a failure, which may be the whole body."""
    from tritonclient.utils import InferenceServerException

    try:
        document = json.loads(data)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        text = data[:200].decode("utf-8", "replace").strip()
        if status >= 400:
            raise InferenceServerException(msg=text or "no reason given", status=str(status))
        raise UnexpectedAnswer(f"not the generate extension's JSON: {text!r}", model=request.model)
    if "error" in document:
        # A failure after the first event comes with the status that was sent before it.
        raise InferenceServerException(
            msg=str(document["error"]), status=str(status if status >= 400 else 400)
        )
    outputs = {name: _array(name, document[name]) for name in request.outputs if name in document}
    version = str(document.get("model_version", ""))
    return InferReply(request.model, request.request_id, outputs, version)


def _array(name: str, value: Any) -> Array:
    values = value if isinstance(value, list) else [value]
    if name in _TYPES:
        return np.array(values, dtype=_TYPES[name])
    return np.array([str(text).encode() for text in values], dtype=np.object_)
