"""Assemble quantized graphs: explicit Q/DQ around each Linear, in the mode asked for, layer by layer.

INT8 weights are stored as INT8 initializers behind a DequantizeLinear alone: Q and DQ on a float weight would
keep the engine at FP16 size. Nodes added for Linear N: N.input.smooth (Mul), N.input.shift (Add),
N.input.quantize, N.input.dequantize, N.weight.dequantize, and N.bias where the Linear had none; initializers
N.weight (now INT8), N.weight.scale, N.input.scale, N.input.zero, N.input.multiplier, N.input.offset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from build_engines.errors import QuantizeError
from build_engines.quantize.linears import FloatArray, Linear, find_linears, read_weight
from build_engines.quantize.outliers import find_pairs, split_outliers
from build_engines.quantize.scales import QuantizedWeight, StaticScales, quantize_weight, search_scales
from build_engines.quantize.statistics import Arrays, InputStatistics, collect_statistics

if TYPE_CHECKING:
    import onnx

Mode = Literal["int8", "int8-weights", "float"]


class Quantizer:
    """Holds the FP32 graph and every Linear's scales; `assemble` writes a graph for any choice of modes.

    Mode "int8" needs `calibrate` first; weights-only needs no data. The graph given is taken over: splitting
    outlier channels rewrites its FFN weights, which changes no answer.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.linears = find_linears(model)
        if not self.linears:
            raise QuantizeError("the graph has no Linear layer to quantize")
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._weights: dict[str, QuantizedWeight] = {}
        self.scales: dict[str, StaticScales] = {}

    def calibrate(
        self,
        batches: Sequence[Arrays],
        *,
        method: str,
        percentile: float,
        smoothing: str,
        advance: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Find scales for every Linear from real inputs; `advance(done, total)` reports progress."""
        total, done = len(batches) + len(self.linears), 0

        def step() -> None:
            nonlocal done
            done += 1
            advance(done, total)

        statistics = collect_statistics(self.model, self.linears, batches, step)
        stagger = self._split_outliers(statistics) if smoothing == "auto" else {}
        for linear in self.linears:
            self.scales[linear.name] = search_scales(
                read_weight(self._initializers, linear),
                statistics.pop(linear.name),
                method=method,
                percentile=percentile,
                smoothing=smoothing,
                stagger=stagger.get(linear.name),
            )
            step()

    def _split_outliers(self, statistics: dict[str, InputStatistics]) -> dict[str, FloatArray]:
        """Repeat the FFNs' outlier channels in graph and `statistics`; the copies' offsets by Linear."""
        stagger = {}
        for first, second in find_pairs(self.linears):
            weight = read_weight(self._initializers, second)
            split = split_outliers(weight, statistics[second.name])
            if split is None:
                continue
            statistics[second.name] = split.statistics(statistics[second.name])
            stagger[second.name] = split.stagger
            self._replace(second.weight, split.second_rows(weight))
            for name in (first.weight, f"{first.name}.bias_value"):
                if name in self._initializers:
                    self._replace(name, split.first_columns(self._array(name)))
        self.linears = find_linears(self.model)
        return stagger

    def _array(self, name: str) -> FloatArray:
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self._initializers[name]), dtype=np.float32)

    def _replace(self, name: str, values: FloatArray) -> None:
        from onnx import numpy_helper

        self._initializers[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))

    def assemble(self, modes: Mapping[str, Mode]) -> onnx.ModelProto:
        """A new graph in which each Linear has the mode named; `modes` must name all of them."""
        by_name = {linear.name: linear for linear in self.linears}
        result = type(self.model)()
        result.CopyFrom(self.model)
        graph = result.graph
        replaced = {by_name[name].weight for name, mode in modes.items() if mode != "float"}
        shifted = {name for name, mode in modes.items() if mode == "int8"}
        replaced |= {f"{name}.bias_value" for name in shifted}
        kept = [tensor for tensor in graph.initializer if tensor.name not in replaced]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        nodes = list(graph.node)
        del graph.node[:]
        for node in nodes:
            mode = modes[node.name] if node.name in by_name else "float"
            if mode != "float":
                self._quantize(graph, node, by_name[node.name], mode)
            graph.node.append(node)
        with_bias = {node.name.removesuffix(".bias") for node in nodes if node.name.endswith(".bias")}
        for name in sorted(shifted):
            self._shift_bias(graph, name, has_bias=name in with_bias)
        return result

    def _shift_bias(self, graph: onnx.GraphProto, name: str, *, has_bias: bool) -> None:
        """Add the shift to the Linear's bias; one without a bias gets its Add right after the MatMul."""
        from onnx import helper, numpy_helper

        shift = self.scales[name].bias_shift
        bias_name = f"{name}.bias_value"
        if has_bias:
            shift = shift + numpy_helper.to_array(self._initializers[bias_name])
        else:
            position = next(i for i, node in enumerate(graph.node) if node.name == name)
            node = graph.node[position]
            output, node.output[0] = node.output[0], f"{name}.matmul"
            add = helper.make_node("Add", [f"{name}.matmul", bias_name], [output], name=f"{name}.bias")
            graph.node.insert(position + 1, add)
        graph.initializer.append(numpy_helper.from_array(shift.astype(np.float32), bias_name))

    def _quantize(self, graph: onnx.GraphProto, node: onnx.NodeProto, linear: Linear, mode: Mode) -> None:
        """Put the Q/DQ nodes of one Linear before `node` and let it read them."""
        if mode == "int8":
            scales = self.scales[linear.name]
            weight = scales.weight
            node.input[0] = _quantized_input(graph, linear, scales)
        else:
            weight = self._weight_only(linear)
        add = _Adder(graph, linear.name)
        quantized = add.initializer("weight", weight.values)
        scale = add.initializer("weight.scale", weight.scale)
        node.input[1] = add.node("DequantizeLinear", [quantized, scale], "weight.dequantize", axis=1)

    def _weight_only(self, linear: Linear) -> QuantizedWeight:
        if linear.name not in self._weights:
            self._weights[linear.name] = quantize_weight(read_weight(self._initializers, linear))
        return self._weights[linear.name]


def _quantized_input(graph: onnx.GraphProto, linear: Linear, scales: StaticScales) -> str:
    add = _Adder(graph, linear.name)
    source = linear.source
    if scales.rewrite is not None:
        multiplier = add.initializer("input.multiplier", scales.rewrite.multiplier)
        source = add.node("Mul", [source, multiplier], "input.smooth")
        if scales.rewrite.offset is not None:
            source = add.node(
                "Add", [source, add.initializer("input.offset", scales.rewrite.offset)], "input.shift"
            )
    scale = add.initializer("input.scale", np.asarray(scales.scale))
    zero = add.initializer("input.zero", np.zeros((), dtype=np.int8))
    codes = add.node("QuantizeLinear", [source, scale, zero], "input.quantize")
    return add.node("DequantizeLinear", [codes, scale, zero], "input.dequantize")


class _Adder:
    """Appends nodes and initializers named after one Linear."""

    def __init__(self, graph: onnx.GraphProto, name: str) -> None:
        self.graph = graph
        self.name = name

    def initializer(self, suffix: str, values: npt.NDArray[Any]) -> str:
        from onnx import numpy_helper

        name = f"{self.name}.{suffix}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def node(self, op: str, inputs: list[str], suffix: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"{self.name}.{suffix}"
        self.graph.node.append(helper.make_node(op, inputs, [f"{name}.output"], name=name, **attributes))
        return f"{name}.output"
