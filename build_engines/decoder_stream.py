"""A decoder run layer by layer: all texts go through one layer, the only one in memory, then the next.

The layer is the export's own graph of one layer, with its weights as inputs: one session serves all layers of
a kind, and the caller decides what a layer computes with, the checkpoint's weights or what quantization left.
Embedding, last norm and head are done here; the head in parts of the vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from build_engines.export.decoder import layer_graph
from build_engines.export.decoder_config import LAYER_LINEARS
from build_engines.graphs import open_session
from build_engines.perplexity import Rows, Scorer, Scores
from build_engines.quantize.clipping import MAX_ROWS

if TYPE_CHECKING:
    import onnx

    from build_engines.export.decoder_weights import Decoder

FloatArray = npt.NDArray[np.float32]
Weights = dict[str, FloatArray]

FP16_MAX = 65504.0
# Tokens that go through a layer together: enough for full speed, and the widest tensor stays at 60 MB for an
# FFN of 14336.
_TOKENS_AT_ONCE = 512
# Columns of the head at a time: 134 MB of weights for a hidden size of 4096.
HEAD_COLUMNS = 8192
_EXTREME = "extreme:"
# What may overflow in FP16: products, sums and, where their weights are large, norms.
_GROWING = {"MatMul", "Add", "Mul", "RMSNormalization"}


@dataclass(slots=True)
class Lane:
    """Texts on their way through the layers. `hidden`: float32 [rows, tokens, hidden] of each batch.

    A batch holds neighbouring rows of equal length, so that there is no padding: it would cost time, and its
    activations would be taken for the texts'.
    """

    tokens: list[npt.NDArray[np.int64]]
    hidden: list[FloatArray]

    @classmethod
    def of(cls, rows: Rows, embed: Callable[[npt.NDArray[np.int64]], FloatArray]) -> Lane:
        """`rows` in their order; `embed` gives what the first layer reads for token ids."""
        tokens = [np.stack(list(batch)) for batch in _batches(rows)]
        return cls(tokens, [np.ascontiguousarray(embed(ids), dtype=np.float32) for ids in tokens])

    def targets(self) -> npt.NDArray[np.int64]:
        """The tokens that are predicted, row by row."""
        return np.concatenate([ids[:, 1:].ravel() for ids in self.tokens])

    def predicting(self) -> FloatArray:
        """[predictions, hidden]: the states that `targets` are predicted from."""
        return np.concatenate([h[:, :-1].reshape(-1, h.shape[-1]) for h in self.hidden])

    def round_to_half(self) -> None:
        """As between the layers of an FP16 graph."""
        self.hidden = [half(hidden) for hidden in self.hidden]


@dataclass(slots=True)
class Peak:
    """The largest magnitude that an FP16 graph would have to hold, and where: a layer's tensor."""

    value: float = 0.0
    place: str = ""

    def see(self, value: float, place: str) -> None:
        # NaN counts as largest, and stays.
        if value > self.value or (np.isnan(value) and not np.isnan(self.value)):
            self.value, self.place = value, place

    @property
    def fits(self) -> bool:
        return self.value <= FP16_MAX


@dataclass(slots=True)
class Inputs:
    """What a Linear reads on the calibration texts: some `rows` [<= MAX_ROWS, inputs], and the mean square of
    every input over all tokens."""

    rows: FloatArray
    moments: FloatArray


@dataclass(slots=True)
class Stream:
    """Runs a decoder's layers on lanes."""

    decoder: Decoder
    _sessions: dict[Any, Any] = field(default_factory=dict)

    def weights(self, layer: int) -> Weights:
        """The layer's parameters in FP32, by the graph's input names."""
        return {name: weight.load() for name, weight in self.decoder.layer_parameters(layer).items()}

    def lane(self, rows: Rows) -> Lane:
        return Lane.of(rows, self.decoder.embed)

    def advance(self, lane: Lane, layer: int, weights: Weights) -> None:
        """Take the lane through one layer."""
        session = self._session(layer, watched=False)
        lane.hidden = [
            session.run(["hidden_out"], {"hidden": hidden, **weights})[0] for hidden in lane.hidden
        ]

    def watch(self, lane: Lane, layer: int, weights: Weights, peak: Peak) -> None:
        """`advance`, noting the largest magnitude on the way."""
        session = self._session(layer, watched=True)
        extremes = [output.name for output in session.get_outputs() if output.name.startswith(_EXTREME)]
        for index, hidden in enumerate(lane.hidden):
            found = session.run(["hidden_out", *extremes], {"hidden": hidden, **weights})
            lane.hidden[index] = found[0]
            for name, value in zip(extremes, found[1:], strict=True):
                peak.see(abs(float(value)), f"layers.{layer}.{name.split(':', 2)[2]}")

    def observe(self, lane: Lane, layer: int, weights: Weights) -> dict[str, Inputs]:
        """`advance`, keeping what the Linears read, by their name without the layer."""
        session = self._session(layer, watched=False)
        names = [f"{part}.input" for part in LAYER_LINEARS]
        kept: dict[str, _Collector] = {part: _Collector(lane) for part in LAYER_LINEARS}
        for index, hidden in enumerate(lane.hidden):
            found = session.run(["hidden_out", *names], {"hidden": hidden, **weights})
            lane.hidden[index] = found[0]
            for part, value in zip(LAYER_LINEARS, found[1:], strict=True):
                kept[part].add(value.reshape(-1, value.shape[-1]))
        return {part: collector.inputs() for part, collector in kept.items()}

    def last_norm(self, states: FloatArray) -> FloatArray:
        """What the head reads."""
        architecture = self.decoder.architecture
        power = np.square(states, dtype=np.float32).mean(axis=-1, keepdims=True)
        normed = states / np.sqrt(power + np.float32(architecture.norm_epsilon))
        return np.asarray(normed * self.decoder.norm("norm"), dtype=np.float32)

    def head_parts(self) -> Iterator[tuple[slice, FloatArray]]:
        """The head's columns, some at a time, and their weight [hidden, part] in FP32."""
        vocabulary = self.decoder.architecture.vocabulary
        for start in range(0, vocabulary, HEAD_COLUMNS):
            part = slice(start, min(start + HEAD_COLUMNS, vocabulary))
            yield part, self.decoder.weight("head", part)

    def logits(self, normed: FloatArray, weight: FloatArray) -> FloatArray:
        """Logits of the columns in `weight`, with the family's softcap."""
        found = normed @ weight
        cap = self.decoder.architecture.logit_softcap
        return np.asarray(found if cap is None else np.tanh(found / cap) * cap, dtype=np.float32)

    def _session(self, layer: int, *, watched: bool) -> Any:
        architecture = self.decoder.architecture
        key = (architecture.kinds[layer], watched)
        if key not in self._sessions:
            import onnx

            graph = onnx.load_from_string(layer_graph(architecture, layer))
            self._sessions[key] = open_session(_with_extremes(graph) if watched else graph)
        return self._sessions[key]


def stream_scores(decoder: Decoder, rows: Rows, advance: Callable[[int, int], None]) -> Scores:
    """The checkpoint's own scores on `rows`, in FP32; `advance(layers done, layers)` reports progress."""
    stream = Stream(decoder)
    lane, layers = stream.lane(rows), decoder.architecture.layers
    for layer in range(layers):
        advance(layer, layers)
        stream.advance(lane, layer, stream.weights(layer))
    scorer, normed = Scorer(lane.targets()), stream.last_norm(lane.predicting())
    for part, weight in stream.head_parts():
        scorer.add(stream.logits(normed, weight), part.start)
    return scorer.scores()


def half(values: FloatArray) -> FloatArray:
    """Rounded to FP16, overflow to infinity included."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


class _Collector:
    """Keeps at most MAX_ROWS rows, evenly from all batches of a lane, and the mean square of every column."""

    def __init__(self, lane: Lane) -> None:
        total = sum(ids.size for ids in lane.tokens)
        count = min(MAX_ROWS, total)
        self._wanted = np.linspace(0, total - 1, count).round().astype(np.int64)
        self._seen = 0
        self._rows: list[FloatArray] = []
        self._power: npt.NDArray[np.float64] | None = None

    def add(self, values: FloatArray) -> None:
        inside = (self._wanted >= self._seen) & (self._wanted < self._seen + len(values))
        self._rows.append(values[self._wanted[inside] - self._seen])
        power = np.einsum("tk,tk->k", values, values, dtype=np.float64)
        self._power = power if self._power is None else self._power + power
        self._seen += len(values)

    def inputs(self) -> Inputs:
        assert self._power is not None
        return Inputs(np.concatenate(self._rows), (self._power / self._seen).astype(np.float32))


def collect(lane: Lane, values: Sequence[FloatArray]) -> Inputs:
    """`Inputs` of a Linear that is not in the layers: `values` [rows, tokens, inputs], batch by batch."""
    collector = _Collector(lane)
    for value in values:
        collector.add(value.reshape(-1, value.shape[-1]))
    return collector.inputs()


def _batches(rows: Rows) -> Iterator[Sequence[npt.NDArray[np.int64]]]:
    for length, group in itertools.groupby(rows, key=len):
        same = list(group)
        step = max(1, _TOKENS_AT_ONCE // max(1, length))
        for start in range(0, len(same), step):
            yield same[start : start + step]


def _with_extremes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Add outputs extreme:highest:T and extreme:lowest:T, scalars, of every tensor T that may grow large."""
    import onnx
    from onnx import TensorProto, helper

    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {info.name: info.type.tensor_type.elem_type for info in (*inferred.value_info, *inferred.output)}
    graph = model.graph
    for node in list(graph.node):
        tensor = node.output[0]
        if node.op_type not in _GROWING or types.get(tensor) != TensorProto.FLOAT:
            continue
        for op, kind in (("ReduceMax", "highest"), ("ReduceMin", "lowest")):
            name = f"{_EXTREME}{kind}:{tensor.removesuffix('.output')}"
            graph.node.append(helper.make_node(op, [tensor], [name], name=name, keepdims=0))
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
    return model
