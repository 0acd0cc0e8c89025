"""The encoders' model file, a fake Triton before it and a fake service behind: each request ends once."""

from __future__ import annotations

import importlib
import json
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triton_fakes import Request, TritonModelException, fake_triton

from build_engines.stack import Queue
from triton_repo.encoders import queue_parameters
from triton_repo.runtime import encode, fingerprint, probe, service
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.texts import BadRequest


class Engine:
    """Of an encoder only that it was opened, and closed."""

    opened: list[tuple[Any, ...]]
    closed = False

    @classmethod
    def open(cls, *given: Any) -> Engine:
        cls.opened.append(given)
        return cls()

    def close(self) -> None:
        Engine.closed = True


class Echo:
    inputs = ("text",)
    max_rows, most_characters = 3, 100

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        self.batches.append(len(requests))
        assert self.gate.wait(5)
        texts = [request["text"][0, 0] for request in requests]
        return [BadRequest("bad") if text == b"bad" else {"out": text} for text in texts]

    def snapshot(self) -> dict[str, float]:
        return {"runs_total": len(self.batches)}


def arguments(instances: int = 1, **parameters: str) -> dict[str, str]:
    queue = queue_parameters(Queue(max_size=2))
    found = {**queue, "target": "onnxruntime", "runtime": fingerprint()} | parameters
    config = {
        "parameters": {name: {"string_value": value} for name, value in found.items()},
        "instance_group": [{"count": instances}],
    }
    return {
        "model_repository": "/nowhere",
        "model_version": "3",
        "model_name": "vector",
        "model_instance_name": "vector_0_1",
        "model_instance_device_id": "1",
        "model_config": json.dumps(config),
    }


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton())
    monkeypatch.setattr(encode, "Encoder", Engine)
    monkeypatch.setattr(service, "EncoderService", Echo)
    monkeypatch.setattr(probe, "probe_encoder", lambda encoder, folder: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    Engine.opened, Engine.closed = [], False
    return importlib.import_module("triton_repo.models.encoder")


@pytest.fixture
def model(module: Any) -> Iterator[Any]:
    found = module.TritonPythonModel()
    found.initialize(arguments())
    yield found
    if not Engine.closed:
        found._service.gate.set()
        found.finalize()


def ask(text: str, **options: Any) -> Request:
    return Request(**options, text=np.array([[text.encode()]], dtype=object))


def warm(model: Any) -> None:
    """One request, as Triton sends before a model is ready: from then on it is known how long one takes."""
    first = ask("first")
    assert model.execute([first]) == [None]
    assert first.sender.closed.wait(5)


def broken() -> Request:
    """Its input cannot be read."""
    return Request(other=np.array([[b"x"]], dtype=object))


def test_what_fits_into_one_batch_is_returned_in_order(model: Any) -> None:
    warm(model)
    responses = model.execute([ask("a"), broken(), ask("bad")])
    assert responses[0]["out"] == b"a"
    assert (responses[1]["error"].code, responses[2]["error"].code) == ("INTERNAL", "INVALID_ARG")
    assert responses[1]["error"].message == "the server failed on this request: AttributeError"


def test_what_does_not_is_answered_later_and_the_rest_sent_away(model: Any) -> None:
    model._service.gate.clear()
    first = [ask("a"), ask("b")]
    assert model.execute(first) == [None, None]
    while not model._service.batches:
        pass
    urgent, patient = ask("urgent", parameters='{"onecard_priority": 1}'), ask("patient")
    displaced, too_many = ask("displaced"), ask("too many")
    responses = model.execute([patient, broken(), displaced, urgent, too_many])
    assert (responses[0], responses[2], responses[3]) == (None, None, None)
    assert (responses[1]["error"].code, responses[4]["error"].code) == ("INTERNAL", "UNAVAILABLE")
    assert displaced.sender.error.message.startswith("the queue is full: more urgent")
    model._service.gate.set()
    answered = ((first[0], b"a"), (first[1], b"b"), (urgent, b"urgent"), (patient, b"patient"))
    for request, text in answered:
        assert request.sender.closed.wait(5)
        assert request.sender.sent[-1][0]["out"] == text
    assert all(len(request.sender.sent) == 1 for request, _ in answered)
    assert not too_many.sender.sent


def test_who_is_rejected_on_arrival_is_not_even_read(model: Any) -> None:
    model._service.gate.clear()
    assert model.execute([ask("a"), ask("b")]) == [None, None]
    while not model._service.batches:
        pass
    assert model.execute([ask("c"), ask("d")]) == [None, None]
    assert model.execute([broken()])[0]["error"].code == "UNAVAILABLE"
    assert model._batcher.snapshot()["rejections_total"]["queue_full"] == 1


def test_what_was_not_answered_is_in_the_log_by_its_id_and_without_its_text(module: Any, model: Any) -> None:
    log = sys.modules["triton_python_backend_utils"].log  # type: ignore[attr-defined]
    warm(model)
    model.execute([ask("a"), ask("bad")])
    assert log == ["onecard request_id=r-1 model=vector event=rejected reason=bad_input"]
    model.execute([ask("b"), ask("c"), broken()])
    assert log[1:] == ["onecard request_id=r-1 model=vector event=failed reason=AttributeError"]
    for _ in range(100):
        model.execute([ask("bad")])
    assert 5 <= len(log) <= 17, "a crowd that is rejected must not fill the log"


def test_an_id_that_is_no_text_costs_nobody_anything(module: Any, model: Any) -> None:
    log = sys.modules["triton_python_backend_utils"].log  # type: ignore[attr-defined]
    warm(model)
    responses = model.execute([ask("bad", id=b"\xff-7"), ask("a")])
    assert (responses[0]["error"].code, responses[1]["out"]) == ("INVALID_ARG", b"a")
    waiting = [ask("bad", id=b"\xff-8"), ask("a", id=b"\xff"), ask("b")]
    assert model.execute(waiting)[:2] == [None, None]
    assert waiting[0].sender.error.code == "INVALID_ARG"
    assert waiting[1].sender.closed.wait(5)
    assert [line.split()[1] for line in log[:2]] == [r"request_id=\xff-7", "request_id=r-1"]
    assert r"request_id=\xff-8" in log[-1]


def test_a_log_that_fails_costs_no_answer(module: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(message: str) -> None:
        raise RuntimeError("no shared memory")

    for name in ("log_info", "log_error"):
        monkeypatch.setattr(sys.modules["triton_python_backend_utils"].Logger, name, fails)  # type: ignore[attr-defined]
    warm(model)
    assert model.execute([ask("bad"), broken()])[0]["error"].code == "INVALID_ARG"
    for _ in range(2):  # and the thread goes on
        waiting = [ask("bad"), ask("a"), ask("too many")]
        model.execute(waiting)
        assert waiting[0].sender.error.code == "INVALID_ARG"
        assert waiting[1].sender.closed.wait(5)


def test_counters_begin_when_the_model_is_ready(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden requests are its own; no client sent them."""

    class Probed(Echo):
        def __init__(self, encoder: Any) -> None:
            super().__init__(encoder)
            self.batches = [4, 4]

    monkeypatch.setattr(service, "EncoderService", Probed)
    model = module.TritonPythonModel()
    model.initialize(arguments())
    warm(model)
    model.finalize()
    families = sys.modules["triton_python_backend_utils"].families  # type: ignore[attr-defined]
    assert families["onecard_runs_total"].made[""].value == 1
    assert families["onecard_requests_total"].made["completed"].value == 1


def test_priority_and_timeout_are_read(model: Any) -> None:
    found = model._read(ask("a", parameters='{"onecard_priority": 3}', timeout_us=1_500_000))
    assert (found.level, found.timeout_s) == (3, 1.5)
    found = model._read(ask("a"))
    assert (found.level, found.timeout_s) == (0, math.inf)
    for wrong in ('{"onecard_priority": -3}', b'{"note": "\xff"}'):
        assert isinstance(model._read(ask("a", parameters=wrong)), BadRequest)


def test_metrics_have_the_version_and_the_last_counts(module: Any, model: Any) -> None:
    warm(model)
    model.execute([ask("a"), ask("bad")])
    model.finalize()
    families = sys.modules["triton_python_backend_utils"].families  # type: ignore[attr-defined]
    requests = families["onecard_requests_total"].made
    assert (requests["completed"].value, requests["rejected"].value) == (2, 1)
    assert families["onecard_runs_total"].made[""].value == 2
    assert Engine.closed


def test_the_engine_gets_its_gpu_and_its_share_of_the_cores(module: Any) -> None:
    for instances in (1, 64):
        model = module.TritonPythonModel()
        model.initialize(arguments(instances))
        model.finalize()
    assert [given[1:] for given in Engine.opened] == [(None, 1), (1, 1)]


def test_a_refused_engine_and_a_foreign_runtime_are_load_errors(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TritonModelException, match="not the runtime that this repository"):
        module.TritonPythonModel().initialize(arguments(runtime="other"))

    def refuse(folder: Path, *settings: Any) -> Engine:
        raise EngineRefused("engine.onnx: altered after the build")

    monkeypatch.setattr(Engine, "open", refuse)
    with pytest.raises(TritonModelException, match=r"engine refused: engine.onnx: altered"):
        module.TritonPythonModel().initialize(arguments())
