"""Tiny BERT checkpoints with random weights, and their engines, made in a second without torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triton_repo.runtime.session import manifest_digest, sha256
from triton_repo.server import Server

HIDDEN, LAYERS, FFN, POSITIONS = 32, 2, 64, 128
LABELS = ["negative", "neutral", "positive"]
WORDS = "the noodles were very good bad cold review place again never".split()  # noqa: SIM905
WORDS += ["맛있", "별로", "가격", "배송"]


@dataclass(frozen=True)
class Served:
    """The running server, what it serves, and the engine folders behind it by model name."""

    server: Server
    folder: Path
    engines: dict[str, Path]

    @property
    def grpc(self) -> str:
        return self.server.urls["grpc"]

    @property
    def http(self) -> str:
        return self.server.urls["http"]

    @property
    def stack_json(self) -> Path:
        return self.folder / "stack.json"


def vocabulary() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, *WORDS, *letters, *".,!?-", *(f"##{letter}" for letter in letters), "##어요", "##예요"]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(
        models.WordPiece({piece: index for index, piece in enumerate(vocabulary())}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def write_checkpoint(folder: Path, task: str, *, seed: int) -> Path:
    """A Hugging Face folder: config.json, model.safetensors, tokenizer.json."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    labels = {"classify": LABELS, "rerank": ["LABEL_0"]}.get(task)
    config: dict[str, Any] = {
        "model_type": "bert",
        "architectures": ["BertModel" if labels is None else "BertForSequenceClassification"],
        "vocab_size": len(vocabulary()),
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": FFN,
        "hidden_act": "gelu",
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    if labels:
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: index for index, label in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps(config))
    prefix = "bert." if labels else ""
    tensors = {prefix + name: value for name, value in _encoder_weights(seed).items()}
    if labels:
        random = np.random.default_rng(seed + 1)
        tensors["classifier.weight"] = random.normal(0, 0.5, (len(labels), HIDDEN)).astype(np.float32)
        tensors["classifier.bias"] = np.zeros(len(labels), np.float32)
    save_file(tensors, str(folder / "model.safetensors"))
    write_tokenizer(folder)
    # Transformers sets the normalizer from these, whatever tokenizer.json says.
    settings = {"tokenizer_class": "BertTokenizerFast", "do_lower_case": True, "strip_accents": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def build_engine(checkpoint: Path, folder: Path, *, model: str, task: str, **serving: Any) -> Path:
    """Export and leave the FP32 graph as a finished engine folder, as the build does."""
    from build_engines.export import export_encoder

    graph = export_encoder(checkpoint, task, folder)
    shutil.move(graph.path, folder / "engine.onnx")

    def record(name: str) -> dict[str, Any]:
        return {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}

    manifest: dict[str, Any] = {
        "format": 1,
        "model": model,
        "task": task,
        "precision": "fp32",
        "target": "onnxruntime",
        "engine": {"file": "engine.onnx", **record("engine.onnx")},
        "files": {"tokenizer.json": record("tokenizer.json")},
        # As an engine for a card has it from the plan.
        "memory": {"weights": (folder / "engine.onnx").stat().st_size},
        "serving": {**graph.serving, "max_length": 64, "max_batch": 64, "overflow": "truncate"} | serving,
    }
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _encoder_weights(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)

    def weight(*shape: int) -> Any:
        return random.normal(0, 0.3, shape).astype(np.float32)

    tensors = {
        "embeddings.word_embeddings.weight": weight(len(vocabulary()), HIDDEN),
        "embeddings.position_embeddings.weight": weight(POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": weight(2, HIDDEN),
        "pooler.dense.weight": weight(HIDDEN, HIDDEN),
        "pooler.dense.bias": weight(HIDDEN),
    }
    linears = {
        "attention.self.query": (HIDDEN, HIDDEN),
        "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN),
        "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (FFN, HIDDEN),
        "output.dense": (HIDDEN, FFN),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        for name, shape in linears.items():
            tensors[f"encoder.layer.{layer}.{name}.weight"] = weight(*shape)
            tensors[f"encoder.layer.{layer}.{name}.bias"] = weight(shape[0])
        norms += [f"encoder.layer.{layer}.{name}.LayerNorm" for name in ("attention.output", "output")]
    for name in norms:
        tensors[f"{name}.weight"] = np.ones(HIDDEN, np.float32)
        tensors[f"{name}.bias"] = np.zeros(HIDDEN, np.float32)
    return tensors
