"""export_encoder: a checkpoint folder becomes one FP32 ONNX graph with the task's answer as its output.

What the other stages may rely on (opset 23, symbolic dimensions "batch" and "sequence"):

Inputs: `input_ids`, `attention_mask` int64 [batch, sequence], right padded; `token_type_ids` only for
rerank with more than one token type (otherwise the row of type 0 is added to the position table).

Outputs, float32: classify `logits`, `probabilities` [batch, labels]; embed `embeddings` [batch, dimension];
rerank `scores` [batch] and `logits` [batch, 1 or 2].

Nodes and initializers; a node's result is `<node>.output` unless said otherwise:

Linear N
    MatMul node `N` with initializer `N.weight` [K, N] and result `N.matmul`; Add node `N.bias` with
    initializer `N.bias_value` and result `N.output` (for head.output: `logits`). Without a bias the
    MatMul's result is `N.output`. N is one of: layers.{i}.attention.qkv (query, key and value side by side,
    Split node layers.{i}.attention.split), layers.{i}.attention.output, layers.{i}.ffn.up (gated: input and
    gate side by side, Split node layers.{i}.ffn.split), layers.{i}.ffn.down, embeddings.projection
    (Electra), pooler, head.dense, head.dense2... (further sentence-transformers Dense modules),
    head.output. No other MatMul has a weight.
Norm N
    LayerNormalization node `N`, initializers `N.weight` and, with a bias, `N.bias_value`: embeddings.norm,
    layers.{i}.attention.norm, layers.{i}.ffn.norm, encoder.norm, head.norm. In BERT's layers a norm follows
    the residual Add (layers.{i}.attention.residual, layers.{i}.ffn.residual); in ModernBERT's it precedes
    the Linear it feeds, and layer 0 has no attention norm.
Activation
    Gelu (or Relu, Tanh, Sigmoid + Mul) node layers.{i}.ffn.act; gated: Mul node layers.{i}.ffn.gated.
Attention
    Attention node layers.{i}.attention.core on [batch, sequence, hidden] query, key and value, head counts
    as attributes, and a boolean mask [B, 1, S, S], True where a key is seen: mask.global.output or, in
    local layers, mask.local.output. Rotary layers: RotaryEmbedding nodes layers.{i}.attention.query.rotary
    and .key.rotary.
Embeddings
    Gather embeddings.word with `embeddings.word.weight`, Slice embeddings.position with
    `embeddings.position.weight`, Gather embeddings.token_type.
Tail
    token_mean (a MatMul of two activations) or first_token; pooling.* and output.* nodes, which to_fp16
    leaves in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_engines.errors import ExportError
from build_engines.export.architecture import Encoder, harmless_tensors, read_encoder
from build_engines.export.blocks import Scope, write_encoder
from build_engines.export.checkpoint import Checkpoint, open_checkpoint, well_formed
from build_engines.export.graph import GraphBuilder
from build_engines.export.heads import write_classifier, write_embedding, write_reranker
from build_engines.export.sentence import Sentence, encoder_folder, read_sentence
from build_engines.export.tokenizer import write_tokenizer
from build_engines.graphs import EXTERNAL_THRESHOLD

TASKS = ("classify", "embed", "rerank")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedGraph:
    """Where the graph is, and what a server must know to use it.

    `serving` holds task, inputs, outputs, labels (None unless classify), multi_label, dimension (None unless
    embed), pad_id and max_positions.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    serving: dict[str, Any]


def export_encoder(
    source: Path,
    task: str,
    out: Path,
    *,
    pooling: str | None = None,
    normalize: bool = True,
    external_threshold: int = EXTERNAL_THRESHOLD,
) -> ExportedGraph:
    """Write `out`/model.onnx (FP32) and `out`/tokenizer.json for the checkpoint in `source`.

    Args:
        task: classify, embed or rerank.
        pooling: mean or cls, for embed; None takes the folder's own setting, or mean where it has none.
        normalize: whether embeddings get unit length.
        external_threshold: bytes of weights above which they go to model.onnx.data.

    Raises:
        ExportError: anything the graph would not reproduce exactly, by name, with what is supported.
    """
    if task not in TASKS:
        raise ExportError(f"task {task!r} is not an encoder task; those are {', '.join(TASKS)}")
    folder = encoder_folder(source)
    checkpoint = open_checkpoint(folder)
    with well_formed(folder / "config.json"):
        encoder = read_encoder(checkpoint)
    scope = Scope(checkpoint, encoder, GraphBuilder(f"{encoder.family.model_type}-{task}"))
    with well_formed(source):
        sentence = read_sentence(source, pooling, normalize) if task == "embed" else None
    labels, dimension = _write_graph(scope, task, sentence)
    _refuse_leftovers(checkpoint, encoder, task)
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, out, encoder.vocabulary)
    path = out / "model.onnx"
    scope.graph.write(path, external_threshold=external_threshold)
    inputs = tuple(value.name for value in scope.graph.inputs)
    outputs = tuple(value.name for value in scope.graph.outputs)
    serving: dict[str, Any] = {
        "task": task,
        "inputs": list(inputs),
        "outputs": list(outputs),
        "labels": labels,
        "multi_label": task == "classify"
        and checkpoint.config.get("problem_type") == "multi_label_classification",
        "dimension": dimension,
        "pad_id": encoder.pad_id,
        "max_positions": encoder.max_positions,
    }
    return ExportedGraph(path=path, inputs=inputs, outputs=outputs, serving=serving)


def _write_graph(scope: Scope, task: str, sentence: Sentence | None) -> tuple[list[str] | None, int | None]:
    """The encoder and the task's head; a classifier's labels and an embedder's dimension."""
    encoder = scope.encoder
    with_token_types = task == "rerank" and encoder.token_types > 1
    read = sentence.pooling if sentence else encoder.head_pooling
    hidden = write_encoder(scope, with_token_types=with_token_types, first_token_only=read == "cls")
    if task == "classify":
        return write_classifier(scope, hidden), None
    if sentence:
        return None, write_embedding(scope, hidden, sentence)
    write_reranker(scope, hidden)
    return None, None


def _refuse_leftovers(checkpoint: Checkpoint, encoder: Encoder, task: str) -> None:
    """A tensor that no node reads means that the graph is not this model."""
    left = checkpoint.unused(harmless_tensors(encoder, task))
    if left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        raise ExportError(
            f"{checkpoint.folder}: the graph would leave out the tensors {shown}",
            cause=f"config.json describes another model ({encoder.layers} layers of "
            f"{encoder.family.model_type}), or the architecture was changed",
            next_step="use a folder whose config.json was saved together with its weights",
        )
