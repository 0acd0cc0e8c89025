"""Fake transports and a fake clock: everything above the transport seam runs without a server or time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_llm import FakeAsyncStream, FakeStream, responses

from client.codec import InferReply, InferRequest
from client.retry import Clock
from client.transport import Endpoint

MAX_BATCH = 4


def config(name: str, task: str, precision: str) -> dict[str, Any]:
    """A model configuration in the form gRPC's JSON has (wrapped, numbers as they come)."""
    tensors = {
        "classify": (["text"], ["labels", "scores", "truncated"]),
        "embed": (["text"], ["embedding", "truncated"]),
        "rerank": (["query", "passages"], ["scores", "truncated"]),
    }[task]
    return {
        "config": {
            "name": name,
            "max_batch_size": MAX_BATCH,
            "input": [{"name": tensor} for tensor in tensors[0]],
            "output": [{"name": tensor} for tensor in tensors[1]],
            "parameters": {"task": {"string_value": task}, "precision": {"string_value": precision}},
        }
    }


class FakeServer:
    """Answers as the encoder models do; `script` holds errors to raise before answering."""

    def __init__(self) -> None:
        self.endpoint = Endpoint("grpc", "fake:1")
        self.configs = {
            "sentiment": config("sentiment", "classify", "int8"),
            "sentiment-fp16": config("sentiment-fp16", "classify", "fp16"),
            "embedder": config("embedder", "embed", "int8"),
            "reranker": config("reranker", "rerank", "int8"),
        }
        self.script: list[BaseException] = []
        self.requests: list[InferRequest] = []
        self.questions: list[tuple[str, str]] = []
        self.timeouts: list[float] = []
        self.replies: Callable[[InferRequest], dict[str, Any]] | None = None
        self.closed = False
        self.versions = iter(itertools.repeat("1"))  # that answer, request by request
        # Streams: what the next one yields in place of its responses, and those that were opened.
        self.scripts: list[list[Any]] = []
        self.streams: list[Any] = []

    def script_of(self, request: InferRequest, timeout: float) -> list[Any]:
        self.requests.append(request)
        self.timeouts.append(timeout)
        return self.scripts.pop(0) if self.scripts else responses(request)

    def answer(self, request: InferRequest, timeout: float) -> InferReply:
        self.requests.append(request)
        self.timeouts.append(timeout)
        if self.script:
            raise self.script.pop(0)
        outputs = self.replies(request) if self.replies else self.compute(request)
        return InferReply(request.model, request.request_id, outputs, next(self.versions))

    def compute(self, request: InferRequest) -> dict[str, Any]:
        if "passages" in request.inputs:
            scores = [[float(len(passage)) for passage in request.inputs["passages"][0]]]
            return {"scores": np.array(scores, np.float32), "truncated": np.zeros((1, len(scores[0])), bool)}
        texts = request.inputs["text"][:, 0]
        truncated = np.array([[len(text) > 100] for text in texts])
        if "embedding" in request.outputs:
            return {"embedding": np.array([[len(t), 1] for t in texts], np.float32), "truncated": truncated}
        labels = [[b"positive", b"negative"] if b"good" in t else [b"negative", b"positive"] for t in texts]
        scores = np.array([[0.75, 0.25]] * len(texts), np.float32)
        return {"labels": np.array(labels, object), "scores": scores, "truncated": truncated}

    def report(self, question: str, model: str) -> Any:
        from client.errors import UnknownModel

        self.questions.append((question, model))
        if question == "config":
            if model not in self.configs:
                raise UnknownModel("Request for unknown model", model=model)
            return self.configs[model]
        if question == "metadata":
            return {"name": "triton", "version": "2.51.0"}
        return {"model_stats": [{"name": name, "version": "1"} for name in self.configs]}


class FakeTransport(FakeServer):
    def infer(self, request: InferRequest, timeout: float) -> InferReply:
        return self.answer(request, timeout)

    def stream(self, request: InferRequest, timeout: float) -> FakeStream:
        self.streams.append(FakeStream(request, self.script_of(request, timeout)))
        return self.streams[-1]

    def ask(self, question: str, model: str, timeout: float) -> Any:
        return self.report(question, model)

    def close(self) -> None:
        self.closed = True


class FakeAsyncTransport(FakeServer):
    async def infer(self, request: InferRequest, timeout: float) -> InferReply:
        return self.answer(request, timeout)

    def stream(self, request: InferRequest, timeout: float) -> FakeAsyncStream:
        self.streams.append(FakeAsyncStream(request, self.script_of(request, timeout)))
        return self.streams[-1]

    async def ask(self, question: str, model: str, timeout: float) -> Any:
        return self.report(question, model)

    async def close(self) -> None:
        self.closed = True


class FakeClock(Clock):
    def __init__(self) -> None:
        self.time = 1000.0
        self.waits: list[float] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def async_transport() -> FakeAsyncTransport:
    return FakeAsyncTransport()
