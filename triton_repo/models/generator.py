"""Triton Python-backend model for causal LLMs: a prompt or a conversation in, a stream of text out.

Copied verbatim as <model>/1/model.py beside the engine, its tokenizer and its own copy of
`triton_repo.runtime`. What is generated, and when, is decided there; here requests are taken in, responses
passed on, and clients that went away noticed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# To ask whether a client has gone is a round trip to the server process (0.1 ms of processor time, measured):
# by the clock, therefore, not by the token, and for so many requests at a time.
_POLL_S = 0.05
_POLLED_AT_A_TIME = 16
_METRIC_INTERVAL_S = 0.5
_LAST_WORDS_S = 2.0
# Two, so that a prompt which takes long to tokenize holds up nobody else's.
_READERS = 2


class TritonPythonModel:
    """Triton creates one, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine after checking every digest; what is wrong becomes Triton's load error."""
        import triton_python_backend_utils as pb_utils

        self._pb = pb_utils
        folder = Path(args["model_repository"]) / args["model_version"]
        # Before everything installed: the repository runs the runtime that it was written with.
        sys.path.insert(0, str(folder))
        config = json.loads(args["model_config"])
        parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        from triton_repo.runtime import mismatch

        if reason := mismatch(parameters["runtime"]):
            raise pb_utils.TritonModelException(f"engine refused: {reason}")
        from triton_repo.runtime.chat import TemplateRefused
        from triton_repo.runtime.generation import GenerationService
        from triton_repo.runtime.probe import probe_generator
        from triton_repo.runtime.session import EngineRefused
        from triton_repo.runtime.texts import EngineFailed
        from triton_repo.runtime.tokenization import TokenizerRefused

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            self._service = GenerationService.open(
                folder,
                max_queue=int(parameters["max_queue"]),
                queue_timeout_s=int(parameters["queue_timeout_ms"]) / 1000,
                device=int(args["model_instance_device_id"]),
            )
            probe_generator(self._service, folder)
        except (EngineRefused, EngineFailed, TokenizerRefused, TemplateRefused) as error:
            raise pb_utils.TritonModelException(f"engine refused: {error}") from None
        self._codes = _error_codes(pb_utils)
        self._readers = ThreadPoolExecutor(_READERS, "reader")
        self._watch = _Watch(self._service, _Metrics(pb_utils, args["model_name"]), pb_utils.Logger)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take the requests in; their answers come later, from other threads."""
        for request in requests:
            exchange = _Exchange(self._pb, request.get_response_sender(), self._codes, self._watch.forget)
            self._watch.add(exchange)
            try:
                tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                self._readers.submit(self._begin, exchange, tensors, request.parameters())
            except Exception as error:
                exchange.send(error, True)

    def finalize(self) -> None:
        """End what still runs, tell its clients, and free the engine before the interpreter goes."""
        self._readers.shutdown(wait=True)
        self._service.close()
        self._watch.close()
        del self._service

    def _begin(self, exchange: _Exchange, tensors: Mapping[str, Any], parameters: str) -> None:
        from triton_repo.runtime.texts import BadRequest
        from triton_repo.runtime.wire import Reply, read_fields

        try:
            try:
                fields, stream = read_fields(tensors, parameters)
            except BadRequest:
                self._service.refuse()
                raise
            exchange.handle = self._service.submit(fields, Reply(exchange.send, stream=stream))
        except Exception as error:  # a fault of ours must not leave a client waiting either
            exchange.send(error, True)


class _Exchange:
    """One request's response sender and, once it is accepted, the handle that stops it."""

    def __init__(
        self,
        pb_utils: Any,
        sender: Any,
        codes: Callable[[Exception], Any],
        closed: Callable[[_Exchange], None],
    ) -> None:
        self._pb = pb_utils
        self._sender = sender
        self._codes = codes
        self._closed = closed
        # A sender must not be asked about a client once its last response is on its way.
        self._lock = threading.Lock()
        self.handle: Any = None

    def send(self, answer: Mapping[str, Any] | Exception, final: bool) -> None:
        """Send one response, the request's last one if `final`; nothing more is sent behind that."""
        with self._lock:
            sender = self._sender
            if sender is None:
                return
            try:
                sender.send(self._response(answer), flags=self._flag(final))
            except Exception:
                # No room in shared memory, most likely. The request ends here: whoever delivers is told.
                final = True
                with contextlib.suppress(Exception):
                    sender.send(flags=self._flag(True))
                raise
            finally:
                if final:
                    self._sender = None
                    self._closed(self)

    def poll(self) -> None:
        """Stop the generation if the client has gone."""
        with self._lock:
            gone = self._sender is not None and self._sender.is_cancelled()
        if gone and self.handle is not None:
            self.handle.cancel()

    def _flag(self, final: bool) -> int:
        return int(self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL) if final else 0

    def _response(self, answer: Mapping[str, Any] | Exception) -> Any:
        if isinstance(answer, Exception):
            error = self._pb.TritonError(*self._codes(answer))
            return self._pb.InferenceResponse(error=error)
        tensors = [self._pb.Tensor(name, value) for name, value in answer.items()]
        return self._pb.InferenceResponse(output_tensors=tensors)


def _error_codes(pb_utils: Any) -> Callable[[Exception], tuple[str, Any]]:
    """Message and Triton's code of an exception. An unforeseen one is named, but its text is not passed on:
    it may hold the prompt."""
    from triton_repo.runtime.jobs import Busy
    from triton_repo.runtime.texts import BadRequest, EngineFailed
    from triton_repo.runtime.wire import Cancelled

    codes = {
        BadRequest: pb_utils.TritonError.INVALID_ARG,
        Busy: pb_utils.TritonError.UNAVAILABLE,
        Cancelled: pb_utils.TritonError.CANCELLED,
        EngineFailed: pb_utils.TritonError.INTERNAL,
    }

    def code(error: Exception) -> tuple[str, Any]:
        if type(error) in codes:
            return str(error), codes[type(error)]
        return f"the server failed on this request: {type(error).__name__}", pb_utils.TritonError.INTERNAL

    return code


class _Watch:
    """Notices clients that went away and passes metrics on, from a thread that rests when nothing runs."""

    def __init__(self, service: Any, metrics: _Metrics, log: Any) -> None:
        self._service = service
        self._metrics = metrics
        self._log = log
        self._lock = threading.Lock()
        self._open: deque[_Exchange] = deque()
        self._awake = threading.Event()
        self._closing = threading.Event()
        self._awake.set()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def add(self, exchange: _Exchange) -> None:
        with self._lock:
            self._open.append(exchange)
        self._awake.set()

    def forget(self, exchange: _Exchange) -> None:
        """Called when its last response is sent."""
        with self._lock, contextlib.suppress(ValueError):
            self._open.remove(exchange)

    def close(self) -> None:
        """Let last responses go out, end requests that have none, stop the thread."""
        from triton_repo.runtime.wire import Cancelled

        deadline = time.monotonic() + _LAST_WORDS_S
        while self._open and time.monotonic() < deadline:
            time.sleep(0.01)
        for exchange in list(self._open):
            with contextlib.suppress(Exception):
                exchange.send(Cancelled("the model is being unloaded"), True)
        self._closing.set()
        self._awake.set()
        self._thread.join()

    def _run(self) -> None:
        due = 0.0
        while not self._closing.wait(_POLL_S):
            try:
                for exchange in self._next():
                    exchange.poll()
                if time.monotonic() < due:
                    continue
                due = time.monotonic() + _METRIC_INTERVAL_S
                self._awake.clear()
                changed = self._metrics.report(self._service.snapshot())
            except (
                Exception
            ) as error:  # the next look may succeed; without this thread none would be cancelled
                self._log.log_error(f"watching requests failed: {type(error).__name__}")
                continue
            if not (changed or self._open or self._closing.is_set()):
                self._awake.wait()

    def _next(self) -> list[_Exchange]:
        """Those that were not asked for the longest time."""
        with self._lock:
            chosen = [self._open[place] for place in range(min(_POLLED_AT_A_TIME, len(self._open)))]
            self._open.rotate(-len(chosen))
        return chosen


class _Metrics:
    """The scheduler's gauges and totals, as Triton metrics.

    A metric costs a round trip to the server process, so only what changed is sent, twice a second at most.
    """

    def __init__(self, pb_utils: Any, model: str) -> None:
        self._labels = {"model": model}
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._sent: dict[tuple[str, str], float] = {}
        for name, description in _METRICS.items():
            counter = name.endswith("_total")
            self._families[name] = pb_utils.MetricFamily(
                name=f"onecard_llm_{name}",
                description=description,
                kind=pb_utils.MetricFamily.COUNTER if counter else pb_utils.MetricFamily.GAUGE,
            )

    def report(self, snapshot: Mapping[str, Any]) -> bool:
        """Send what changed; whether anything did."""
        changed = False
        for name in _METRICS:
            value = snapshot[name]
            by_outcome = value if isinstance(value, dict) else {"": value}
            for outcome, number in by_outcome.items():
                changed |= self._report_one(name, outcome, float(number))
        return changed

    def _report_one(self, name: str, outcome: str, number: float) -> bool:
        key = name, outcome
        if key not in self._metrics:
            labels = self._labels | ({"outcome": outcome} if outcome else {})
            self._metrics[key] = self._families[name].Metric(labels=labels)
            self._sent[key] = 0.0
        difference = number - self._sent[key]
        if not difference:
            return False
        if name.endswith("_total"):
            self._metrics[key].increment(difference)
        else:
            self._metrics[key].set(number)
        self._sent[key] = number
        return True


_METRICS = {
    "slots": "Sequences that can run at once",
    "slots_active": "Sequences that run now",
    "queue": "Requests that wait for a slot",
    "cache_tokens": "Tokens whose keys and values are in the cache",
    "cache_capacity_tokens": "Tokens that the cache has room for",
    "tokens_per_second": "Tokens generated per second, over the last seconds",
    "prompt_tokens_total": "Tokens of prompts that were started",
    "cached_tokens_total": "Of those, tokens found in the cache instead of computed",
    "generated_tokens_total": "Tokens that were generated",
    "requests_total": "Requests by how they ended",
}
