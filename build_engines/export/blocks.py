"""Embeddings, masks and encoder layers: an `Encoder` and its checkpoint become nodes of a `GraphBuilder`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from build_engines.export.architecture import GELU, PLAIN_ACTIVATIONS, Encoder
from build_engines.export.checkpoint import Checkpoint, FloatArray
from build_engines.export.graph import GraphBuilder, Weight

FLOAT = np.dtype(np.float32)


@dataclass(slots=True)
class Scope:
    """What every block needs: where weights come from and where nodes go."""

    checkpoint: Checkpoint
    encoder: Encoder
    graph: GraphBuilder

    def vector(self, name: str, size: int) -> Weight:
        self.checkpoint.claim(name, (size,))
        return Weight((size,), FLOAT, lambda: self.checkpoint.read(name))

    def matrix(self, names: tuple[str, ...], k: int, n: int) -> Weight:
        """torch's [N, K] matrices side by side as one [K, N]; `n` is the sum of their rows."""
        for name in names:
            self.checkpoint.claim(name, (n // len(names), k))

        def load() -> FloatArray:
            return np.concatenate([self.checkpoint.read(name).T for name in names], axis=1)

        return Weight((k, n), FLOAT, load)

    def linear(
        self, node: str, x: str, modules: tuple[str, ...], shape: tuple[int, int], bias: bool = True
    ) -> str:
        """x [..., K] through the modules' weights as one Linear of `shape` (K, N)."""
        k, n = shape
        weight = self.matrix(tuple(f"{module}.weight" for module in modules), k, n)
        return self.graph.linear(node, x, weight, self.biases(modules, n) if bias else None)

    def norm(self, node: str, x: str, module: str, size: int) -> str:
        weight = self.vector(f"{module}.weight", size)
        bias = self.vector(f"{module}.bias", size) if self.encoder.norm_bias else None
        return self.graph.layer_norm(node, x, weight, bias, self.encoder.norm_epsilon)

    def activation(self, node: str, x: str, kind: str) -> str:
        if kind in GELU:
            return self.graph.node("Gelu", [x], node, approximate=GELU[kind])
        operator = PLAIN_ACTIVATIONS[kind]
        if operator == "Silu":
            gate = self.graph.node("Sigmoid", [x], f"{node}.sigmoid")
            return self.graph.node("Mul", [x, gate], node)
        return self.graph.node(operator, [x], node)

    def biases(self, modules: tuple[str, ...], n: int) -> Weight:
        names = [f"{module}.bias" for module in modules]
        for name in names:
            self.checkpoint.claim(name, (n // len(names),))
        return Weight((n,), FLOAT, lambda: np.concatenate([self.checkpoint.read(name) for name in names]))


def write_encoder(scope: Scope, *, with_token_types: bool, first_token_only: bool) -> str:
    """Everything from token ids to the last hidden state [batch, sequence, hidden]; returns its name.

    With `first_token_only` the state is that of the first token, [batch, 1, hidden]: a head that reads no
    other token needs no query, attention output or FFN of the others in the last layer, most of its work.
    """
    encoder, graph = scope.encoder, scope.graph
    graph.input("input_ids", ["batch", "sequence"])
    graph.input("attention_mask", ["batch", "sequence"])
    if with_token_types:
        graph.input("token_type_ids", ["batch", "sequence"])
    graph.node("Shape", ["input_ids"], "sequence_length", start=1, end=2)
    hidden = _embeddings(scope, with_token_types)
    masks = _masks(scope)
    positions = _rotary_positions(scope) if encoder.rotary else None
    for layer in range(encoder.layers):
        local = encoder.rotary is not None and encoder.rotary.local_layers[layer]
        attention = _Attention(masks[local], positions, "local" if local else "global")
        if first_token_only and layer == encoder.layers - 1:
            row = _first(graph, masks[local], "mask.first_token", axis=2)
            attention = replace(attention, mask=row, first=True)
        write_layer = _pre_norm_layer if encoder.rotary else _post_norm_layer
        hidden = write_layer(scope, layer, hidden, attention)
    if encoder.family.names.final_norm:
        hidden = scope.norm(
            "encoder.norm", hidden, encoder.tensor(encoder.family.names.final_norm), encoder.hidden
        )
    return hidden


@dataclass(frozen=True, slots=True)
class _Attention:
    """What attention in one layer reads beside its input: the mask, and rotary positions and tables.

    `first`: only the first token asks; the mask is then [B, 1, 1, S].
    """

    mask: str
    positions: str | None
    table: str
    first: bool = False


def _embeddings(scope: Scope, with_token_types: bool) -> str:
    encoder, graph, names = scope.encoder, scope.graph, scope.encoder.family.names
    width = encoder.embedding
    word = encoder.tensor(f"{names.word}.weight")
    scope.checkpoint.claim(word, (encoder.vocabulary, width))
    shape = (encoder.vocabulary, width)
    graph.weight("embeddings.word.weight", Weight(shape, FLOAT, lambda: scope.checkpoint.read(word)))
    x = graph.node("Gather", ["embeddings.word.weight", "input_ids"], "embeddings.word", axis=0)
    if names.position:
        graph.weight(
            "embeddings.position.weight", _position_table(scope, fold_type_zero=not with_token_types)
        )
        rows = _first_rows(graph, "embeddings.position.weight", "embeddings.position")
        x = graph.node("Add", [x, rows], "embeddings.add_position")
    if with_token_types:
        token_type = encoder.tensor(f"{names.token_type}.weight")
        scope.checkpoint.claim(token_type, (encoder.token_types, width))
        table = Weight((encoder.token_types, width), FLOAT, lambda: scope.checkpoint.read(token_type))
        graph.weight("embeddings.token_type.weight", table)
        rows = graph.node(
            "Gather", ["embeddings.token_type.weight", "token_type_ids"], "embeddings.token_type", axis=0
        )
        x = graph.node("Add", [x, rows], "embeddings.add_token_type")
    x = scope.norm("embeddings.norm", x, encoder.tensor(names.embedding_norm), width)
    if names.projection and width != encoder.hidden:
        module = encoder.tensor(names.projection)
        x = scope.linear("embeddings.projection", x, (module,), (width, encoder.hidden))
    return x


def _position_table(scope: Scope, *, fold_type_zero: bool) -> Weight:
    """Rows from the family's first position on; a single text has token type 0 only, so that row is added."""
    encoder, names, checkpoint = scope.encoder, scope.encoder.family.names, scope.checkpoint
    position = encoder.tensor(f"{names.position}.weight")
    checkpoint.claim(position, (encoder.positions, encoder.embedding))
    token_type = (
        encoder.tensor(f"{names.token_type}.weight") if encoder.token_types and fold_type_zero else None
    )
    if token_type:
        checkpoint.claim(token_type, (encoder.token_types, encoder.embedding))

    def load() -> FloatArray:
        table = checkpoint.read(position)[encoder.position_offset :]
        return table + checkpoint.read(token_type)[:1] if token_type else table

    return Weight((encoder.max_positions, encoder.embedding), FLOAT, load)


def _first_rows(graph: GraphBuilder, table: str, node: str) -> str:
    """table[:sequence]: only right padding exists, so position i is row i."""
    start = graph.constant("zero", np.array([0], np.int64))
    return graph.node("Slice", [table, start, "sequence_length.output", start], node)


def _masks(scope: Scope) -> dict[bool, str]:
    """Boolean masks [B, 1, S, S], True where a query sees a key: {False: global, True: local layers}."""
    graph, rotary = scope.graph, scope.encoder.rotary
    from onnx import TensorProto

    seen = graph.node("Cast", ["attention_mask"], "mask.seen", to=TensorProto.BOOL)
    axes = graph.constant("mask.axes", np.array([1, 2], np.int64))
    keys = graph.node("Unsqueeze", [seen, axes], "mask.keys")
    # The operator's text allows one row for all queries, ONNX Runtime 1.31 wants them all.
    one = graph.constant("one", np.array([1], np.int64))
    rows = graph.node("Concat", [one, one, "sequence_length.output", one], "mask.shape", axis=0)
    everywhere = graph.node("Expand", [keys, rows], "mask.global")
    if rotary is None or not any(rotary.local_layers):
        return {False: everywhere}
    graph.constant("positions.table", np.arange(scope.encoder.max_positions, dtype=np.int64))
    row = _first_rows(graph, "positions.table", "mask.positions")
    column = graph.node("Unsqueeze", [row, one], "mask.queries")
    distance = graph.node("Abs", [graph.node("Sub", [row, column], "mask.difference")], "mask.distance")
    limit = graph.constant("mask.window", np.array(rotary.window, np.int64))
    near = graph.node("LessOrEqual", [distance, limit], "mask.near")
    return {False: everywhere, True: graph.node("And", [keys, near], "mask.local")}


def _rotary_positions(scope: Scope) -> str:
    """Position ids [batch, sequence]; the operator wants them per row."""
    graph, rotary = scope.graph, scope.encoder.rotary
    assert rotary is not None
    graph.constant("positions.table", np.arange(scope.encoder.max_positions, dtype=np.int64))
    row = _first_rows(graph, "positions.table", "positions.row")
    shape = graph.node("Shape", ["input_ids"], "positions.shape")
    for kind, theta in (("global", rotary.global_theta), ("local", rotary.local_theta)):
        if (kind == "local") in rotary.local_layers:
            _rotary_tables(scope, kind, theta)
    return graph.node("Expand", [row, shape], "positions")


def _rotary_tables(scope: Scope, kind: str, theta: float) -> None:
    """cos and sin of position x frequency, [max_positions, head / 2], in float32 as transformers has them."""
    encoder = scope.encoder
    size = encoder.hidden // encoder.heads
    shape = (encoder.max_positions, size // 2)

    def load(function: Callable[[FloatArray], FloatArray]) -> Callable[[], FloatArray]:
        def table() -> FloatArray:
            exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
            inverse = (1.0 / np.power(np.float32(theta), exponent)).astype(np.float32)
            angles = np.arange(encoder.max_positions, dtype=np.float32)[:, None] * inverse[None, :]
            return function(angles).astype(np.float32)

        return table

    scope.graph.weight(f"rotary.{kind}.cos", Weight(shape, FLOAT, load(np.cos)))
    scope.graph.weight(f"rotary.{kind}.sin", Weight(shape, FLOAT, load(np.sin)))


def _attention(scope: Scope, layer: int, x: str, attention: _Attention) -> str:
    """x [batch, sequence, hidden] -> its shape, or [batch, 1, hidden] where only the first token asks."""
    encoder, graph, names = scope.encoder, scope.graph, scope.encoder.family.names
    base = f"layers.{layer}.attention"
    q, k, v = (_first_query if attention.first else _queries)(scope, layer, x)
    if attention.positions:
        tables = [f"rotary.{attention.table}.cos", f"rotary.{attention.table}.sin", attention.positions]

        def rotate(name: str) -> str:
            return graph.node("RotaryEmbedding", [name, *tables], f"{name}.rotary", num_heads=encoder.heads)

        # The first token's position is 0, where the rotation is the identity.
        q, k = (q if attention.first else rotate(q)), rotate(k)
    context = graph.node(
        "Attention",
        [q, k, v, attention.mask],
        f"{base}.core",
        q_num_heads=encoder.heads,
        kv_num_heads=encoder.heads,
    )
    module = encoder.tensor(names.attention_output, layer)
    shape = (encoder.hidden, encoder.hidden)
    return scope.linear(f"{base}.output", context, (module,), shape, encoder.attention_bias)


def _queries(scope: Scope, layer: int, x: str) -> list[str]:
    """Query, key and value of every token through one Linear."""
    encoder, base = scope.encoder, f"layers.{layer}.attention"
    modules = tuple(encoder.tensor(name, layer) for name in encoder.family.names.qkv)
    shape = (encoder.hidden, 3 * encoder.hidden)
    fused = scope.linear(f"{base}.qkv", x, modules, shape, encoder.attention_bias)
    parts = [f"{base}.{part}" for part in ("query", "key", "value")]
    return scope.graph.multi_node("Split", [fused], f"{base}.split", parts, axis=-1, num_outputs=3)


def _first_query(scope: Scope, layer: int, x: str) -> list[str]:
    """The first token's query, and key and value of every token."""
    encoder, graph, base = scope.encoder, scope.graph, f"layers.{layer}.attention"
    modules = tuple(encoder.tensor(name, layer) for name in encoder.family.names.qkv)
    hidden = encoder.hidden
    weight = scope.matrix(tuple(f"{module}.weight" for module in modules), hidden, 3 * hidden)
    bias = scope.biases(modules, 3 * hidden) if encoder.attention_bias else None
    first = _first(graph, x, f"{base}.first_token", axis=1)
    linears = []
    for node, source, part in (
        ("first_query", first, slice(0, hidden)),
        ("key_value", x, slice(hidden, 3 * hidden)),
    ):
        partial_bias = _columns(bias, part) if bias else None
        linears.append(graph.linear(f"{base}.{node}", source, _columns(weight, part), partial_bias))
    parts = [f"{base}.{part}" for part in ("key", "value")]
    key_value = graph.multi_node("Split", [linears[1]], f"{base}.split", parts, axis=-1, num_outputs=2)
    return [linears[0], *key_value]


def _columns(weight: Weight, part: slice) -> Weight:
    """Some of a weight's (or bias's) outputs."""
    shape = (*weight.shape[:-1], part.stop - part.start)
    return Weight(shape, weight.dtype, lambda: weight.load()[..., part])


def _first(graph: GraphBuilder, x: str, node: str, axis: int) -> str:
    """x[0:1] along `axis`."""
    start = graph.constant("zero", np.array([0], np.int64))
    end = graph.constant("one", np.array([1], np.int64))
    along = graph.constant(f"axis.{axis}", np.array([axis], np.int64))
    return graph.node("Slice", [x, start, end, along], node)


def _post_norm_layer(scope: Scope, layer: int, x: str, attention: _Attention) -> str:
    """BERT's layer: x = norm(x + attention(x)); x = norm(x + ffn(x))."""
    encoder, graph, names = scope.encoder, scope.graph, scope.encoder.family.names
    base = f"layers.{layer}"
    attended = _attention(scope, layer, x, attention)
    residual = _first(graph, x, f"{base}.first_token", axis=1) if attention.first else x
    x = graph.node("Add", [attended, residual], f"{base}.attention.residual")
    x = scope.norm(f"{base}.attention.norm", x, encoder.tensor(names.attention_norm, layer), encoder.hidden)
    up = scope.linear(f"{base}.ffn.up", x, (encoder.tensor(names.up, layer),), (encoder.hidden, encoder.ffn))
    activated = scope.activation(f"{base}.ffn.act", up, encoder.activation)
    module = encoder.tensor(names.down, layer)
    down = scope.linear(f"{base}.ffn.down", activated, (module,), (encoder.ffn, encoder.hidden))
    x = graph.node("Add", [down, x], f"{base}.ffn.residual")
    return scope.norm(f"{base}.ffn.norm", x, encoder.tensor(names.ffn_norm, layer), encoder.hidden)


def _pre_norm_layer(scope: Scope, layer: int, x: str, attention: _Attention) -> str:
    """ModernBERT's layer: x = x + attention(norm(x)); x = x + down(act(a) * b) with a, b = up(norm(x)).

    The first layer has no attention norm: the embeddings are normed already.
    """
    encoder, graph, names = scope.encoder, scope.graph, scope.encoder.family.names
    base, hidden = f"layers.{layer}", encoder.hidden
    normed = x
    if layer:
        normed = scope.norm(f"{base}.attention.norm", x, encoder.tensor(names.attention_norm, layer), hidden)
    attended = _attention(scope, layer, normed, attention)
    residual = _first(graph, x, f"{base}.first_token", axis=1) if attention.first else x
    x = graph.node("Add", [attended, residual], f"{base}.attention.residual")
    normed = scope.norm(f"{base}.ffn.norm", x, encoder.tensor(names.ffn_norm, layer), hidden)
    module = encoder.tensor(names.up, layer)
    up = scope.linear(f"{base}.ffn.up", normed, (module,), (hidden, 2 * encoder.ffn), encoder.ffn_bias)
    halves = [f"{base}.ffn.input", f"{base}.ffn.gate"]
    inner, gate = graph.multi_node("Split", [up], f"{base}.ffn.split", halves, axis=-1, num_outputs=2)
    activated = scope.activation(f"{base}.ffn.act", inner, encoder.activation)
    gated = graph.node("Mul", [activated, gate], f"{base}.ffn.gated")
    module = encoder.tensor(names.down, layer)
    down = scope.linear(f"{base}.ffn.down", gated, (module,), (encoder.ffn, hidden), encoder.ffn_bias)
    return graph.node("Add", [down, x], f"{base}.ffn.residual")
