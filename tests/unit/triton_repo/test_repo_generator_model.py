"""The model file of a causal LLM, a fake Triton before it, a fake service behind: each request ends once."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triton_fakes import USAGE, Request, Service, TritonModelException, fake_triton

from build_engines.stack import Queue
from triton_repo.encoders import queue_parameters
from triton_repo.runtime import fingerprint, generation, probe
from triton_repo.runtime import metrics as runtime_metrics
from triton_repo.runtime.admission import Busy, Limits
from triton_repo.runtime.delivery import Delta
from triton_repo.runtime.golden import ProbeFailed
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.texts import EngineFailed


class Loaded:
    """A model that was initialized, and what is around it."""

    def __init__(self, model: Any, triton: Any, module: Any) -> None:
        self.model, self.triton, self.module = model, triton, module
        self.service: Service = model._service

    def ask(self, text: str = "a", **options: Any) -> Request:
        tensors = {"text": np.array([text.encode()], dtype=object)}
        request = Request(**({"parameters": "{}"} | options), **tensors)
        assert self.model.execute([request]) is None
        return request

    def running(self, text: str = "a") -> tuple[Request, Any]:
        request = self.ask(text)
        assert self.service.arrived.acquire(timeout=5)
        return request, self.service.handles[-1]


def arguments(**parameters: str) -> dict[str, str]:
    queue = queue_parameters(Queue(max_size=7, deadline_ms=1500))
    found = {**queue, "runtime": fingerprint()} | parameters
    config = {"parameters": {name: {"string_value": value} for name, value in found.items()}}
    return {
        "model_repository": "/nowhere",
        "model_version": "1",
        "model_name": "talk",
        "model_instance_device_id": "1",
        "model_config": json.dumps(config),
    }


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    triton = fake_triton()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    monkeypatch.setattr(generation, "GenerationService", Service)
    monkeypatch.setattr(probe, "probe_generator", lambda service, folder: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return triton


@pytest.fixture
def loaded(triton: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loaded]:
    module = importlib.import_module("triton_repo.models.generator")
    for name, value in (("_POLL_S", 0.005), ("_LAST_WORDS_S", 0.2)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(runtime_metrics, "_INTERVAL_S", 0.01)
    model = module.TritonPythonModel()
    model.initialize(arguments())
    found = Loaded(model, triton, module)
    yield found
    if not found.service.closed:
        model.finalize()


def until(condition: Callable[[], Any], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def test_the_queue_s_bounds_come_from_the_config_and_the_gpu_from_triton(loaded: Loaded) -> None:
    assert loaded.service.settings == {"limits": Limits(max_size=7, deadline_s=1.5), "device": 1}


def test_a_stream_is_passed_on_and_closed_by_its_last_delta(loaded: Loaded) -> None:
    request, handle = loaded.running()
    handle.on_delta(Delta(0, "가", (1,)))
    handle.on_delta(Delta(0, "나", (2,), (), "stop", USAGE))
    assert [flags for _, flags in request.sender.sent] == [0, 1]
    assert [response["text"][0].decode() for response, _ in request.sender.sent] == ["가", "나"]
    handle.on_delta(Delta(0, "late", (3,)))
    assert len(request.sender.sent) == 2


@pytest.mark.parametrize(
    ("text", "parameters", "code", "message"),
    [
        ("refuse", "{}", "INVALID_ARG", "'text' is refused"),
        ("a", '{"beams": 1}', "INVALID_ARG", "unknown parameter 'beams'"),
        ("fault", "{}", "INTERNAL", "the server failed on this request: ZeroDivisionError"),
    ],
)
def test_a_refused_request_gets_its_reason_and_its_neighbours_go_on(
    loaded: Loaded, text: str, parameters: str, code: str, message: str
) -> None:
    running, handle = loaded.running()
    refused = loaded.ask(text, parameters=parameters)
    assert (refused.sender.error.code, message in refused.sender.error.message) == (code, True)
    assert loaded.service.refused == (code == "INVALID_ARG")
    assert not handle.cancelled.is_set()
    handle.on_delta(Delta(0, "end", (1,), (), "stop", USAGE))
    assert running.sender.sent[-1][0]["text"][0] == b"end"


@pytest.mark.parametrize(
    ("error", "code"),
    [(Busy("the queue is full", "queue_full"), "UNAVAILABLE"), (EngineRefused("secret"), "INTERNAL")],
)
def test_a_failure_behind_the_queue_has_its_own_code(loaded: Loaded, error: Exception, code: str) -> None:
    request, handle = loaded.running()
    handle.on_delta(Delta(0, "", (), (), "error", USAGE, error))
    assert request.sender.error.code == code
    assert "secret" not in request.sender.error.message


def test_a_client_that_went_away_stops_its_generation_and_no_other(loaded: Loaded) -> None:
    gone, stopped = loaded.running()
    stays, goes_on = loaded.running()
    gone.sender.cancelled = True
    assert stopped.cancelled.wait(5)
    assert gone.sender.error.code == "CANCELLED"
    assert not goes_on.cancelled.is_set()
    assert not stays.sender.closed.is_set()


def test_nobody_is_asked_about_after_its_last_response(loaded: Loaded) -> None:
    """The sender's own assertion would fail; the watching thread logs what it raises."""
    for request, handle in [loaded.running() for _ in range(20)]:
        assert until(lambda asked=request.sender: asked.polls)
        handle.on_delta(Delta(0, "", (), (), "stop", USAGE))
    assert loaded.triton.log == []


def test_every_waiting_client_is_asked_about_in_turn(loaded: Loaded) -> None:
    requests = [loaded.running()[0] for _ in range(3 * loaded.module._POLLED_AT_A_TIME)]
    assert until(lambda: all(request.sender.polls >= 2 for request in requests))
    polls = [request.sender.polls for request in requests]
    assert max(polls) - min(polls) <= max(polls) // 2 + 2


def test_a_response_that_cannot_be_sent_ends_the_request(loaded: Loaded) -> None:
    request, handle = loaded.running()
    request.sender.broken = True
    with pytest.raises(RuntimeError, match="no room"):
        handle.on_delta(Delta(0, "a", (1,)))
    assert request.sender.sent == [(None, 1)], "not even an error had room"
    handle.on_delta(Delta(0, "b", (2,)))
    assert len(request.sender.sent) == 1


def test_a_response_that_cannot_be_made_ends_the_request(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(name: str, value: Any) -> Any:
        raise RuntimeError("no room")

    request, handle = loaded.running()
    monkeypatch.setattr(loaded.triton, "Tensor", full)
    with pytest.raises(RuntimeError, match="no room"):
        handle.on_delta(Delta(0, "a", (1,)))
    assert (request.sender.error.code, request.sender.sent[-1][1]) == ("INTERNAL", 1)
    assert "could not be sent" in request.sender.error.message
    assert not loaded.model._watch._open


def test_metrics_follow_the_service(loaded: Loaded) -> None:
    loaded.service.counts = {"llm_slots": 4, "llm_generated_tokens_total": 10}
    families = loaded.triton.families
    assert until(lambda: "onecard_llm_generated_tokens_total" in families)
    assert until(lambda: families["onecard_llm_generated_tokens_total"].made[""].value == 10)
    assert families["onecard_llm_slots"].made[""].value == 4
    loaded.service.counts = {"llm_slots": 4, "llm_generated_tokens_total": 12}
    loaded.model.finalize()
    assert families["onecard_llm_generated_tokens_total"].made[""].value == 12, "the last ones too"


def test_priority_and_timeout_go_along(loaded: Loaded) -> None:
    request = loaded.ask(parameters='{"onecard_priority": 1}', timeout_us=1_500_000)
    assert loaded.service.arrived.acquire(timeout=5)
    over_http = loaded.ask(parameters='{"timeout": 2500000}')
    assert loaded.service.arrived.acquire(timeout=5)
    assert loaded.service.urgency == [(1, 1.5), (0, 2.5)]
    assert not over_http.sender.closed.is_set()
    wrong = loaded.ask(parameters='{"onecard_priority": "high"}')
    assert (wrong.sender.error.code, wrong.sender.error.message[:18]) == ("INVALID_ARG", "'onecard_priority'")
    assert not request.sender.closed.is_set()


def test_who_is_rejected_on_arrival_is_not_read_and_keeps_nobody_busy(loaded: Loaded) -> None:
    loaded.service.full = True
    loaded.service.gate.clear()  # no reader would come to it
    before = time.monotonic()
    rejected = loaded.ask("fault", parameters='{"onecard_priority": 1}', timeout_us=1_500_000)
    assert [flags for _, flags in rejected.sender.sent] == [1], "told before execute returns"
    assert rejected.sender.error.code == "UNAVAILABLE"
    assert loaded.service.checked[:2] == (1, 1.5)
    assert before <= loaded.service.checked[2] <= time.monotonic()
    assert loaded.service.refused == 1
    assert not loaded.model._watch._open
    assert rejected.sender.polls == 0


def test_no_more_requests_are_read_at_a_time_than_the_queue_and_the_slots_hold(loaded: Loaded) -> None:
    loaded.service.gate.clear()
    asked = [loaded.ask() for _ in range(7 + loaded.service.slots + 3)]
    for rejected in asked[-3:]:
        assert rejected.sender.error.code == "UNAVAILABLE"
        assert rejected.sender.error.message == "the queue is full: 9 requests are waiting; try again later"
    assert loaded.service.refused == 3
    loaded.service.gate.set()
    for _ in asked[:-3]:
        assert loaded.service.arrived.acquire(timeout=5)
    for text in ("refuse", "fault", "a", "refuse", "fault", "a") * 2:
        assert until(lambda: loaded.model._places._value == loaded.model._most_read), "a place was lost"
        loaded.ask(text)
    for _ in range(4):
        assert loaded.service.arrived.acquire(timeout=5)


def test_a_request_arrives_before_it_is_read(loaded: Loaded) -> None:
    """What it waits for that is time of its deadline."""
    loaded.service.gate.clear()
    for _ in range(loaded.module._READERS + 1):
        loaded.ask()
    asked = time.monotonic()
    time.sleep(0.1)
    loaded.service.gate.set()
    for _ in range(loaded.module._READERS + 1):
        assert loaded.service.arrived.acquire(timeout=5)
    assert len(loaded.service.since) == 3
    assert max(loaded.service.since) <= asked


def test_an_id_that_is_no_text_costs_nobody_anything(loaded: Loaded) -> None:
    neighbour = Request(text=np.array([b"a"], dtype=object))
    assert loaded.ask(parameters=b'{"note": "\xff"}').sender.error.code == "INVALID_ARG"
    loaded.triton.log.clear()
    strange = Request(id=b"\xff-7", text=np.array([b"refuse"], dtype=object))
    assert loaded.model.execute([strange, neighbour]) is None
    assert strange.sender.error.code == "INVALID_ARG"
    assert loaded.service.arrived.acquire(timeout=5)
    assert loaded.triton.log == [r"onecard request_id=\xff-7 model=talk event=rejected reason=bad_input"]


def test_counters_begin_when_the_model_is_ready(triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden requests are its own; no client sent them."""

    def probed(service: Service, folder: Path) -> None:
        counters = {"llm_generated_tokens_total": 32, "requests_total": {"completed": 4}}
        service.counts = {**counters, "llm_slots": 2}

    monkeypatch.setattr(probe, "probe_generator", probed)
    model = importlib.import_module("triton_repo.models.generator").TritonPythonModel()
    model.initialize(arguments())
    families = triton.families
    assert until(lambda: "onecard_reported_timestamp_seconds" in families)
    model._service.counts = {"llm_generated_tokens_total": 37, "requests_total": {"completed": 5}}
    model.finalize()
    assert families["onecard_llm_generated_tokens_total"].made[""].value == 5
    assert families["onecard_requests_total"].made["completed"].value == 1
    assert families["onecard_llm_slots"].made[""].value == 2


@pytest.mark.parametrize("broken", ["is_cancelled", "log"])
def test_the_watch_outlives_what_breaks_in_it(
    loaded: Loaded, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("no shared memory")

    first, _ = loaded.running()
    if broken == "log":
        monkeypatch.setattr(loaded.triton.Logger, "log_error", fails)
    first.sender.is_cancelled = fails  # type: ignore[method-assign]
    time.sleep(0.05)
    gone, stopped = loaded.running()
    gone.sender.cancelled = True
    assert stopped.cancelled.wait(5)


def test_what_is_left_at_the_end_is_told_so(loaded: Loaded) -> None:
    waiting, _ = loaded.running()
    loaded.model.finalize()
    assert waiting.sender.error.code == "CANCELLED"
    assert "unloaded" in waiting.sender.error.message


def test_a_refused_engine_and_a_foreign_runtime_are_load_errors(
    triton: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("triton_repo.models.generator")
    with pytest.raises(TritonModelException, match="not the runtime that this repository"):
        module.TritonPythonModel().initialize(arguments(runtime="other"))

    for reason in (EngineRefused("engine.onnx: altered after the build"), EngineFailed("the GPU is full")):

        def refuse(folder: Path, reason: Exception = reason, **settings: Any) -> Service:
            raise reason

        monkeypatch.setattr(Service, "open", refuse)
        with pytest.raises(TritonModelException, match=f"engine refused: {reason}"):
            module.TritonPythonModel().initialize(arguments())


def test_an_engine_that_answers_otherwise_than_recorded_is_a_load_error(
    triton: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("triton_repo.models.generator")
    probed = []

    def refuse(service: Any, folder: Path) -> None:
        probed.append((type(service), folder))
        raise ProbeFailed("golden request 1 of 4: 7 instead of token 6, at place 2")

    monkeypatch.setattr(probe, "probe_generator", refuse)
    with pytest.raises(TritonModelException, match="engine refused: golden request 1 of 4: 7 instead"):
        module.TritonPythonModel().initialize(arguments())
    assert probed == [(Service, Path("/nowhere/1"))]
