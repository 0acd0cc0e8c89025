"""GraphBuilder: ONNX nodes by name, weights by promise, and files that are either whole or absent.

Weights are read only while the file is written, one at a time: with external data, the memory needed is the
graph plus one tensor.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from build_engines.errors import ExportError

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

OPSET = 23  # Attention and RotaryEmbedding; 24 only adds what a KV cache needs
IR_VERSION = 11  # the first IR that carries opset 23; every runtime here reads it
# A protobuf message ends at 2 GiB; 1.5 GB leaves room for what quantization adds to it.
EXTERNAL_THRESHOLD = 1_500_000_000
_ALIGNMENT = 4096  # of external tensors, so that a runtime can map them


@dataclass(frozen=True, slots=True)
class Weight:
    """An initializer that is not loaded yet; `load` must return `shape` in `dtype`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class GraphBuilder:
    """Collects nodes in topological order. Every node has a name, every tensor is written once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Weight] = {}
        self._tensors: set[str] = set()
        self._node_names: set[str] = set()

    def input(self, name: str, shape: Sequence[str | int]) -> str:
        """Declare an int64 graph input; symbolic dimensions are strings."""
        from onnx import TensorProto, helper

        self._claim_tensor(name)
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, list(shape)))
        return name

    def output(self, name: str, shape: Sequence[str | int]) -> None:
        """Declare a float32 graph output; the tensor must exist by now."""
        from onnx import TensorProto, helper

        if name not in self._tensors:
            raise AssertionError(f"graph output {name} is no tensor")
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

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
            ExportError: the disk is full, or onnx.checker refuses the graph.
        """
        from onnx import helper

        with _written_aside(path) as draft:
            external = sum(weight.nbytes for weight in self.weights.values()) > external_threshold
            data = (draft.parent / f"{path.name}.data").open("wb") if external else None
            with data or contextlib.nullcontext():
                initializers = [self._initializer(name, w, data, path) for name, w in self.weights.items()]
            graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, initializers)
            opsets = [helper.make_opsetid("", OPSET)]
            model = helper.make_model(
                graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="onecard"
            )
            draft.write_bytes(model.SerializeToString())
            verify_graph(draft)

    def _initializer(self, name: str, weight: Weight, data: Any, path: Path) -> onnx.TensorProto:
        from onnx import TensorProto, helper

        array = np.asarray(weight.load(), order="C")
        if array.shape != weight.shape or array.dtype != weight.dtype:
            raise AssertionError(
                f"{name}: {array.dtype} {array.shape} instead of {weight.dtype} {weight.shape}"
            )
        tensor = TensorProto(name=name, dims=list(array.shape))
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        # Small constants stay inside: shape inference and TensorRT's parser want to see them.
        if data is None or array.nbytes < 1024:
            tensor.raw_data = array.tobytes()
        else:
            _store_external(tensor, memoryview(array.tobytes()), data, f"{path.name}.data")
        return tensor

    def _claim_tensor(self, name: str) -> None:
        if name in self._tensors:
            raise AssertionError(f"tensor {name} is written twice")
        self._tensors.add(name)


def read_graph(path: Path) -> onnx.ModelProto:
    """Load a graph with its external data in memory.

    Raises:
        ExportError: the file is missing or not an ONNX graph, or its external data is missing or short.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError has no public common base
        raise ExportError(f"{path} is not an ONNX graph: {error}") from error
    _check_external_files(model, path.parent)
    onnx.load_external_data_for_model(model, str(path.parent))
    return model


def save_graph(model: onnx.ModelProto, path: Path, *, external_threshold: int = EXTERNAL_THRESHOLD) -> None:
    """Write an in-memory graph as `GraphBuilder.write` does: checked, whole or not at all."""
    total = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    with _written_aside(path) as draft:
        if total > external_threshold:
            copy = type(model)()
            copy.CopyFrom(model)
            model = copy
            with (draft.parent / f"{path.name}.data").open("wb") as data:
                for tensor in model.graph.initializer:
                    if len(tensor.raw_data) >= 1024:
                        _store_external(tensor, memoryview(tensor.raw_data), data, f"{path.name}.data")
        draft.write_bytes(model.SerializeToString())
        verify_graph(draft)


def verify_graph(path: Path) -> None:
    """onnx.checker with full shape inference, and every external tensor within its file.

    Raises:
        ExportError: what the checker said, with the file's name.
    """
    import onnx

    _check_external_files(onnx.load(str(path), load_external_data=False), path.parent)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses {path.name}: {error}") from error


def _store_external(tensor: onnx.TensorProto, payload: memoryview, data: Any, location: str) -> None:
    from onnx import TensorProto

    data.write(b"\0" * (-data.tell() % _ALIGNMENT))
    entries = {"location": location, "offset": str(data.tell()), "length": str(payload.nbytes)}
    data.write(payload)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _check_external_files(model: onnx.ModelProto, folder: Path) -> None:
    from onnx import TensorProto

    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = folder / entries["location"]
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        if not file.is_file() or file.stat().st_size < end:
            state = "is missing" if not file.is_file() else f"has {file.stat().st_size} of {end} bytes"
            raise ExportError(
                f"the weights file {file} {state}",
                cause="the graph was copied without its .data file, or the copy was cut short",
                next_step="copy both files together, or run the export again",
            )


@contextlib.contextmanager
def _written_aside(path: Path) -> Any:
    """Yield a draft path beside `path`; on success swap draft and its .data in, on failure leave nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    final_data = path.with_name(f"{path.name}.data")
    try:
        draft = folder / path.name
        yield draft
        # The graph goes first and comes back last: no graph ever stands beside another graph's data.
        path.unlink(missing_ok=True)
        final_data.unlink(missing_ok=True)
        if (folder / final_data.name).exists():
            os.replace(folder / final_data.name, final_data)
        os.replace(draft, path)
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written: {error.strerror or error}",
            next_step="free some disk space or choose another build folder, then run the same command",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
