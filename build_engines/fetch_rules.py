"""Which files of a checkpoint are taken, and which make it refused: pickled weights, remote code, paths
outside.

A pickle runs code when it is loaded, and so does a Python file that `auto_map` names. Neither is needed:
weights come as safetensors, and the graph is written from config.json. The rules are the same for a hub
repository, of which only the list of names is known, and for a folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from build_engines.errors import FetchError
from build_engines.stack import Model
from build_engines.untrusted import check_count, check_sizes, read_json

PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".ot")
# Of these only a torch pickle can be turned into safetensors, without running what it holds.
CONVERTIBLE_SUFFIXES: Final = (".bin", ".pt", ".pth")
_TEXT_SUFFIXES: Final = (".json", ".txt", ".model", ".spm", ".vocab", ".jinja")
# Settings in which Transformers looks for code to run.
NAMING_CODE: Final = ("config.json", "tokenizer_config.json")
# The folders of sentence-transformers' modules; all others (onnx/, openvino/, runs/) are not read.
_MODULE_FOLDER = re.compile(r"\d+_[A-Za-z]+")
_SHARD = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin|pt|pth)")
# Training leaves these beside the weights. They are no weights, and they are not taken.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|trainer_state)\.\w+")


def check_name(source: str, name: str) -> None:
    """FetchError for a file name that would lead out of the checkpoint's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable() or not path.parts:
        raise FetchError(
            f"{source}: the file name {name!r} leads out of the checkpoint's folder",
            cause="the repository is broken or hostile",
            next_step="name another checkpoint in the stack file",
        )


def needed_files(model: Model, sizes: Mapping[str, int]) -> list[str]:
    """The files to take, of all that a checkpoint has; `sizes` in bytes, by name.

    Raises FetchError for Python files, for weights that exist only as pickles (unless the stack file allows
    them by name), where config.json or the weights are missing, and for what is too large or too many.
    """
    check_count(model.source, len(sizes), FetchError)
    names = sorted(sizes)
    for name in names:
        check_name(model.source, name)
    inside = [name for name in names if _is_read(name)]
    _refuse_code_files(model, inside)
    if any(name.endswith("adapter_config.json") for name in inside):
        raise FetchError(
            f"{model.source}: it is an adapter (adapter_config.json), or has one",
            cause="an adapter names another model, which would be loaded under it",
            next_step="merge it into its model and save that as one checkpoint",
        )
    taken = [name for name in inside if _is_text(name)]
    for folder in sorted({str(PurePosixPath(name).parent) for name in inside}):
        here = [name for name in inside if str(PurePosixPath(name).parent) == folder]
        taken += _weights(model, here)
    if not any(PurePosixPath(name).name == "config.json" for name in taken):
        raise FetchError(
            f"{model.source}: there is no config.json", cause="this is not a Transformers checkpoint"
        )
    if all(_is_text(name) for name in taken):
        raise FetchError(
            f"{model.source}: there are no weights (*.safetensors)",
            cause="the repository holds another format, or only a tokenizer",
            next_step="name a checkpoint with model.safetensors",
        )
    check_sizes(model.source, {name: sizes[name] for name in taken}, FetchError)
    return sorted(taken)


def _is_read(name: str) -> bool:
    parts = PurePosixPath(name).parts
    if any(part.startswith(".") for part in parts):
        return False
    return len(parts) == 1 or (len(parts) == 2 and bool(_MODULE_FOLDER.fullmatch(parts[0])))


def _is_text(name: str) -> bool:
    # Index files too: they are small, and the exporter reads the safetensors one.
    return name.endswith(_TEXT_SUFFIXES) and PurePosixPath(name).suffix != ".py"


def _weights(model: Model, names: list[str]) -> list[str]:
    """The weight files of one folder: safetensors, or the pickles that the stack file allows."""
    safe = [name for name in names if name.endswith(".safetensors")]
    if safe:
        standard = [name for name in safe if _SHARD.fullmatch(PurePosixPath(name).name)]
        return standard or safe
    pickles = [
        name
        for name in names
        if name.endswith(PICKLE_SUFFIXES) and not _NOT_WEIGHTS.fullmatch(PurePosixPath(name).name)
    ]
    if not pickles:
        return []
    usable = [name for name in pickles if name.endswith(CONVERTIBLE_SUFFIXES)]
    if not model.allow_pickle:
        raise FetchError(
            f"{model.source}: weights are pickled ({_some(usable or pickles)}) and there is no safetensors",
            cause="loading a pickle can run any code",
            next_step=f"name a checkpoint with safetensors, or, if you trust this one, set "
            f"allow_pickle = true under [models.{model.name}]",
        )
    if not usable:
        raise FetchError(
            f"{model.source}: the weights are in a format that cannot be read ({_some(pickles)})",
            cause="they were saved by TensorFlow or Flax",
            next_step="name a checkpoint with model.safetensors",
        )
    return [name for name in usable if _SHARD.fullmatch(PurePosixPath(name).name)] or usable


def _refuse_code_files(model: Model, names: list[str]) -> None:
    code = [name for name in names if name.endswith(".py")]
    if code and not model.allow_remote_code:
        raise _remote_code(model, f"it comes with Python files ({_some(code)})")


def refuse_remote_code(model: Model, config: Path) -> None:
    """FetchError for settings (NAMING_CODE) that name code of the repository's own, or a kernel of the hub,
    unless that is allowed.
    """
    if model.allow_remote_code:
        return
    values = read_json(config, FetchError)
    if isinstance(values, dict) and values.get("auto_map"):
        named = values["auto_map"]
        classes = _some(sorted(map(str, named.values()))) if isinstance(named, dict) else str(named)[:100]
        raise _remote_code(model, f"its {config.name} names code of its own (auto_map: {classes})")
    for key, value in values.items() if isinstance(values, dict) else ():
        # "owner/name" is a kernel, which Transformers downloads and loads.
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise _remote_code(model, f"its {config.name} names a kernel ({key}: {str(value)[:100]})")


def _remote_code(model: Model, what: str) -> FetchError:
    return FetchError(
        f"{model.source}: {what}",
        cause="such a model may not be what its config.json says, and its code is not ours to run",
        next_step=f"name a checkpoint of a standard architecture, or set allow_remote_code = true under "
        f"[models.{model.name}] (Transformers then runs a folder's code when the engine is compared with it)",
    )


def folder_files(source: Path) -> dict[str, int]:
    """Bytes of all files under `source` by name; FetchError for a link whose target lies outside, for a pipe
    or device, and for more files than a checkpoint has.
    """
    if not source.is_dir():
        raise FetchError(
            f"{source}: there is no such folder",
            cause="the checkpoint is not there yet, or `source` in the stack file is wrong",
            next_step="correct `source` (relative to the stack file); the demo's models: "
            f"build-engines demo-models {source.parent}",
        )
    root = os.path.realpath(source)
    sizes: dict[str, int] = {}
    for folder, folders, files in os.walk(source):
        check_count(str(source), len(sizes) + len(files), FetchError)
        for entry in (*folders, *files):
            path = os.path.join(folder, entry)
            target = os.path.realpath(path)
            if os.path.islink(path) and os.path.commonpath((root, target)) != root:
                raise FetchError(
                    f"{path}: a link that leaves the checkpoint's folder (to {target})",
                    cause="a cache of the hub is made of such links; others may be hostile",
                    next_step="copy the folder with its links resolved (cp -rL), or name the hub id",
                )
        for file in (Path(folder, name) for name in files):
            if not file.is_file():
                raise FetchError(f"{file}: is no regular file", next_step="remove it, or name another folder")
            sizes[file.relative_to(source).as_posix()] = file.stat().st_size
    return sizes


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
