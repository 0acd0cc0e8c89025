"""Triton Python-backend model for the encoder tasks: text in, answer out.

Copied verbatim as <model>/1/model.py beside the engine, its tokenizer and its own copy of
`triton_repo.runtime`. Everything but Triton's own tensors is in `triton_repo.runtime.service`.
"""

from __future__ import annotations

import json
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
        from triton_repo.runtime.counters import Counters
        from triton_repo.runtime.encode import Encoder
        from triton_repo.runtime.probe import probe_encoder
        from triton_repo.runtime.service import EncoderService
        from triton_repo.runtime.session import EngineRefused
        from triton_repo.runtime.texts import BadRequest
        from triton_repo.runtime.tokenization import TokenizerRefused

        self._bad_request = BadRequest
        # An engine that computes on these cores loses more to tokenizer threads than they gain; one on a GPU
        # leaves them idle. The library reads this at every call.
        os.environ["TOKENIZERS_PARALLELISM"] = str(parameters["target"] != "onnxruntime").lower()
        try:
            device = int(args["model_instance_device_id"])  # of an engine on a GPU
            encoder = Encoder.open(folder, _threads(config), device)
            probe_encoder(encoder, folder)
            self._service = EncoderService(encoder)
        except (EngineRefused, TokenizerRefused) as error:
            raise pb_utils.TritonModelException(f"engine refused: {error}") from None
        self._inputs = self._service.inputs
        self._metrics = Counters(pb_utils, args["model_name"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        pb_utils = self._pb
        arrays = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        responses = []
        for answer in self._service.answer(arrays):
            if isinstance(answer, dict):
                tensors = [pb_utils.Tensor(name, value) for name, value in answer.items()]
                responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
                continue
            code = (
                pb_utils.TritonError.INVALID_ARG
                if isinstance(answer, self._bad_request)
                else pb_utils.TritonError.INTERNAL
            )
            responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), code)))
        self._metrics.report(self._service.counts)
        return responses

    def finalize(self) -> None:
        """Free the engine before the interpreter goes."""
        self._metrics.report(self._service.counts, now=True)
        self._service.encoder.close()
        del self._service


def _threads(config: dict[str, Any]) -> int | None:
    """Compute threads per instance: several instances share the cores; one takes them all (None)."""
    instances = sum(group["count"] for group in config["instance_group"])
    return None if instances == 1 else max(1, len(os.sched_getaffinity(0)) // instances)
