"""ONNX Runtime on the CPU: the same graph, lowered to what its kernels are fast at.

Three rewrites, none of which changes a value beyond float rounding:

1. FP16 tensors become float32 (`widen`): there are no FP16 kernels on the CPU, and ONNX Runtime would put a
pair
   of casts around every node. Every FP16 number is a float32 number, so weights keep their values.
2. A Linear in static INT8 becomes QuantizeLinear to u8 with zero point 128 and MatMulIntegerToFloat
   (`lower_static_linears`). u8 = s8 + 128 for every code, clamping included, so the integer product is the
   same; the signed form would not be fused and would run in float32.
3. INT8 weights with float activations stay DequantizeLinear + MatMul, which ONNX Runtime turns into
MatMulNBits
   when it loads the graph; that kernel quantizes activations row by row, so the gate must judge the result.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from build_engines.errors import CompileError
from build_engines.graphs import operator_counts, read_graph, save_graph

if TYPE_CHECKING:
    import onnx

    from build_engines.profiles import DecoderProfile, Profile
    from build_engines.targets import Progress

_FLOAT, _FLOAT16 = 1, 10  # TensorProto.DataType
_ZERO_POINT = 128
_MOVES_ONLY = ("Split", "Slice", "Gather", "Reshape", "Transpose", "Squeeze", "Unsqueeze")


class OnnxRuntimeTarget:
    name = "onnxruntime"
    engine_file = "engine.onnx"
    needs_card = False

    def check(self) -> None:
        # Not imported: a build that has nothing to do should not wait for it.
        if importlib.util.find_spec("onnxruntime") is None:
            raise CompileError(
                "the target onnxruntime needs a Python module of that name",
                next_step="pip install onnxruntime",
            )

    def compile(
        self,
        graph: Path,
        out: Path,
        *,
        profile: Profile | DecoderProfile,
        compute_capability: str | None,
        progress: Progress,
    ) -> dict[str, Any]:
        """Lower `graph` into `out`/engine.onnx; shapes stay dynamic, so `profile` only bounds the server."""
        import onnxruntime

        del profile, compute_capability
        progress("lower", 0, 2)
        model = lower(read_graph(graph))
        progress("write", 1, 2)
        save_graph(model, out / self.engine_file)
        progress("write", 2, 2)
        return {"versions": {"onnxruntime": onnxruntime.__version__}, "layers": operator_counts(model)}


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as the CPU runs it; `model` is left as it is."""
    return lower_static_linears(widen(model))


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every FP16 tensor as float32; casts to FP16 become casts to float32, which ONNX Runtime removes."""
    from onnx import numpy_helper

    result = type(model)()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if tensor.data_type == _FLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in result.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT16:
                attribute.i = _FLOAT
            elif attribute.t.data_type == _FLOAT16:
                values = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(values))
    del result.graph.value_info[:]
    return result


def rounded(model: onnx.ModelProto, tensors: Set[str]) -> onnx.ModelProto:
    """A float32 graph that rounds each of `tensors` to FP16, overflow to infinity included.

    This is how a CPU shows what FP16 hardware would answer. An FP16 graph shows nothing: ONNX Runtime runs
    its nodes in float32 and removes the casts between them. Explicit casts it keeps.
    """
    from onnx import helper

    result = type(model)()
    result.CopyFrom(model)
    nodes = list(result.graph.node)
    del result.graph.node[:]
    for node in nodes:
        names = [name for name in node.output if name in tensors and node.op_type not in _MOVES_ONLY]
        for index, name in enumerate(node.output):
            if name in names:
                node.output[index] = f"{name}.exact"
        result.graph.node.append(node)
        for name in names:
            for source, target, kind in (
                (f"{name}.exact", f"{name}.half", _FLOAT16),
                (f"{name}.half", name, _FLOAT),
            ):
                result.graph.node.append(
                    helper.make_node("Cast", [source], [target], name=f"{target}.round", to=kind)
                )
    return result


def lower_static_linears(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace [Q, DQ, DQ of the weight, MatMul, Add of the bias] by QuantizeLinear, MatMulIntegerToFloat."""
    result = type(model)()
    result.CopyFrom(model)
    graph = result.graph
    lowering = _Lowering(graph)
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        lowering.add(node)
    give_zero_points(graph)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    if all(opset.domain != "com.microsoft" for opset in result.opset_import):
        result.opset_import.add(domain="com.microsoft", version=1)
    return result


def give_zero_points(graph: onnx.GraphProto) -> None:
    """Zero points of weights that stay DequantizeLinear, one for each scale.

    Where a processor's fast u8 x s8 products overflow, ONNX Runtime makes such weights u8; one that has no
    zero points to be moved it gives a single one, whatever its scales are (seen in 1.31).
    """
    from onnx import numpy_helper

    scales = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 2:
            # Its own: ONNX Runtime replaces it without a look at who else reads it.
            zeros = np.zeros(scales[node.input[1]], np.int8)
            node.input.append(f"{node.name}.zeros")
            graph.initializer.append(numpy_helper.from_array(zeros, node.input[2]))


class _Lowering:
    """Walks the nodes in order and appends each one, or what replaces it, to the graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.producer = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.dropped = {name for node in graph.node for name in self._replaced_by_lowering(node)}

    def add(self, node: onnx.NodeProto) -> None:
        if self._is_static(node):
            self._lower(node)
        elif node.name not in self.dropped:
            self.graph.node.append(node)

    def _is_static(self, node: onnx.NodeProto) -> bool:
        """A MatMul of a dequantized signed activation by a dequantized constant."""
        if node.op_type != "MatMul":
            return False
        inputs = [self._before_casts(name)[-1] for name in node.input if name in self.producer]
        if len(inputs) < 2 or any(found.op_type != "DequantizeLinear" for found in inputs):
            return False
        quantize = self.producer.get(inputs[0].input[0])
        return quantize is not None and quantize.op_type == "QuantizeLinear"

    def _before_casts(self, name: str) -> list[onnx.NodeProto]:
        """The node that computes `name`, last, and the casts after it: widened, they change nothing."""
        nodes = [self.producer[name]]
        while nodes[-1].op_type == "Cast" and nodes[-1].input[0] in self.producer:
            nodes.append(self.producer[nodes[-1].input[0]])
        return nodes

    def _replaced_by_lowering(self, node: onnx.NodeProto) -> list[str]:
        if not self._is_static(node):
            return []
        operands = [self._before_casts(name) for name in node.input]
        names = [found.name for nodes in operands for found in nodes]
        names.append(self.producer[operands[0][-1].input[0]].name)
        bias = self._bias(node)
        return [*names, bias.name] if bias is not None else names

    def _bias(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        readers = self.readers.get(node.output[0], [])
        if len(readers) == 1 and readers[0].op_type == "Add" and readers[0].name == f"{node.name}.bias":
            return readers[0]
        return None

    def _lower(self, node: onnx.NodeProto) -> None:
        from onnx import helper, numpy_helper

        activation, weight = (self._before_casts(name)[-1] for name in node.input)
        quantize = self.producer[activation.input[0]]
        zero = numpy_helper.from_array(np.asarray(_ZERO_POINT, dtype=np.uint8), f"{node.name}.input.zero.u8")
        self.graph.initializer.append(zero)
        codes = f"{node.name}.input.u8"
        inputs = [quantize.input[0], quantize.input[1], zero.name]
        self.graph.node.append(helper.make_node("QuantizeLinear", inputs, [codes], name=codes))
        values, scale = weight.input[0], weight.input[1]
        operands = [codes, values, quantize.input[1], scale, zero.name, ""]
        output = node.output[0]
        bias = self._bias(node)
        if bias is not None:
            output = bias.output[0]
            operands.append(next(name for name in bias.input if name != node.output[0]))
        self.graph.node.append(
            helper.make_node(
                "MatMulIntegerToFloat", operands, [output], name=node.name, domain="com.microsoft"
            )
        )
