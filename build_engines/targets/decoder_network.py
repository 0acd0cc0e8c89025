"""A causal LM's typed graph made ready for TensorRT, and what must be true of the network it becomes.

TensorRT wants every cache of one fixed length. The rest is the graph as it was exported and judged: rows of
the cache are written by KV_CACHE_UPDATE, in place because a cache is network input and output alike, and read
by the fused ATTENTION, which no engine may lack: its replacement would hold heads x sequence x capacity
scores, far more than the plan counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from build_engines.errors import CompileError
from build_engines.graphs import fix_dimension, read_structure

if TYPE_CHECKING:
    import onnx

_CACHES: Final = "past_key."
_LARGE: Final = 1_000_000_000
_MOST: Final = 1.03
_HALF: Final = 2
_ALIGNMENT: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderNetwork:
    """`model`: the graph without its weights, which stay in the file beside the graph it was read from.

    `layers`: attention layers; `head_size`: elements of one head; `weight_bytes`: what all initializers hold.
    """

    model: bytes
    layers: int
    head_size: int
    weight_bytes: int

    def check_layers(self, found: Mapping[str, int], graph: str) -> None:
        """Raise CompileError unless the network updates every cache in place and fuses every attention."""
        for kind, wanted in (("KV_CACHE_UPDATE", 2 * self.layers), ("ATTENTION", self.layers)):
            if found.get(kind, 0) != wanted:
                raise CompileError(
                    f"{graph}: the network has {found.get(kind, 0)} {kind} layers, {wanted} are needed",
                    cause="this version of the library reads the graph's cache or attention differently",
                    next_step="use the version that constraints.txt pins",
                )

    def no_kernel(self, graph: str) -> CompileError:
        """The refusal of heads that TensorRT has no fused attention for."""
        return CompileError(
            f"{graph}: TensorRT has no fused attention for heads of {self.head_size} elements",
            cause="its kernels take heads of 16 to 256 elements, a multiple of 8, and more than one of them",
            next_step='use the target "onnxruntime" for this model',
        )

    def check_size(self, engine_bytes: int, graph: str) -> None:
        """Raise CompileError for a large engine with weights stored twice: the plan has no room for them."""
        if self.weight_bytes > _LARGE and engine_bytes > _MOST * self.weight_bytes:
            raise CompileError(
                f"{graph}: the engine takes {engine_bytes:,} bytes for {self.weight_bytes:,} of weights, "
                f"more than {_MOST:g} times as much",
                cause="the builder stored weights in two arrangements, one for each of the two profiles",
                next_step='use the precision "int8-weights", or the version that constraints.txt pins',
            )


def read_decoder(graph: Path, capacity: int) -> DecoderNetwork:
    """Read a graph of build_engines.export.write_decoder, its caches fixed to `capacity` tokens.

    Raises:
        ArtifactError: the file is missing or no such graph.
        CompileError: its caches are FP32, for which TensorRT has no fused attention.
    """
    import onnx

    model = read_structure(graph)
    caches = [value for value in model.graph.input if value.name.startswith(_CACHES)]
    if caches and caches[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
        raise CompileError(
            f"{graph.name} is FP32, and TensorRT has no fused attention in FP32",
            cause="precision fp32 of an LLM is for the CPU",
            next_step='use the target "onnxruntime" for it, or the precision "fp16" or "int8-weights"',
        )
    fix_dimension(model, "capacity", capacity)
    if caches:
        check_alignment(caches[0], graph.name)
    _split_unevenly(model)
    return DecoderNetwork(
        model=model.SerializeToString(),
        layers=len(caches),
        head_size=caches[0].type.tensor_type.shape.dim[-1].dim_value if caches else 0,
        weight_bytes=sum(_stored_bytes(tensor) for tensor in model.graph.initializer),
    )


def check_alignment(cache: onnx.ValueInfoProto, graph: str) -> None:
    """Raise CompileError unless a tensor may begin at any row of the cache."""
    heads, capacity, head_dim = (size.dim_value for size in cache.type.tensor_type.shape.dim[1:])
    row = _HALF * heads * capacity * head_dim
    if row % _ALIGNMENT:
        raise CompileError(
            f"{graph}: a slot of {capacity} tokens takes {row} bytes of a cache",
            cause=f"a tensor on a GPU begins at a multiple of {_ALIGNMENT} bytes, and slots lie side by side",
            next_step="set max_length to a multiple of 8",
        )


def _split_unevenly(model: onnx.ModelProto) -> None:
    """Take query, key and value apart in two steps where they are of one size, in place.

    TensorRT-RTX 1.7 makes three products of a Linear that is split into three equal parts, and widens its
    whole INT8 weight to FP16 ahead of them: in every layer at once, and on every step.
    """
    from onnx import helper, numpy_helper

    sizes = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        given = sizes.get(node.input[1]) if node.op_type == "Split" and len(node.input) == 2 else None
        parts = [int(part) for part in numpy_helper.to_array(given)] if given is not None else []
        if len(parts) == 3 and len(set(parts)) == 1:
            rest = f"{node.name}.rest"
            for name, value in ((f"{rest}.first", [parts[0], 2 * parts[0]]), (f"{rest}.second", parts[1:])):
                model.graph.initializer.append(helper.make_tensor(name, 7, [2], value))  # INT64
            outputs, attributes = list(node.output), list(node.attribute)
            for name, inputs, made in (
                (node.name, [node.input[0], f"{rest}.first"], [outputs[0], rest]),
                (rest, [rest, f"{rest}.second"], outputs[1:]),
            ):
                step = helper.make_node("Split", inputs, made, name=name)
                step.attribute.extend(attributes)
                nodes.append(step)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return len(tensor.raw_data) or tensor.ByteSize()
