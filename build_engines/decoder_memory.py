"""How many bytes of the card one LLM engine takes: the arithmetic, and where each constant was measured.

As for encoders (build_engines.memory), weights follow from the graph, and what TensorRT-RTX 1.7 adds was
fitted to what it reports: "Total Activation Memory" of both profiles and engine sizes of graphs with 1 to 8
layers, hidden 256 to 4096, FFN 256 to 14336, 14 to 32 heads over 2 to 32 of key and value, prefill chunks of
16 to 2048 tokens, 1 to 64 slots of 256 to 16384 tokens. docs/plan.md has the table.
"""

from __future__ import annotations

from typing import Final

from build_engines.memory import HALF, EngineMemory
from build_engines.profiles import LOGIT_ROWS, DecoderProfile, decoder_profile
from build_engines.stack import MAX_CAPACITY, DecoderShape, Model, Precision

# Kernels and plan data that the engine file carries beside the weights: a constant, and per layer.
_CODE: Final[dict[str, tuple[int, int]]] = {
    "fp16": (2_400_000, 685_000),
    "int8-weights": (2_000_000, 1_280_000),
}
# Matrix kernels keep a workspace while few tokens are in flight, whatever the width.
_WORKSPACE: Final = 10 << 20
# TensorRT-LLM. Bytes of a stored weight: 4 bits beside an FP8 scale for 16 (NVFP4) or an FP16 one for 128.
_STORED: Final = {"fp16": 2.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16, "int4-awq": 0.5 + HALF / 128}
# Tokens of a page of its cache.
_PAGE: Final = 32
# PyTorch's allocator, workspaces of matrix products and attention, CUDA graphs: assumed, never measured.
_LIBRARY: Final = 1 << 30


def decoder_engine_memory(
    model: Model, shape: DecoderShape, precision: Precision, context: int
) -> EngineMemory:
    """The engine of `model` in `precision` with its caches. Its slots and length must be settled."""
    profile = decoder_profile(model)
    constant, per_layer = _CODE[precision]
    return EngineMemory(
        tensors=decoder_tensor_bytes(shape, model, precision),
        code=constant + per_layer * shape.layers,
        activations=decoder_activation_bytes(shape, precision, profile),
        buffers=_buffer_bytes(shape, profile),
        cache=profile.slots * profile.capacity * cache_bytes_per_token(shape),
        context=context,
    )


def llm_memory(model: Model, shape: DecoderShape, precision: Precision, context: int) -> EngineMemory:
    """`model` served by TensorRT-LLM from the checkpoint itself. Its slots and length must be settled.

    A step computes a chunk of prompts and one token of every slot together.
    """
    profile = decoder_profile(model)
    tokens = profile.chunk + profile.slots
    return EngineMemory(
        tensors=shape.stored_bytes or _llm_tensor_bytes(shape, precision),
        code=_LIBRARY,
        activations=tokens * (6 * shape.ffn + 8 * shape.hidden),
        buffers=2 * 4 * profile.slots * shape.vocabulary,
        cache=llm_cache_tokens(profile) * cache_bytes_per_token(shape),
        context=context,
    )


def llm_cache_tokens(profile: DecoderProfile) -> int:
    """Tokens of a cache in which all slots can be full: whole pages, and one that pads CUDA graphs."""
    return (profile.slots * -(-profile.capacity // _PAGE) + 1) * _PAGE


def _llm_tensor_bytes(shape: DecoderShape, precision: Precision) -> int:
    """The layers' matrices as they are stored; embedding, head (one table if tied) and vectors in 16 bits."""
    matrices = sum(rows * columns for rows, columns in _layer_matrices(shape))
    tables = (1 if shape.tied else 2) * shape.vocabulary * shape.hidden
    vectors = shape.layers * _layer_vectors(shape) + shape.hidden
    return int(shape.layers * matrices * _STORED[precision]) + HALF * (tables + vectors)


def cache_bytes_per_token(shape: DecoderShape) -> int:
    """Keys and values of one token in every layer, in FP16 unless the checkpoint says FP8."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.cache_bytes


def decoder_tensor_bytes(shape: DecoderShape, model: Model, precision: Precision) -> int:
    """Weights as stored: 1 byte each and an FP16 scale per output channel in `int8-weights`, else 2 bytes.

    Embedding and head are two tables even where the checkpoint ties them: one is read by rows, the other
    multiplied by, transposed. Norms, biases and rotary tables stay FP16.
    """
    quantized = precision == "int8-weights"
    matrices = sum(rows * columns for rows, columns in _layer_matrices(shape))
    outputs = sum(columns for _, columns in _layer_matrices(shape))
    layer = matrices + HALF * outputs if quantized else HALF * matrices
    table = shape.vocabulary * shape.hidden
    embedding, head = (
        table + HALF * shape.vocabulary if quantized and stored == "int8" else HALF * table
        for stored in (model.embedding, model.head)
    )
    return shape.layers * (layer + HALF * _layer_vectors(shape)) + embedding + head + _rest(shape)


def _layer_matrices(shape: DecoderShape) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of q/k/v side by side, attention's output, gate and up side by side, down."""
    attention = shape.heads * shape.head_dim
    return (
        (shape.hidden, attention + 2 * shape.kv_heads * shape.head_dim),
        (attention, shape.hidden),
        (shape.hidden, 2 * shape.ffn),
        (shape.ffn, shape.hidden),
    )


def _layer_vectors(shape: DecoderShape) -> int:
    norms = (4 if shape.family.startswith("gemma") else 2) * shape.hidden
    head_norms = 2 * shape.head_dim if shape.family in {"qwen3", "exaone4", "gemma3_text"} else 0
    biases = (shape.heads + 2 * shape.kv_heads) * shape.head_dim if shape.qkv_bias else 0
    return norms + head_norms + biases


def _rest(shape: DecoderShape) -> int:
    """The last norm and the rotary tables, cosines and sines half a head wide; Gemma 3 has two pairs."""
    tables = 2 if shape.family == "gemma3_text" else 1
    rows = min(shape.positions, MAX_CAPACITY)
    return HALF * (shape.hidden + tables * 2 * rows * (shape.head_dim // 2))


def decoder_activation_bytes(shape: DecoderShape, precision: Precision, profile: DecoderProfile) -> int:
    """Scratch memory of an execution context that runs both profiles, one after the other: the larger.

    Decoding needs little beside the matrix kernels' workspace. In a prefill step (planned for the two rows
    that its profile allows) the largest of four moments decides: attention, whose kernel wants keys and
    values repeated for every query head over the whole slot; the time before it, when one of them is and the
    workspace is still held; the FFN; and the logits.
    """
    quantized = precision == "int8-weights"
    width = shape.heads * shape.head_dim
    ffn = 6 * shape.ffn + (10 if quantized else 8) * shape.hidden
    # Boolean mask and its copy, and the logits.
    decode = profile.slots * (ffn + 2 * profile.capacity + HALF * shape.vocabulary) + _WORKSPACE
    tokens = 2 * profile.chunk
    repeated = 8 * profile.capacity * width
    mask = 2 * profile.capacity
    attention = repeated + tokens * (mask + 6 * width + (8 if quantized else 6) * shape.hidden)
    before = repeated // 2 + tokens * (mask + 4 * width + 2 * shape.ffn)
    logits = 2 * LOGIT_ROWS * HALF * shape.vocabulary + 10 * tokens * shape.hidden
    prefill = max(attention, before + _WORKSPACE, tokens * ffn + _WORKSPACE, logits + _WORKSPACE)
    return max(decode, prefill) + 2 * HALF * shape.vocabulary + (1 << 20)


def _buffer_bytes(shape: DecoderShape, profile: DecoderProfile) -> int:
    """Int64 ids, lengths and positions of either step, FP32 logits, a row to swap through."""
    rows = max(2, profile.slots)
    spare = HALF * shape.kv_heads * profile.capacity * shape.head_dim
    logits = 4 * max(rows, LOGIT_ROWS) * shape.vocabulary
    return 8 * (max(rows, 2 * profile.chunk) + 2 * max(rows, LOGIT_ROWS)) + logits + spare
