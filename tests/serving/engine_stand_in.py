"""Copied as model.py of a native layout's engine: ONNX Runtime in the place of Triton's TensorRT backend.

Like that backend it gets whole batches of one width, has the tensors that config.pbtxt lists, and gives a
tensor of one number a row without a second dimension.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        graph = Path(args["model_repository"]) / args["model_version"] / "engine.trt"
        self._session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        assert {value.name for value in self._session.get_outputs()} == set(self._outputs)
        self._log = (graph.parent / "runs.jsonl").open("a", buffering=1)

    def execute(self, requests):
        arrays = {
            name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self._inputs
        }
        sizes = [len(array) for array in arrays[self._inputs[0]]]
        # One width in a batch, or this fails.
        batch = {name: np.concatenate(values) for name, values in arrays.items()}
        self._log.write(json.dumps(list(batch[self._inputs[0]].shape)) + "\n")
        found = dict(zip(self._outputs, self._session.run(self._outputs, batch), strict=True))
        responses, start = [], 0
        for size in sizes:
            own = [pb_utils.Tensor(name, value[start : start + size]) for name, value in found.items()]
            responses.append(pb_utils.InferenceResponse(output_tensors=own))
            start += size
        return responses
