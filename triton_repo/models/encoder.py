"""Triton Python-backend model for the encoder tasks: text in, answer out.

Copied verbatim as <model>/1/model.py beside the engine, its tokenizer and its own copy of
`triton_repo.runtime`. What one batch cannot answer is taken in at once and answered later, from a thread.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class TritonPythonModel:
    """Triton creates one per instance, in a process of its own."""

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
        from triton_repo.runtime.encode import Encoder
        from triton_repo.runtime.probe import probe_encoder
        from triton_repo.runtime.service import EncoderService
        from triton_repo.runtime.session import EngineRefused
        from triton_repo.runtime.tokenization import TokenizerRefused

        # An engine that computes on these cores loses more to tokenizer threads than they gain; one on a GPU
        # leaves them idle. The library reads this at every call.
        os.environ["TOKENIZERS_PARALLELISM"] = str(parameters["target"] != "onnxruntime").lower()
        instances = sum(group["count"] for group in config["instance_group"])
        try:
            device = int(args["model_instance_device_id"])  # of an engine on a GPU
            encoder = Encoder.open(folder, _threads(instances), device)
            probe_encoder(encoder, folder)
            self._service = EncoderService(encoder)
        except (EngineRefused, TokenizerRefused) as error:
            raise pb_utils.TritonModelException(f"engine refused: {error}") from None
        self._open(args, parameters, instances)

    def _open(self, args: dict[str, str], parameters: dict[str, str], instances: int) -> None:
        """The queue, and the metrics of it and of the engine."""
        from triton_repo.runtime.admission import Limits, read_level
        from triton_repo.runtime.batching import Batcher, Ticket
        from triton_repo.runtime.exchange import EventLog, Exchange, id_of, parameters_of, to_response
        from triton_repo.runtime.metrics import Publisher, Reporter, labels

        self._log = EventLog(self._pb, args["model_name"])
        self._exchange, self._to_response = Exchange, to_response
        self._id_of, self._parameters_of = id_of, parameters_of
        self._ticket, self._read_level = Ticket, read_level
        self._batcher = Batcher(self._service, Limits.read(parameters))
        self._batcher.start()
        self._reporter = Reporter(Publisher(self._pb, labels(args, instances)), self._batcher.snapshot)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order; None for one whose answer comes later, from another thread."""
        asked = [self._read(request) for request in requests]
        tickets = [ticket for ticket in asked if not isinstance(ticket, Exception)]
        answers: list[Any] | None = self._batcher.answer_now(tickets)
        if answers is None:
            answers = self._batcher.submit(
                [
                    (ticket, self._exchange(self._pb, request, self._log))
                    for request, ticket in zip(requests, asked, strict=True)
                    if not isinstance(ticket, Exception)
                ]
            )
        following = iter(answers)
        return [
            self._respond(request, found if isinstance(found, Exception) else next(following))
            for request, found in zip(requests, asked, strict=True)
        ]

    def _respond(self, request: Any, answer: Any) -> Any:
        if answer is None:
            return None
        if isinstance(answer, Exception):
            self._log.ended(answer, self._id_of(request))
        return self._to_response(self._pb, answer)

    def _read(self, request: Any) -> Any:
        """A ticket, or what to answer with: a fault of ours must not leave a client waiting either."""
        try:
            # Triton's timeout is in microseconds, 0 for none.
            timeout_s = request.timeout() / 1e6 or math.inf
            level = self._read_level(self._parameters_of(request))
            self._batcher.check(level, timeout_s)
            inputs = {
                name: self._pb.get_input_tensor_by_name(request, name).as_numpy()
                for name in self._service.inputs
            }
            return self._ticket(inputs, level, timeout_s)
        except Exception as error:
            self._batcher.refuse(error)
            return error

    def finalize(self) -> None:
        """Reject what still waits, and free the engine before the interpreter goes."""
        self._batcher.close()
        self._reporter.close()
        self._service.encoder.close()
        del self._service


def _threads(instances: int) -> int | None:
    """Compute threads per instance: several instances share the cores; one takes them all (None)."""
    return None if instances == 1 else max(1, len(os.sched_getaffinity(0)) // instances)
