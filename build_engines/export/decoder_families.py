"""What each causal LM family calls its tensors and settings, and where its layers differ from Llama's.

Sources: transformers' modeling_ and configuration_{llama,mistral,qwen2,qwen3,exaone4,gemma2,gemma3}.py, and
modeling_exaone.py and configuration_exaone.py of LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct. `{i}` stands for the
layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Checkpoint names of modules; those in the lower half are relative to `layer`."""

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{i}."
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    # The graph's norm -> the checkpoint's.
    norms: Mapping[str, str]


# Setting -> (config.json key, default); the defaults are those of the family's own configuration class.
Keys = Mapping[str, tuple[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`norms` of `names` also say which norms a layer has; `offset` is added to every norm's weight."""

    model_type: str
    names: TensorNames
    keys: Keys
    qkv_bias: bool | None = None  # None: as attention_bias says
    output_bias: bool | None = None
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    # Whether layers may see a window only; sliding_window means nothing to the others.
    slides: bool = False
    # Global layers have no rotary positions where others are local (EXAONE 4).
    global_without_rotary: bool = False


_LLAMA_NORMS = {"attention.norm": "input_layernorm", "ffn.norm": "post_attention_layernorm"}
_QK_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "attention.norm": "input_layernorm",
    "attention.post_norm": "post_attention_layernorm",
    "ffn.norm": "pre_feedforward_layernorm",
    "ffn.post_norm": "post_feedforward_layernorm",
}
_KEYS: dict[str, tuple[str, Any]] = {
    "hidden": ("hidden_size", None),
    "layers": ("num_hidden_layers", None),
    "heads": ("num_attention_heads", None),
    "kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "ffn": ("intermediate_size", None),
    "vocabulary": ("vocab_size", None),
    "positions": ("max_position_embeddings", 2048),
    "activation": ("hidden_act", "silu"),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
    "bos_id": ("bos_token_id", None),
    "eos_ids": ("eos_token_id", None),
    "pad_id": ("pad_token_id", None),
}
_GEMMA_KEYS = _KEYS | {
    "head_dim": ("head_dim", 256),
    "activation": ("hidden_activation", "gelu_pytorch_tanh"),
    "tied": ("tie_word_embeddings", True),
    "bos_id": ("bos_token_id", 2),
    "eos_ids": ("eos_token_id", 1),
    "pad_id": ("pad_token_id", 0),
}
_BOS_EOS: dict[str, tuple[str, Any]] = {"bos_id": ("bos_token_id", 1), "eos_ids": ("eos_token_id", 2)}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        names=TensorNames(norms=_LLAMA_NORMS),
        keys=_KEYS | _BOS_EOS,
    ),
    "mistral": Family(
        model_type="mistral",
        names=TensorNames(norms=_LLAMA_NORMS),
        keys=_KEYS | _BOS_EOS | {"positions": ("max_position_embeddings", 131_072)},
        qkv_bias=False,
        output_bias=False,
        slides=True,
    ),
    "qwen2": Family(
        model_type="qwen2",
        names=TensorNames(norms=_LLAMA_NORMS),
        keys=_KEYS | {"positions": ("max_position_embeddings", 32_768)},
        qkv_bias=True,
        output_bias=False,
        slides=True,
    ),
    "qwen3": Family(
        model_type="qwen3",
        names=TensorNames(norms=_LLAMA_NORMS | _QK_NORMS),
        keys=_KEYS
        | {
            "head_dim": ("head_dim", 128),
            "positions": ("max_position_embeddings", 32_768),
        },
        slides=True,
    ),
    "exaone": Family(
        model_type="exaone",
        names=TensorNames(
            embedding="transformer.wte",
            norm="transformer.ln_f",
            layer="transformer.h.{i}.",
            qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
            output="attn.attention.out_proj",
            gate_up=("mlp.c_fc_0", "mlp.c_fc_1"),
            down="mlp.c_proj",
            norms={"attention.norm": "ln_1", "ffn.norm": "ln_2"},
        ),
        keys=_KEYS
        | {
            "layers": ("num_layers", None),
            "activation": ("activation_function", "silu"),
            "norm_epsilon": ("layer_norm_epsilon", 1e-5),
            "tied": ("tie_word_embeddings", True),
            "bos_id": ("bos_token_id", 0),
            "eos_ids": ("eos_token_id", 2),
        },
        qkv_bias=False,
        output_bias=False,
    ),
    "exaone4": Family(
        model_type="exaone4",
        names=TensorNames(
            norms=_QK_NORMS
            | {
                "attention.post_norm": "post_attention_layernorm",
                "ffn.post_norm": "post_feedforward_layernorm",
            }
        ),
        keys=_KEYS
        | {
            "norm_epsilon": ("rms_norm_eps", 1e-5),
            "bos_id": ("bos_token_id", 0),
            "eos_ids": ("eos_token_id", 2),
        },
        qkv_bias=False,
        output_bias=False,
        slides=True,
        global_without_rotary=True,
    ),
    "gemma2": Family(
        model_type="gemma2",
        names=TensorNames(norms=_GEMMA_NORMS),
        keys=_GEMMA_KEYS | {"positions": ("max_position_embeddings", 8192)},
        norm_offset=1.0,
        scaled_embedding=True,
        slides=True,
    ),
    "gemma3_text": Family(
        model_type="gemma3_text",
        names=TensorNames(norms=_GEMMA_NORMS | _QK_NORMS),
        keys=_GEMMA_KEYS | {"positions": ("max_position_embeddings", 131_072)},
        norm_offset=1.0,
        scaled_embedding=True,
        slides=True,
    ),
}
