"""The stack summary (stack.json, written beside the Triton repository) and the evaluation data it names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import BenchError
from ..types import Task

TASKS = ("classify", "embed", "rerank")
REBUILD = "write it again with `triton-repo write STACK`"


@dataclass(frozen=True, slots=True)
class Item:
    """One unit of work: a text (label if known), or a query with its passages and their relevance."""

    text: str
    label: str | None = None
    passages: tuple[str, ...] = ()
    relevance: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchModel:
    """One model of the stack: its checkpoint, its served variants and the data to measure them on."""

    name: str
    task: Task
    source: Path
    variants: Mapping[str, str]  # precision -> Triton model name
    max_length: int
    overflow: str
    labels: tuple[str, ...] | None
    pooling: str | None
    normalize: bool
    items: tuple[Item, ...]


def read_summary(path: Path, only: tuple[str, ...] = ()) -> tuple[BenchModel, ...]:
    """The encoders to measure, all or those named; BenchError names the file and the field that is wrong.

    Models that generate are read by `generate_data`.
    """
    document = read_json(path)
    models = document.get("models")
    if not isinstance(models, dict) or not models:
        raise BenchError(f"{path}: no models in it", next_step=REBUILD)
    unknown = [name for name in only if name not in models]
    if unknown:
        raise BenchError(f"{path}: no model {', '.join(unknown)}; it has {', '.join(sorted(models))}")
    encoders = {
        name: entry
        for name, entry in models.items()
        if (not only or name in only) and not (isinstance(entry, dict) and entry.get("task") == "generate")
    }
    return tuple(_read_model(path, name, entry) for name, entry in encoders.items())


def read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BenchError(f"{path}: no such file", next_step=REBUILD) from None
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: not JSON ({error})", next_step=REBUILD) from None
    if not isinstance(document, dict):
        raise BenchError(f"{path}: not a stack summary", next_step=REBUILD)
    return document


def _read_model(path: Path, name: str, entry: object) -> BenchModel:
    if not isinstance(entry, dict):
        raise BenchError(f"{path}: models.{name} is not an object", next_step=REBUILD)
    where = f"{path}: models.{name}"
    task = field_of(where, entry, "task", lambda value: value in TASKS, f"one of {', '.join(TASKS)}")
    source = Path(field_of(where, entry, "source", is_text, "the checkpoint's folder"))
    variants = field_of(where, entry, "variants", is_text_map, "precisions with their Triton model names")
    max_length = field_of(
        where, entry, "max_length", lambda value: type(value) is int and value > 0, "a length"
    )
    evaluation = field_of(where, entry, "evaluation", lambda value: value is None or is_text(value), "a path")
    if not source.is_dir():
        raise BenchError(
            f"{where}.source: {source} is not a folder; the baseline needs the checkpoint",
            next_step="build the stack on this machine first",
        )
    if evaluation is None:
        raise BenchError(
            f"{where}.evaluation is empty: there is nothing to measure on",
            next_step=f"give model {name} `evaluation` data in the stack file and write the repository again",
        )
    labels = entry.get("labels")
    return BenchModel(
        name=name,
        task=cast("Task", task),
        source=source,
        variants=variants,
        max_length=max_length,
        overflow=str(entry.get("overflow", "truncate")),
        labels=tuple(str(label) for label in labels) if isinstance(labels, list) else None,
        pooling=entry.get("pooling"),
        normalize=bool(entry.get("normalize", True)),
        items=read_items(Path(evaluation), task),
    )


def field_of(
    where: str, entry: Mapping[str, Any], name: str, valid: Callable[[Any], bool], expected: str
) -> Any:
    if name not in entry:
        raise BenchError(f"{where}: no {name}", next_step=REBUILD)
    if not valid(entry[name]):
        raise BenchError(f"{where}.{name}: {entry[name]!r} is not {expected}", next_step=REBUILD)
    return entry[name]


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(is_text(name) for name in value.values())


def read_items(path: Path, task: str) -> tuple[Item, ...]:
    """JSONL of {"text", "label"?} or {"query", "passages", "relevance"}; BenchError names file and line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror})", next_step=REBUILD) from None
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line), task))
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{path}, line {number}: not a {task} record ({error!r})") from None
    if not items:
        raise BenchError(f"{path}: holds no record")
    return tuple(items)


def _item(record: dict[str, Any], task: str) -> Item:
    if task != "rerank":
        text, label = record["text"], record.get("label")
        if not is_text(text):
            raise ValueError("text is not a non-empty string")
        return Item(text, None if label is None else str(label))
    passages = tuple(record["passages"])
    relevance = tuple(float(value) for value in record["relevance"])
    if not passages or len(passages) != len(relevance) or not all(map(is_text, passages)):
        raise ValueError("passages and relevance do not belong together")
    if not is_text(record["query"]):
        raise ValueError("query is not a non-empty string")
    return Item(record["query"], None, passages, relevance)
