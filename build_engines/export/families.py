"""What each encoder family calls its tensors and settings.

Sources: transformers' modeling_ and
configuration_{bert,roberta,xlm_roberta,electra,distilbert,modernbert}.py. `{i}` stands for the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Checkpoint names, without the model's prefix. A tuple under `qkv` is fused at export."""

    word: str
    position: str | None
    token_type: str | None
    embedding_norm: str
    qkv: tuple[str, ...]
    attention_output: str
    attention_norm: str
    up: str
    down: str
    ffn_norm: str
    final_norm: str | None = None
    projection: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The tail of ...ForSequenceClassification: pooled row -> dense -> activation (-> norm) -> output.

    Names are absolute; `dense` is under the model's prefix when `in_model`. The activation
    "classifier_activation" is the one that config.json states under that key.
    """

    dense: str
    dense_node: Literal["pooler", "head.dense"]
    activation: str
    output: str
    in_model: bool = False
    norm: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    model_type: str
    names: TensorNames
    head: Head
    keys: Mapping[str, tuple[str, Any]]
    # Tensors of other heads: nothing the chosen task computes depends on them.
    harmless: tuple[str, ...] = ()


_BERT_NAMES = TensorNames(
    word="embeddings.word_embeddings",
    position="embeddings.position_embeddings",
    token_type="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    qkv=tuple(f"encoder.layer.{{i}}.attention.self.{part}" for part in ("query", "key", "value")),
    attention_output="encoder.layer.{i}.attention.output.dense",
    attention_norm="encoder.layer.{i}.attention.output.LayerNorm",
    up="encoder.layer.{i}.intermediate.dense",
    down="encoder.layer.{i}.output.dense",
    ffn_norm="encoder.layer.{i}.output.LayerNorm",
)
_ELECTRA_NAMES = TensorNames(
    **{name: getattr(_BERT_NAMES, name) for name in _BERT_NAMES.__slots__ if name != "projection"},
    projection="embeddings_project",
)
_DISTILBERT_NAMES = TensorNames(
    word="embeddings.word_embeddings",
    position="embeddings.position_embeddings",
    token_type=None,
    embedding_norm="embeddings.LayerNorm",
    qkv=tuple(f"transformer.layer.{{i}}.attention.{part}_lin" for part in ("q", "k", "v")),
    attention_output="transformer.layer.{i}.attention.out_lin",
    attention_norm="transformer.layer.{i}.sa_layer_norm",
    up="transformer.layer.{i}.ffn.lin1",
    down="transformer.layer.{i}.ffn.lin2",
    ffn_norm="transformer.layer.{i}.output_layer_norm",
)
_MODERNBERT_NAMES = TensorNames(
    word="embeddings.tok_embeddings",
    position=None,
    token_type=None,
    embedding_norm="embeddings.norm",
    qkv=("layers.{i}.attn.Wqkv",),
    attention_output="layers.{i}.attn.Wo",
    attention_norm="layers.{i}.attn_norm",
    up="layers.{i}.mlp.Wi",
    down="layers.{i}.mlp.Wo",
    ffn_norm="layers.{i}.mlp_norm",
    final_norm="final_norm",
)
# Field -> (config.json key, default).
_BERT_KEYS: dict[str, tuple[str, Any]] = {
    "hidden": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "ffn": ("intermediate_size", 3072),
    "activation": ("hidden_act", "gelu"),
    "positions": ("max_position_embeddings", 512),
    "token_types": ("type_vocab_size", 2),
    "norm_epsilon": ("layer_norm_eps", 1e-12),
    "pad_id": ("pad_token_id", 0),
}
_DISTILBERT_KEYS: dict[str, tuple[str, Any]] = {
    "hidden": ("dim", 768),
    "layers": ("n_layers", 6),
    "heads": ("n_heads", 12),
    "ffn": ("hidden_dim", 3072),
    "activation": ("activation", "gelu"),
    "positions": ("max_position_embeddings", 512),
    "pad_id": ("pad_token_id", 0),
}
_MODERNBERT_KEYS: dict[str, tuple[str, Any]] = {
    "hidden": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 22),
    "heads": ("num_attention_heads", 12),
    "ffn": ("intermediate_size", 1152),
    "activation": ("hidden_activation", "gelu"),
    "positions": ("max_position_embeddings", 8192),
    "norm_epsilon": ("norm_eps", 1e-5),
    "pad_id": ("pad_token_id", 50283),
}
_DENSE_TANH_HEAD = Head(
    dense="classifier.dense", dense_node="head.dense", activation="tanh", output="classifier.out_proj"
)
_ROBERTA_KEYS = {**_BERT_KEYS, "pad_id": ("pad_token_id", 1)}

FAMILIES: dict[str, Family] = {
    "bert": Family(
        model_type="bert",
        names=_BERT_NAMES,
        head=Head(
            dense="pooler.dense", dense_node="pooler", activation="tanh", output="classifier", in_model=True
        ),
        keys=_BERT_KEYS,
        harmless=(r"^cls\.(predictions|seq_relationship)\.",),
    ),
    "roberta": Family(
        model_type="roberta",
        names=_BERT_NAMES,
        head=_DENSE_TANH_HEAD,
        keys=_ROBERTA_KEYS,
        harmless=(r"^lm_head\.",),
    ),
    "xlm-roberta": Family(
        model_type="xlm-roberta",
        names=_BERT_NAMES,
        head=_DENSE_TANH_HEAD,
        keys=_ROBERTA_KEYS,
        harmless=(r"^lm_head\.",),
    ),
    "electra": Family(
        model_type="electra",
        names=_ELECTRA_NAMES,
        # Electra's classifier uses GELU whatever hidden_act says.
        head=Head(
            dense="classifier.dense", dense_node="head.dense", activation="gelu", output="classifier.out_proj"
        ),
        keys={
            **_BERT_KEYS,
            "hidden": ("hidden_size", 256),
            "heads": ("num_attention_heads", 4),
            "ffn": ("intermediate_size", 1024),
        },
        harmless=(r"^discriminator_predictions\.", r"^generator_(predictions|lm_head)\."),
    ),
    "distilbert": Family(
        model_type="distilbert",
        names=_DISTILBERT_NAMES,
        head=Head(dense="pre_classifier", dense_node="head.dense", activation="relu", output="classifier"),
        keys=_DISTILBERT_KEYS,
        harmless=(r"^vocab_(transform|layer_norm|projector)\.",),
    ),
    "modernbert": Family(
        model_type="modernbert",
        names=_MODERNBERT_NAMES,
        head=Head(
            dense="head.dense",
            dense_node="head.dense",
            activation="classifier_activation",
            output="classifier",
            norm="head.norm",
        ),
        keys=_MODERNBERT_KEYS,
        harmless=(r"^decoder\.",),
    ),
}
