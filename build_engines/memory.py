"""How many bytes of the card one engine takes: the arithmetic, and where each constant was measured.

Weights follow from the graph: which tensors it holds and how wide they are stored. Activations, kernels and
plan data are what TensorRT-RTX 1.7 decides; the coefficients below were fitted to the "Total Activation
Memory" and the engine sizes that it reports for encoders of 2 to 24 layers, hidden 384 to 1024, FFN 1 to 8
times as wide, 1 x 64 to 256 x 512 tokens, and they are the same for compute capabilities 7.5 to 12.0.
docs/plan.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from build_engines.stack import Model, ModelShape, Precision, Task

HALF: Final = 2
_SINGLE: Final = 4
_QUANTIZED: Final = ("int8", "int8-weights")
# Kernels and plan data that the engine file carries beside the weights: a constant, and per layer.
_CODE: Final[dict[str, tuple[int, int]]] = {
    "fp16": (2_300_000, 510_000),
    # ONNX Runtime's alone, never measured: counted as FP16's.
    "fp32": (2_300_000, 510_000),
    # Between layers that are all static (220,000 each) and ones of which some got FP16 activations back.
    "int8": (3_800_000, 370_000),
    "int8-weights": (2_500_000, 515_000),
}
_CODE_MODERNBERT: Final[dict[str, tuple[int, int]]] = {
    "fp16": (3_300_000, 220_000),
    "fp32": (3_300_000, 220_000),
    "int8": (3_100_000, 555_000),
    "int8-weights": (3_100_000, 545_000),
}
# Matrix kernels keep a workspace while few tokens are in flight: 10.24 MB, whatever the width.
_WORKSPACE: Final = 10 << 20
_FEW_TOKENS: Final = 512
_SMALL: Final = 64 << 10
_SMALL_QUANTIZED: Final = 12 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Bytes of one instance of one engine. `cache`: keys and values of an LLM's slots."""

    tensors: int
    code: int
    activations: int
    buffers: int
    cache: int = 0
    context: int

    @property
    def weights(self) -> int:
        """What the engine file holds and loading it puts on the card: tensors, kernels and plan data."""
        return self.tensors + self.code

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.buffers + self.cache + self.context

    def promised(self) -> dict[str, int]:
        """The parts by what they are for, as an engine's manifest and the errors of its runner name them."""
        parts = ("weights", "activations", "buffers", "cache", "context")
        return {part: int(getattr(self, part)) for part in parts}


def engine_memory(model: Model, shape: ModelShape, precision: Precision, context: int) -> EngineMemory:
    """One instance of `model` at its largest profile: max_batch texts of max_length tokens."""
    constant, per_layer = (_CODE_MODERNBERT if shape.family == "modernbert" else _CODE)[precision]
    return EngineMemory(
        tensors=tensor_bytes(shape, model.task, precision),
        code=constant + per_layer * shape.layers,
        activations=activation_bytes(shape, precision, model.max_batch, model.max_length),
        buffers=buffer_bytes(model, shape),
        context=context,
    )


def tensor_bytes(shape: ModelShape, task: Task, precision: Precision) -> int:
    """Weights as stored: the layers' matrices at 1 byte with an FP16 scale per output channel, or at 2 bytes.

    Embeddings, norms, biases and the task's head stay FP16 in every precision but FP32, which doubles all.
    """
    if precision == "fp32":
        return 2 * tensor_bytes(shape, task, "fp16")
    quantized = precision in _QUANTIZED
    linear, outputs = _layer_matrices(shape)
    layer = linear + HALF * outputs if quantized else HALF * linear
    # ModernBERT's Linears and norms have no biases.
    vectors = 2 * shape.hidden if shape.family == "modernbert" else outputs + 4 * shape.hidden
    return shape.layers * (layer + HALF * vectors) + HALF * (_embeddings(shape, task) + _head(shape, task))


def _layer_matrices(shape: ModelShape) -> tuple[int, int]:
    """Elements of one layer's four matrices, and the sum of their output channels."""
    up = 2 * shape.ffn if shape.family == "modernbert" else shape.ffn
    h = shape.hidden
    return 3 * h * h + h * h + h * up + shape.ffn * h, 3 * h + h + up + h


def _embeddings(shape: ModelShape, task: Task) -> int:
    """Elements of the tables, their norm, ELECTRA's projection, ModernBERT's rotary tables and last norm."""
    elements = shape.vocabulary * shape.embedding + 2 * shape.embedding
    if shape.family == "modernbert":
        # cos and sin, for the global and for the local layers, half a head wide.
        return elements + 4 * shape.positions * (shape.hidden // shape.heads // 2) + shape.hidden
    # A single text has type 0 everywhere: that row is added to the position table at export.
    types = shape.token_types if task == "rerank" and shape.token_types > 1 else 0
    projection = shape.embedding * shape.hidden + shape.hidden if shape.embedding != shape.hidden else 0
    return elements + (shape.positions + types) * shape.embedding + projection


def _head(shape: ModelShape, task: Task) -> int:
    if task == "embed":
        return 0
    h = shape.hidden
    return h * h + h + h * shape.labels + shape.labels


def activation_bytes(shape: ModelShape, precision: Precision, batch: int, sequence: int) -> int:
    """Scratch memory of one execution context at `batch` x `sequence` tokens (padded).

    The larger of two moments: inside the FFN, where its inner tensors live beside the residual; and inside
    attention, where seven tensors of the hidden size and the kernels' workspace do. The attention masks [B,
    S, S] live through both.
    """
    modern = shape.family == "modernbert"
    hidden = (_SINGLE if precision == "fp32" else HALF) * batch * sequence * shape.hidden
    square = shape.hidden * shape.hidden if precision in _QUANTIZED else 0
    ffn = _ffn_tensors(precision, shape.ffn / shape.hidden, gated=modern)
    # For so few tokens every layer's q/k/v weight is widened to FP16 ahead of its use; else one at a time.
    widened = 6 * square * (shape.layers if batch * sequence <= _FEW_TOKENS else 2)
    peak = max(ffn * hidden + 6 * square, 7 * hidden + _WORKSPACE + widened)
    # Boolean masks, and beside each the copy that its kernel reads; local layers have a mask of their own.
    masks = (4 if modern else 2) * batch * sequence * sequence
    return int(peak) + masks + (_SMALL_QUANTIZED if square else _SMALL)


def _ffn_tensors(precision: Precision, width: float, *, gated: bool) -> float:
    """How many [batch, sequence, hidden] tensors live in the FFN; `width` is ffn/hidden.

    `int8` counts as `int8-weights`, which takes more: the accuracy gate may give any layer its FP16
    activations back, and one such layer is enough for the larger peak.
    """
    if precision in _QUANTIZED:
        return 4.5 + 3.1 * width if gated else max(3 + 2 * width, 6 + width)
    return 4.5 + 3 * width if gated else 4 + width


def buffer_bytes(model: Model, shape: ModelShape) -> int:
    """Inputs (int64 ids, mask and, for pairs, token types) and FP32 outputs at the largest profile."""
    pairs = model.task == "rerank" and shape.token_types > 1
    inputs = 8 * (3 if pairs else 2) * model.max_batch * model.max_length
    width = shape.hidden if model.task == "embed" else 2 * shape.labels
    return inputs + 4 * model.max_batch * width
