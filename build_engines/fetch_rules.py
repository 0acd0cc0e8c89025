"""Which files of a checkpoint are taken, and which make it refused: pickled weights, remote code, paths
outside.

A pickle runs code when it is loaded, and so does a Python file that `auto_map` names. Neither is needed:
weights come as safetensors, and the graph is written from config.json. The rules are the same for a hub
repository, of which only the list of names is known, and for a folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from build_engines.errors import FetchError
from build_engines.stack import Model

PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".ot")
# Of these only a torch pickle can be turned into safetensors, without running what it holds.
CONVERTIBLE_SUFFIXES: Final = (".bin", ".pt", ".pth")
_TEXT_SUFFIXES: Final = (".json", ".txt", ".model", ".spm", ".vocab", ".jinja")
# The folders of sentence-transformers' modules; all others (onnx/, openvino/, runs/) are not read.
_MODULE_FOLDER = re.compile(r"\d+_[A-Za-z]+")
_SHARD = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin|pt|pth)")
# Training leaves these beside the weights. They are no weights, and they are not taken.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|trainer_state)\.\w+")
MAX_CONFIG_BYTES: Final = 16 << 20


def check_name(source: str, name: str) -> None:
    """FetchError for a file name that would lead out of the checkpoint's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable() or not path.parts:
        raise FetchError(
            f"{source}: the file name {name!r} leads out of the checkpoint's folder",
            cause="the repository is broken or hostile",
            next_step="name another checkpoint in the stack file",
        )


def needed_files(model: Model, names: Iterable[str]) -> list[str]:
    """The files to take, of all that a checkpoint has.

    Raises FetchError for Python files, for weights that exist only as pickles (unless the stack file allows
    them by name) and where config.json or the weights are missing.
    """
    names = sorted(names)
    for name in names:
        check_name(model.source, name)
    inside = [name for name in names if _is_read(name)]
    _refuse_code_files(model, inside)
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
    """FetchError for a config.json that names code of the repository's own (`auto_map`), unless that is
    allowed.
    """
    if model.allow_remote_code:
        return
    try:
        if config.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {MAX_CONFIG_BYTES:,} bytes")
        values = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FetchError(
            f"{config}: not valid JSON: {str(error)[:200]}",
            cause="the file is damaged",
            next_step="fetch the checkpoint again, or name another one",
        ) from None
    if isinstance(values, dict) and values.get("auto_map"):
        named = values["auto_map"]
        classes = _some(sorted(map(str, named.values()))) if isinstance(named, dict) else str(named)[:100]
        raise _remote_code(model, f"its config.json names code of its own (auto_map: {classes})")


def _remote_code(model: Model, what: str) -> FetchError:
    return FetchError(
        f"{model.source}: {what}",
        cause="such a model may not be what its config.json says, and its code is not ours to run",
        next_step=f"name a checkpoint of a standard architecture, or set allow_remote_code = true under "
        f"[models.{model.name}] (the code is still never downloaded or run)",
    )


def folder_files(source: Path) -> list[str]:
    """Names of all files under `source`; FetchError for a link whose target lies outside."""
    if not source.is_dir():
        raise FetchError(
            f"{source}: there is no such folder",
            cause="the checkpoint is not there yet, or `source` in the stack file is wrong",
            next_step="correct `source` (relative to the stack file); the demo's models: "
            f"build-engines demo-models {source.parent}",
        )
    root = os.path.realpath(source)
    names: list[str] = []
    for folder, folders, files in os.walk(source):
        for entry in (*folders, *files):
            path = os.path.join(folder, entry)
            target = os.path.realpath(path)
            if os.path.islink(path) and os.path.commonpath((root, target)) != root:
                raise FetchError(
                    f"{path}: a link that leaves the checkpoint's folder (to {target})",
                    cause="a cache of the hub is made of such links; others may be hostile",
                    next_step="copy the folder with its links resolved (cp -rL), or name the hub id",
                )
        names += [Path(folder, name).relative_to(source).as_posix() for name in files]
    return names


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
