"""Tiny models of every encoder family, saved as Hugging Face folders, and inputs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FAMILIES = (
    "bert",
    "roberta",
    "xlm-roberta",
    "electra",
    "electra-small",
    "distilbert",
    "modernbert",
    "modernbert-mean",
)
VOCABULARY = 99


def tiny_config(family: str, labels: int, **extra: Any) -> Any:
    """The true architecture with few and small layers; 200 positions so that 130 tokens fit."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_labels": labels,
        "max_position_embeddings": 200,
        **extra,
    }
    bert = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 56,
        **common,
    }
    if family.startswith("modernbert"):
        pooling = "mean" if family.endswith("mean") else "cls"
        biases = dict.fromkeys(
            ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), pooling == "mean"
        )
        local = {"local_attention": 16, "pad_token_id": 0, "classifier_pooling": pooling}
        return transformers.ModernBertConfig(**{**bert, **biases, **local, "num_hidden_layers": 4})
    if family == "distilbert":
        return transformers.DistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=56, **common)
    kind, settings = {
        "bert": ("Bert", {}),
        "roberta": ("Roberta", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
        "xlm-roberta": ("XLMRoberta", {"type_vocab_size": 1}),
        "electra": ("Electra", {"embedding_size": 32}),
        "electra-small": ("Electra", {"embedding_size": 24, "hidden_act": "relu"}),
    }[family]
    return getattr(transformers, f"{kind}Config")(**{**settings, **bert})


def save_tiny(folder: Path, family: str, task: str, **extra: Any) -> Any:
    """Save a random model and a word tokenizer; weights are spread so that no layer is near the identity."""
    import torch
    import transformers

    torch.manual_seed(0)
    labels = {"classify": 3, "embed": 2, "rerank": 1}[task]
    config = tiny_config(family, labels, **extra)
    auto = transformers.AutoModel if task == "embed" else transformers.AutoModelForSequenceClassification
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    write_word_tokenizer(folder)
    return model


def write_word_tokenizer(folder: Path, words: int = VOCABULARY) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def batch(shape: tuple[int, int], pad_id: int, token_types: bool, seed: int = 0) -> dict[str, Any]:
    """Random ids with right padding of every length down to one token; row 0 is full."""
    rng = np.random.default_rng(seed)
    rows, columns = shape
    lengths = np.maximum(1, columns - np.arange(rows) * columns // 4)
    mask = (np.arange(columns) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(5, VOCABULARY, shape)
    arrays = {"input_ids": np.where(mask == 1, ids, pad_id), "attention_mask": mask}
    if token_types:
        arrays["token_type_ids"] = (np.arange(columns) >= columns // 2).astype(np.int64) * mask
    return arrays


def with_small_scales(model: Any, factor: float = 2.0**-10) -> Any:
    """`model`, quantized or not, changed: its first FFN has small weights, and then small activations.

    The FFN's second Linear makes up for it, so that the answers still depend on both.
    """
    from onnx import numpy_helper

    small = ("up.weight", "up.bias_value", "up.weight.scale", "down.input.scale", "down.input.offset")
    factors = dict.fromkeys(small, factor) | dict.fromkeys(("down.weight", "down.weight.scale"), 1 / factor)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        name = tensor.name.removeprefix("layers.0.ffn.")
        if name in factors and values.dtype == np.float32:
            changed = np.asarray(values * np.float32(factors[name]), np.float32)
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    return model


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
