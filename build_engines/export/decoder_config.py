"""config.json resolved into one typed `Architecture`; what the graph would not reproduce is refused here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_engines.errors import ExportError
from build_engines.export.checkpoint import read_json
from build_engines.export.decoder_families import FAMILIES, Family
from build_engines.export.decoder_rotary import MAX_ROWS, Rope, read_ropes

# config.json's activation -> ONNX: Silu, or Gelu's `approximate`.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "none",
    "gelu_pytorch_tanh": "tanh",
    "gelu_new": "tanh",
}
# Far beyond any model; what follows is proportional to it.
_MOST_LAYERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """How a layer attends: the last `window` tokens (None: all), rotated by `rope` (None: not at all)."""

    window: int | None
    rope: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One causal LM, checked; sizes in elements.

    `norms` holds the norms that a layer has: attention.norm and ffn.norm precede what they feed,
    attention.post_norm and ffn.post_norm follow it, attention.q_norm and .k_norm work on single heads.
    """

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    norm_epsilon: float
    norm_offset: float
    norms: frozenset[str]
    activation: str
    qkv_bias: bool
    output_bias: bool
    ffn_bias: bool
    tied: bool
    embedding_scale: float
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    ropes: tuple[tuple[str, Rope], ...]
    kinds: tuple[LayerKind, ...]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None

    @property
    def rows(self) -> int:
        """Positions that the rotary tables hold: the longest sequence the graph can run."""
        return min(self.positions, MAX_ROWS)

    @property
    def qk_norm(self) -> bool:
        return "attention.q_norm" in self.norms

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Columns of query, key and value in the fused Linear."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(K, N) of a Linear by its name in the graph, with or without its layer: "attention.qkv", "head"."""
        part = name.split(".", 2)[2] if name.startswith("layers.") else name
        return {
            "attention.qkv": (self.hidden, sum(self.qkv_sizes)),
            "attention.output": (self.heads * self.head_dim, self.hidden),
            "ffn.up": (self.hidden, 2 * self.ffn),
            "ffn.down": (self.ffn, self.hidden),
            "head": (self.hidden, self.vocabulary),
        }[part]

    def has_bias(self, name: str) -> bool:
        """Whether a layer's Linear, by its name without the layer, has a bias."""
        return {
            "attention.qkv": self.qkv_bias,
            "attention.output": self.output_bias,
            "ffn.up": self.ffn_bias,
            "ffn.down": self.ffn_bias,
        }.get(name, False)


LAYER_LINEARS = ("attention.qkv", "attention.output", "ffn.up", "ffn.down")


def find_family(config: dict[str, Any], folder: Path) -> Family:
    """The family of a configuration, or ExportError with those that are supported."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ExportError(
            f"{folder}: model_type {model_type!r} is not supported for generation; supported are "
            f"{', '.join(FAMILIES)}",
            cause="the export writes the graph of each family itself and knows only these causal LMs",
            next_step="choose a checkpoint of a supported family",
        )
    return FAMILIES[model_type]


def read_architecture(config: dict[str, Any], folder: Path) -> Architecture:
    """Resolve config.json (and generation_config.json, for the tokens that end a text).

    Raises:
        ExportError: the family, or something the configuration asks for, is not supported; or a number that
            no model has.
    """
    family = find_family(config, folder)
    _refuse_unsupported(config, folder)
    values = {field: _value(config, key, default) for field, (key, default) in family.keys.items()}
    size = _Sizes(folder, {field: key for field, (key, _) in family.keys.items()}, values)
    hidden, layers, heads = size("hidden"), size("layers", largest=_MOST_LAYERS), size("heads")
    kv_heads = size("kv_heads", heads)
    head_dim = size("head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise ExportError(
            f"{folder}: {heads} heads of {head_dim} over {kv_heads} key/value heads are not supported",
            cause="heads must divide evenly into groups, and rotary positions need heads of even size",
        )
    positions = size("positions")
    bias = bool(config.get("attention_bias"))
    vocabulary = size("vocabulary")
    return Architecture(
        family=family.model_type,
        layers=layers,
        hidden=hidden,
        ffn=size("ffn", 4 * hidden if family.model_type == "exaone" else None),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        positions=positions,
        norm_epsilon=_number(values["norm_epsilon"], "the norm's epsilon", folder),
        norm_offset=family.norm_offset,
        norms=frozenset(family.names.norms),
        activation=_activation(values["activation"], folder),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=bias if family.output_bias is None else family.output_bias,
        ffn_bias=family.model_type == "llama" and bool(config.get("mlp_bias")),
        tied=bool(values["tied"]),
        embedding_scale=math.sqrt(hidden) if family.scaled_embedding else 1.0,
        attention_scale=_attention_scale(config, family, head_dim, folder),
        attention_softcap=_softcap(config, "attn_logit_softcapping", 50.0, folder),
        logit_softcap=_softcap(config, "final_logit_softcapping", 30.0, folder),
        ropes=tuple(read_ropes(config, folder, positions).items()),
        kinds=_kinds(config, family, layers, min(positions, MAX_ROWS), folder),
        **_special_ids(values, folder, vocabulary),
    )


def _value(config: dict[str, Any], key: str, default: Any) -> Any:
    """An explicit null means "not set", but for a special token "there is none"."""
    value = config.get(key, default)
    return default if value is None and not key.endswith("_token_id") else value


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Positive integers out of config.json, by field."""

    folder: Path
    keys: dict[str, str]
    values: dict[str, Any]

    def __call__(self, field: str, default: int | None = None, largest: int = 2**31 - 1) -> int:
        value = self.values[field]
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise ExportError(
                f"{self.folder}/config.json: {self.keys[field]} must be an integer from 1 to {largest}, "
                f"not {value!r:.40}"
            )
        return value


def _refuse_unsupported(config: dict[str, Any], folder: Path) -> None:
    refusals = {
        "quantized checkpoints (quantization_config)": config.get("quantization_config"),
        "encoder-decoders": config.get("is_encoder_decoder"),
        "mixtures of experts": config.get("num_local_experts") or config.get("num_experts"),
        "bidirectional attention (use_bidirectional_attention)": config.get("use_bidirectional_attention"),
    }
    for what, present in refusals.items():
        if present:
            raise ExportError(
                f"{folder}: {what} are not supported; supported are plain dense causal LMs",
                next_step="choose the original FP32, FP16 or BF16 checkpoint of a dense causal LM",
            )
    architectures = config.get("architectures") or []
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise ExportError(
            f"{folder}: {', '.join(map(str, architectures))} does not generate text",
            cause="the checkpoint was trained for another task",
            next_step="use a checkpoint saved as ...ForCausalLM, or another task in the stack file",
        )


def _activation(name: Any, folder: Path) -> str:
    if name not in ACTIVATIONS:
        raise ExportError(
            f"{folder}: activation {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _number(value: Any, what: str, folder: Path) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ExportError(f"{folder}/config.json: {what} must be a positive number, not {value!r:.40}")
    return number


def _attention_scale(config: dict[str, Any], family: Family, head_dim: int, folder: Path) -> float:
    if not family.model_type.startswith("gemma"):
        return float(head_dim**-0.5)
    scalar = config.get("query_pre_attn_scalar")
    return float(_number(256 if scalar is None else scalar, "query_pre_attn_scalar", folder) ** -0.5)


def _softcap(config: dict[str, Any], key: str, gemma2_default: float, folder: Path) -> float | None:
    if not str(config.get("model_type")).startswith("gemma"):
        return None
    value = config.get(key, gemma2_default if config["model_type"] == "gemma2" else None)
    return None if value is None else _number(value, key, folder)


def _kinds(
    config: dict[str, Any], family: Family, layers: int, rows: int, folder: Path
) -> tuple[LayerKind, ...]:
    # An absent window has the default of every sliding family's configuration class, a null one is none.
    window = config.get("sliding_window", 4096) if family.slides else None
    if family.model_type.startswith("qwen") and not config.get("use_sliding_window"):
        window = None
    if window is None:
        return (LayerKind(window=None, rope="global"),) * layers
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ExportError(
            f"{folder}/config.json: sliding_window must be a positive integer, not {window!r:.40}"
        )
    # A window as long as the tables never hides a token.
    local = LayerKind(window=window if window < rows else None, rope="local")
    distant = LayerKind(window=None, rope=None if family.global_without_rotary else "global")
    return tuple(
        local if slides else distant for slides in _sliding_layers(config, family.model_type, layers, folder)
    )


def _sliding_layers(config: dict[str, Any], kind: str, layers: int, folder: Path) -> tuple[bool, ...]:
    """Which layers see a window only, by layer_types or, in older files, by the family's own rule."""
    if kind == "mistral":
        return (True,) * layers
    types = config.get("layer_types")
    if types is not None:
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != layers:
            raise ExportError(
                f"{folder}: layer_types names {sorted(unknown) or len(types)}, {layers} layers of "
                "full_attention or sliding_attention are expected"
            )
        return tuple(name == "sliding_attention" for name in types)
    if kind.startswith("qwen"):
        first = int(config.get("max_window_layers", 28))
        return tuple(layer >= first for layer in range(layers))
    pattern = config.get("sliding_window_pattern", {"gemma2": 2, "gemma3_text": 6}.get(kind, 4))
    if isinstance(pattern, str) and set(pattern) <= set("LG") and pattern:
        return (*(pattern[layer % len(pattern)] == "L" for layer in range(layers - 1)), False)
    if not isinstance(pattern, int) or pattern < 1:
        raise ExportError(f"{folder}: sliding_window_pattern {pattern!r:.40} is neither a number nor L and G")
    return tuple((layer + 1) % pattern != 0 for layer in range(layers))


def _special_ids(values: dict[str, Any], folder: Path, vocabulary: int) -> dict[str, Any]:
    """bos_id, eos_ids and pad_id; generation_config.json wins, as it does when transformers generates."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}

    def pick(key: str, field: str) -> Any:
        return values[field] if generation.get(key) is None else generation[key]

    ends = pick("eos_token_id", "eos_ids")
    eos = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    bos, pad = pick("bos_token_id", "bos_id"), pick("pad_token_id", "pad_id")
    for value in (*eos, *(value for value in (bos, pad) if value is not None)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ExportError(f"{folder}: a special token id is {value!r:.40}, not an integer")
    for value in eos:
        if not 0 <= value < vocabulary:
            raise ExportError(
                f"{folder}: eos_token_id {value} is outside the vocabulary of {vocabulary} tokens",
                cause="config.json and the weights belong to different models",
            )
    valid = range(vocabulary)
    return {
        "bos_id": bos if bos in valid else None,
        "eos_ids": eos,
        "pad_id": pad if pad in valid else None,
    }
