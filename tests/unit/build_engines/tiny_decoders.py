"""Tiny causal LMs of every family as Hugging Face folders, their references, and a runner for graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llama_checkpoint import Llama

VOCABULARY, HIDDEN, FFN, HEADS, KV_HEADS, POSITIONS = 211, 48, 80, 4, 2, 256
Reference = Callable[[Any], Any]  # token ids [n] -> logits [n, vocabulary]

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Name -> (transformers' configuration class, settings).
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases-tied": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "llama3-rope": ("Llama", {"rope_parameters": _LLAMA3}),
    "linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "exaone4": (
        "Exaone4",
        {"num_hidden_layers": 3, "sliding_window": 9, "sliding_window_pattern": 2},
    ),
    "exaone4-global": (
        "Exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3Text", {"num_hidden_layers": 3, "head_dim": 16, "sliding_window": 9}),
}


def save_decoder(folder: Path, name: str) -> Reference:
    """Save a random model of the family in two shards; return transformers' own answer, in FP32."""
    import torch
    import transformers

    if name == "exaone":
        return save_exaone(folder)
    kind, settings = DECODERS[name]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": POSITIONS,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    _spread(model)
    model.save_pretrained(folder, max_shard_size="60KB")

    def reference(ids: Any) -> Any:
        with torch.no_grad():
            return model(torch.tensor(ids)[None]).logits[0].numpy()

    return reference


def _spread(model: Any) -> None:
    """Move every weight, norms and biases too, so that none of them may be left out unnoticed."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def save_exaone(folder: Path) -> Reference:
    """EXAONE 3.5 is not part of transformers: this follows its published modeling_exaone.py."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    size = HIDDEN // HEADS
    shapes = {"transformer.wte.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for layer in range(2):
        base, inner = f"transformer.h.{layer}", f"transformer.h.{layer}.attn.attention"
        shapes |= {f"{inner}.q_proj.weight": (HIDDEN, HIDDEN), f"{inner}.out_proj.weight": (HIDDEN, HIDDEN)}
        shapes |= {f"{inner}.{part}_proj.weight": (KV_HEADS * size, HIDDEN) for part in "kv"}
        shapes |= {f"{base}.mlp.{part}.weight": (FFN, HIDDEN) for part in ("c_fc_0", "c_fc_1")}
        shapes |= {f"{base}.mlp.c_proj.weight": (HIDDEN, FFN)}
    weights = {name: torch.randn(shape) * 0.12 for name, shape in shapes.items()}
    norms = ["transformer.ln_f", *(f"transformer.h.{layer}.ln_{part}" for layer in (0, 1) for part in (1, 2))]
    weights |= {f"{name}.weight": 1 + 0.1 * torch.randn(HIDDEN) for name in norms}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    config = {
        "model_type": "exaone",
        "architectures": ["ExaoneForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": POSITIONS,
        "activation_function": "silu",
        "layer_norm_epsilon": 1e-5,
        "rope_theta": 10_000,
        "rope_scaling": {key: value for key, value in _LLAMA3.items() if key != "rope_theta"},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 3,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return lambda ids: _exaone(weights, ids)


def _exaone(weights: dict[str, Any], ids: Any) -> Any:
    import torch
    import transformers
    from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        rope_parameters=dict(_LLAMA3),
    )

    def norm(name: str, x: Any) -> Any:
        return rms_norm(x, (HIDDEN,), weights[f"{name}.weight"], 1e-5)

    x = weights["transformer.wte.weight"][torch.tensor(ids)][None]
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(len(ids))[None])
    for layer in range(2):
        base = f"transformer.h.{layer}"
        inner, y = f"{base}.attn.attention", norm(f"{base}.ln_1", x)
        q, k, v = (
            linear(y, weights[f"{inner}.{part}_proj.weight"])
            .unflatten(-1, (-1, HIDDEN // HEADS))
            .transpose(1, 2)
            for part in "qkv"
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        core = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + linear(core.transpose(1, 2).flatten(2), weights[f"{inner}.out_proj.weight"])
        y = norm(f"{base}.ln_2", x)
        gate, up = (linear(y, weights[f"{base}.mlp.{part}.weight"]) for part in ("c_fc_0", "c_fc_1"))
        x = x + linear(silu(gate) * up, weights[f"{base}.mlp.c_proj.weight"])
    return linear(norm("transformer.ln_f", x), weights["lm_head.weight"])[0].numpy()


class Runner:
    """A graph with its caches: rows of one batch, each at its own length."""

    def __init__(self, path: Path, rows: int, capacity: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # The graph as it is written: what a target makes of it is tested there.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(str(path), options)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.caches = {
            value.name: np.zeros(
                (rows, value.shape[1], capacity, value.shape[3]),
                np.float16 if value.type == "tensor(float16)" else np.float32,
            )
            for value in self.session.get_inputs()
            if value.name.startswith("past_") and value.name != "past_lengths"
        }

    def step(self, ids: Any, lengths: Any, indices: Any) -> Any:
        """Run [batch, sequence] tokens at each row's length; logits [batch, indices, vocabulary]."""
        feed = {"input_ids": ids, "past_lengths": lengths, "logit_indices": indices}
        feed = {name: np.asarray(value, np.int64) for name, value in feed.items()}
        results = dict(zip(self.outputs, self.session.run(None, {**feed, **self.caches}), strict=True))
        self.caches = {name: results[name.replace("past", "present")] for name in self.caches}
        return results["logits"]


def write_hollow(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    ffn: int = 48,
    vocabulary: int = 64,
    bad: dict[str, float] | None = None,
) -> int:
    """A Llama of BF16 zeros, a sparse file that takes no time or disk; return its bytes.

    `bad`: tensors whose last value is this instead.
    """
    sizes = {"hidden": hidden, "ffn": ffn, "heads": hidden // 16, "kv_heads": hidden // 32}
    llama = Llama(layers=layers, **sizes, vocabulary=vocabulary)
    table: dict[str, Any] = {}
    ends: dict[str, int] = {}
    total = 0
    for name, shape in llama.tensors().items():
        start, total = total, total + 2 * int(np.prod(shape))
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, total]}
        ends[name] = total
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        first = file.tell()
        file.truncate(first + total)
        for name, value in (bad or {}).items():
            file.seek(first + ends[name] - 2)
            bits = np.array([value], np.float32).view(np.uint32)
            file.write((bits + 0x8000 >> 16).astype(np.uint16).tobytes())
    llama.write_config(folder, rms_norm_eps=1e-5)
    return total
