"""What a server needs beside a causal LM's graph: sizes, special tokens, the chat template, the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from build_engines.errors import ExportError
from build_engines.export.checkpoint import read_json, well_formed
from build_engines.export.decoder_config import Architecture
from build_engines.export.decoder_weights import Decoder
from build_engines.export.tokenizer import write_tokenizer

TEMPLATE_FILE = "chat_template.jinja"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def decoder_serving(decoder: Decoder, precision: str = "fp16") -> dict[str, Any]:
    """The manifest's `serving` entry of a causal LM; slots, capacity and chunk are added at compile time.

    Returns:
        task, family, vocabulary, positions (rows of the rotary tables), layers, kv_heads, head_dim,
        cache_type ("float16", or "float32" for the precision "fp32"), windows (per layer, null: sees all),
        eos_ids, bos_id, pad_id, and chat: template (null where the model has none) and the texts of the
        special tokens that templates use.

    Raises:
        ExportError: a tokenizer setting is damaged.
    """
    return llm_serving(decoder.architecture, decoder.folder, precision)


def llm_serving(architecture: Architecture, folder: Path, precision: str = "fp16") -> dict[str, Any]:
    """The same of a checkpoint in `folder` whose tensors are not looked at."""
    return {
        "task": "generate",
        "family": architecture.family,
        "vocabulary": architecture.vocabulary,
        "positions": architecture.rows,
        "layers": architecture.layers,
        "kv_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "cache_type": "float32" if precision == "fp32" else "float16",
        "windows": [kind.window for kind in architecture.kinds],
        "eos_ids": list(architecture.eos_ids),
        "bos_id": architecture.bos_id,
        "pad_id": architecture.pad_id,
        "chat": {"template": read_chat_template(folder), **_special_tokens(folder)},
    }


def copy_chat_tokenizer(folder: Path, out: Path, vocabulary: int | None = None) -> None:
    """Write `out`/tokenizer.json, and `out`/chat_template.jinja where the model has a template.

    Args:
        vocabulary: rows of the embedding table; None reads config.json's.

    Raises:
        ExportError: there is no usable tokenizer, or it knows tokens that the model does not.
    """
    if vocabulary is None:
        with well_formed(folder / "config.json"):
            vocabulary = int(read_json(folder / "config.json").get("vocab_size", 0))
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, out, vocabulary, truncates=False)
    template = read_chat_template(folder)
    if template is not None:
        (out / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def read_chat_template(folder: Path) -> str | None:
    """The template as transformers finds it: chat_template.jinja, else tokenizer_config.json's default."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return _text(path)
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return None
    template = read_json(settings).get("chat_template")
    if isinstance(template, list):
        with well_formed(settings):
            named = {str(entry.get("name")): entry.get("template") for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ExportError(
            f"{settings}: chat_template is a {type(template).__name__}, not a Jinja template",
            next_step="fetch the checkpoint again, or put the template into chat_template.jinja",
        )
    return template


def _special_tokens(folder: Path) -> dict[str, str | None]:
    """bos_token, eos_token... as text, from tokenizer_config.json or special_tokens_map.json."""
    found: dict[str, str | None] = dict.fromkeys(_TOKENS)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        settings = read_json(path)
        for token in _TOKENS:
            value = settings.get(token)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[token] = value
            elif value is not None:
                raise ExportError(f"{path}: {token} is {json.dumps(value):.60}, not a text")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is not UTF-8 text: {error}") from error
