"""What every request carries beside its tensors, and what is read from an answer beside its outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http

from client import codec, wire
from client.access import Access
from client.codec import InferRequest


def request(priority: int = 0) -> InferRequest:
    inputs = {"text": codec.text_column([b"good"])}
    return InferRequest(model="m", inputs=inputs, outputs=("o",), request_id="r/1", priority=priority)


@pytest.mark.parametrize("module", [tritonclient.grpc, tritonclient.http])
def test_the_time_left_the_priority_the_id_and_the_token_go_along(module: Any) -> None:
    arguments = wire.infer_arguments(module, request(priority=2), 1.5, Access("a-token"))
    assert arguments.pop("inputs")[0].name() == "text"
    assert arguments == {
        "model_name": "m",
        "request_id": "r/1",
        "timeout": 1_500_000,
        "parameters": {"onecard_priority": 2},
        "headers": {"authorization": "Bearer a-token", "x-request-id": "r/1"},
    }
    plain = wire.infer_arguments(module, request(), 1e-9, Access())
    assert (plain["parameters"], plain["timeout"]) == (None, 1)
    assert "priority" not in plain  # Triton's own reaches no model


@pytest.mark.parametrize("response", [{"model_version": "7"}, SimpleNamespace(model_version="7")])
def test_an_answer_tells_its_version(response: Any) -> None:
    result = SimpleNamespace(as_numpy=lambda name: None, get_response=lambda: response)
    assert wire.reply_of(request(), result).version == "7"
