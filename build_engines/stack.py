"""The stack file: TOML into frozen dataclasses, resolved once, before anything runs.

`load_stack` is the only way in. What it returns is complete (every default filled in, every source and data
path absolute) and consistent, so no later stage checks a key again. What it refuses, it refuses with a
StackError that names the file, the dotted key, the nearest valid name and what is allowed; docs/stack-file.md
lists them.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import cast

from build_engines.cards import (
    CARDS,
    KNOWN_COMPUTE_CAPABILITIES,
    RTX_COMPUTE_CAPABILITIES,
    Card,
    custom_card,
)
from build_engines.errors import StackError
from build_engines.stack_fields import Table, nearest, one_of, read_toml, show
from build_engines.stack_types import (
    BUNDLED_SETS,
    BUNDLED_SPLITS,
    DATA_SUFFIXES,
    DEFAULT_CONTEXT_MIB,
    DEFAULT_GATES,
    DEFAULT_RESERVE_MIB,
    FAMILIES,
    MAX_MODELS,
    METHODS,
    OVERFLOWS,
    POOLINGS,
    PRECISIONS,
    SMOOTHINGS,
    TARGETS,
    TASKS,
    Calibration,
    CalibrationMethod,
    DataRef,
    Family,
    Gates,
    Model,
    ModelShape,
    Overflow,
    Pooling,
    Precision,
    Queue,
    Smoothing,
    Stack,
    Target,
    Task,
)

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


_STACK_KEYS = ("name", "card", "targets", "reserve_mib", "context_mib", "models")
_CUSTOM_CARD_KEYS = ("memory_mib", "compute_capability")
# `name` comes from the table's own key and `source_dir` from `source`.
_MODEL_KEYS = tuple(f.name for f in dataclass_fields(Model) if f.name not in {"name", "source_dir"})
_CALIBRATION_KEYS = tuple(f.name for f in dataclass_fields(Calibration))
_QUEUE_KEYS = tuple(f.name for f in dataclass_fields(Queue))
_SHAPE_KEYS = tuple(f.name for f in dataclass_fields(ModelShape))


def load_stack(path: Path, *, build_dir: Path | None = None) -> Stack:
    """Read, check and resolve a stack file.

    `build_dir` defaults to build/<stack name> under the current folder. Raises StackError and nothing else.
    """
    top = Table(path, "", read_toml(path), _STACK_KEYS)
    name = _stack_name(top, path)
    card = _card(top)
    targets = cast(tuple[Target, ...], top.choices("targets", TARGETS, ("onnxruntime",)))
    if "tensorrt-rtx" in targets and card.compute_capability not in RTX_COMPUTE_CAPABILITIES:
        raise top.bad(
            "targets",
            f"names tensorrt-rtx, which does not compile for compute capability {card.compute_capability}",
            allowed=f"tensorrt-rtx with {one_of(RTX_COMPUTE_CAPABILITIES)}; else onnxruntime, tensorrt",
        )
    models = _models(top)
    for model in models.values():
        if "fp32" in model.precisions and "onnxruntime" not in targets:
            raise top.bad("targets", f"lacks onnxruntime, the only one that runs {model.name} in fp32")
    return Stack(
        name=name,
        path=path,
        card=card,
        targets=targets,
        models=models,
        reserve_mib=top.integer("reserve_mib", 0, 1 << 20, DEFAULT_RESERVE_MIB, unit="MiB"),
        context_mib=top.integer("context_mib", 0, 1 << 20, DEFAULT_CONTEXT_MIB, unit="MiB"),
        build_dir=build_dir if build_dir is not None else Path("build") / name,
    )


def _stack_name(top: Table, path: Path) -> str:
    name = cast(str, top.text("name", path.stem))
    if not _NAME.fullmatch(name):
        raise top.bad("name", f"is {show(name)}", allowed="a-z, 0-9 and '-', at most 64 characters")
    return name


def _card(top: Table) -> Card:
    value = top.raw("card")
    if isinstance(value, dict):
        table = top.table("card", _CUSTOM_CARD_KEYS)
        memory = table.integer("memory_mib", 1024, 1 << 20, unit="MiB")
        return custom_card(memory, table.choice("compute_capability", KNOWN_COMPUTE_CAPABILITIES))
    if isinstance(value, str) and value in CARDS:
        return CARDS[value]
    near = nearest(value, CARDS) if isinstance(value, str) else None
    raise top.bad(
        "card",
        f"is {show(value)}" if top.has("card") else "is missing",
        allowed=f'{one_of(CARDS)}, or {{ memory_mib = 16303, compute_capability = "12.0" }}',
        hint=f"did you mean {near!r}?" if near else None,
    )


def _models(top: Table) -> dict[str, Model]:
    tables = top.raw("models")
    if tables is not None and not isinstance(tables, dict):
        raise top.bad("models", f"must be a table, not {show(tables)}", hint="write [models.<name>]")
    if not tables:
        raise top.bad("models", "is empty", hint="add a table such as [models.sentiment]")
    if len(tables) > MAX_MODELS:
        raise top.bad("models", f"has {len(tables):,} models", allowed=f"at most {MAX_MODELS}")
    outer = top.table("models", tables)
    models: dict[str, Model] = {}
    for name in tables:
        if not _NAME.fullmatch(name):
            raise outer.bad(
                name,
                "is no model name: it becomes a folder and a Triton model",
                allowed="a-z, 0-9 and '-', at most 64 characters, first a letter or digit",
            )
        models[name] = _model(name, outer.table(name, _MODEL_KEYS))
    for model in models.values():
        for precision in model.precisions:
            if f"{model.name}-{precision}" in models:
                raise outer.bad(
                    f"{model.name}-{precision}",
                    f"collides with the {precision} engine of models.{model.name}, which has that name",
                    hint="rename one of the two models",
                )
    return models


def _model(name: str, table: Table) -> Model:
    task = cast(Task, table.choice("task", TASKS))
    source, source_dir = _source(table)
    if task != "embed":
        for key in ("pooling", "normalize"):
            if table.has(key):
                raise table.bad(
                    key, f"has no meaning for task {task!r}", hint="remove it; it is for embed only"
                )
    return Model(
        name=name,
        task=task,
        source=source,
        source_dir=source_dir,
        revision=_revision(table, source_dir),
        precisions=cast(tuple[Precision, ...], table.choices("precisions", PRECISIONS, ("int8", "fp16"))),
        max_batch=table.integer("max_batch", 1, 1024, 64, unit="texts"),
        max_length=table.integer("max_length", 8, 8192, 256, unit="tokens"),
        overflow=table.choice("overflow", OVERFLOWS, "truncate"),
        pooling=table.choice("pooling", POOLINGS, None),
        normalize=table.flag("normalize", True),
        shape=_shape(table, task) if table.has("shape") else None,
        allow_pickle=table.flag("allow_pickle", False),
        allow_remote_code=table.flag("allow_remote_code", False),
        calibration=_calibration(table, task),
        evaluation=_data(table, "evaluation", task),
        gates=_gates(table, task),
        queue=_queue(table),
        cache=table.flag("cache", False),
        instances=table.integer("instances", 1, 16, 1),
    )


def _source(table: Table) -> tuple[str, Path | None]:
    source = cast(str, table.text("source"))
    if source.startswith(("./", "../", "/")):
        return source, _resolve(table, source)
    if not _HUB_ID.fullmatch(source) or ".." in source or "--" in source:
        raise table.bad(
            "source",
            f"is {show(source)}",
            allowed='a hub id ("owner/name"), or a folder that starts with "./", "../" or "/"',
            hint="a folder is relative to the stack file",
        )
    return source, None


def _resolve(table: Table, value: str) -> Path:
    """An absolute path, relative to the stack file. Path.resolve would raise on a loop of links."""
    return Path(os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(table.file)), value)))


def _revision(table: Table, source_dir: Path | None) -> str | None:
    revision = cast("str | None", table.text("revision", None))
    if revision is None:
        return None
    if source_dir is not None:
        raise table.bad(
            "revision", "has no meaning for a folder", hint="remove it, or name a hub id as source"
        )
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise table.bad("revision", f"is {show(revision)}", allowed="a branch, a tag or a commit")
    return revision


def _data(table: Table, key: str, task: Task) -> DataRef | None:
    spec = cast("str | None", table.text(key, None))
    if spec is None:
        return None
    if spec.startswith("bundled:"):
        allowed = [f"bundled:{BUNDLED_SETS[task]}:{split}" for split in BUNDLED_SPLITS]
        return DataRef(spec=table.choice(key, allowed), path=None)
    if not spec.lower().endswith(DATA_SUFFIXES):
        raise table.bad(
            key,
            f"is {show(spec)}",
            allowed=f"a file that ends in {one_of(DATA_SUFFIXES)}, or bundled:{BUNDLED_SETS[task]}:<split>",
        )
    if task == "rerank" and not spec.lower().endswith(".jsonl"):
        raise table.bad(key, f"is {show(spec)}", allowed="for rerank a .jsonl of query, passages, relevance")
    return DataRef(spec=spec, path=_resolve(table, spec))


def _calibration(model: Table, task: Task) -> Calibration:
    table = model.table("calibration", _CALIBRATION_KEYS)
    return Calibration(
        data=_data(table, "data", task),
        samples=table.integer("samples", 1, 100_000, 256, unit="texts"),
        method=table.choice("method", METHODS, "minmax"),
        percentile=table.number("percentile", 90.0, 100.0, 99.99),
        smoothing=table.choice("smoothing", SMOOTHINGS, "auto"),
    )


def _gates(model: Table, task: Task) -> Gates:
    defaults = DEFAULT_GATES[task]
    table = model.table("gates", defaults)
    return Gates(**{key: table.number(key, 0.0, 1.0, value) for key, value in defaults.items()})


def _queue(model: Table) -> Queue:
    table = model.table("queue", _QUEUE_KEYS)
    levels = table.integer("priority_levels", 0, 64, 0)
    if levels == 0 and table.has("default_priority"):
        raise table.bad("default_priority", "is set without priority_levels", hint="set priority_levels")
    return Queue(
        max_size=table.integer("max_size", 0, 1_000_000, 0, unit="requests"),
        timeout_ms=table.integer("timeout_ms", 0, 3_600_000, 0, unit="ms"),
        max_delay_us=table.integer("max_delay_us", 0, 10_000_000, 0, unit="µs"),
        priority_levels=levels,
        default_priority=table.integer("default_priority", 1, levels, (levels + 1) // 2) if levels else 0,
    )


def _shape(model: Table, task: Task) -> ModelShape:
    table = model.table("shape", _SHAPE_KEYS)
    family = cast(Family, table.choice("family", FAMILIES))
    hidden = table.integer("hidden", 8, 1 << 15)
    heads = table.integer("heads", 1, 256)
    if hidden % heads:
        raise table.bad("heads", f"is {heads}", allowed=f"a divisor of hidden = {hidden}")
    return ModelShape(
        family=family,
        layers=table.integer("layers", 1, 256),
        hidden=hidden,
        ffn=table.integer("ffn", 8, 1 << 17),
        heads=heads,
        vocabulary=table.integer("vocabulary", 2, 1 << 21),
        embedding=table.integer("embedding", 8, 1 << 15, hidden),
        positions=table.integer("positions", 8, 1 << 17, 8192 if family == "modernbert" else 512),
        token_types=table.integer("token_types", 0, 16, 0 if family in {"distilbert", "modernbert"} else 2),
        labels=table.integer("labels", 1, 100_000, 1 if task == "rerank" else 2),
    )


__all__ = [
    "BUNDLED_SETS",
    "BUNDLED_SPLITS",
    "DATA_SUFFIXES",
    "DEFAULT_GATES",
    "DEFAULT_RESERVE_MIB",
    "FAMILIES",
    "MAX_MODELS",
    "METHODS",
    "OVERFLOWS",
    "POOLINGS",
    "PRECISIONS",
    "SMOOTHINGS",
    "TARGETS",
    "TASKS",
    "Calibration",
    "CalibrationMethod",
    "Card",
    "DataRef",
    "Family",
    "Gates",
    "Model",
    "ModelShape",
    "Overflow",
    "Pooling",
    "Precision",
    "Queue",
    "Smoothing",
    "Stack",
    "StackError",
    "Target",
    "Task",
    "load_stack",
]
