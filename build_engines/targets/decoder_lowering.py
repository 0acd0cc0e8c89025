"""A causal LM's graph in the operators that ONNX Runtime's CPU kernels are fast at; same weights, same bytes.

1. FP16 becomes float32: small constants here, matrices by a Cast that is folded when the graph is loaded. The
   embedding table stays FP16 and its rows are widened as they are read.
2. RotaryEmbedding, TensorScatter and Attention become one GroupQueryAttention per layer. It works through the
   tokens that a row holds, not through the cache's capacity, and appends in place (past and present bound to
   one address).
3. INT8 weights: in "int8-weights" a Linear stays DequantizeLinear + MatMul, which ONNX Runtime turns into
   MatMulNBits when it loads the graph (activations quantized per row and block, at run time); in "int8" it
   becomes DynamicQuantizeMatMul (activations quantized per run with one scale), coarser, and faster for many
   tokens.

The result names the same external data file, so the weights need not be written again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from build_engines.graphs import load_external
from build_engines.targets.onnxruntime import give_zero_points

if TYPE_CHECKING:
    import onnx

LinearMode = Literal["int8", "int8-weights"]

_FLOAT, _FLOAT16, _INT32 = 1, 10, 6  # TensorProto.DataType
_CONTRIB = "com.microsoft"
# What attention's pieces are called below layers.{i}.attention (build_engines.export.decoder).
_REPLACED = frozenset(
    (
        *(f"{name}_rows" for name in "qkv"),
        *("v_heads", "rotary_q", "rotary_k", "update_key", "update_value", "core", "merge", "merged"),
    )
)


def int8_linears(model: onnx.ModelProto) -> list[str]:
    """Names of the Linears whose weights the graph holds as INT8; the embedding is none."""
    found = (
        node.name.removesuffix(".dequantize")
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.name.endswith(".dequantize")
    )
    return [name for name in found if name != "embedding"]


def widen_decoder(model: onnx.ModelProto, data: Path) -> onnx.ModelProto:
    """A graph of `export.write_decoder`, its external data not loaded, ready to be lowered.

    FP16 leaves every signature and small constant, which are read from the folder `data`; matrices keep their
    bytes, and `lower_decoder` casts them. `model` is left as it is.
    """
    from onnx import numpy_helper

    result = type(model)()
    result.CopyFrom(model)
    graph = result.graph
    for tensor in graph.initializer:
        if tensor.data_type == _FLOAT16 and not _is_matrix(tensor):
            if tensor.data_location == tensor.EXTERNAL:
                load_external(tensor, data)
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == _FLOAT16:
            value.type.tensor_type.elem_type = _FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT16:
                attribute.i = _FLOAT
    del graph.value_info[:]
    return result


def lower_decoder(model: onnx.ModelProto, modes: Mapping[str, LinearMode]) -> onnx.ModelProto:
    """The lowered graph of what `widen_decoder` gave; `model` is left as it is.

    `modes` says how each INT8 Linear computes; those absent stay "int8-weights".
    """
    result = type(model)()
    result.CopyFrom(model)
    graph = result.graph
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == _FLOAT16}
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(_Lowering(nodes, half, modes).nodes())
    if "int8" in modes.values():
        give_zero_points(graph)
    finish_lowering(result)
    return result


def _is_matrix(tensor: onnx.TensorProto) -> bool:
    return len(tensor.dims) == 2 and tensor.name.endswith(".weight")


class GroupQueryLowering:
    """Walks the nodes in order and yields each one, or the GroupQueryAttention that replaces it.

    `ends` names the int32 tensor of each row's last position.
    """

    def __init__(self, nodes: list[onnx.NodeProto], ends: str) -> None:
        self.source = nodes
        self.ends = ends
        self.by_name = {node.name: node for node in nodes}

    def nodes(self) -> Iterator[onnx.NodeProto]:
        lengths_known = False
        for node in self.source:
            layer, _, part = node.name.partition(".attention.")
            if layer.startswith("layers.") and part in _REPLACED:
                if part == "merged":
                    if not lengths_known:
                        yield from self._lengths()
                        lengths_known = True
                    yield from self._attention(f"{layer}.attention", node.output[0])
            else:
                yield from self._other(node)

    def _other(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        yield node

    def _lengths(self) -> Iterator[onnx.NodeProto]:
        """Nodes that compute `ends` and "lengths.most", the longest row's length, where they are computed."""
        return iter(())

    def _attention(self, base: str, output: str) -> Iterator[onnx.NodeProto]:
        core, layer = self.by_name[f"{base}.core"], base.split(".")[1]
        split = self.by_name[f"{base}.split"]
        rotary = self.by_name.get(f"{base}.rotary_q")
        normed = f"{base}.q_norm" in self.by_name
        inputs = [split.input[0], "", ""]
        if normed:
            inputs = [f"{base}.q_packed", f"{base}.k_packed", split.output[2]]
            for name in "qk":
                yield _node("Reshape", [f"{base}.{name}_norm.output", "packed"], f"{base}.{name}_packed")
        inputs += [f"past_key.{layer}", f"past_value.{layer}", self.ends, "lengths.most"]
        if rotary is not None:
            inputs += list(rotary.input[1:3])
        settings = {a.name: a.f for a in core.attribute if a.name in {"scale", "softcap"}}
        window = core.input[3].removeprefix("mask.local.").removesuffix(".output")
        yield _node(
            "GroupQueryAttention",
            inputs,
            f"{base}.core",
            [output, f"present_key.{layer}", f"present_value.{layer}"],
            domain=_CONTRIB,
            num_heads=self._heads(base, "q"),
            kv_num_heads=self._heads(base, "k"),
            do_rotary=int(rotary is not None),
            local_window_size=int(window) if window.isdigit() else -1,
            **settings,
        )

    def _heads(self, base: str, name: str) -> int:
        """The Reshape into heads names its shape after their number: heads.{count}."""
        return int(self.by_name[f"{base}.{name}_heads"].input[1].removeprefix("heads."))


class _Lowering(GroupQueryLowering):
    """The same for the CPU: Linears and the embedding in the forms that its kernels are fast at."""

    def __init__(self, nodes: list[onnx.NodeProto], half: Set[str], modes: Mapping[str, LinearMode]) -> None:
        super().__init__(nodes, ends="lengths.rows")
        self.half = half  # initializers that are still FP16
        self.modes = modes

    def _other(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        if node.op_type == "MatMul":
            yield from self._linear(node)
        elif node.name == "embedding":
            yield from self._embedding(node)
        elif not self._is_bias_of_dynamic(node):
            yield node

    def _lengths(self) -> Iterator[onnx.NodeProto]:
        yield _node("Add", ["past_lengths", "sequence_length.output"], "lengths.total")
        yield _node("Sub", ["lengths.total", "one"], "lengths.last")
        yield _node("Cast", ["lengths.last"], self.ends, to=_INT32)
        yield _node("ReduceMax", ["lengths.total"], "lengths.longest", keepdims=1)
        yield _node("Cast", ["lengths.longest"], "lengths.most", to=_INT32)

    def _linear(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        name, weight = node.name, f"{node.name}.weight"
        if weight in self.half:
            yield _node("Cast", [weight], f"{weight}.wide", to=_FLOAT)
            node.input[1] = f"{weight}.wide"
            yield node
        elif f"{name}.dequantize" not in self.by_name or self.modes.get(name) != "int8":
            yield node
        else:
            bias = self._bias(name)
            inputs = [node.input[0], weight, f"{name}.scale"]
            if bias is not None:
                inputs += ["", f"{name}.bias_value"]
            output = (bias or node).output[0]
            yield _node("DynamicQuantizeMatMul", inputs, name, [output], domain=_CONTRIB)

    def _bias(self, linear: str) -> onnx.NodeProto | None:
        return self.by_name.get(f"{linear}.bias")

    def _is_bias_of_dynamic(self, node: onnx.NodeProto) -> bool:
        linear, _, part = node.name.rpartition(".")
        return part == "bias" and self.modes.get(linear) == "int8"

    def _embedding(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Rows are widened after they are read, so that the table stays as small as it is stored."""
        output, ids = node.output[0], node.input[1]
        quantized = "embedding.dequantize" in self.by_name
        yield _node("Gather", ["embedding.weight", ids], "embedding.rows", axis=0)
        wide = ["embedding.codes"] if quantized else [output]
        yield _node("Cast", ["embedding.rows"], "embedding.wide", wide, to=_FLOAT)
        if quantized:
            yield _node("Gather", ["embedding.scale", ids], "embedding.row_scale", axis=0)
            yield _node("Unsqueeze", ["embedding.row_scale", "last_axis"], "embedding.column")
            yield _node("Mul", ["embedding.codes", "embedding.column"], "embedding", [output])


def _node(
    op: str, inputs: list[str], name: str, outputs: list[str] | None = None, domain: str = "", **settings: Any
) -> onnx.NodeProto:
    """A node; its one result has its name unless `outputs` says otherwise."""
    from onnx import helper

    return helper.make_node(op, inputs, outputs or [name], name=name, domain=domain, **settings)


def finish_lowering(model: onnx.ModelProto) -> None:
    """Add the constants that new nodes read; drop nodes and initializers that no output depends on."""
    from onnx import numpy_helper

    graph = model.graph
    model.opset_import.add(domain=_CONTRIB, version=1)
    for name, values in (("packed", [0, 0, -1]), ("last_axis", [-1])):
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    wanted: set[str] = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    _keep(graph.initializer, wanted)


def _keep(tensors: Any, names: Set[str]) -> None:
    kept = [tensor for tensor in tensors if tensor.name in names]
    del tensors[:]
    tensors.extend(kept)
