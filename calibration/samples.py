"""Typed readers for calibration and evaluation data, from a file of the user or from the bundled sets.

A reference is either ``bundled:<set>:<split>`` or a path. What a file may hold:

==========  ==========================================================================================
``.jsonl``  one object per line: ``{"text", "label"?}`` or ``{"query", "passages", "relevance"}``
``.csv``    RFC 4180 with a header: ``text`` and, optionally, ``label``
``.txt``    one text per line
==========  ==========================================================================================

Files are UTF-8, with or without a byte order mark. Blank lines are skipped; every other line that does
not fit is a `DataError` naming the file and the line, because a silently dropped line changes what the
accuracy gates measure.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from build_engines.errors import DataError

__all__ = ["BUNDLED", "SPLITS", "RankingGroup", "Review", "data_file", "load_groups", "load_texts"]

BUNDLED = ("reviews", "ranking")
SPLITS = ("train", "calibration", "evaluation")
_SUFFIXES = (".jsonl", ".csv", ".txt")
_DATA = Path(__file__).parent / "data"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Review:
    """One text and, where the data has it, its label."""

    text: str
    label: str | None


@dataclass(frozen=True, slots=True)
class RankingGroup:
    """A query and its passages; ``relevance[i]`` grades ``passages[i]``: 0 is irrelevant, higher better."""

    query: str
    passages: tuple[str, ...]
    relevance: tuple[float, ...]


def data_file(ref: str | Path) -> Path:
    """The file a reference stands for, so that it can be digested; a bundled name is checked here."""
    if isinstance(ref, Path) or not ref.startswith("bundled:"):
        return Path(ref)
    parts = ref.split(":")
    if len(parts) != 3:
        raise DataError(
            f"{ref!r} is not a bundled data set",
            cause="a bundled reference has three parts: bundled:<set>:<split>",
            next_step=f"combine one of {_listed(BUNDLED)} with one of {_listed(SPLITS)}",
        )
    _check_name("bundled data set", parts[1], BUNDLED, ref)
    _check_name("split", parts[2], SPLITS, ref)
    return _DATA / f"{parts[1]}.{parts[2]}.jsonl"


def load_texts(
    ref: str | Path, *, limit: int | None = None, seed: int = 0, labels: Sequence[str] | None = None
) -> list[Review]:
    """Read texts from JSONL, CSV or TXT, in file order.

    ``limit`` keeps that many, chosen by ``seed`` alone (see `_sample`). With ``labels``, every text must
    carry one of them: pass the model's label names where accuracy is measured.

    Raises `DataError` naming the file and line of the first text that does not fit.
    """
    path = data_file(ref)
    if isinstance(ref, str) and ref.startswith("bundled:ranking:"):
        raise DataError(
            f"{ref!r} holds queries with passages, not texts",
            next_step=f"use {ref.replace('ranking', 'reviews')!r}",
        )
    readers: dict[str, Callable[[Path, str], Iterator[tuple[int, Review]]]] = {
        ".jsonl": _jsonl_reviews,
        ".csv": _csv_reviews,
        ".txt": _txt_reviews,
    }
    reader = readers[_suffix(path, _SUFFIXES)]
    numbered = list(reader(path, _read(path)))
    if labels is not None:
        for line, review in numbered:
            _check_label(path, line, review.label, labels)
    return _sample(path, [review for _, review in numbered], limit, seed)


def load_groups(ref: str | Path, *, limit: int | None = None, seed: int = 0) -> list[RankingGroup]:
    """Read query/passages groups from JSONL, in file order; ``limit`` and ``seed`` as in `load_texts`.

    Raises `DataError` naming the file and line of the first group that does not fit.
    """
    path = data_file(ref)
    if isinstance(ref, str) and ref.startswith("bundled:reviews:"):
        raise DataError(
            f"{ref!r} holds texts, not queries with passages",
            next_step=f"use {ref.replace('reviews', 'ranking')!r}",
        )
    _suffix(path, (".jsonl",))
    groups = [
        _group(path, line, record)
        for line, record in _jsonl(path, _read(path), {"query", "passages", "relevance"}, set())
    ]
    return _sample(path, groups, limit, seed)


def _sample(path: Path, items: list[T], limit: int | None, seed: int) -> list[T]:
    """Keep ``limit`` items: those whose position hashes lowest with the seed, in file order.

    A hash instead of `random.sample`, whose choice may change between Python versions: the samples are part
    of what makes two builds the same. A larger limit keeps every item of a smaller one.
    """
    if not items:
        raise DataError(
            f"{path} holds no data",
            cause="the file is empty or has only blank lines",
            next_step="add at least one line, or name another file in the stack file",
        )
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise DataError(f"cannot take {limit} samples of {path}", next_step="ask for at least 1")
    ranked = sorted(range(len(items)), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    return [items[i] for i in sorted(ranked[:limit])]


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise _missing(path) from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not a data file", next_step="name a file inside it") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x})",
            cause="the file was saved in another encoding, such as CP949 or UTF-16",
            next_step="convert it, for example: iconv -f CP949 -t UTF-8 FILE > NEW",
        ) from None


def _jsonl_reviews(path: Path, text: str) -> Iterator[tuple[int, Review]]:
    for line, record in _jsonl(path, text, {"text"}, {"label"}):
        label = record.get("label")
        if label is not None and not isinstance(label, str):
            raise _bad(path, line, f"'label' must be a string, not {_kind(label)}")
        yield line, Review(_text(path, line, "text", record["text"]), _label(path, line, label))


def _csv_reviews(path: Path, text: str) -> Iterator[tuple[int, Review]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for row in rows:
            if header is None:
                header = _csv_header(path, line, row)
            elif row:
                if len(row) != len(header):
                    raise _bad(path, line, f"{len(row)} fields where the header has {len(header)}")
                record = dict(zip(header, row, strict=True))
                label = _label(path, line, record.get("label") or None)
                yield line, Review(_text(path, line, "text", record["text"]), label)
            # A quoted field may span lines: the next record starts after the last line read.
            line = rows.line_num + 1
    except csv.Error as error:
        raise _bad(path, line, f"not valid CSV: {error}") from None


def _csv_header(path: Path, line: int, row: list[str]) -> list[str]:
    header = [name.strip() for name in row]
    _check_keys(path, line, header, {"text"}, {"label"})
    return header


def _txt_reviews(path: Path, text: str) -> Iterator[tuple[int, Review]]:
    for line, content in _lines(text):
        yield line, Review(_text(path, line, "text", content), None)


def _group(path: Path, line: int, record: dict[str, Any]) -> RankingGroup:
    passages, relevance = record["passages"], record["relevance"]
    if not isinstance(passages, list) or not passages:
        raise _bad(path, line, "'passages' must be a list with at least one text")
    if not isinstance(relevance, list) or len(relevance) != len(passages):
        raise _bad(path, line, f"'relevance' must be a list of {len(passages)} numbers, one per passage")
    for grade in relevance:
        if isinstance(grade, bool) or not isinstance(grade, int | float) or not _is_grade(grade):
            raise _bad(path, line, f"relevance {grade!r} is not a finite number of at least 0")
    if not any(relevance):
        raise _bad(path, line, "no passage has a relevance above 0, so there is nothing to rank")
    return RankingGroup(
        _text(path, line, "query", record["query"]),
        tuple(_text(path, line, f"passages[{i}]", passage) for i, passage in enumerate(passages)),
        tuple(float(grade) for grade in relevance),
    )


def _is_grade(value: float) -> bool:
    try:
        return math.isfinite(value) and value >= 0
    except OverflowError:  # an integer beyond the range of a double
        return False


def _jsonl(
    path: Path, text: str, required: set[str], optional: set[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in _lines(text):
        try:
            record = json.loads(content, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            raise _bad(path, line, f"not valid JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise _bad(path, line, str(error) or "nested too deeply") from None
        if not isinstance(record, dict):
            raise _bad(path, line, f"expected an object, found {_kind(record)}")
        _check_keys(path, line, list(record), required, optional)
        yield line, record


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not str.splitlines: it also breaks at U+2028 and U+0085, which may stand inside a text.
    for number, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            yield number, content.removesuffix("\r")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key is given twice")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _text(path: Path, line: int, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _bad(path, line, f"'{key}' must be a string, not {_kind(value)}")
    if not value.strip():
        raise _bad(path, line, f"'{key}' is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _bad(path, line, f"'{key}' holds half of a surrogate pair, which is no character") from None
    return value


def _label(path: Path, line: int, value: str | None) -> str | None:
    return None if value is None else _text(path, line, "label", value.strip())


def _check_label(path: Path, line: int, label: str | None, labels: Sequence[str]) -> None:
    if label is None:
        raise _bad(path, line, f"no label, and the model's labels are {_listed(labels)}")
    if label not in labels:
        hint = _nearest(label, labels)
        raise _bad(path, line, f"label {label!r} is not one of the model's: {_listed(labels)}{hint}")


def _check_keys(path: Path, line: int, keys: list[str], required: set[str], optional: set[str]) -> None:
    known = sorted(required | optional)
    for key in keys:
        if key not in known:
            raise _bad(path, line, f"unknown key {key!r}{_nearest(key, known)}; allowed: {_listed(known)}")
        if keys.count(key) > 1:
            raise _bad(path, line, f"{key!r} is given twice")
    if lacking := sorted(required - set(keys)):
        raise _bad(path, line, f"{_listed(lacking)} missing; found: {_listed(keys) or 'nothing'}")


def _check_name(what: str, name: str, known: Sequence[str], ref: str) -> None:
    if name not in known:
        raise DataError(
            f"{ref!r}: unknown {what} {name!r}{_nearest(name, known)}",
            next_step=f"use one of {_listed(known)}",
        )


def _suffix(path: Path, allowed: Sequence[str]) -> str:
    suffix = path.suffix.lower()
    if suffix not in allowed:
        raise DataError(
            f"{path}: cannot read a {suffix or 'suffixless'} file here",
            cause="query/passages groups are read from JSONL only" if len(allowed) == 1 else None,
            next_step=f"save the data as {' or '.join(allowed)}",
        )
    return suffix


def _missing(path: Path) -> DataError:
    siblings: list[str] = []
    if path.parent.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in _SUFFIXES]
    return DataError(
        f"{path} does not exist{_nearest(path.name, siblings)}",
        cause=None if path.parent.is_dir() else f"the folder {path.parent} does not exist either",
        next_step="correct the path in the stack file; it is relative to that file",
    )


def _bad(path: Path, line: int, problem: str) -> DataError:
    return DataError(f"{path}, line {line}: {problem}")


def _nearest(name: str, known: Sequence[str]) -> str:
    lowered = {entry.lower(): entry for entry in known}
    matches = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f" (did you mean {lowered[matches[0]]!r}?)" if matches else ""


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", type(None): "null", str: "a string"}
    return names.get(type(value), "a number")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
