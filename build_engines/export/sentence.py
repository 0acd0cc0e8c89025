"""sentence-transformers folders: which modules follow the encoder (modules.json) and what they are set to.

Both spellings of pooling are read: `pooling_mode_mean_tokens: true` and, newer, `pooling_mode: "mean"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from build_engines.errors import ExportError
from build_engines.export.checkpoint import Checkpoint, read_json, read_weights_table
from build_engines.untrusted import read_json as read_bounded

_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Class name of a Dense module's activation -> our name for it; None is the identity.
_ACTIVATIONS = {"Identity": None, "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu"}
Pooling = Literal["mean", "cls"]
MAX_MODULES = 64


@dataclass(frozen=True, slots=True)
class Dense:
    weights: Checkpoint
    out_features: int
    bias: bool
    activation: str | None


@dataclass(frozen=True, slots=True)
class Normalize:
    """A normalization between other modules; the last one is `Sentence.normalize`."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """What turns token vectors into an embedding, in order: pooling, modules, normalization."""

    pooling: Pooling
    modules: tuple[Dense | Normalize, ...]
    normalize: bool


def encoder_folder(source: Path) -> Path:
    """The folder with config.json: `source`, or in older layouts its Transformer module (0_Transformer)."""
    if not source.is_dir():
        raise ExportError(
            f"the checkpoint folder {source} does not exist",
            next_step="run `build-engines fetch STACK`, or correct `source` in the stack file",
        )
    for module in _modules(source):
        if _kind(module) == "Transformer":
            return source / _inside(source, module)
    return source


def read_sentence(source: Path, pooling: str | None, normalize: bool) -> Sentence:
    """Modules of `source`; `pooling` and `normalize` from the stack file win over the folder's.

    Raises:
        ExportError: a module, pooling or setting that the graph does not reproduce, by name.
    """
    found: Pooling | None = None
    after: list[Dense | Normalize] = []
    for module in _modules(source):
        kind, folder = _kind(module), source / _inside(source, module)
        if kind == "Pooling":
            found = None if pooling else _read_pooling(folder)
        elif kind == "Dense":
            after.append(_read_dense(folder))
        elif kind == "Normalize":
            after.append(Normalize())
        elif kind not in ("Transformer", "Dropout"):
            raise ExportError(
                f"{source}: the sentence-transformers module {module.get('type')} is not supported; "
                "supported are Transformer, Pooling, Dense and Normalize",
                next_step="choose a model built from these modules",
            )
    _refuse_default_prompt(source)
    if pooling and pooling not in ("mean", "cls"):
        raise ExportError(f"pooling {pooling!r} is not supported; supported are mean and cls")
    while after and isinstance(after[-1], Normalize):
        after.pop()
    chosen = cast(Pooling, pooling) if pooling else found or "mean"
    return Sentence(chosen, tuple(after), normalize)


def _modules(source: Path) -> list[dict[str, Any]]:
    path = source / "modules.json"
    if not path.is_file():
        return []
    modules = read_bounded(path, ExportError)
    try:
        if len(modules) > MAX_MODULES:
            raise ValueError(f"{len(modules):,} modules, more than {MAX_MODULES}")
        found = sorted((dict(module) for module in modules), key=lambda module: int(module["idx"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{path} is not a list of sentence-transformers modules: {error!r}") from error
    for module in found:
        _refuse_foreign(path, module.get("type"), "sentence_transformers.")
    return found


def _kind(module: dict[str, Any]) -> str:
    return str(module.get("type", "")).rsplit(".", 1)[-1]


def _refuse_foreign(path: Path, name: Any, package: str) -> None:
    """ExportError for a class that is not of `package`: sentence-transformers would import it by its name."""
    if not str(name).startswith(package):
        raise ExportError(
            f"{path} names {name!r:.100}, which is not of {package.removesuffix('.')}",
            cause="such a name is imported when the model is loaded, and its code is not ours to run",
            next_step="choose a model built from the library's own modules",
        )


def _inside(source: Path, module: dict[str, Any]) -> str:
    path = str(module.get("path", ""))
    if not (source / path).resolve().is_relative_to(source.resolve()):
        raise ExportError(f"{source}/modules.json points outside its folder: {path!r}")
    return path


def _read_pooling(folder: Path) -> Pooling:
    config = read_json(folder / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _LEGACY_POOLING.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if modes not in (["mean"], ["cls"]):
        raise ExportError(
            f"{folder}: pooling {' + '.join(map(str, modes))} is not supported; supported are mean and cls",
            next_step='choose another model, or override it with pooling = "mean" or "cls" in the stack file',
        )
    return cast(Pooling, modes[0])


def _read_dense(folder: Path) -> Dense:
    config = read_json(folder / "config.json")
    named = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    _refuse_foreign(folder / "config.json", named, "torch.nn.")
    activation = str(named).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS:
        raise ExportError(
            f"{folder}: activation {activation} is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    placed = config.get("module_input_name") or "sentence_embedding"
    if config.get("use_residual") or placed != "sentence_embedding":
        raise ExportError(f"{folder}: a Dense module with a residual or on {placed} is not supported")
    weights = Checkpoint(folder, config, read_weights_table(folder))
    return Dense(
        weights, int(config["out_features"]), bool(config.get("bias", True)), _ACTIVATIONS[activation]
    )


def _refuse_default_prompt(source: Path) -> None:
    """A default prompt is prepended to every text; a server that does not would answer other vectors."""
    path = source / "config_sentence_transformers.json"
    if not path.is_file():
        return
    config = read_json(path)
    name = config.get("default_prompt_name")
    prompt = (config.get("prompts") or {}).get(name, "") if name else ""
    if prompt:
        raise ExportError(
            f"{path}: the model prepends the default prompt {prompt!r} to every text, which is not supported",
            next_step="set default_prompt_name to null there and send the prompt with your texts",
        )
