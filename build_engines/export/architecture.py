"""config.json resolved into one typed `Encoder`; whatever the graph would not reproduce is refused here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from build_engines.errors import ExportError
from build_engines.export.checkpoint import Checkpoint
from build_engines.export.families import FAMILIES, Family

# config.json's activation -> ONNX: Gelu's `approximate`, or the name of a plain operator.
GELU = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
}
PLAIN_ACTIVATIONS = {"relu": "Relu", "tanh": "Tanh", "silu": "Silu", "swish": "Silu"}
# Far beyond any encoder; lists and tables of these lengths are made before any weight is looked at.
MAX_LAYERS = 1024
MAX_ROTARY_POSITIONS = 1 << 17
_MAX_SIZE = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary positions: theta of layers with global and with local attention, and which are local.

    A local layer sees `window` tokens to each side.
    """

    global_theta: float
    local_theta: float
    window: int
    local_layers: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """One checkpoint's architecture, checked; sizes in elements."""

    family: Family
    prefix: str
    hidden: int
    embedding: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    positions: int
    position_offset: int
    token_types: int
    activation: str
    head_activation: str
    head_pooling: Literal["cls", "mean"]
    norm_epsilon: float
    pad_id: int
    rotary: Rotary | None
    attention_bias: bool
    ffn_bias: bool
    norm_bias: bool
    head_bias: bool

    @property
    def max_positions(self) -> int:
        """Longest sequence the position table holds."""
        return self.positions - self.position_offset

    def tensor(self, name: str, layer: int | None = None) -> str:
        return self.prefix + (name if layer is None else name.format(i=layer))


# Buffers that older transformers saved with the weights.
_BUFFERS = (r"(^|\.)position_ids$", r"embeddings\.token_type_ids$", r"\.inv_freq$")


def read_encoder(checkpoint: Checkpoint) -> Encoder:
    """Resolve config.json into an `Encoder`.

    Raises:
        ExportError: the family, or something the configuration asks for, is not supported.
    """
    config, folder = checkpoint.config, checkpoint.folder
    family = _family(config, folder)
    _refuse_unsupported(config, folder)
    # An explicit null means "not set" in config.json.
    values = {
        field: default if config.get(key) is None else config[key]
        for field, (key, default) in family.keys.items()
    }
    prefix = _prefix(checkpoint, family)
    vocabulary, embedding = checkpoint.shape(f"{prefix}{family.names.word}.weight")[:2]
    sizes = _sizes(values, family, folder)
    pad_id = int(values["pad_id"])
    if not 0 <= pad_id < vocabulary:
        raise ExportError(f"{folder}/config.json: pad_token_id {pad_id} is none of {vocabulary} tokens")
    modern = family.model_type == "modernbert"
    return Encoder(
        family=family,
        prefix=prefix,
        **sizes,
        embedding=embedding,
        vocabulary=vocabulary,
        # RoBERTa counts positions from padding_idx + 1.
        position_offset=pad_id + 1 if "roberta" in family.model_type else 0,
        token_types=int(values.get("token_types", 0)) if family.names.token_type else 0,
        activation=_activation(values["activation"], "hidden", folder),
        head_activation=_activation(_head_activation(config, family), "classifier", folder),
        head_pooling=_head_pooling(config, family, folder),
        norm_epsilon=float(values.get("norm_epsilon", 1e-12)),
        pad_id=pad_id,
        rotary=_rotary(config, sizes["layers"], sizes["positions"], folder) if modern else None,
        attention_bias=not modern or bool(config.get("attention_bias", False)),
        ffn_bias=not modern or bool(config.get("mlp_bias", False)),
        norm_bias=not modern or bool(config.get("norm_bias", False)),
        head_bias=not modern or bool(config.get("classifier_bias", False)),
    )


def _family(config: dict[str, Any], folder: Path) -> Family:
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        raise ExportError(
            f"{folder}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}",
            cause="the export writes the graph of each family itself and knows only these encoders",
            next_step="choose a checkpoint of a supported family",
        )
    return family


def _sizes(values: dict[str, Any], family: Family, folder: Path) -> dict[str, int]:
    """Hidden, heads, FFN, layers and positions, which fit each other."""
    # Rotary tables are computed; all others are as long as their table of weights.
    longest = MAX_ROTARY_POSITIONS if family.model_type == "modernbert" else _MAX_SIZE
    sizes = {key: _size(values[key], family.keys[key][0], folder) for key in ("hidden", "heads", "ffn")}
    sizes["layers"] = _size(values["layers"], family.keys["layers"][0], folder, MAX_LAYERS)
    sizes["positions"] = _size(values["positions"], "max_position_embeddings", folder, longest)
    if sizes["hidden"] % sizes["heads"]:
        raise ExportError(f"{folder}: hidden size {sizes['hidden']} is no multiple of {sizes['heads']} heads")
    return sizes


def _head_activation(config: dict[str, Any], family: Family) -> Any:
    named = family.head.activation
    return str(config.get(named) or "gelu") if named == "classifier_activation" else named


def harmless_tensors(encoder: Encoder, task: str) -> tuple[str, ...]:
    """Regular expressions of the tensors that may stay unused for `task`."""
    patterns = (*encoder.family.harmless, *_BUFFERS)
    if task == "embed":
        # Heads trained on top of the encoder, and the pooler: an embedding reads the last hidden state.
        return (*patterns, r"(^|\.)pooler\.", r"^(pre_)?classifier\.", r"^head\.")
    return patterns if encoder.family.head.in_model else (*patterns, r"(^|\.)pooler\.")


def _refuse_unsupported(config: dict[str, Any], folder: Path) -> None:
    refusals = {
        "decoder models": config.get("is_decoder"),
        "cross attention": config.get("add_cross_attention"),
        "quantized checkpoints (quantization_config)": config.get("quantization_config"),
        "pruned heads": config.get("pruned_heads"),
        "tied or shared layers (num_hidden_groups)": config.get("num_hidden_groups"),
        "chunked encoder-decoders": config.get("is_encoder_decoder"),
    }
    for what, present in refusals.items():
        if present:
            raise ExportError(
                f"{folder}: {what} are not supported; supported are plain encoders with all their heads",
                next_step="choose a plain encoder checkpoint",
            )
    position_type = config.get("position_embedding_type", "absolute")
    if position_type not in ("absolute", None):
        raise ExportError(
            f"{folder}: position_embedding_type {position_type!r} is not supported; supported is 'absolute'",
            cause="relative positions change what attention computes, the graph would be silently wrong",
            next_step="choose a checkpoint with absolute positions",
        )


def _prefix(checkpoint: Checkpoint, family: Family) -> str:
    """The part before the encoder's own names: "bert.", "model.", or nothing."""
    ending = f"{family.names.word}.weight"
    found = [name for name in checkpoint.entries if name == ending or name.endswith(f".{ending}")]
    if len(found) != 1:
        what = "no" if not found else "more than one"
        raise ExportError(
            f"{checkpoint.folder}: the weights hold {what} tensor {ending} {found or ''}".rstrip(),
            cause=f"the weights are not those of one {family.model_type!r} model",
            next_step="use a checkpoint with one encoder",
        )
    return found[0][: -len(ending)]


def _size(value: Any, key: str, folder: Path, largest: int = _MAX_SIZE) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise ExportError(
            f"{folder}/config.json: {key} must be an integer from 1 to {largest}, not {value!r:.40}"
        )
    return value


def _activation(activation: Any, what: str, folder: Path) -> str:
    if activation not in GELU and activation not in PLAIN_ACTIVATIONS:
        supported = ", ".join(sorted({*GELU, *PLAIN_ACTIVATIONS}))
        raise ExportError(
            f"{folder}: {what} activation {activation!r} is not supported; supported are {supported}"
        )
    return str(activation)


def _head_pooling(config: dict[str, Any], family: Family, folder: Path) -> Literal["cls", "mean"]:
    pooling = config.get("classifier_pooling", "cls") if family.model_type == "modernbert" else "cls"
    if pooling == "cls":
        return "cls"
    if pooling == "mean":
        return "mean"
    raise ExportError(
        f"{folder}: classifier_pooling {pooling!r} is not supported; supported are cls and mean"
    )


def _rotary(config: dict[str, Any], layers: int, positions: int, folder: Path) -> Rotary:
    """ModernBERT's positions in both spellings: `rope_parameters` (transformers 5), `*_rope_theta` (4)."""
    kinds = config.get("layer_types")
    if kinds is None:
        every = int(config.get("global_attn_every_n_layers") or 3)
        kinds = ["full_attention" if layer % every == 0 else "sliding_attention" for layer in range(layers)]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise ExportError(
            f"{folder}: layer_types names {sorted(unknown) or len(kinds)}, {layers} layers of "
            "full_attention or sliding_attention are expected"
        )
    global_theta = float(config.get("global_rope_theta") or 160_000.0)
    # Before transformers 5 a null local theta meant "the global one".
    local = config.get("local_rope_theta", 10_000.0)
    thetas = {
        "full_attention": global_theta,
        "sliding_attention": float(global_theta if local is None else local),
    }
    parameters = config.get("rope_parameters") or {}
    scaling = [p for p in (config.get("rope_scaling"), *parameters.values()) if isinstance(p, dict)]
    for entry in scaling:
        if entry.get("rope_type", entry.get("type", "default")) != "default":
            raise ExportError(
                f"{folder}: rope_type {entry.get('rope_type', entry.get('type'))!r} is not supported; "
                "supported is 'default'"
            )
    for kind, entry in parameters.items():
        if isinstance(entry, dict) and entry.get("rope_theta") is not None:
            thetas[kind] = float(entry["rope_theta"])
    return Rotary(
        global_theta=thetas["full_attention"],
        local_theta=thetas["sliding_attention"],
        # One that is wider than every text hides nothing, and need not fit the graph's integers.
        window=min(int(config.get("local_attention") or 128) // 2, positions),
        local_layers=tuple(kind == "sliding_attention" for kind in kinds),
    )
