"""Triton Python-backend model behind an engine that Triton runs itself: probabilities or scores to answers.

Copied verbatim as <model>_answer/1/model.py beside the manifest and a copy of `triton_repo.runtime`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class TritonPythonModel:
    """Triton creates one, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the manifest; what is wrong with it becomes Triton's load error."""
        import triton_python_backend_utils as pb_utils

        self._pb = pb_utils
        folder = Path(args["model_repository"]) / args["model_version"]
        # Before everything installed: the repository runs the runtime that it was written with.
        sys.path.insert(0, str(folder))
        from triton_repo.runtime import mismatch

        expected = json.loads(args["model_config"])["parameters"]["runtime"]["string_value"]
        if reason := mismatch(expected):
            raise pb_utils.TritonModelException(f"step refused: {reason}")
        from triton_repo.runtime.session import EngineRefused
        from triton_repo.runtime.steps import AnswerStep

        try:
            self._step = AnswerStep.open(folder)
        except EngineRefused as error:
            raise pb_utils.TritonModelException(f"step refused: {error}") from None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        pb_utils = self._pb
        arrays = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._step.inputs}
            for request in requests
        ]
        return [
            pb_utils.InferenceResponse(
                output_tensors=[pb_utils.Tensor(name, value) for name, value in answer.items()]
            )
            for answer in self._step.answer(arrays)
        ]
