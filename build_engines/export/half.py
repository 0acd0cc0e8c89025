"""to_fp16: an FP32 graph, with or without Q/DQ, rewritten so that its tensors are FP16.

Types are followed node by node from the operators' own schemas. A node stays in float32 when FP16 would not
hold what it computes: the pooling and output tail, and a Q or DQ whose scale is too small for it (its
relative error would reach percents), with those of its MatMul's other operand. Casts go where the two meet.
INT8 weights and zero points stay as they are, and graph inputs and outputs keep their types.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from build_engines.errors import ExportError
from build_engines.export.graph import Array

if TYPE_CHECKING:
    import onnx

FLOAT, INT64, FLOAT16 = 1, 7, 10  # onnx.TensorProto's codes
_FP16_MAX = float(np.finfo(np.float16).max)
_FP16_TINY = float(np.finfo(np.float16).tiny)  # the smallest normal number
_FP16_ROUNDING = 2.0**-11  # of normal numbers, relative
KEPT_IN_FLOAT = ("pooling.", "output.")
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a new model whose float32 tensors are FP16 (see the module); `model` is unchanged.

    Finite values beyond FP16's range become its largest value: a mask constant never turns into infinity.

    Raises:
        ExportError: an operator whose types cannot be followed (another domain, a subgraph).
    """
    return _Halver(model).run()


def half_tensors(model: onnx.ModelProto) -> set[str]:
    """The tensors that the nodes of a typed graph compute in FP16."""
    types = _Halver(model).types
    return {name for node in model.graph.node for name in node.output if types.get(name) == FLOAT16}


class _Halver:
    """One conversion: `types` holds the FP32 graph's element types, `now` those of the new graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
        self.arrays = {tensor.name: tensor for tensor in model.graph.initializer}
        self.types = self._follow_types()
        self.float_scales = self._find_float_scales()
        self.now = dict(self.types)
        self.nodes: list[onnx.NodeProto] = []
        self.casts: dict[tuple[str, int], str] = {}
        self.wanted: dict[str, set[int]] = defaultdict(set)

    def run(self) -> onnx.ModelProto:
        for node in self.model.graph.node:
            self._convert(node)
        for output in self.model.graph.output:
            self._restore_output(output)
        result = type(self.model)()
        for field in (
            "ir_version",
            "producer_name",
            "producer_version",
            "domain",
            "model_version",
            "doc_string",
        ):
            setattr(result, field, getattr(self.model, field))
        result.opset_import.extend(self.model.opset_import)
        result.metadata_props.extend(self.model.metadata_props)
        graph = result.graph
        graph.name = self.model.graph.name
        graph.input.extend(self.model.graph.input)
        graph.output.extend(self.model.graph.output)
        graph.node.extend(self.nodes)
        for tensor in self.model.graph.initializer:
            self._copy_initializer(tensor, graph)
        return result

    def _follow_types(self) -> dict[str, int]:
        types = {tensor.name: tensor.data_type for tensor in self.model.graph.initializer}
        for value in self.model.graph.input:
            types[value.name] = value.type.tensor_type.elem_type
        for node in self.model.graph.node:
            for name, kind in zip(node.output, self._output_types(node, types), strict=True):
                types[name] = kind
        return types

    def _output_types(self, node: onnx.NodeProto, types: dict[str, int]) -> list[int]:
        from onnx import AttributeProto, defs

        if node.domain not in ("", "ai.onnx") or any(a.type == AttributeProto.GRAPH for a in node.attribute):
            raise ExportError(
                f"node {node.name} ({node.domain}::{node.op_type}) cannot be turned into FP16",
                cause="only plain ONNX operators are converted; a graph lowered for one runtime is not",
                next_step="convert the graph before lowering it",
            )
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Cast":
            return [attributes["to"].i]
        if node.op_type in ("Constant", "ConstantOfShape"):
            if "value" in attributes:
                return [attributes["value"].t.data_type]
            return [INT64 if {"value_int", "value_ints"} & attributes.keys() else FLOAT]
        if node.op_type == "QuantizeLinear":
            stated = attributes["output_dtype"].i if "output_dtype" in attributes else 0
            return [types[node.input[2]] if len(node.input) > 2 and node.input[2] else stated or 2]
        if (
            node.op_type == "DequantizeLinear"
        ):  # its output follows the scale; the schema has a parameter of its own
            return [types[node.input[1]]]
        schema = defs.get_schema(node.op_type, self.opset)
        by_parameter: dict[str, int] = {}
        for index, name in enumerate(node.input):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            if name:
                by_parameter.setdefault(formal.type_str, types[name])
        kinds = []
        for index in range(len(node.output)):
            formal = schema.outputs[min(index, len(schema.outputs) - 1)]
            kinds.append(by_parameter.get(formal.type_str) or _only_type(formal, node))
        return kinds

    def _convert(self, node: onnx.NodeProto) -> None:
        copy = type(node)()
        copy.CopyFrom(node)
        target = FLOAT if self._stays_float(node) else FLOAT16
        for index, name in enumerate(node.input):
            if name and self.types[name] == FLOAT:
                copy.input[index] = self._as(name, target)
        for attribute in copy.attribute:
            if target == FLOAT:
                continue
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = FLOAT16
            elif attribute.name == "value" and attribute.t.data_type == FLOAT:
                attribute.t.CopyFrom(_half_tensor(attribute.t))
        for name in node.output:
            if self.types.get(name) == FLOAT:
                self.now[name] = target
        self.nodes.append(copy)

    def _stays_float(self, node: onnx.NodeProto) -> bool:
        if node.name.startswith(KEPT_IN_FLOAT):
            return True
        if node.op_type in ("Constant", "ConstantOfShape"):
            # Without a tensor to convert these make float32 numbers only.
            return all(attribute.name != "value" for attribute in node.attribute)
        return node.op_type in _QUANTIZERS and node.input[1] in self.float_scales

    def _find_float_scales(self) -> set[str]:
        """The scales that FP16 does not hold, and the other scale of each INT8 product that has one.

        TensorRT refuses a product whose operands have scales of two types.
        """
        quantizers = [node for node in self.model.graph.node if node.op_type in _QUANTIZERS]
        scale_of = {node.output[0]: node.input[1] for node in quantizers if node.input[1] in self.arrays}
        divisors = {node.input[1] for node in quantizers if node.op_type == "QuantizeLinear"}
        small = {
            name for name in scale_of.values() if not _in_half(self.arrays[name], normal=name in divisors)
        }
        found = set(small)
        for node in self.model.graph.node:
            if node.op_type == "MatMul":
                scales = {scale_of[name] for name in node.input if name in scale_of}
                found |= scales if scales & small else set()
        return found

    def _as(self, name: str, target: int) -> str:
        """The tensor `name` in the type `target`, through an initializer of that type or one shared Cast."""
        from onnx import helper

        if name in self.arrays:
            self.wanted[name].add(target)
            return name if target == FLOAT16 else f"{name}.fp32"
        if self.now[name] == target:
            return name
        if (name, target) not in self.casts:
            cast = f"{name}.fp16" if target == FLOAT16 else f"{name}.fp32"
            self.nodes.append(helper.make_node("Cast", [name], [cast], name=f"{cast}.cast", to=target))
            self.casts[name, target] = cast
        return self.casts[name, target]

    def _restore_output(self, output: onnx.ValueInfoProto) -> None:
        """A graph output keeps its name and float32 type: its FP16 producer is renamed, a Cast follows."""
        from onnx import helper

        name = output.name
        if self.types[name] != FLOAT or self.now[name] == FLOAT:
            return
        inner = f"{name}.half"
        for node in self.nodes:
            for index, tensor in enumerate(node.output):
                if tensor == name:
                    node.output[index] = inner
            for index, tensor in enumerate(node.input):
                if tensor == name:
                    node.input[index] = inner
        cast = self.casts.get((name, FLOAT))
        if cast is None:
            self.nodes.append(helper.make_node("Cast", [inner], [name], name=f"{name}.cast", to=FLOAT))
            return
        for node in self.nodes:  # float32 nodes read it already: let them read the output itself
            for tensors in (node.input, node.output):
                for index, tensor in enumerate(tensors):
                    if tensor == cast:
                        tensors[index] = name

    def _copy_initializer(self, tensor: onnx.TensorProto, graph: onnx.GraphProto) -> None:
        if tensor.data_type != FLOAT:
            graph.initializer.append(tensor)
            return
        if FLOAT16 in self.wanted[tensor.name]:
            graph.initializer.append(_half_tensor(tensor))
        if FLOAT in self.wanted[tensor.name]:
            graph.initializer.append(tensor)
            graph.initializer[-1].name = f"{tensor.name}.fp32"


def _only_type(formal: onnx.defs.OpSchema.FormalParameter, node: onnx.NodeProto) -> int:
    """The type of an output that no input decides: Shape and comparisons allow exactly one."""
    from onnx import TensorProto

    if len(formal.types) != 1:
        raise ExportError(
            f"node {node.name or node.op_type}: the type of its output {formal.name} cannot be followed"
        )
    (allowed,) = formal.types
    return int(TensorProto.DataType.Value(allowed.removeprefix("tensor(").removesuffix(")").upper()))


def _in_half(scale: onnx.TensorProto, *, normal: bool) -> bool:
    """Whether FP16 holds these numbers to its usual precision, and, if asked, their inverses too."""
    values = np.minimum(np.abs(_array(scale)), _FP16_MAX)
    rounded = values.astype(np.float16).astype(values.dtype)
    held = np.abs(rounded - values) <= _FP16_ROUNDING * values
    return bool((held & (values >= _FP16_TINY) if normal else held).all())


def _array(tensor: onnx.TensorProto) -> Array:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def _half_tensor(tensor: onnx.TensorProto) -> onnx.TensorProto:
    from onnx import numpy_helper

    values = _array(tensor)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    overflowed = np.isinf(half)
    if overflowed.any():  # rarely: one look at the whole tensor is cheaper than clipping it
        finite = overflowed & np.isfinite(values)
        half[finite] = np.copysign(_FP16_MAX, values[finite])
    return numpy_helper.from_array(half, tensor.name)
