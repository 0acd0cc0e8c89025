"""From the last hidden state to the task's outputs: pooling, classifier head, sentence modules, scores.

Nodes named `pooling.*` and `output.*` stay in float32 in FP16 graphs: they count tokens or square values.
"""

from __future__ import annotations

import numpy as np

from build_engines.errors import ExportError
from build_engines.export.blocks import FLOAT, Scope
from build_engines.export.checkpoint import well_formed
from build_engines.export.graph import Weight
from build_engines.export.sentence import Dense, Sentence


def write_classifier(scope: Scope, hidden: str) -> list[str]:
    """logits, probabilities [batch, labels]; returns the label names.

    Raises:
        ExportError: a regression model, or labels that do not match the weights.
    """
    config, folder = scope.checkpoint.config, scope.checkpoint.folder
    count = _logits(scope, hidden)
    problem = config.get("problem_type")
    if problem == "regression" or (count == 1 and problem != "multi_label_classification"):
        raise ExportError(
            f"{folder}: {count} output(s) with problem_type {problem!r} predict numbers, not classes",
            next_step='use task = "rerank" if it scores pairs of texts, or choose a classifier',
        )
    labels = label_names(scope, count)
    if problem == "multi_label_classification":
        scope.graph.node("Sigmoid", ["logits"], "output.probabilities", "probabilities")
    else:
        scope.graph.node("Softmax", ["logits"], "output.probabilities", "probabilities", axis=-1)
    scope.graph.output("logits", ["batch", count])
    scope.graph.output("probabilities", ["batch", count])
    return labels


def write_reranker(scope: Scope, hidden: str) -> None:
    """scores [batch] in 0..1 and logits [batch, 1 or 2]: sigmoid of one logit, or the second of two classes.

    Raises:
        ExportError: more than two outputs.
    """
    graph, count = scope.graph, _logits(scope, hidden)
    if count > 2:
        raise ExportError(
            f"{scope.checkpoint.folder}: a reranker has one or two outputs, this head has {count}",
            next_step='use task = "classify", or choose a cross-encoder',
        )
    # Softmax works along the last axis unless told otherwise.
    scores = graph.node("Sigmoid" if count == 1 else "Softmax", ["logits"], "output.relevance")
    last = graph.constant("output.last", np.array(count - 1, np.int64))
    graph.node("Gather", [scores, last], "output.scores", "scores", axis=1)
    graph.output("scores", ["batch"])
    graph.output("logits", ["batch", count])


def write_embedding(scope: Scope, hidden: str, sentence: Sentence) -> int:
    """embeddings [batch, dimension] through pooling and sentence modules; returns the dimension."""
    graph, size = scope.graph, scope.encoder.hidden
    x = _pool(scope, hidden, sentence.pooling)
    for number, module in enumerate(sentence.modules):
        if isinstance(module, Dense):
            x, size = _dense(
                scope, x, size, module, "head.dense" if not number else f"head.dense{number + 1}"
            )
        else:
            x = _normalize(scope, x, f"output.normalize{number + 1}", None)
    if sentence.normalize:
        _normalize(scope, x, "output.normalize", "embeddings")
    else:
        graph.node("Identity", [x], "output.embeddings", "embeddings")
    graph.output("embeddings", ["batch", size])
    return size


def label_names(scope: Scope, count: int) -> list[str]:
    """id2label in order of id; LABEL_0... where config.json has none, as transformers does."""
    table = scope.checkpoint.config.get("id2label")
    if not isinstance(table, dict) or not table:
        return [f"LABEL_{index}" for index in range(count)]
    try:
        by_id = {int(key): str(value) for key, value in table.items()}
    except ValueError as error:
        raise ExportError(
            f"{scope.checkpoint.folder}: id2label has a key that is no number: {error}"
        ) from error
    if sorted(by_id) != list(range(count)):
        raise ExportError(
            f"{scope.checkpoint.folder}: id2label names {len(by_id)} labels, the head has {count} outputs",
            cause="config.json and the weights belong to different models",
        )
    if len(set(by_id.values())) != count:
        raise ExportError(
            f"{scope.checkpoint.folder}: id2label uses a label twice: {', '.join(by_id.values())}"
        )
    return [by_id[index] for index in range(count)]


def _logits(scope: Scope, hidden: str) -> int:
    """Write the family's classification head up to the tensor "logits"; return its number of outputs."""
    encoder, checkpoint = scope.encoder, scope.checkpoint
    with well_formed(checkpoint.folder / "config.json"):
        architectures = list(checkpoint.config.get("architectures") or [])
    if architectures and not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        raise ExportError(
            f"{checkpoint.folder}: {', '.join(map(str, architectures))} has no sequence classification head",
            cause="the checkpoint was trained for another task",
            next_step='use task = "embed", or a checkpoint saved as ...ForSequenceClassification',
        )
    head, size = encoder.family.head, encoder.hidden
    pooled = _pool(scope, hidden, encoder.head_pooling)
    dense = encoder.tensor(head.dense) if head.in_model else head.dense
    x = scope.linear(head.dense_node, pooled, (dense,), (size, size), encoder.head_bias)
    x = scope.activation(f"{head.dense_node}.act", x, encoder.head_activation)
    if head.norm:
        x = scope.norm("head.norm", x, head.norm, size)
    shape = checkpoint.shape(f"{head.output}.weight")
    weight = scope.matrix((f"{head.output}.weight",), size, shape[0])
    scope.graph.linear("head.output", x, weight, scope.vector(f"{head.output}.bias", shape[0]), "logits")
    return shape[0]


def _pool(scope: Scope, hidden: str, pooling: str) -> str:
    """[batch, sequence, hidden] -> [batch, hidden]."""
    graph = scope.graph
    from onnx import TensorProto

    if pooling == "cls":
        first = graph.constant("first_token.index", np.array(0, np.int64))
        return graph.node("Gather", [hidden, first], "first_token", axis=1)
    mask = graph.node("Cast", ["attention_mask"], "pooling.mask", to=TensorProto.FLOAT)
    axis = graph.constant("pooling.axis", np.array([1], np.int64))
    count = graph.node("ReduceSum", [mask, axis], "pooling.count", keepdims=1)
    share = graph.node("Div", [mask, count], "pooling.share")
    # Shares first: the sum is then a [1, S] x [S, H] product that never exceeds a token, so FP16 holds it
    # (TensorRT-RTX has no FP32 product for compute capability 7.5).
    rows = graph.node("Unsqueeze", [share, axis], "token_share")
    mean = graph.node("MatMul", [rows, hidden], "token_mean")
    return graph.node("Squeeze", [mean, axis], "token_mean.row")


def _dense(scope: Scope, x: str, size: int, module: Dense, node: str) -> tuple[str, int]:
    """sentence-transformers' Dense: Linear and activation."""
    weights = module.weights
    shape = (size, module.out_features)
    weights.claim("linear.weight", shape[::-1])
    weight = Weight(shape, FLOAT, lambda: weights.read("linear.weight").T)
    bias = None
    if module.bias:
        weights.claim("linear.bias", shape[1:])
        bias = Weight(shape[1:], FLOAT, lambda: weights.read("linear.bias"))
    x = scope.graph.linear(node, x, weight, bias)
    if module.activation:
        x = scope.activation(f"{node}.act", x, module.activation)
    return x, module.out_features


def _normalize(scope: Scope, x: str, node: str, output: str | None) -> str:
    """x / max(|x|, 1e-12), as torch.nn.functional.normalize."""
    graph = scope.graph
    axis = graph.constant("output.axis", np.array([1], np.int64))
    norm = graph.node("ReduceL2", [x, axis], f"{node}.length", keepdims=1)
    floor = graph.constant("output.floor", np.array(1e-12, np.float32))
    return graph.node("Div", [x, graph.node("Max", [norm, floor], f"{node}.safe")], node, output)
