"""Find the Linear layers of an exported graph by the names that the exporter guarantees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

FloatArray = npt.NDArray[np.float32]

# Heads and poolers are a thousandth of the work and decide the answer's last digits: they stay as they are.
QUANTIZED_PREFIX = "layers."


@dataclass(frozen=True, slots=True)
class Linear:
    """One MatMul by a constant [inputs, outputs]; `source` is the tensor that it reads."""

    name: str
    source: str
    weight: str
    inputs: int
    outputs: int

    @property
    def int8_saving(self) -> int:
        """Bytes that INT8 saves against FP16."""
        return self.inputs * self.outputs


def find_linears(model: onnx.ModelProto) -> list[Linear]:
    """The encoder layers' Linears in graph order."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMul" or not node.name.startswith(QUANTIZED_PREFIX):
            continue
        weight = f"{node.name}.weight"
        if node.input[1] == weight and weight in shapes:
            inputs, outputs = shapes[weight]
            found.append(Linear(node.name, node.input[0], weight, inputs, outputs))
    return found


def read_weight(initializers: dict[str, Any], linear: Linear) -> FloatArray:
    """The Linear's float32 weight [inputs, outputs]."""
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(initializers[linear.weight]), dtype=np.float32)
