"""Which Linear of a decoder suffers most from INT8: each is quantized alone, and the predictions compared.

All variants of the model go through the layers together, a batch of hidden states each, so that the weights
are read once however many there are; only one layer's are in memory, as in the pass that quantizes. A variant
leaves the exact stream at its own layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from build_engines.decoder_stream import Lane, Stream, Weights
from build_engines.export.decoder_config import LAYER_LINEARS
from build_engines.perplexity import Rows
from build_engines.quantize.clipping import dequantize_into
from build_engines.quantize.codes import CodeStore

if TYPE_CHECKING:
    from build_engines.export.decoder_weights import Decoder

FloatArray = npt.NDArray[np.float32]
Logs = npt.NDArray[np.float64]

# Parameters x tokens x variants: the order of the Linears needs few tokens, each computed once per Linear.
# This is six minutes on two cores for a model of 10 B parameters, which has 193 Linears.
_WORK = 6e13
_LEAST_TOKENS, _MOST_TOKENS = 32, 256
_LONGEST = 32
_TOGETHER = 512
# Stands for a divergence that is not finite: those Linears go first, and JSON has no infinity.
_OVERFLOW = 1e9


def measure_sensitivity(
    decoder: Decoder,
    rows: Rows,
    store: CodeStore,
    names: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> dict[str, float]:
    """Of each Linear in `names` (and "embedding"), whose codes `store` holds: the mean Kullback-Leibler
    divergence, in nats, of the predictions with it alone in INT8 from those in FP32, on some of `rows`."""
    return _Variants(decoder, store, _some(rows, decoder, len(names))).measure(names, progress)


def _some(rows: Rows, decoder: Decoder, variants: int) -> list[npt.NDArray[np.int64]]:
    """Rows of equal length, few enough for the model's size."""
    architecture = decoder.architecture
    size = sum(np.prod(architecture.linear_shape(name)) for name in decoder.linears())
    tokens = int(np.clip(_WORK / (float(size) * variants), _LEAST_TOKENS, _MOST_TOKENS))
    longest = max(len(row) for row in rows)
    length = min(_LONGEST, longest)
    return [row[:length] for row in rows if len(row) >= length][: max(1, tokens // length)]


@dataclass(slots=True)
class _Variants:
    """The exact states and those of every variant so far, all of shape [rows, tokens, hidden]."""

    decoder: Decoder
    store: CodeStore
    rows: list[npt.NDArray[np.int64]]
    states: dict[str, FloatArray] = field(default_factory=dict)

    def measure(self, names: Sequence[str], progress: Callable[[str, int, int], None]) -> dict[str, float]:
        stream, layers = Stream(self.decoder), self.decoder.architecture.layers
        ids = np.stack(self.rows)
        exact = np.asarray(self.decoder.embed(ids), dtype=np.float32)
        if "embedding" in names:
            codes, scale = self.store.read("embedding")
            factor = np.float32(self.decoder.architecture.embedding_scale)
            self.states["embedding"] = np.asarray(codes[ids] * scale[ids][..., None] * factor, np.float32)
        for layer in range(layers):
            progress("sensitivity", layer, layers)
            weights = stream.weights(layer)
            before, self.states = self.states, {}
            moved = self._run(stream, layer, weights, list(before.values()))
            self.states.update(zip(before, moved, strict=True))
            for part in LAYER_LINEARS:
                name = f"layers.{layer}.{part}"
                if name in names:
                    self.states[name] = self._alone(stream, layer, weights, part, exact)
            (exact,) = self._run(stream, layer, weights, [exact])
        found = self._divergences(stream, exact, quantized_head="head" in names)
        progress("sensitivity", layers, layers)
        return {name: value if np.isfinite(value) else _OVERFLOW for name, value in found.items()}

    def _run(
        self, stream: Stream, layer: int, weights: Weights, states: Sequence[FloatArray]
    ) -> list[FloatArray]:
        """Several states through one layer, as many at a time as keep its memory small."""
        step = max(1, _TOGETHER // max(1, len(self.rows) * len(self.rows[0])))
        found: list[FloatArray] = []
        for start in range(0, len(states), step):
            group = states[start : start + step]
            lane = Lane([], [np.concatenate(group)])
            stream.advance(lane, layer, weights)
            found += np.split(lane.hidden[0], len(group))
        return found

    def _alone(
        self, stream: Stream, layer: int, weights: Weights, part: str, exact: FloatArray
    ) -> FloatArray:
        """The exact states through the layer with one Linear in INT8."""
        key = f"{part}.weight"
        quantized = np.empty_like(weights[key])
        dequantize_into(quantized, *self.store.read(f"layers.{layer}.{part}"))
        (found,) = self._run(stream, layer, {**weights, key: quantized}, [exact])
        return found

    def _divergences(self, stream: Stream, exact: FloatArray, *, quantized_head: bool) -> dict[str, float]:
        """The head's columns come in parts, so sums over the vocabulary are gathered part by part."""
        states = stream.last_norm(exact).reshape(-1, exact.shape[-1])
        logits = [stream.logits(states, weight) for _, weight in stream.head_parts()]
        shares = _log_softmax(np.concatenate(logits, axis=1))
        normed = {name: stream.last_norm(state).reshape(states.shape) for name, state in self.states.items()}
        sums = {name: _Sums(len(states)) for name in (*normed, *(["head"] if quantized_head else []))}
        for part, weight in stream.head_parts():
            share = shares[:, part]
            for name, state in normed.items():
                sums[name].add(share, stream.logits(state, weight))
            if quantized_head:
                codes, scale = self.store.read("head")
                dequantize_into(weight, codes[:, part], scale[part])
                sums["head"].add(share, stream.logits(states, weight))
        entropy = (np.exp(shares) * shares).sum(axis=1)
        return {name: float((entropy - found.cross()).mean()) for name, found in sums.items()}


class _Sums:
    """Of one variant: the expected logit under the exact distribution, and the logarithm of its own total."""

    def __init__(self, tokens: int) -> None:
        self._expected: Logs = np.zeros(tokens)
        self._total: Logs = np.full(tokens, -np.inf)

    def add(self, shares: Logs, logits: FloatArray) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            self._expected += (np.exp(shares) * logits).sum(axis=1)
            top = logits.max(axis=1).astype(np.float64)
            part = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            self._total = np.logaddexp(self._total, part)

    def cross(self) -> Logs:
        """The expected log-probability that the variant gives, per token."""
        return self._expected - self._total


def _log_softmax(logits: FloatArray) -> Logs:
    shifted: Logs = logits - logits.max(axis=1, keepdims=True).astype(np.float64)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
