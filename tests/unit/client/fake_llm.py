"""What the fake transports answer for a generating model: a continuation, word by word."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from client.codec import InferReply, InferRequest

WORDS = ("한국", "어 ", "soup ", "👍🏽 ", "good.")
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "cached_tokens": 3, "queue_ms": 0.5, "new_field": 1}


def config(name: str, precision: str = "int8-weights") -> dict[str, Any]:
    """A decoupled model's configuration: gRPC leaves max_batch_size 0 out."""
    parameters = {"task": "generate", "precision": precision, "slots": "8", "capacity": "512"}
    inputs = ("text", "messages", "max_tokens", "stream")
    outputs = ("text", "index", "token_ids", "token_counts", "logprobs", "finish_reason", "usage")
    return {
        "config": {
            "name": name,
            "input": [{"name": tensor} for tensor in inputs],
            "output": [{"name": tensor} for tensor in outputs],
            "parameters": {key: {"string_value": value} for key, value in parameters.items()},
        }
    }


def arrays(texts: list[str], indices: list[int], counts: list[int], **last: Any) -> dict[str, Any]:
    """One response's outputs; `last` holds logprobs, reasons and usage where they are not empty."""
    total = sum(counts)
    usage = json.dumps(last["usage"]) if last.get("usage") else ""
    reasons = last.get("reasons") or [""] * len(texts)
    return {
        "text": np.array([text.encode() for text in texts], object),
        "index": np.array(indices, np.int32),
        "token_ids": np.arange(total, dtype=np.int32),
        "token_counts": np.array(counts, np.int32),
        "logprobs": np.full(total if last.get("logprobs") else 0, -0.5, np.float32),
        "finish_reason": np.array([reason.encode() for reason in reasons], object),
        "usage": np.array([usage.encode()], object),
    }


def responses(request: InferRequest) -> list[dict[str, Any]]:
    """All responses to a request, in order."""
    n = int(request.inputs["n"][0]) if "n" in request.inputs else 1
    scores = "logprobs" in request.inputs
    if not request.inputs["stream"][0]:
        counts = [len(WORDS)] * n
        whole = ["".join(WORDS)] * n
        return [arrays(whole, list(range(n)), counts, logprobs=scores, reasons=["stop"] * n, usage=USAGE)]
    out = []
    for place, word in enumerate(WORDS):
        for sample in range(n):
            last = place == len(WORDS) - 1
            end = last and sample == n - 1
            reasons = ["stop"] if last else [""]
            usage = USAGE if end else None
            out.append(arrays([word], [sample], [1], logprobs=scores, reasons=reasons, usage=usage))
    return out


class FakeStream:
    """Yields the script's responses; an exception in it is raised. `close` wakes a wait that never ends."""

    def __init__(self, request: InferRequest, script: list[Any]) -> None:
        self._request = request
        self._items: Iterator[Any] = iter(script)
        self._woken = threading.Event()
        self.closed = False
        self.waiting = threading.Event()

    def __iter__(self) -> FakeStream:
        return self

    def __next__(self) -> InferReply:
        if self.closed:
            raise StopIteration
        item = next(self._items)
        if item == "hang":
            self.waiting.set()
            self._woken.wait(10)
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return InferReply(self._request.model, self._request.request_id, item)

    def close(self) -> None:
        self.closed = True
        self._woken.set()


class FakeAsyncStream:
    def __init__(self, request: InferRequest, script: list[Any]) -> None:
        self._inner = FakeStream(request, script)

    @property
    def closed(self) -> bool:
        return self._inner.closed

    def __aiter__(self) -> FakeAsyncStream:
        return self

    async def __anext__(self) -> InferReply:
        try:
            return next(self._inner)
        except StopIteration:
            raise StopAsyncIteration from None

    async def close(self) -> None:
        self._inner.close()
