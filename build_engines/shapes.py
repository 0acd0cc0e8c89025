"""A checkpoint's sizes from its config.json, for the plan: no model library and no weights.

Every family names its sizes differently. Layers, widths, heads and vocabulary must be there: a file without
them is no checkpoint's. What else is left out takes the default of Transformers' own configuration class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

from build_engines.errors import PlanError
from build_engines.modelopt import read_stored
from build_engines.stack import (
    DECODER_FAMILIES,
    FAMILIES,
    DecoderFamily,
    DecoderShape,
    Family,
    Model,
    ModelShape,
    Stack,
    Task,
)
from build_engines.stack_fields import nearest, one_of, show
from build_engines.untrusted import read_json

Shape = ModelShape | DecoderShape

# An upper bound on any size, so that a corrupt value is named here instead of overflowing a sum later.
_MAX_SIZE: Final = 1 << 24

_BERT_KEYS: Final = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "vocabulary": "vocab_size",
}
_DISTILBERT_KEYS: Final = {
    "layers": "n_layers",
    "hidden": "dim",
    "ffn": "hidden_dim",
    "heads": "n_heads",
    "vocabulary": "vocab_size",
}
# What Transformers' configurations of LLMs assume where config.json says nothing.
_HEAD_DIM: Final = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
_POSITIONS: Final = {
    "mistral": 131_072,
    "qwen2": 32_768,
    "qwen3": 32_768,
    "gemma2": 8192,
    "gemma3_text": 131_072,
}
# These number their positions from pad_token_id + 1, so the first rows of the table are never a token's.
_OFFSET_FAMILIES: Final = ("roberta", "xlm-roberta")


def resolve_shape(stack: Stack, model: Model) -> Shape:
    """The model's sizes: from the checkpoint's config.json, else from `shape` in the stack file.

    Raises PlanError where neither is there, where the config is malformed, and where `max_length` is more
    than the checkpoint's positions.
    """
    config = stack.checkpoint_dir(model) / "config.json"
    shape: Shape
    if config.is_file():
        generates = model.task == "generate"
        shape = read_decoder_shape(config) if generates else read_shape(config, model.task)
        if model.target and isinstance(shape, DecoderShape):
            stored = read_stored(config.parent, model)
            shape = replace(shape, cache_bytes=stored.cache_bytes, stored_bytes=stored.weight_bytes)
        where = str(config)
    elif model.shape is not None:
        shape, where = model.shape, f"models.{model.name}.shape"
    else:
        raise PlanError(
            f"models.{model.name}: its sizes are not known: {config} does not exist",
            cause="the checkpoint is not there yet, and the stack file has no shape for it",
            next_step=_get_it(stack, model),
        )
    if model.max_length > shape.positions:
        raise PlanError(
            f"models.{model.name}.max_length is {model.max_length:,}, but the checkpoint has positions for "
            f"{shape.positions:,} tokens",
            cause=f"{where} states how many it was made for",
            next_step=f"set max_length = {shape.positions} or less",
        )
    return shape


def _get_it(stack: Stack, model: Model) -> str:
    if model.source_dir is None:
        return f"build-engines fetch {stack.path}, or add a [models.{model.name}.shape] table"
    return f"put the checkpoint there (the demo's: build-engines demo-models {model.source_dir.parent})"


def read_shape(path: Path, task: Task) -> ModelShape:
    """The sizes that an encoder's config.json states; PlanError names the file and the key at fault."""
    config = _read_json(path)
    family = cast(Family, _family(path, config, FAMILIES, "encoders"))
    keys = _DISTILBERT_KEYS if family == "distilbert" else _BERT_KEYS
    sizes = {field: _size(path, config, key) for field, key in keys.items()}
    if sizes["hidden"] % sizes["heads"]:
        raise _wrong(path, keys["heads"], f"is {sizes['heads']}, which does not divide {sizes['hidden']}")
    embedding = (
        _size(path, config, "embedding_size", sizes["hidden"]) if family == "electra" else sizes["hidden"]
    )
    return ModelShape(
        family=family,
        layers=sizes["layers"],
        hidden=sizes["hidden"],
        ffn=sizes["ffn"],
        heads=sizes["heads"],
        vocabulary=sizes["vocabulary"],
        embedding=embedding,
        positions=_positions(path, config, family),
        token_types=_token_types(path, config, family),
        labels=_labels(path, config, task),
    )


def read_decoder_shape(path: Path) -> DecoderShape:
    """The sizes that a causal LM's config.json states; PlanError names the file and the key."""
    config = _read_json(path)
    family = cast(DecoderFamily, _family(path, config, DECODER_FAMILIES, "LLMs"))
    # EXAONE 3 has a configuration of its own; where it gives no FFN width, its code takes 4 x hidden.
    early = family == "exaone"
    hidden = _size(path, config, "hidden_size")
    heads = _size(path, config, "num_attention_heads")
    kv_heads = _size(path, config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise _wrong(path, "num_key_value_heads", f"is {kv_heads}, which does not divide {heads}")
    head_dim = _HEAD_DIM.get(family, max(1, hidden // heads))
    return DecoderShape(
        family=family,
        layers=_size(path, config, "num_layers" if early else "num_hidden_layers"),
        hidden=hidden,
        ffn=_size(path, config, "intermediate_size", 4 * hidden if early else None),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_size(path, config, "head_dim", head_dim),
        vocabulary=_size(path, config, "vocab_size"),
        positions=_size(path, config, "max_position_embeddings", _POSITIONS.get(family, 2048)),
        tied=bool(config.get("tie_word_embeddings", early or family.startswith("gemma"))),
        qkv_bias=family == "qwen2" or bool(config.get("attention_bias")),
    )


def _read_json(path: Path) -> dict[str, Any]:
    config = read_json(path, PlanError)
    if not isinstance(config, dict):
        raise PlanError(f"{path}: must hold a JSON object, not {show(config)}")
    return config


def _wrong(path: Path, key: str, what: str) -> PlanError:
    return PlanError(
        f"{path}: {key} {what}",
        cause="this is not the configuration of a complete checkpoint of its kind",
        next_step="compare it with the model's page, or fetch the checkpoint again",
    )


def _family(path: Path, config: dict[str, Any], families: Sequence[str], kind: str) -> str:
    value = config.get("model_type")
    if isinstance(value, str) and value in families:
        return value
    near = nearest(value, families) if isinstance(value, str) else None
    raise PlanError(
        f"{path}: model_type is {show(value)}"
        if "model_type" in config
        else f"{path}: model_type is missing",
        cause=f"{kind} of these families are supported: {one_of(families)}",
        next_step=f"name a checkpoint of one of them{f' ({near!r} is the nearest)' if near else ''}",
    )


def _size(path: Path, config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise _wrong(path, key, "is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
        raise _wrong(path, key, f"is {show(value)}, not a positive integer")
    return value


def _positions(path: Path, config: dict[str, Any], family: Family) -> int:
    rows = _size(path, config, "max_position_embeddings", 8192 if family == "modernbert" else 512)
    if family not in _OFFSET_FAMILIES:
        return rows
    pad = config.get("pad_token_id", 1)
    if isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < rows - 1:
        raise _wrong(path, "pad_token_id", f"is {show(pad)}, not a row of the position table")
    return rows - pad - 1


def _token_types(path: Path, config: dict[str, Any], family: Family) -> int:
    if family in {"distilbert", "modernbert"}:
        return 0
    if config.get("type_vocab_size") == 0:
        return 0
    return _size(path, config, "type_vocab_size", 2)


def _labels(path: Path, config: dict[str, Any], task: Task) -> int:
    names = config.get("id2label")
    if names is None:
        # Transformers writes id2label only where it is not its default, two labels.
        return _size(path, config, "num_labels", 1 if task == "rerank" else 2)
    if not isinstance(names, dict) or not names:
        raise _wrong(path, "id2label", f"is {show(names)}, not a table of label names")
    return len(names)
