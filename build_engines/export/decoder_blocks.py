"""Layers of a causal LM as nodes: the same functions write the whole graph and the graph of one layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from build_engines.export.decoder_config import Architecture
from build_engines.export.decoder_rotary import rope_tables
from build_engines.export.graph import GraphBuilder, Weight


class Parameters(Protocol):
    """Where weights come from: initializers of the whole graph, inputs of a layer's."""

    def matrix(self, name: str) -> str:
        """The tensor [K, N] that the Linear `name` multiplies by."""
        ...

    def vector(self, name: str) -> str:
        """The tensor of an initializer by its name: a norm's .weight, a Linear's .bias_value."""
        ...


@dataclass(slots=True)
class Blocks:
    """What every block needs: the graph, the element type, where weights come from.

    `linear_inputs` collects what each Linear reads, by its name.
    """

    graph: GraphBuilder
    architecture: Architecture
    dtype: np.dtype[Any]
    parameters: Parameters
    linear_inputs: dict[str, str] = field(default_factory=dict)

    def linear(self, name: str, x: str, bias: bool = False) -> str:
        """x [..., K] -> [..., N]: MatMul `name`, then Add `name`.bias where there is one."""
        self.linear_inputs[name] = x
        weight = self.parameters.matrix(name)
        if not bias:
            return self.graph.node("MatMul", [x, weight], name)
        product = self.graph.node("MatMul", [x, weight], name, f"{name}.matmul")
        value = self.parameters.vector(f"{name}.bias_value")
        return self.graph.node("Add", [product, value], f"{name}.bias", f"{name}.output")

    def norm(self, name: str, x: str) -> str:
        """RMSNormalization over the last axis, its mean in float32 whatever the graph's type is."""
        weight = self.parameters.vector(f"{name}.weight")
        epsilon = self.architecture.norm_epsilon
        return self.graph.node("RMSNormalization", [x, weight], name, axis=-1, epsilon=epsilon, stash_type=1)

    def activation(self, name: str, x: str) -> str:
        if self.architecture.activation != "silu":
            return self.graph.node("Gelu", [x], name, approximate=self.architecture.activation)
        gate = self.graph.node("Sigmoid", [x], f"{name}.sigmoid")
        return self.graph.node("Mul", [x, gate], name)

    def integers(self, name: str, values: list[int]) -> str:
        return self.graph.constant(name, np.array(values, np.int64))


@dataclass(frozen=True, slots=True)
class Context:
    """What every layer's attention reads beside its input.

    `masks`: {window or None: boolean mask [batch, 1, sequence, keys], True where a key is seen};
    `positions`: [batch, sequence], for the rotary tables; `past_lengths`: [batch] where there is a cache.
    """

    masks: dict[int | None, str]
    positions: str
    past_lengths: str | None = None


def positions_and_masks(
    blocks: Blocks, ids: str, past_lengths: str | None, cache: str | None, layers: range
) -> Context:
    """Positions of the tokens in `ids` ([batch, sequence, ...]), and who sees whom.

    A key in the cache is seen by every token at its position or later; a local layer also forgets those
    `window` or more positions back. Nothing hides what lies beyond a row's real tokens: it is at later
    positions.
    """
    graph = blocks.graph
    zero, one = graph.constant("zero", np.array(0, np.int64)), graph.constant("one", np.array(1, np.int64))
    graph.node("Shape", [ids], "sequence_length", start=1, end=2)
    axis = blocks.integers("axis.0", [0])
    length = graph.node("Squeeze", ["sequence_length.output", axis], "sequence_length.scalar")
    steps = graph.node("Range", [zero, length, one], "sequence_range")
    if past_lengths and cache:
        start = graph.node("Unsqueeze", [past_lengths, blocks.integers("axis.1", [1])], "past_column")
        positions = graph.node("Add", [start, steps], "positions")
        graph.node("Shape", [cache], "capacity", start=2, end=3)
        capacity = graph.node("Squeeze", ["capacity.output", axis], "capacity.scalar")
        keys = graph.node("Range", [zero, capacity, one], "key_range")
    else:
        rows = graph.node("Shape", [ids], "positions.shape", start=0, end=2)
        positions = graph.node("Expand", [steps, rows], "positions")
        keys = steps
    asking = graph.node("Unsqueeze", [positions, blocks.integers("axes.1.3", [1, 3])], "mask.queries")
    masks: dict[int | None, str] = {None: graph.node("LessOrEqual", [keys, asking], "mask.global")}
    kinds = blocks.architecture.kinds
    for window in sorted({kinds[layer].window or 0 for layer in layers} - {0}):
        size = graph.constant(f"mask.window.{window}", np.array(window, np.int64))
        oldest = graph.node("Sub", [asking, size], f"mask.oldest.{window}")
        near = graph.node("Greater", [keys, oldest], f"mask.near.{window}")
        masks[window] = graph.node("And", ["mask.global.output", near], f"mask.local.{window}")
    # Padding may lie beyond the tables; nothing reads what it is rotated by.
    last = graph.constant("positions.last", np.array(blocks.architecture.rows - 1, np.int64))
    return Context(masks, graph.node("Min", [positions, last], "rotary_positions"), past_lengths)


def rotary_tables(blocks: Blocks, layers: range) -> None:
    """Initializers rotary.{kind}.cos and .sin, [rows, head_dim / 2], for the kinds these layers use."""
    architecture = blocks.architecture
    shape = (architecture.rows, architecture.head_dim // 2)
    used = {architecture.kinds[layer].rope for layer in layers}
    for kind, rope in architecture.ropes:
        if kind not in used:
            continue
        for index, name in enumerate(("cos", "sin")):

            def load(rope: Any = rope, index: int = index) -> Any:
                return rope_tables(rope, architecture.head_dim, shape[0])[index].astype(blocks.dtype)

            blocks.graph.weight(f"rotary.{kind}.{name}", Weight(shape, blocks.dtype, load))


def write_layer(blocks: Blocks, base: str, layer: int, x: str, context: Context) -> str:
    """x [batch, sequence, hidden] through one layer; its nodes' names start with `base`.

    Pre-norm (Llama): x + attention(norm(x)), then x + ffn(norm(x)). Post-norm (EXAONE 4):
    x + norm(attention(x)), likewise. Gemma has both.
    """
    graph, norms = blocks.graph, blocks.architecture.norms

    def normed(name: str, value: str) -> str:
        return blocks.norm(f"{base}{name}", value) if name in norms else value

    attended = _attention(blocks, base, layer, normed("attention.norm", x), context)
    attended = normed("attention.post_norm", attended)
    x = graph.node("Add", [x, attended], f"{base}attention.residual")
    y = normed("ffn.post_norm", _ffn(blocks, base, normed("ffn.norm", x)))
    return graph.node("Add", [x, y], f"{base}ffn.residual")


def _ffn(blocks: Blocks, base: str, x: str) -> str:
    """down(act(gate) * up) with gate and up side by side in one Linear."""
    graph, biased = blocks.graph, blocks.architecture.ffn_bias
    both = blocks.linear(f"{base}ffn.up", x, biased)
    halves = [f"{base}ffn.gate", f"{base}ffn.value"]
    gate, value = graph.multi_node("Split", [both], f"{base}ffn.split", halves, axis=-1, num_outputs=2)
    gated = graph.node("Mul", [blocks.activation(f"{base}ffn.act", gate), value], f"{base}ffn.gated")
    return blocks.linear(f"{base}ffn.down", gated, biased)


def _attention(blocks: Blocks, base: str, layer: int, x: str, context: Context) -> str:
    """x [batch, sequence, hidden] -> its shape, through the layer's cache where there is one."""
    architecture, graph = blocks.architecture, blocks.graph
    kind = architecture.kinds[layer]
    fused = blocks.linear(f"{base}attention.qkv", x, architecture.qkv_bias)
    sizes = blocks.integers("qkv.sizes", list(architecture.qkv_sizes))
    parts = [f"{base}attention.{part}" for part in ("query", "key", "value")]
    query, key, value = graph.multi_node("Split", [fused, sizes], f"{base}attention.split", parts, axis=-1)
    heads = []
    for name, tensor, count in (
        ("q", query, architecture.heads),
        ("k", key, architecture.kv_heads),
        ("v", value, architecture.kv_heads),
    ):
        shape = blocks.integers(f"heads.{count}", [0, 0, count, architecture.head_dim])
        split = graph.node("Reshape", [tensor, shape], f"{base}attention.{name}_heads")
        if name != "v" and architecture.qk_norm:
            split = blocks.norm(f"{base}attention.{name}_norm", split)
        split = graph.node("Transpose", [split], f"{base}attention.{name}_rows", perm=[0, 2, 1, 3])
        if name != "v" and kind.rope:
            tables = [f"rotary.{kind.rope}.cos", f"rotary.{kind.rope}.sin", context.positions]
            split = graph.node("RotaryEmbedding", [split, *tables], f"{base}attention.rotary_{name}")
        heads.append(split)
    query, key, value = heads
    if context.past_lengths:
        key = _update(blocks, base, layer, "key", (key, context.past_lengths))
        value = _update(blocks, base, layer, "value", (value, context.past_lengths))
    softcap = architecture.attention_softcap
    settings: dict[str, Any] = {"scale": architecture.attention_scale} | (
        {"softcap": softcap} if softcap else {}
    )
    inputs = [query, key, value, context.masks[kind.window]]
    core = graph.node("Attention", inputs, f"{base}attention.core", **settings)
    rows = graph.node("Transpose", [core], f"{base}attention.merge", perm=[0, 2, 1, 3])
    shape = blocks.integers("heads.merged", [0, 0, architecture.heads * architecture.head_dim])
    merged = graph.node("Reshape", [rows, shape], f"{base}attention.merged")
    return blocks.linear(f"{base}attention.output", merged, architecture.output_bias)


def _update(blocks: Blocks, base: str, layer: int, what: str, new: tuple[str, str]) -> str:
    """Write the new rows into the cache at each sequence's length; the result shares the cache's memory."""
    return blocks.graph.node(
        "TensorScatter",
        [f"past_{what}.{layer}", *new],
        f"{base}attention.update_{what}",
        f"present_{what}.{layer}",
        axis=-2,
        mode="linear",
    )
