"""Typed readers for calibration and evaluation data, from a file of the user or from the bundled sets.

A reference is either ``bundled:<set>:<split>`` or a path. What a file may hold:

==========  ==========================================================================================
``.jsonl``  one object per line: ``{"text", "label"?}`` or ``{"query", "passages", "relevance"}`` or
            ``{"messages": [{"role", "content"}, ...]}``
``.csv``    RFC 4180 with a header: ``text`` and, optionally, ``label``
``.txt``    one text per line
==========  ==========================================================================================

Files are UTF-8, with or without a byte order mark. Blank lines are skipped; every other line that does
not fit is a `DataError` naming the file and the line, because a silently dropped line changes what the
accuracy gates measure.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_engines.errors import DataError
from calibration.reading import (
    BUNDLED,
    SPLITS,
    bad_line,
    check_keys,
    data_file,
    file_suffix,
    jsonl_objects,
    kind,
    listed,
    nearest,
    numbered_lines,
    read_text,
    sample,
    valid_text,
)

__all__ = [
    "BUNDLED",
    "ROLES",
    "SPLITS",
    "Conversation",
    "Message",
    "RankingGroup",
    "Review",
    "data_file",
    "load_conversations",
    "load_groups",
    "load_texts",
]

ROLES = ("system", "user", "assistant")
_SUFFIXES = (".jsonl", ".csv", ".txt")
# What each bundled set holds, in the words of an error message.
_HOLDS = {"reviews": "texts", "ranking": "queries with passages", "conversations": "conversations"}


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


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; ``role`` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Either the turns of a conversation, in order, or a plain text for a model without a chat template.

    An optional system message comes first, then user and assistant take turns, the user first: chat
    templates refuse any other order. The last turn may be either's.
    """

    messages: tuple[Message, ...]
    text: str | None

    def turns(self) -> list[dict[str, str]]:
        """``messages`` as chat templates take them: ``[{"role": ..., "content": ...}, ...]``."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


def load_texts(
    ref: str | Path, *, limit: int | None = None, seed: int = 0, labels: Sequence[str] | None = None
) -> list[Review]:
    """Read texts from JSONL, CSV or TXT, in file order.

    ``limit`` keeps that many, chosen by ``seed`` alone (see `sample`). With ``labels``, every text must
    carry one of them: pass the model's label names where accuracy is measured.

    Raises `DataError` naming the file and line of the first text that does not fit.
    """
    path = data_file(ref)
    _check_set(ref, ("reviews",))
    numbered = list(_reviews(path))
    if labels is not None:
        for line, review in numbered:
            _check_label(path, line, review.label, labels)
    return sample(path, [review for _, review in numbered], limit, seed)


def load_groups(ref: str | Path, *, limit: int | None = None, seed: int = 0) -> list[RankingGroup]:
    """Read query/passages groups from JSONL, in file order; ``limit`` and ``seed`` as in `load_texts`.

    Raises `DataError` naming the file and line of the first group that does not fit.
    """
    path = data_file(ref)
    _check_set(ref, ("ranking",))
    file_suffix(path, (".jsonl",))
    groups = [
        _group(path, line, record)
        for line, record in jsonl_objects(path, read_text(path), {"query", "passages", "relevance"}, set())
    ]
    return sample(path, groups, limit, seed)


def load_conversations(ref: str | Path, *, limit: int | None = None, seed: int = 0) -> list[Conversation]:
    """Read conversations from JSONL, or plain texts from JSONL, CSV or TXT, in file order.

    A JSONL line is ``{"messages": [...]}`` or ``{"text"}``, both kinds in one file if need be; a label is
    read and not used. ``limit`` and ``seed`` as in `load_texts`.

    Raises `DataError` naming the file and line of the first conversation or text that does not fit.
    """
    path = data_file(ref)
    _check_set(ref, ("conversations", "reviews"))
    if file_suffix(path, _SUFFIXES) == ".jsonl":
        loaded = list(_jsonl_conversations(path))
    else:
        loaded = [Conversation((), review.text) for _, review in _reviews(path)]
    return sample(path, loaded, limit, seed)


def _check_set(ref: str | Path, wanted: Sequence[str]) -> None:
    if isinstance(ref, Path) or not ref.startswith("bundled:"):
        return
    found = ref.split(":")[1]
    if found not in wanted:
        raise DataError(
            f"{ref!r} holds {_HOLDS[found]}, not {_HOLDS[wanted[0]]}",
            next_step=f"use {ref.replace(found, wanted[0])!r}",
        )


def _reviews(path: Path) -> Iterator[tuple[int, Review]]:
    readers: dict[str, Callable[[Path, str], Iterator[tuple[int, Review]]]] = {
        ".jsonl": _jsonl_reviews,
        ".csv": _csv_reviews,
        ".txt": _txt_reviews,
    }
    reader = readers[file_suffix(path, _SUFFIXES)]
    return reader(path, read_text(path))


def _jsonl_reviews(path: Path, text: str) -> Iterator[tuple[int, Review]]:
    for line, record in jsonl_objects(path, text, {"text"}, {"label"}):
        label = record.get("label")
        if label is not None and not isinstance(label, str):
            raise bad_line(path, line, f"'label' must be a string, not {kind(label)}")
        yield line, Review(valid_text(path, line, "text", record["text"]), _label(path, line, label))


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
                    raise bad_line(path, line, f"{len(row)} fields where the header has {len(header)}")
                record = dict(zip(header, row, strict=True))
                label = _label(path, line, record.get("label") or None)
                yield line, Review(valid_text(path, line, "text", record["text"]), label)
            # A quoted field may span lines: the next record starts after the last line read.
            line = rows.line_num + 1
    except csv.Error as error:
        raise bad_line(path, line, f"not valid CSV: {error}") from None


def _csv_header(path: Path, line: int, row: list[str]) -> list[str]:
    header = [name.strip() for name in row]
    check_keys(path, line, header, ({"text"}, {"label"}))
    return header


def _txt_reviews(path: Path, text: str) -> Iterator[tuple[int, Review]]:
    for line, content in numbered_lines(path, text):
        yield line, Review(valid_text(path, line, "text", content), None)


def _jsonl_conversations(path: Path) -> Iterator[Conversation]:
    for line, record in jsonl_objects(path, read_text(path), set(), {"messages", "text", "label"}):
        if "messages" in record:
            if extra := sorted(set(record) - {"messages"}):
                raise bad_line(path, line, f"{listed(extra)} beside 'messages'; a line has one or the other")
            yield Conversation(_messages(path, line, record["messages"]), None)
        elif "text" in record:
            yield Conversation((), valid_text(path, line, "text", record["text"]))
        else:
            raise bad_line(path, line, f"messages or text missing; found: {listed(record) or 'nothing'}")


def _messages(path: Path, line: int, found: object) -> tuple[Message, ...]:
    if not isinstance(found, list) or not found:
        raise bad_line(path, line, "'messages' must be a list with at least one message")
    messages = tuple(_message(path, line, f"messages[{i}]", item) for i, item in enumerate(found))
    first = 1 if messages[0].role == "system" else 0
    if len(messages) == first:
        raise bad_line(path, line, "a system message alone; a user message must follow it")
    for i, message in enumerate(messages[first:], start=first):
        due = "assistant" if (i - first) % 2 else "user"
        if message.role != due:
            problem = f"messages[{i}] has the role {message.role!r} where {due!r} is due"
            raise bad_line(path, line, f"{problem} (a system message may come first, then they take turns)")
    return messages


def _message(path: Path, line: int, name: str, found: object) -> Message:
    if not isinstance(found, dict):
        raise bad_line(path, line, f"'{name}' must be an object, not {kind(found)}")
    check_keys(path, line, list(found), ({"role", "content"}, set()), f"{name}: ")
    role = found["role"]
    if role not in ROLES:
        what = f"unknown role{nearest(role, ROLES)}" if isinstance(role, str) else f"the role is {kind(role)}"
        raise bad_line(path, line, f"{name}: {what}; allowed: {listed(ROLES)}")
    return Message(role, valid_text(path, line, f"{name}.content", found["content"]))


def _group(path: Path, line: int, record: dict[str, Any]) -> RankingGroup:
    passages, relevance = record["passages"], record["relevance"]
    if not isinstance(passages, list) or not passages:
        raise bad_line(path, line, "'passages' must be a list with at least one text")
    if not isinstance(relevance, list) or len(relevance) != len(passages):
        raise bad_line(path, line, f"'relevance' must be a list of {len(passages)} numbers, one per passage")
    for grade in relevance:
        if isinstance(grade, bool) or not isinstance(grade, int | float) or not _is_grade(grade):
            is_number = isinstance(grade, int | float)
            shown = f"{grade!r:.40}" if is_number else f"that is {kind(grade)}"
            raise bad_line(path, line, f"relevance {shown} is not a finite number of at least 0")
    if not any(relevance):
        raise bad_line(path, line, "no passage has a relevance above 0, so there is nothing to rank")
    return RankingGroup(
        valid_text(path, line, "query", record["query"]),
        tuple(valid_text(path, line, f"passages[{i}]", passage) for i, passage in enumerate(passages)),
        tuple(float(grade) for grade in relevance),
    )


def _is_grade(value: float) -> bool:
    try:
        return math.isfinite(value) and value >= 0
    except OverflowError:  # an integer beyond the range of a double
        return False


def _label(path: Path, line: int, value: str | None) -> str | None:
    return None if value is None else valid_text(path, line, "label", value.strip())


def _check_label(path: Path, line: int, label: str | None, labels: Sequence[str]) -> None:
    if label is None:
        raise bad_line(path, line, f"no label, and the model's labels are {listed(labels)}")
    if label not in labels:
        hint = nearest(label, labels)
        raise bad_line(path, line, f"the label is not one of the model's: {listed(labels)}{hint}")
