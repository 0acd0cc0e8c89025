"""Where an ONNX graph says its weights are: read off the file itself, before any library opens them.

A tensor may lie in another file, which the graph names by a path. ONNX Runtime 1.31 refuses paths of
initializers that leave the graph's folder; this does not rely on it. Here a path is a plain name, whatever
part of the graph has it, and of a served engine it is a file whose digest was checked.

The file is walked as protobuf: messages inside messages, each field a number and a value. Only lengths are
read of what is not on the way to a tensor, so a graph of gigabytes takes milliseconds per thousand nodes.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

MAX_FIELDS: Final = 20_000_000
_MAX_DEPTH: Final = 64
_VARINT, _FIXED64, _MESSAGE, _FIXED32 = 0, 1, 2, 5
# Fields that lead to tensors, by message: onnx.proto of IR version 13.
_WAYS: Final[Mapping[str, Mapping[int, str]]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}


class UnsafeGraph(Exception):
    """The file is no ONNX graph, or it names weights that it may not have."""


class External(NamedTuple):
    """One tensor's weights: `length` bytes (None: to the end) from `offset` of the file `location`."""

    location: str
    offset: int
    length: int | None


def check_external(graph: Path, listed: Collection[str] | None = None) -> None:
    """Raise UnsafeGraph unless all external weights of `graph` are whole and in files beside it.

    A file beside it is a plain name, no link, and one of `listed` where that is given.
    """
    sizes: dict[str, int] = {}
    for tensor in external_tensors(graph):
        name = tensor.location
        if name not in sizes:
            sizes[name] = _size(graph, name, listed)
        end = tensor.offset + (tensor.length or 0)
        if tensor.offset < 0 or (tensor.length or 0) < 0 or end > sizes[name]:
            raise UnsafeGraph(
                f"{graph}: the weights file {graph.parent / name} has {sizes[name]} bytes, "
                f"and a tensor is to lie at {tensor.offset} to {end}"
            )


def external_tensors(graph: Path) -> Iterator[External]:
    """Every tensor of the graph that lies in another file, wherever in the graph it is.

    Raises UnsafeGraph: the file is missing or no protobuf message.
    """
    try:
        with graph.open("rb") as file:
            if not file.seek(0, 2):
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                yield from _Walk(graph, content).tensors("Model", 0, len(content), 0)
    except OSError as error:
        raise UnsafeGraph(f"{graph}: cannot be read: {error.strerror or error}") from None


def _size(graph: Path, name: str, listed: Collection[str] | None) -> int:
    path = graph.parent / name
    if not name or Path(name).name != name or "\0" in name or path.is_symlink():
        raise UnsafeGraph(
            f"{graph}: its weights are at {name!r:.200}, and may only be in files of its own folder"
        )
    if listed is not None and name not in listed:
        raise UnsafeGraph(f"{graph}: its weights are in {name!r:.200}, which the manifest does not list")
    if not path.is_file():
        raise UnsafeGraph(f"{graph}: the weights file {path} is missing")
    return path.stat().st_size


class _Walk:
    """Over one file; counts fields, so that a hostile one ends."""

    def __init__(self, graph: Path, content: mmap.mmap) -> None:
        self._graph = graph
        self._content = content
        self._fields = 0

    def tensors(self, kind: str, start: int, end: int, depth: int) -> Iterator[External]:
        """The external tensors in the message of `kind` at [start, end)."""
        if depth > _MAX_DEPTH:
            raise self._damaged("is nested too deeply")
        entries = {}
        for number, first, last in self._messages(start, end):
            inner = _WAYS[kind].get(number)
            if inner == "Entry":
                key, value = self._entry(first, last)
                if key == "location" and "location" in entries:
                    raise self._damaged("has a tensor in two files")
                entries[key] = value
            elif inner is not None:
                yield from self.tensors(inner, first, last, depth + 1)
        if "location" in entries:
            yield self._external(entries)

    def _external(self, entries: Mapping[str, str]) -> External:
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries["length"]) if entries.get("length") else None
        except ValueError:
            raise self._damaged("has a tensor whose place is no number") from None
        return External(entries["location"], offset, length)

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        found = {1: "", 2: ""}
        try:
            for number, first, last in self._messages(start, end):
                found[number] = self._content[first:last].decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged("has a tensor's place in no UTF-8") from None
        return found[1], found[2]

    def _messages(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(field, start, end) of the fields with a length in [start, end); others are stepped over."""
        place = start
        while place < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise self._damaged(f"has more than {MAX_FIELDS:,} fields")
            key, place = self._varint(place, end)
            # Other readers drop what is beyond 32 bits, and find another field than we would.
            if not 8 <= key < 1 << 32:
                raise self._damaged("has a field of no number that there is")
            kind = key & 7
            if kind == _MESSAGE:
                length, place = self._varint(place, end)
                if length > end - place:
                    raise self._damaged("ends inside a field")
                yield key >> 3, place, place + length
                place += length
            elif kind == _VARINT:
                _, place = self._varint(place, end)
            elif kind in (_FIXED64, _FIXED32):
                place += 8 if kind == _FIXED64 else 4
            else:
                raise self._damaged("has a field of no kind that there is")
        if place != end:
            raise self._damaged("ends inside a field")

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while place < end and shift < 70:
            byte = self._content[place]
            value |= (byte & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if byte < 0x80:
                return value, place
        raise self._damaged("ends inside a number")

    def _damaged(self, how: str) -> UnsafeGraph:
        return UnsafeGraph(f"{self._graph} is not an ONNX graph: it {how}")
