"""A word tokenizer with special tokens, texts for it, and stack files that use both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import VOCABULARY

LABELS = ("LABEL_0", "LABEL_1", "LABEL_2")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def write_tokenizer(folder: Path) -> None:
    """Words w4 .. w98, one token each, in BERT's template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*SPECIAL, *(f"w{index}" for index in range(len(SPECIAL), VOCABULARY))]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_input_names": inputs}))


def sentence(generator: np.random.Generator, longest: int = 24) -> str:
    words = generator.integers(len(SPECIAL), VOCABULARY, int(generator.integers(1, longest + 1)))
    return " ".join(f"w{word}" for word in words)


def write_texts(folder: Path, count: int = 48) -> None:
    """texts.jsonl (labelled), other.jsonl (texts of another seed) and groups.jsonl (ranking)."""
    for name, seed in (("texts.jsonl", 1), ("other.jsonl", 2)):
        generator = np.random.default_rng(seed)
        lines = [{"text": sentence(generator), "label": LABELS[i % len(LABELS)]} for i in range(count)]
        write_lines(folder / name, lines)
    generator = np.random.default_rng(3)
    groups = [
        {
            "query": sentence(generator, 6),
            "passages": [sentence(generator) for _ in range(4)],
            "relevance": [1, 0, 0, 2],
        }
        for _ in range(count // 4)
    ]
    write_lines(folder / "groups.jsonl", groups)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_stack(path: Path, models: dict[str, dict[str, Any]], **top: Any) -> Path:
    """A stack file of those models; values are written as TOML by way of JSON, tables one level deep."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in {"card": "rtx-5070-ti", **top}.items()]
    for name, model in models.items():
        plain = {key: value for key, value in model.items() if not isinstance(value, dict)}
        lines += [f"\n[models.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
        for table, values in model.items():
            if isinstance(values, dict):
                lines.append(f"\n[models.{name}.{table}]")
                lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
