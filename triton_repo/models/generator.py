"""Triton Python-backend model for causal LLMs: a prompt or a conversation in, a stream of text out.

Copied verbatim as <model>/1/model.py beside the engine, its tokenizer and its own copy of
`triton_repo.runtime`. What is generated, and when, is decided there; here requests are taken in, responses
passed on, and clients that went away noticed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# To ask whether a client has gone is a round trip to the server process (0.1 ms of processor time, measured):
# by the clock, therefore, not by the token, and for so many requests at a time.
_POLL_S = 0.1
_POLLED_AT_A_TIME = 16
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
        from triton_repo.runtime.admission import Limits
        from triton_repo.runtime.chat import TemplateRefused
        from triton_repo.runtime.exchange import EventLog
        from triton_repo.runtime.generation import GenerationService
        from triton_repo.runtime.metrics import Publisher, Reporter, labels
        from triton_repo.runtime.probe import probe_generator
        from triton_repo.runtime.session import EngineRefused
        from triton_repo.runtime.texts import EngineFailed
        from triton_repo.runtime.tokenization import TokenizerRefused

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            limits = Limits.read(parameters)
            self._service = GenerationService.open(
                folder, device=int(args["model_instance_device_id"]), limits=limits
            )
            probe_generator(self._service, folder)
        except (EngineRefused, EngineFailed, TokenizerRefused, TemplateRefused) as error:
            raise pb_utils.TritonModelException(f"engine refused: {error}") from None
        self._readers = ThreadPoolExecutor(_READERS, "reader")
        # So many may be on their way to the queue as it and the slots hold.
        self._most_read = limits.max_size + self._service.slots
        self._places = threading.BoundedSemaphore(self._most_read)
        self._log = EventLog(pb_utils, args["model_name"])
        self._watch = _Watch(pb_utils.Logger)
        self._reporter = Reporter(Publisher(pb_utils, labels(args)), self._service.snapshot)

    def execute(self, requests: Sequence[Any]) -> None:
        """Take the requests in; their answers come later, from other threads."""
        from triton_repo.runtime.exchange import Exchange

        arrived = time.monotonic()
        for request in requests:
            call = _Call(Exchange(self._pb, request, self._log, self._watch.forget), arrived)
            try:
                self._take_in(call, request)
            except Exception as error:  # a fault of ours must not leave a client waiting either
                self._service.refuse(error)
                call.exchange.send(error)

    def _take_in(self, call: _Call, request: Any) -> None:
        """Have it read, which takes as long as its prompt is; raises Busy where that is not worth it, or too
        many wait for it, and BadRequest."""
        from triton_repo.runtime.admission import full, read_level, read_timeout
        from triton_repo.runtime.exchange import parameters_of

        parameters = parameters_of(request)
        # Triton's timeout is in microseconds, 0 for none.
        call.timeout_s = min(request.timeout() / 1e6 or math.inf, read_timeout(parameters))
        call.level = read_level(parameters)
        self._service.check(call.level, call.timeout_s, call.arrived)
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if not self._places.acquire(blocking=False):
            raise full(self._most_read)
        self._watch.add(call)
        self._readers.submit(self._begin, call, tensors, parameters)

    def finalize(self) -> None:
        """End what still runs, tell its clients, and free the engine before the interpreter goes."""
        self._readers.shutdown(wait=True)
        self._service.close()
        self._watch.close()
        self._reporter.close()
        del self._service

    def _begin(self, call: _Call, tensors: Mapping[str, Any], parameters: str) -> None:
        from triton_repo.runtime.texts import BadRequest
        from triton_repo.runtime.wire import Reply, read_fields

        try:
            try:
                fields, stream = read_fields(tensors, parameters)
            except BadRequest as error:
                self._service.refuse(error)
                raise
            reply = Reply(call.exchange.send, stream=stream)
            call.handle = self._service.submit(
                fields, reply, level=call.level, timeout_s=call.timeout_s, arrived=call.arrived
            )
        except Exception as error:  # a fault of ours must not leave a client waiting either
            call.exchange.send(error)
        finally:
            self._places.release()


@dataclass(slots=True, eq=False)
class _Call:
    """A request's way back, when it came (monotonic seconds), its urgency and its own limit in seconds, and
    the handle that stops it once accepted."""

    exchange: Any
    arrived: float
    level: int = 0
    timeout_s: float = math.inf
    handle: Any = None


class _Watch:
    """Notices clients that went away, from a thread that rests when nothing runs."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._open: dict[Any, _Call] = {}  # by exchange; asked for longest ago first
        self._awake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def add(self, call: _Call) -> None:
        with self._lock:
            self._open[call.exchange] = call
        self._awake.set()

    def forget(self, exchange: Any) -> None:
        """Called when its last response is sent."""
        with self._lock:
            self._open.pop(exchange, None)

    def close(self) -> None:
        """Let last responses go out, end requests that have none, stop the thread."""
        from triton_repo.runtime.exchange import Cancelled

        deadline = time.monotonic() + _LAST_WORDS_S
        while self._open and time.monotonic() < deadline:
            time.sleep(0.01)
        for exchange in list(self._open):
            with contextlib.suppress(Exception):
                exchange.send(Cancelled("the model is being unloaded"))
        self._closing.set()
        self._awake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_POLL_S):
            for call in self._next():
                self._look_after(call)
            self._awake.clear()
            if not (self._open or self._closing.is_set()):
                self._awake.wait()

    def _look_after(self, call: _Call) -> None:
        try:
            if call.exchange.is_gone() and call.handle is not None:
                call.handle.cancel()
        except Exception as error:
            # The next look may succeed; without this thread none would be cancelled.
            with contextlib.suppress(Exception):
                self._log.log_error(f"watching requests failed: {type(error).__name__}")

    def _next(self) -> list[_Call]:
        """Those that were not asked for the longest time."""
        with self._lock:
            chosen = list(itertools.islice(self._open.values(), _POLLED_AT_A_TIME))
            for call in chosen:
                self._open[call.exchange] = self._open.pop(call.exchange)
        return chosen
