"""Triton Python-backend model in front of an engine that Triton runs itself: texts to padded token rows.

Copied verbatim as <model>_tokenize/1/model.py beside the tokenizer, the manifest and a copy of
`triton_repo.runtime`. Everything but Triton's own tensors is in `triton_repo.runtime.steps`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class TritonPythonModel:
    """Triton creates one, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the tokenizer after checking its digest; what is wrong becomes Triton's load error."""
        import triton_python_backend_utils as pb_utils

        self._pb = pb_utils
        folder = Path(args["model_repository"]) / args["model_version"]
        # Before everything installed: the repository runs the runtime that it was written with.
        sys.path.insert(0, str(folder))
        entries = json.loads(args["model_config"])["parameters"]
        parameters = {name: entry["string_value"] for name, entry in entries.items()}
        from triton_repo.runtime import mismatch

        if reason := mismatch(parameters["runtime"]):
            raise pb_utils.TritonModelException(f"step refused: {reason}")
        from triton_repo.runtime.metrics import Publisher, Reporter
        from triton_repo.runtime.session import EngineRefused
        from triton_repo.runtime.steps import TokenizeStep
        from triton_repo.runtime.texts import BadRequest
        from triton_repo.runtime.tokenization import TokenizerRefused

        self._bad_request = BadRequest
        # The engine computes on the GPU, so the cores are the tokenizer's.
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        try:
            self._step = TokenizeStep.open(folder)
        except (EngineRefused, TokenizerRefused) as error:
            raise pb_utils.TritonModelException(f"step refused: {error}") from None
        # The ensemble's name: what its requests cost is counted here.
        labels = {"model": parameters["model"], "version": args["model_version"]}
        self._reporter = Reporter(Publisher(pb_utils, labels), self._step.snapshot)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        pb_utils = self._pb
        arrays = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._step.inputs}
            for request in requests
        ]
        responses = []
        for answer in self._step.answer(arrays):
            if isinstance(answer, self._bad_request):
                error = pb_utils.TritonError(str(answer), pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=error))
                continue
            tensors = [pb_utils.Tensor(name, value) for name, value in answer.items()]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses

    def finalize(self) -> None:
        """Send what was counted last."""
        self._reporter.close()
