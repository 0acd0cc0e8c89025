"""open_decoder and write_decoder: a causal LM's checkpoint becomes one ONNX graph with its KV cache inside.

What the other stages may rely on (opset 24; symbolic dimensions "batch", "sequence", "logits", "capacity"):

Inputs
    `input_ids` int64 [batch, sequence]; `past_lengths` int64 [batch], tokens already in each row's cache;
    `logit_indices` int64 [batch, logits], positions inside `sequence` whose logits are wanted;
    `past_key.{i}`, `past_value.{i}` [batch, kv_heads, capacity, head_dim] in the graph's type.
Outputs
    `logits` float32 [batch, logits, vocabulary]; `present_key.{i}`, `present_value.{i}`, the caches with the
    new tokens at past_lengths... (a runtime lets past and present share one buffer).
    Rows may have different lengths. Whatever a row holds beyond its real tokens (padding on the right) is
    written beyond its length, where later tokens overwrite it, and no real token sees it.

Nodes and initializers; a node's result is `<node>.output` unless said otherwise:

Linear N
    MatMul `N` with initializer `N.weight` [K, N]; with a bias its result is `N.matmul` and Add `N.bias` with
    initializer `N.bias_value` follows. INT8: initializers `N.weight` int8 and `N.scale` [N], and
    DequantizeLinear `N.dequantize` (axis 1) between weight and MatMul. N is one of
    layers.{i}.attention.qkv (query, key, value side by side), layers.{i}.attention.output, layers.{i}.ffn.up
    (gate and up side by side), layers.{i}.ffn.down, head.
Norm N
    RMSNormalization `N` with initializer `N.weight`: layers.{i}.attention.norm and .ffn.norm (before what
    they feed), .attention.post_norm and .ffn.post_norm (after it), .attention.q_norm and .k_norm (per head),
    norm.
Attention
    Per layer, under layers.{i}.attention: split, q_heads/k_heads/v_heads (Reshape), q_rows/k_rows/v_rows
    (Transpose), rotary_q/rotary_k (RotaryEmbedding with rotary.global.* or rotary.local.* and
    `rotary_positions`), update_key/update_value (TensorScatter, results present_key.{i}, present_value.{i}),
    core (Attention on 4 dimensions, with the mask mask.global.output or mask.local.{window}.output),
    merge, merged.
FFN
    layers.{i}.ffn.split, .ffn.act (Mul with .ffn.act.sigmoid, or Gelu), .ffn.gated.
Ends
    Gather `embedding` with `embedding.weight` [vocabulary, hidden] (INT8: DequantizeLinear
    `embedding.dequantize` with `embedding.scale` [vocabulary] on axis 0 before it: a target that would
    dequantize the whole table gathers first); Mul `embedding.scaled` where the family scales; GatherND
    `logit_rows` before `norm`; Cast `head.cast`, and Gemma 2's soft cap, after `head`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from build_engines.errors import ExportError
from build_engines.export.checkpoint import Array, open_checkpoint, well_formed
from build_engines.export.decoder_blocks import Blocks, positions_and_masks, rotary_tables, write_layer
from build_engines.export.decoder_config import LAYER_LINEARS, Architecture, find_family, read_architecture
from build_engines.export.decoder_weights import Decoder, narrowed, parameter_shapes
from build_engines.export.graph import GraphBuilder, Weight

DECODER_OPSET = 24  # TensorScatter
DECODER_IR = 11  # as the encoders: every runtime here reads it
Precision = Literal["fp32", "fp16", "int8-weights"]
# Gives the INT8 codes [K, N] (embedding: [vocabulary, hidden]) and the scale per output channel, float32 [N]
# (embedding: per row), when the graph is written, once for each; the codes may be mapped from a file. The
# scale is rounded to the graph's type: choose the codes for the rounded one.
QuantizedSource = Callable[[], tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]]
_BLOCK = 1 << 24


def open_decoder(folder: Path) -> Decoder:
    """Check the configuration and every tensor's place, shape and type; no weight is read.

    Raises:
        ExportError: the family or a setting is not supported, or the weights are not what config.json says.
    """
    checkpoint = open_checkpoint(folder)
    with well_formed(folder / "config.json"):
        architecture = read_architecture(checkpoint.config, folder)
        names = find_family(checkpoint.config, folder).names
    decoder = Decoder(folder, architecture, names, checkpoint)
    decoder.claim_all()
    return decoder


def write_decoder(
    decoder: Decoder,
    out: Path,
    *,
    precision: Precision,
    quantized: Mapping[str, QuantizedSource] | None = None,
) -> None:
    """Write the graph `out` and its weights `out`.data, tensor by tensor, whole or not at all.

    Args:
        precision: "fp32", or FP16 for the other two.
        quantized: the Linears (and "embedding") to hold as INT8; every other weight stays in the graph's
            float type.

    Raises:
        ExportError: a weight does not fit its type, by name; or onnx.checker refuses the graph.
        ArtifactError: the disk is full.
    """
    architecture, sources = decoder.architecture, dict(quantized or {})
    unknown = sorted(set(sources) - {*decoder.linears(), "embedding"})
    if unknown:
        raise ExportError(f"{decoder.folder}: quantized weights for unknown Linears: {', '.join(unknown)}")
    dtype = np.dtype(np.float32 if precision == "fp32" else np.float16)
    graph = GraphBuilder(f"{architecture.family}-generate", DECODER_OPSET, DECODER_IR)
    blocks = Blocks(graph, architecture, dtype, _Stored(decoder, graph, dtype, sources))
    layers = range(architecture.layers)
    cache = ("batch", architecture.kv_heads, "capacity", architecture.head_dim)
    graph.input("input_ids", ["batch", "sequence"])
    graph.input("past_lengths", ["batch"])
    graph.input("logit_indices", ["batch", "logits"])
    for layer in layers:
        for what in ("key", "value"):
            graph.input(f"past_{what}.{layer}", cache, dtype)
    rotary_tables(blocks, layers)
    context = positions_and_masks(blocks, "input_ids", "past_lengths", "past_key.0", layers)
    x = _embedding(blocks, decoder, sources.get("embedding"))
    for layer in layers:
        x = write_layer(blocks, f"layers.{layer}.", layer, x, context)
    _logits(blocks, x)
    graph.output("logits", ["batch", "logits", architecture.vocabulary])
    for layer in layers:
        for what in ("key", "value"):
            graph.output(f"present_{what}.{layer}", cache, dtype)
    graph.write(out, external_threshold=0)


def layer_graph(architecture: Architecture, layer: int = 0) -> bytes:
    """One layer as an FP32 model whose weights are inputs, so that one session can run every layer like it.

    Inputs: `hidden` float32 [batch, sequence, hidden] and `Decoder.layer_parameters` by name. Outputs:
    `hidden_out`, and what the four Linears read: "attention.qkv.input", "attention.output.input",
    "ffn.up.input", "ffn.down.input". Every token sees those before it and itself; there is no cache.

    Layers differ only where `architecture.kinds` does: one graph serves all layers of one kind.
    """
    graph = GraphBuilder(f"{architecture.family}-layer", DECODER_OPSET, DECODER_IR)
    blocks = Blocks(graph, architecture, np.dtype(np.float32), _Fed(graph, architecture))
    graph.input("hidden", ["batch", "sequence", architecture.hidden], np.float32)
    layers = range(layer, layer + 1)
    rotary_tables(blocks, layers)
    context = positions_and_masks(blocks, "hidden", None, None, layers)
    x = write_layer(blocks, "", layer, "hidden", context)
    outputs = {"hidden_out": (x, architecture.hidden)}
    for name in LAYER_LINEARS:
        outputs[f"{name}.input"] = (blocks.linear_inputs[name], architecture.linear_shape(name)[0])
    for name, (tensor, width) in outputs.items():
        graph.node("Identity", [tensor], f"{name}.result", name)
        graph.output(name, ["batch", "sequence", width])
    return bytes(graph.model().SerializeToString())


def _embedding(blocks: Blocks, decoder: Decoder, source: QuantizedSource | None) -> str:
    """input_ids -> [batch, sequence, hidden], scaled where the family scales."""
    graph, architecture = blocks.graph, blocks.architecture
    shape = (architecture.vocabulary, architecture.hidden)
    if source is None:
        graph.weight("embedding.weight", _stored(decoder, "embedding", shape, blocks.dtype))
        x = graph.node("Gather", ["embedding.weight", "input_ids"], "embedding", axis=0)
    else:
        graph.weight("embedding.weight", _codes("embedding", source, shape))
        graph.weight("embedding.scale", _scales("embedding", source, shape[:1], blocks.dtype))
        inputs = ["embedding.weight", "embedding.scale"]
        # TensorRT takes INT8 constants nowhere but here, and fuses this into the Gather: no table in FP16.
        table = graph.node("DequantizeLinear", inputs, "embedding.dequantize", axis=0)
        x = graph.node("Gather", [table, "input_ids"], "embedding", axis=0)
    if architecture.embedding_scale == 1.0:
        return x
    factor = graph.constant("embedding.factor", np.array(architecture.embedding_scale, blocks.dtype))
    return graph.node("Mul", [x, factor], "embedding.scaled")


def _logits(blocks: Blocks, x: str) -> None:
    """[batch, sequence, hidden] -> float32 "logits" of the positions asked for; only those are computed."""
    graph, softcap = blocks.graph, blocks.architecture.logit_softcap
    last = blocks.integers("axis.2", [2])
    indices = graph.node("Unsqueeze", ["logit_indices", last], "logit_rows.indices")
    rows = graph.node("GatherND", [x, indices], "logit_rows", batch_dims=1)
    logits = blocks.linear("head", blocks.norm("norm", rows))
    final = "logits" if softcap is None else None
    wide = graph.node("Cast", [logits], "head.cast", final, to=_onnx_type(np.dtype(np.float32)))
    if softcap is not None:
        cap = graph.constant("head.softcap", np.array(softcap, np.float32))
        squashed = graph.node("Tanh", [graph.node("Div", [wide, cap], "head.share")], "head.squash")
        graph.node("Mul", [squashed, cap], "head.capped", "logits")


@dataclass(frozen=True, slots=True)
class _Stored:
    """Weights as initializers of the graph, in its float type or as INT8."""

    decoder: Decoder
    graph: GraphBuilder
    dtype: np.dtype[Any]
    quantized: Mapping[str, QuantizedSource]

    def matrix(self, name: str) -> str:
        shape = self.decoder.architecture.linear_shape(name)
        source = self.quantized.get(name)
        if source is None:
            return self.graph.weight(f"{name}.weight", _stored(self.decoder, name, shape, self.dtype))
        self.graph.weight(f"{name}.weight", _codes(name, source, shape))
        self.graph.weight(f"{name}.scale", _scales(name, source, shape[1:], self.dtype))
        inputs = [f"{name}.weight", f"{name}.scale"]
        return self.graph.node("DequantizeLinear", inputs, f"{name}.dequantize", axis=1)

    def vector(self, name: str) -> str:
        architecture = self.decoder.architecture
        shapes = parameter_shapes(architecture) | {"norm.weight": (architecture.hidden,)}
        shape = shapes[name.split(".", 2)[2] if name.startswith("layers.") else name]
        place = f"{self.decoder.folder}: {name}"

        def load() -> Array:
            return narrowed(self.decoder.parameter(name), self.dtype, place)

        return self.graph.weight(name, Weight(shape, self.dtype, load))


@dataclass(frozen=True, slots=True)
class _Fed:
    """Weights as float32 inputs of the graph."""

    graph: GraphBuilder
    architecture: Architecture

    def matrix(self, name: str) -> str:
        return self.vector(f"{name}.weight")

    def vector(self, name: str) -> str:
        return self.graph.input(name, parameter_shapes(self.architecture)[name], np.float32)


def _stored(decoder: Decoder, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Weight:
    return Weight(
        shape,
        dtype,
        lambda: np.concatenate(list(decoder.pieces(name, dtype))),
        lambda: decoder.pieces(name, dtype),
    )


def _codes(name: str, source: QuantizedSource, shape: tuple[int, ...]) -> Weight:
    """INT8 codes, in blocks of rows where they are mapped from a file."""

    def read() -> npt.NDArray[np.int8]:
        codes, _ = source()
        if codes.dtype != np.int8 or codes.shape != shape:
            raise ExportError(
                f"{name}: the codes are {codes.dtype} {codes.shape}, the graph needs int8 {shape}"
            )
        return codes

    def pieces() -> Iterator[Array]:
        codes = read()
        step = max(1, _BLOCK // shape[1])
        for start in range(0, shape[0], step):
            yield codes[start : start + step]

    return Weight(shape, np.dtype(np.int8), read, pieces)


def _scales(name: str, source: QuantizedSource, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Weight:
    def load() -> Array:
        _, scale = source()
        if scale.size != shape[0] or not (scale >= 0).all():
            raise ExportError(f"{name}: {scale.size} scales, {shape[0]} that are not negative are needed")
        values = narrowed(scale.reshape(shape).astype(np.float32), dtype, f"{name}.scale")
        # An all-zero channel has scale 0, which TensorRT refuses; its codes are zero under any scale.
        return np.maximum(values, np.finfo(dtype).smallest_subnormal)

    return Weight(shape, dtype, load)


def _onnx_type(dtype: np.dtype[Any]) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(dtype))
