"""GraphBuilder: ONNX nodes by name, weights by promise, in a file that is either whole or absent.

Weights are read only while the file is written, one at a time: with external data, the memory needed is the
graph plus one tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from build_engines.graphs import (
    EXTERNAL_THRESHOLD,
    SMALLEST_EXTERNAL,
    store_external,
    verify_graph,
    written_aside,
)

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

OPSET = 23  # Attention and RotaryEmbedding; 24 only adds what a KV cache needs
IR_VERSION = 11  # the first IR that carries opset 23; every runtime here reads it


@dataclass(frozen=True, slots=True)
class Weight:
    """An initializer that is not loaded yet; `load` must return `shape` in `dtype`.

    Where `pieces` is given, external data is written from it: consecutive parts along the first axis, so
    that a tensor of any size passes through little memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], Array]
    pieces: Callable[[], Iterator[Array]] | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class GraphBuilder:
    """Collects nodes in topological order. Every node has a name, every tensor is written once."""

    def __init__(self, name: str, opset: int = OPSET, ir_version: int = IR_VERSION) -> None:
        self.name = name
        self.opset = opset
        self.ir_version = ir_version
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Weight] = {}
        self._tensors: set[str] = set()
        self._node_names: set[str] = set()

    def input(self, name: str, shape: Sequence[str | int], dtype: Any = np.int64) -> str:
        """Declare a graph input; symbolic dimensions are strings."""
        self._claim_tensor(name)
        self.inputs.append(_value_info(name, shape, dtype))
        return name

    def output(self, name: str, shape: Sequence[str | int], dtype: Any = np.float32) -> None:
        """Declare a graph output; the tensor must exist by now."""
        if name not in self._tensors:
            raise AssertionError(f"graph output {name} is no tensor")
        self.outputs.append(_value_info(name, shape, dtype))

    def constant(self, name: str, value: Array) -> str:
        """A small initializer; asking twice for the same name returns the first."""
        if name not in self.weights:
            self.weight(name, Weight(value.shape, value.dtype, lambda: value))
        return name

    def weight(self, name: str, weight: Weight) -> str:
        self._claim_tensor(name)
        self.weights[name] = weight
        return name

    def node(
        self, op: str, inputs: Sequence[str], name: str, output: str | None = None, **attributes: Any
    ) -> str:
        """Add a node with one output (named `<name>.output` unless told) and return that output's name."""
        return self.multi_node(op, inputs, name, [output or f"{name}.output"], **attributes)[0]

    def multi_node(
        self, op: str, inputs: Sequence[str], name: str, outputs: Sequence[str], **attributes: Any
    ) -> list[str]:
        from onnx import helper

        if name in self._node_names:
            raise AssertionError(f"two nodes called {name}")
        unknown = [tensor for tensor in inputs if tensor and tensor not in self._tensors]
        if unknown:
            raise AssertionError(f"node {name} reads {unknown} before it exists")
        for tensor in outputs:
            self._claim_tensor(tensor)
        self._node_names.add(name)
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), name=name, **attributes))
        return list(outputs)

    def linear(
        self, name: str, x: str, weight: Weight, bias: Weight | None = None, output: str | None = None
    ) -> str:
        """x [..., K] -> [..., N]: MatMul `name` with `name`.weight [K, N], then Add `name`.bias."""
        final = output or f"{name}.output"
        self.weight(f"{name}.weight", weight)
        if bias is None:
            return self.node("MatMul", [x, f"{name}.weight"], name, final)
        product = self.node("MatMul", [x, f"{name}.weight"], name, f"{name}.matmul")
        self.weight(f"{name}.bias_value", bias)
        return self.node("Add", [product, f"{name}.bias_value"], f"{name}.bias", final)

    def layer_norm(self, name: str, x: str, weight: Weight, bias: Weight | None, epsilon: float) -> str:
        """LayerNormalization over the last axis, statistics in float32 whatever the graph's type is."""
        inputs = [x, self.weight(f"{name}.weight", weight)]
        if bias is not None:
            inputs.append(self.weight(f"{name}.bias_value", bias))
        return self.node("LayerNormalization", inputs, name, axis=-1, epsilon=epsilon, stash_type=1)

    def write(self, path: Path, *, external_threshold: int = EXTERNAL_THRESHOLD) -> None:
        """Write `path`, and `<path>.data` for weights above `external_threshold` bytes; checked, or nothing.

        Raises:
            ArtifactError: the disk is full.
            ExportError: onnx.checker refuses the graph.
        """
        with written_aside(path) as draft:
            external = sum(weight.nbytes for weight in self.weights.values()) > external_threshold
            data = (draft.parent / f"{path.name}.data").open("wb") if external else None
            with data or contextlib.nullcontext():
                initializers = [self._initializer(name, w, data, path) for name, w in self.weights.items()]
            draft.write_bytes(self._model(initializers).SerializeToString())
            verify_graph(draft)

    def model(self) -> onnx.ModelProto:
        """The graph with its weights inside, for small ones."""
        return self._model([self._initializer(name, w, None, Path()) for name, w in self.weights.items()])

    def _model(self, initializers: list[onnx.TensorProto]) -> onnx.ModelProto:
        from onnx import helper

        return helper.make_model(
            helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, initializers),
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=self.ir_version,
            producer_name="onecard",
        )

    def _initializer(self, name: str, weight: Weight, data: Any, path: Path) -> onnx.TensorProto:
        from onnx import TensorProto, helper

        tensor = TensorProto(name=name, dims=list(weight.shape))
        tensor.data_type = helper.np_dtype_to_tensor_dtype(weight.dtype)
        external = data is not None and weight.nbytes >= SMALLEST_EXTERNAL
        if external and weight.pieces is not None:
            store_external(tensor, _checked_pieces(name, weight), data, f"{path.name}.data")
            return tensor
        array = np.asarray(weight.load(), order="C")
        if array.shape != weight.shape or array.dtype != weight.dtype:
            raise AssertionError(
                f"{name}: {array.dtype} {array.shape} instead of {weight.dtype} {weight.shape}"
            )
        if external:
            store_external(tensor, memoryview(array.tobytes()), data, f"{path.name}.data")
        else:
            tensor.raw_data = array.tobytes()
        return tensor

    def _claim_tensor(self, name: str) -> None:
        if name in self._tensors:
            raise AssertionError(f"tensor {name} is written twice")
        self._tensors.add(name)


def _value_info(name: str, shape: Sequence[str | int], dtype: Any) -> onnx.ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))


def _checked_pieces(name: str, weight: Weight) -> Iterator[memoryview]:
    """The bytes of a weight's pieces; they must add up to its shape."""
    rows = 0
    for piece in weight.pieces() if weight.pieces else ():
        if piece.shape[1:] != weight.shape[1:] or piece.dtype != weight.dtype:
            raise AssertionError(f"{name}: a piece is {piece.dtype} {piece.shape}, the whole {weight.shape}")
        rows += piece.shape[0]
        yield np.ascontiguousarray(piece).data.cast("B")
    if rows != weight.shape[0]:
        raise AssertionError(f"{name}: {rows} rows instead of {weight.shape[0]}")
