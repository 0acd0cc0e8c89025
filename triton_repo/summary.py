"""stack.json: what is served, for the client's benchmark; and the evaluation data that it measures with."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from build_engines.atomic import write_text
from build_engines.stack import DataRef, Model, Stack
from triton_repo.engine_entries import Entry
from triton_repo.runtime.seal import RECORD, sealed_files

FILE = "stack.json"


def now() -> str:
    """When something was written: what was written together has the same, what came later a greater one."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def served_record(stack: Stack, entry: Entry, folder: Path, written: str) -> dict[str, Any]:
    """What served.json says of one version: what stack.json in `folder` is made of, when it was written, and
    the bytes of the card that the stack may take."""
    model, manifest = entry.model, entry.manifest
    return {
        "written": written,
        "usable_bytes": usable_bytes(stack),
        "stack": stack.name,
        "model": model.name,
        "precision": manifest["precision"],
        "name": entry.name,
        "facts": {
            "task": model.task,
            "target": manifest["target"],
            "source": str(stack.checkpoint_dir(model).absolute()),
            "evaluation": None if model.evaluation is None else str(_evaluation(folder, model.name)),
            **_limits(model, manifest["serving"]),
        },
    }


def usable_bytes(stack: Stack) -> int:
    return stack.card.memory_bytes - (stack.reserve_mib << 20)


def write_summary(records: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Write stack.json of what `served_record` gave, an entry for each model."""
    models: dict[str, Any] = {}
    stack = ""
    for record in records:
        stack = record["stack"]
        found = models.setdefault(record["model"], {**record["facts"], "variants": {}})
        found["variants"].setdefault(record["precision"], record["name"])
    summary = {"stack": stack, "models": models}
    write_text(folder / FILE, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    evaluation = [_evaluation(Path(), name) for name, found in models.items() if found["evaluation"]]
    sealed = sealed_files(folder, [FILE, *(path.as_posix() for path in evaluation)])
    write_text(folder / RECORD, json.dumps(sealed, indent=1) + "\n")


def _limits(model: Model, serving: Mapping[str, Any]) -> dict[str, Any]:
    if model.task == "generate":
        return {name: serving[name] for name in ("slots", "capacity", "chunk")}
    return {
        "max_length": serving["max_length"],
        "max_batch": serving["max_batch"],
        "labels": serving.get("labels"),
        "overflow": serving["overflow"],
        "pooling": serving.get("pooling") or model.pooling,
        "normalize": model.normalize,
    }


def _evaluation(folder: Path, model: str) -> Path:
    return folder / "evaluation" / f"{model}.jsonl"


def write_evaluation(models: Iterable[Model], folder: Path) -> None:
    """Copy each model's evaluation data as JSONL: the client needs nothing of the build tool to read that."""
    for model in {model.name: model for model in models}.values():
        if model.evaluation is not None:
            _write_records(model, model.evaluation, _evaluation(folder, model.name))


def _write_records(model: Model, data: DataRef, out: Path) -> None:
    from calibration.samples import load_conversations, load_groups, load_texts

    reference = data.path or data.spec
    records: list[dict[str, Any]]
    if model.task == "generate":
        records = [
            {"messages": found.turns()} if found.messages else {"text": found.text}
            for found in load_conversations(reference)
        ]
    elif model.task == "rerank":
        records = [
            {"query": group.query, "passages": group.passages, "relevance": group.relevance}
            for group in load_groups(reference)
        ]
    else:
        records = [
            {"text": review.text} | ({} if review.label is None else {"label": review.label})
            for review in load_texts(reference)
        ]
    write_text(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
