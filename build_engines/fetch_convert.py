"""Torch pickles that the stack file allows, rewritten as safetensors so that nothing later reads a pickle."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from build_engines.errors import FetchError
from build_engines.fetch_rules import CONVERTIBLE_SUFFIXES
from build_engines.untrusted import read_json

_MOST_TIES = 4
_INDEX = "pytorch_model.bin.index.json"


def convert_pickles(folder: Path, names: list[str]) -> list[str]:
    """Replace each pickle among `names` (relative to `folder`) by a safetensors file; return the new list.

    Only tensors are read (torch's weights_only loader refuses everything else). Raises FetchError for a
    pickle that holds more, or is damaged.
    """
    result: list[str] = []
    for name in names:
        path = folder / name
        if not name.endswith(CONVERTIBLE_SUFFIXES):
            result.append(name)
            continue
        target = path.with_name(_safe_name(path.name))
        _convert(path, target)
        path.unlink()
        result.append(target.relative_to(folder).as_posix())
    if _INDEX in result and result != sorted(names):
        _convert_index(folder)
        result[result.index(_INDEX)] = "model.safetensors.index.json"
    return sorted(result)


def _safe_name(name: str) -> str:
    return name.rsplit(".", 1)[0].replace("pytorch_model", "model") + ".safetensors"


def _convert(path: Path, target: Path) -> None:
    import pickle

    import torch
    from safetensors.torch import save_file

    _refuse_packed(path)
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FetchError(
            f"{path.name}: cannot be read as weights: {str(error).splitlines()[0][:200]}",
            cause="the file is damaged, or holds more than tensors",
            next_step="name a checkpoint with model.safetensors",
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FetchError(f"{path.name}: holds no table of tensors", next_step="name another checkpoint")
    _refuse_stretched(path, state)
    # Tied weights share memory, which safetensors does not store.
    save_file({str(key): value.clone().contiguous() for key, value in state.items()}, target)


def _refuse_packed(path: Path) -> None:
    """torch stores tensors as they are; compressed they could be of any size, whatever the file's is."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError):
        return  # torch's older format, or damaged: torch says so
    if packed:
        raise FetchError(
            f"{path.name}: the archive is compressed, and torch writes none",
            cause="the file is hostile, or was packed again",
            next_step="name a checkpoint with model.safetensors",
        )


def _refuse_stretched(path: Path, state: dict[Any, Any]) -> None:
    """Strides let four bytes stand for a tensor of any size, which safetensors would have to hold."""
    size = path.stat().st_size
    sizes = {str(key): value.numel() * value.element_size() for key, value in state.items()}
    # Tied weights are stored once and written for each of their names.
    if any(found > size for found in sizes.values()) or sum(sizes.values()) > _MOST_TIES * size:
        largest = max(sizes, key=lambda key: sizes[key])
        raise FetchError(
            f"{path.name}: its tensors take {sum(sizes.values()):,} bytes, {largest[:100]!r} "
            f"{sizes[largest]:,} of them, and the file has {size:,}",
            cause="tensors repeat what is stored once",
            next_step="name a checkpoint with model.safetensors",
        )


def _convert_index(folder: Path) -> None:
    index = read_json(folder / _INDEX, FetchError)
    try:
        index["weight_map"] = {tensor: _safe_name(file) for tensor, file in index["weight_map"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise FetchError(f"{_INDEX}: no weight_map of file names ({error!r:.100})") from None
    written = folder / "model.safetensors.index.json"
    # Not through a link: one that the checkpoint has is the same file as the user's.
    written.unlink(missing_ok=True)
    written.write_text(json.dumps(index), encoding="utf-8")
    (folder / _INDEX).unlink()
