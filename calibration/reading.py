"""Reading data files: UTF-8 text to numbered records, and errors that name the file and the line.

No error repeats what stands there: the texts are somebody's, and errors end up in logs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from build_engines.errors import DataError

__all__ = [
    "BUNDLED",
    "SPLITS",
    "bad_line",
    "check_keys",
    "data_file",
    "file_suffix",
    "jsonl_objects",
    "kind",
    "listed",
    "nearest",
    "numbered_lines",
    "read_text",
    "sample",
    "valid_text",
]

BUNDLED = ("reviews", "ranking", "conversations")
SPLITS = ("train", "calibration", "evaluation")
_SUFFIXES = (".jsonl", ".csv", ".txt")
_DATA = Path(__file__).parent / "data"

# Of one file. Python's texts take up to four times as much.
MAX_DATA_BYTES = 64 << 20
MAX_LINES = 1_000_000
MAX_LINE_CHARACTERS = 8_000_000
_LONGEST_NAME = 100

T = TypeVar("T")


def data_file(ref: str | Path) -> Path:
    """The file a reference stands for, so that it can be digested; a bundled name is checked here."""
    if isinstance(ref, Path) or not ref.startswith("bundled:"):
        return Path(ref)
    parts = ref.split(":")
    if len(parts) != 3:
        raise DataError(
            f"{ref!r} is not a bundled data set",
            cause="a bundled reference has three parts: bundled:<set>:<split>",
            next_step=f"combine one of {listed(BUNDLED)} with one of {listed(SPLITS)}",
        )
    _check_name("bundled data set", parts[1], BUNDLED, ref)
    _check_name("split", parts[2], SPLITS, ref)
    return _DATA / f"{parts[1]}.{parts[2]}.jsonl"


def sample(path: Path, items: list[T], limit: int | None, seed: int) -> list[T]:
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


def read_text(path: Path) -> str:
    raw = _read(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x})",
            cause="the file was saved in another encoding, such as CP949 or UTF-16",
            next_step="convert it, for example: iconv -f CP949 -t UTF-8 FILE > NEW",
        ) from None


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder, not a data file", next_step="name a file inside it")
        # A pipe would be waited for.
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is no regular file", next_step="name a file")
        with path.open("rb") as file:
            raw = file.read(MAX_DATA_BYTES + 1)
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if len(raw) > MAX_DATA_BYTES:
        raise DataError(
            f"{path} is larger than {MAX_DATA_BYTES >> 20} MiB",
            cause="calibration and the accuracy gates need some thousand texts, not all there are",
            next_step="name a file with a sample of them",
        )
    return raw


def jsonl_objects(
    path: Path, text: str, required: set[str], optional: set[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in numbered_lines(path, text):
        try:
            record = json.loads(content, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            raise bad_line(path, line, f"not valid JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise bad_line(path, line, str(error) or "nested too deeply") from None
        if not isinstance(record, dict):
            raise bad_line(path, line, f"expected an object, found {kind(record)}")
        check_keys(path, line, list(record), (required, optional))
        yield line, record


def numbered_lines(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, and their numbers. Raises DataError for too many, or too long a one."""
    if text.count("\n") > MAX_LINES:
        raise DataError(f"{path} has more than {MAX_LINES:,} lines", next_step="name a file with fewer")
    # Not str.splitlines: it also breaks at U+2028 and U+0085, which may stand inside a text.
    for number, content in enumerate(text.split("\n"), start=1):
        if len(content) > MAX_LINE_CHARACTERS:
            problem = f"{len(content):,} characters, more than {MAX_LINE_CHARACTERS:,}"
            raise bad_line(path, number, problem)
        if content.strip():
            yield number, content.removesuffix("\r")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key is given twice")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def valid_text(path: Path, line: int, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise bad_line(path, line, f"'{key}' must be a string, not {kind(value)}")
    if not value.strip():
        raise bad_line(path, line, f"'{key}' is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad_line(path, line, f"'{key}' holds half of a surrogate pair, which is no character") from None
    return value


def check_keys(
    path: Path, line: int, keys: list[str], allowed: tuple[set[str], set[str]], prefix: str = ""
) -> None:
    """Refuse keys that are neither of `allowed` (required, optional), given twice, or required and absent.

    An unknown one is named by its place: where a header is missing, keys are somebody's texts.
    """
    required, optional = allowed
    known = sorted(required | optional)
    for place, key in enumerate(keys, start=1):
        if key not in known:
            hint = nearest(key, known)
            raise bad_line(path, line, f"{prefix}key {place} is unknown{hint}; allowed: {listed(known)}")
        if keys.count(key) > 1:
            raise bad_line(path, line, f"{prefix}{key!r} is given twice")
    if lacking := sorted(required - set(keys)):
        found = listed(keys) or "nothing"
        raise bad_line(path, line, f"{prefix}{listed(lacking)} missing; found: {found}")


def _check_name(what: str, name: str, known: Sequence[str], ref: str) -> None:
    if name not in known:
        raise DataError(
            f"{ref!r}: unknown {what} {name!r}{nearest(name, known)}",
            next_step=f"use one of {listed(known)}",
        )


def file_suffix(path: Path, allowed: Sequence[str]) -> str:
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
        f"{path} does not exist{nearest(path.name, siblings)}",
        cause=None if path.parent.is_dir() else f"the folder {path.parent} does not exist either",
        next_step="correct the path in the stack file; it is relative to that file",
    )


def bad_line(path: Path, line: int, problem: str) -> DataError:
    return DataError(f"{path}, line {line}: {problem}")


def nearest(name: str, known: Sequence[str]) -> str:
    lowered = {entry.lower(): entry for entry in known}
    matches = difflib.get_close_matches(name.lower()[:_LONGEST_NAME], lowered, n=1, cutoff=0.5)
    return f" (did you mean {lowered[matches[0]]!r}?)" if matches else ""


def kind(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", type(None): "null", str: "a string"}
    return names.get(type(value), "a number")


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)
