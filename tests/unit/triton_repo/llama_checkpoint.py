"""A Llama of any small size as a Hugging Face folder; the weights are the caller's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Weight = Callable[[str, Shape], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    layers: int = 2
    hidden: int = 64
    ffn: int = 96
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int
    positions: int = 128

    def tensors(self) -> dict[str, Shape]:
        """The shape of every tensor by its name in the file; those of norms have one dimension."""
        hidden, narrow = self.hidden, self.hidden // self.heads * self.kv_heads
        shapes: dict[str, Shape] = {
            "model.embed_tokens.weight": (self.vocabulary, hidden),
            "lm_head.weight": (self.vocabulary, hidden),
            "model.norm.weight": (hidden,),
        }
        for layer in range(self.layers):
            base = f"model.layers.{layer}"
            shapes |= {f"{base}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qo"}
            shapes |= {f"{base}.self_attn.{part}_proj.weight": (narrow, hidden) for part in "kv"}
            shapes |= {f"{base}.mlp.{part}_proj.weight": (self.ffn, hidden) for part in ("gate", "up")}
            shapes |= {f"{base}.mlp.down_proj.weight": (hidden, self.ffn)}
            shapes |= {f"{base}.{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
        return shapes

    def write_config(self, folder: Path, **others: Any) -> None:
        """`folder`/config.json, with `others` beside the sizes."""
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.positions,
        }
        (folder / "config.json").write_text(json.dumps(config | others))

    def write(self, folder: Path, weight: Weight, **others: Any) -> None:
        """Make `folder` with config.json and model.safetensors; `weight` makes each tensor."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True)
        weights = {name: weight(name, shape) for name, shape in self.tensors().items()}
        save_file(weights, folder / "model.safetensors")
        self.write_config(folder, **others)


def normal(seed: int, scale: float, dtype: Any = np.float32, *, mean: float = 0.0) -> Weight:
    """Normally distributed weights; those of norms are around `mean`."""
    random = np.random.default_rng(seed)

    def weight(name: str, shape: Shape) -> Any:
        del name
        drawn = random.standard_normal(shape) * scale
        return (drawn + mean * (len(shape) == 1)).astype(dtype)

    return weight
