"""A checkpoint folder read tensor by tensor: config.json and safetensors (one file or shards), nothing else.

The safetensors header is parsed here rather than through the library because numpy has no bfloat16 and the
library's numpy reader refuses it; the format is a length, a JSON table and raw bytes
(https://huggingface.co/docs/safetensors/index#format). One tensor is in memory at a time.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from build_engines.errors import ExportError
from build_engines.untrusted import read_json as read_bounded

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

# Widths of the storage types a float weight may have; BF16 is widened by hand.
_NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# A shard of a large mixture of experts has 50,000 tensors of some 100 bytes each.
MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 17
MAX_DIMENSIONS = 8
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: absolute byte range [start, end) of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(slots=True)
class Checkpoint:
    """Tensors of one folder by name; remembers which were read, so that nothing is left out in silence."""

    folder: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    used: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        return name in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def entry(self, name: str) -> TensorEntry:
        try:
            return self.entries[name]
        except KeyError:
            raise missing_tensors(self, [name]) from None

    def claim(self, name: str, shape: tuple[int, ...]) -> None:
        """Mark a tensor as used and check its shape now, long before its bytes are wanted.

        Raises:
            ExportError: the tensor is missing, or its shape is not what config.json promises.
        """
        found = self.entry(name).shape
        if found != shape:
            raise ExportError(
                f"{self.folder}: tensor {name} has shape {list(found)}, config.json implies {list(shape)}",
                cause="config.json and the weights belong to different models, or heads were pruned",
                next_step="use a folder whose config.json was saved together with its weights",
            )
        self.used.add(name)

    def read(self, name: str) -> FloatArray:
        """Return the tensor as contiguous float32, whatever float type it is stored in."""
        entry = self.float_entry(name)
        count = math.prod(entry.shape)
        raw: Array = np.fromfile(entry.file, dtype=_NUMPY_TYPES[entry.dtype], count=count, offset=entry.start)
        if raw.size != count:
            raise _damaged(entry.file, "it ends before its last tensor")
        return widened(raw, entry.dtype).reshape(entry.shape)

    def mapped(self, name: str) -> Array:
        """The stored tensor mapped into memory, for `widened` in parts: no byte is read before it is used."""
        entry = self.float_entry(name)
        try:
            return np.memmap(entry.file, _NUMPY_TYPES[entry.dtype], "r", entry.start, entry.shape)
        except (OSError, ValueError) as error:
            raise _damaged(entry.file, str(error)) from error

    def float_entry(self, name: str) -> TensorEntry:
        """The entry of a tensor that is stored as floats, or ExportError."""
        entry = self.entry(name)
        if entry.dtype not in _NUMPY_TYPES:
            raise ExportError(
                f"{self.folder}: tensor {name} is stored as {entry.dtype}, not as floats",
                cause="the checkpoint was quantized already",
                next_step="export from the original FP32, FP16 or BF16 checkpoint",
            )
        return entry

    def unused(self, harmless: Iterable[str]) -> list[str]:
        """Names neither read nor matched by one of the `harmless` regular expressions."""
        patterns = [re.compile(pattern) for pattern in harmless]
        left = (name for name in self.entries if name not in self.used)
        return sorted(name for name in left if not any(p.search(name) for p in patterns))


def widened(raw: Array, dtype: str) -> FloatArray:
    """Stored values as contiguous float32; BF16 is the upper half of a float32."""
    if dtype == "BF16":
        wide = np.ascontiguousarray(raw).astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return np.ascontiguousarray(raw, dtype=np.float32)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and the table of tensors of `folder`; no weight is loaded.

    Raises:
        ExportError: a file is missing or damaged, or the weights are pickled.
    """
    config = read_json(folder / "config.json")
    return Checkpoint(folder, config, read_weights_table(folder))


@contextlib.contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """What a block that only reads settings raises over a value of the wrong type, as ExportError."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ExportError(
            f"{path} holds a value of the wrong type or size: {error}",
            cause="the file is damaged, or was edited by hand",
            next_step="correct it, or fetch the checkpoint again",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ExportError(
            f"{path} does not exist",
            cause="the folder is not a Hugging Face checkpoint, or its download did not finish",
            next_step="run `build-engines fetch STACK`, or point `source` at the folder with config.json",
        )
    loaded = read_bounded(path, ExportError)
    if not isinstance(loaded, dict):
        raise ExportError(f"{path} holds a {type(loaded).__name__}, not a JSON object")
    return loaded


def read_weights_table(folder: Path) -> dict[str, TensorEntry]:
    """Name -> place of every tensor in the folder's safetensors file or shards."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return _canonical(read_header(single), folder)
    if index.is_file():
        return _canonical(_read_shards(index), folder)
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles:
        raise ExportError(
            f"{folder} holds pickled weights ({pickles[0]}), the export reads safetensors only",
            cause="loading a pickle runs whatever code is inside it",
            next_step="choose a revision with safetensors, or set allow_pickle = true for this model in the "
            "stack file and run `build-engines fetch STACK`, which converts them",
        )
    raise ExportError(
        f"{folder} holds no model.safetensors",
        cause="the folder is incomplete, or is not a checkpoint",
        next_step="run `build-engines fetch STACK`",
    )


def missing_tensors(checkpoint: Checkpoint, names: list[str]) -> ExportError:
    architectures = checkpoint.config.get("architectures") or "not stated"
    return ExportError(
        f"{checkpoint.folder}: the weights lack {', '.join(names)}",
        cause=f"the checkpoint is of another architecture (config.json: {architectures}) or incomplete",
        next_step="use the task this checkpoint was trained for, or fetch it again",
    )


def _read_shards(index: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ExportError(f"{index} has no weight_map")
    entries: dict[str, TensorEntry] = {}
    with well_formed(index):
        shards = sorted({Path(shard).name for shard in weight_map.values()})
    for shard in shards:
        # A shard name is a plain file name: an index must not be able to point outside its folder.
        path = index.parent / shard
        if not path.is_file():
            raise ExportError(
                f"{path} is named by {index.name} but does not exist",
                next_step="run `build-engines fetch STACK` to finish the download",
            )
        entries.update(read_header(path))
    lost = sorted(set(weight_map) - set(entries))
    if lost:
        raise ExportError(f"{index} promises tensors that no shard holds: {', '.join(lost[:5])}")
    return entries


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file; ExportError where it is damaged or cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _damaged(path, "it is shorter than a header")
        length = struct.unpack("<Q", prefix)[0]
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(path, f"its header claims {length} bytes")
        header = file.read(length)
    # Each tensor has one brace and two brackets, counted before they become objects.
    if max(2 * header.count(b"{"), header.count(b"[")) > 2 * MAX_TENSORS:
        raise _damaged(path, f"its header has more than {MAX_TENSORS:,} tensors")
    try:
        table = json.loads(header).items()
        return {name: _entry(path, 8 + length, size, info) for name, info in table if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read ({str(error)[:200]})") from error


def _entry(path: Path, base: int, size: int, info: dict[str, Any]) -> TensorEntry:
    offsets, shape = _sizes(info["data_offsets"]), _sizes(info["shape"])
    start, end = (base + offset for offset in offsets)
    if len(shape) > MAX_DIMENSIONS:
        raise _damaged(path, f"a tensor has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    if not base <= start <= end <= size:
        raise _damaged(path, "it is shorter than its header says")
    width = _WIDTHS.get(info["dtype"])
    # In Python's integers: a product that wraps around would fit any length.
    if width and end - start != width * math.prod(shape):
        raise _damaged(path, f"a tensor of shape {list(shape)} does not fill its {end - start} bytes")
    return TensorEntry(path, str(info["dtype"]), shape, start, end)


def _sizes(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(size) is int and size >= 0 for size in found):
        raise ValueError(f"{found!r:.60} are no sizes")
    return tuple(found)


def _canonical(entries: dict[str, TensorEntry], folder: Path) -> dict[str, TensorEntry]:
    """Give the norms of checkpoints converted from TensorFlow (gamma, beta) their present names."""
    renamed = {
        re.sub(
            r"(LayerNorm\.)(gamma|beta)$", lambda m: m[1] + ("weight" if m[2] == "gamma" else "bias"), name
        ): entry
        for name, entry in entries.items()
    }
    if len(renamed) != len(entries):
        raise ExportError(f"{folder}: a norm is stored both as gamma/beta and as weight/bias")
    return renamed


def _damaged(path: Path, detail: str) -> ExportError:
    return ExportError(
        f"{path} is damaged: {detail}",
        cause="the download or copy was cut short, or the file was altered",
        next_step="delete it and run `build-engines fetch STACK`",
    )
