"""One [models.<name>] table of the stack file into a `Model`; `build_engines.stack` reads the rest.

The tables of encoders and of LLMs (task "generate") have most keys in common. A key of the other kind is
refused by name with the reason, never ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Final, cast

from build_engines.cards import Card
from build_engines.errors import StackError
from build_engines.stack_fields import Table, one_of, show
from build_engines.stack_types import (
    BUNDLED_SETS,
    BUNDLED_SPLITS,
    DATA_SUFFIXES,
    DECODER_FAMILIES,
    DEFAULT_GATES,
    FAMILIES,
    GENERATE_PRECISIONS,
    LLM_CAPABILITIES,
    MAX_CAPACITY,
    MAX_SLOTS,
    METHODS,
    OVERFLOWS,
    POOLINGS,
    PRECISIONS,
    SMOOTHINGS,
    TABLE_TYPES,
    TARGETS,
    TASKS,
    Calibration,
    DataRef,
    DecoderFamily,
    DecoderShape,
    Family,
    Gates,
    Model,
    ModelShape,
    Precision,
    Queue,
    Task,
)

# `name` comes from the table's own key and `source_dir` from `source`.
MODEL_KEYS: Final = tuple(f.name for f in dataclass_fields(Model) if f.name not in {"name", "source_dir"})
CALIBRATION_KEYS: Final = tuple(f.name for f in dataclass_fields(Calibration))
QUEUE_KEYS: Final = tuple(f.name for f in dataclass_fields(Queue))
SHAPE_KEYS: Final = tuple(f.name for f in dataclass_fields(ModelShape))
# The last two are read off a checkpoint alone.
DECODER_SHAPE_KEYS: Final = tuple(f.name for f in dataclass_fields(DecoderShape))[:-2]

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_MIN_CAPACITY: Final = 16

_NOT_FOR_GENERATE: Final = {
    "max_batch": "remove it; slots says how many sequences run at once",
    "overflow": "remove it; a prompt that is longer than a slot is always refused, with both lengths",
    "pooling": "remove it; it is for embed only",
    "normalize": "remove it; it is for embed only",
    "cache": "remove it; Triton cannot cache streamed answers, and slots reuse the prefixes of conversations",
}
_FOR_GENERATE_ONLY: Final = ("slots", "prefill_chunk", "embedding", "head", "target")
_NOT_FOR_TENSORRT_LLM: Final = {
    "calibration": "remove it; the checkpoint was quantized by ModelOpt, with data of its own",
    "gates": "remove it; the checkpoint is served as it is, so there is nothing to compare it with",
    "embedding": "remove it; the checkpoint says how its tables are stored",
    "head": "remove it; the checkpoint says how its tables are stored",
}
# A step of TensorRT-LLM computes chunks of prompts and the running sequences together.
_LLM_CHUNK: Final = 512
_CALIBRATION_OF_ENCODERS: Final = dict.fromkeys(
    ("method", "percentile", "smoothing"),
    "remove it; it is for INT8 activations, and of an LLM only weights are quantized",
)
_QUEUE_OF_ENCODERS: Final = {
    "max_delay_us": "remove it; sequences join the running batch at any step",
}


def read_model(name: str, table: Table, card: Card) -> Model:
    """The model called `name` for `card`, every default filled in. Raises StackError."""
    task = cast(Task, table.choice("task", TASKS))
    return _generator(name, table, card) if task == "generate" else _encoder(name, table, task)


def _encoder(name: str, table: Table, task: Task) -> Model:
    if task != "embed":
        _refuse(table, task, dict.fromkeys(("pooling", "normalize"), "remove it; it is for embed only"))
    if table.raw("target") in TARGETS:
        raise _target_of_all(table)
    _refuse(table, task, dict.fromkeys(_FOR_GENERATE_ONLY, "remove it; it is for generate only"))
    source, source_dir = _source(table)
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
        queue=_queue(table, Queue()),
        cache=table.flag("cache", False),
        instances=table.integer("instances", 1, 16, 1),
    )


def _generator(name: str, table: Table, card: Card) -> Model:
    _refuse(table, "generate", _NOT_FOR_GENERATE)
    if table.raw("target") in TARGETS:
        raise _target_of_all(table)
    target = table.choice("target", ("tensorrt-llm",), None)
    if table.integer("instances", 1, 16, 1) > 1:
        raise table.bad(
            "instances",
            f"is {table.raw('instances')}: each would be another copy of the weights",
            allowed="1, for task 'generate'",
            hint="raise slots: all of them share one copy",
        )
    source, source_dir = _source(table)
    slots = _open_integer(table, "slots", 1, MAX_SLOTS, "slots")
    max_length = _open_integer(table, "max_length", _MIN_CAPACITY, MAX_CAPACITY, "tokens")
    precisions = _stored_precision(table, card) if target else _generate_precisions(table)
    return Model(
        name=name,
        task="generate",
        target=target,
        source=source,
        source_dir=source_dir,
        revision=_revision(table, source_dir),
        precisions=precisions,
        max_batch=0,
        max_length=max_length,
        overflow="refuse",
        shape=_decoder_shape(table) if table.has("shape") else None,
        allow_pickle=table.flag("allow_pickle", False),
        allow_remote_code=table.flag("allow_remote_code", False),
        calibration=_text_calibration(table),
        evaluation=_data(table, "evaluation", "generate"),
        gates=_gates(table, "generate"),
        queue=_waiting(table),
        slots=slots,
        prefill_chunk=_prefill_chunk(table, max_length, _LLM_CHUNK if target else 128),
        embedding=table.choice("embedding", TABLE_TYPES, "fp16"),
        head=table.choice("head", TABLE_TYPES, "int8"),
    )


def _target_of_all(table: Table) -> StackError:
    value = table.raw("target")
    return table.bad(
        "target",
        f"is {show(value)}, which all models of a stack share",
        allowed="tensorrt-llm, for an LLM",
        hint=f'remove it, and name "{value}" in targets, above all [models.<name>] tables',
    )


def _refuse(table: Table, task: Task, hints: Mapping[str, str]) -> None:
    for key, hint in hints.items():
        if table.has(key):
            raise table.bad(key, f"has no meaning for task {task!r}", hint=hint)


def _open_integer(table: Table, key: str, low: int, high: int, unit: str) -> int:
    """An integer, or 0 (also where there is none): the plan chooses."""
    value = table.integer(key, 0, high, 0, unit=unit)
    if 0 < value < low:
        raise table.bad(
            key,
            f"is {value}",
            allowed=f"an integer from {low:,} to {high:,} {unit}, or 0: the plan chooses",
        )
    return value


def _generate_precisions(table: Table) -> tuple[Precision, ...]:
    values = table.raw("precisions")
    if isinstance(values, list) and "int8" in values:
        raise table.bad(
            "precisions",
            "names int8, whose INT8 activations are for encoders",
            allowed=one_of(GENERATE_PRECISIONS),
            hint='write "int8-weights": weights in INT8, activations in FP16',
        )
    chosen = table.choices("precisions", GENERATE_PRECISIONS, GENERATE_PRECISIONS[:1])
    return cast(tuple[Precision, ...], chosen)


def _stored_precision(table: Table, card: Card) -> tuple[Precision, ...]:
    """How the checkpoint for TensorRT-LLM is stored; the plan compares it with the checkpoint itself."""
    for key, hint in _NOT_FOR_TENSORRT_LLM.items():
        if table.has(key):
            raise table.bad(key, "has no meaning for target 'tensorrt-llm'", hint=hint)
    values = table.raw("precisions")
    if isinstance(values, list) and ("int8" in values or "int8-weights" in values):
        raise table.bad(
            "precisions",
            f"is {show(values)}: TensorRT-LLM's PyTorch backend has no INT8 W8A8, and int8-weights are what "
            "onecard compiles itself",
            allowed=f"one of {one_of(LLM_CAPABILITIES)}",
            hint="quantize the checkpoint with ModelOpt to one of these, or remove target",
        )
    chosen = table.choices("precisions", LLM_CAPABILITIES, ("fp16",))
    if len(chosen) > 1:
        raise table.bad(
            "precisions", f"is {show(list(chosen))}", allowed="one: a checkpoint is stored in one"
        )
    supported = LLM_CAPABILITIES[chosen[0]]
    if card.compute_capability not in supported:
        others = [name for name, found in LLM_CAPABILITIES.items() if card.compute_capability in found]
        raise table.bad(
            "precisions",
            f"is {chosen[0]}, for which TensorRT-LLM has no kernels on compute capability "
            f"{card.compute_capability}",
            allowed=one_of(others) if others else f"a card with {one_of(supported)}",
        )
    return cast(tuple[Precision, ...], chosen)


def _prefill_chunk(table: Table, max_length: int, default: int) -> int:
    chunk = table.integer("prefill_chunk", _MIN_CAPACITY, 4096, default, unit="tokens")
    if max_length and chunk > max_length:
        if table.has("prefill_chunk"):
            raise table.bad("prefill_chunk", f"is {chunk}", allowed=f"at most max_length = {max_length}")
        return max_length
    return chunk


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
    table = model.table("calibration", CALIBRATION_KEYS)
    return Calibration(
        data=_data(table, "data", task),
        samples=table.integer("samples", 1, 100_000, 256, unit="texts"),
        method=table.choice("method", METHODS, "minmax"),
        percentile=table.number("percentile", 90.0, 100.0, 99.99),
        smoothing=table.choice("smoothing", SMOOTHINGS, "auto"),
    )


def _text_calibration(model: Table) -> Calibration:
    table = model.table("calibration", CALIBRATION_KEYS)
    _refuse(table, "generate", _CALIBRATION_OF_ENCODERS)
    return Calibration(
        data=_data(table, "data", "generate"),
        samples=table.integer("samples", 1, 100_000, 64, unit="conversations"),
    )


def _gates(model: Table, task: Task) -> Gates:
    defaults = DEFAULT_GATES[task]
    table = model.table("gates", defaults)
    return Gates(**{key: table.number(key, 0.0, 1.0, value) for key, value in defaults.items()})


def _queue(model: Table, default: Queue) -> Queue:
    table = model.table("queue", QUEUE_KEYS)
    levels = table.integer("priority_levels", 1, 64, default.priority_levels)
    return Queue(
        max_size=table.integer("max_size", 1, 1_000_000, default.max_size, unit="requests"),
        deadline_ms=table.integer("deadline_ms", 1, 3_600_000, default.deadline_ms, unit="ms"),
        max_delay_us=table.integer("max_delay_us", 0, 10_000_000, 0, unit="µs"),
        priority_levels=levels,
        default_priority=table.integer("default_priority", 1, levels, (levels + 1) // 2),
    )


def _waiting(model: Table) -> Queue:
    """The queue for slots. Each waiting prompt is kept in memory, and an answer takes seconds."""
    _refuse(model.table("queue", QUEUE_KEYS), "generate", _QUEUE_OF_ENCODERS)
    return _queue(model, Queue(max_size=256, deadline_ms=60_000))


def _shape(model: Table, task: Task) -> ModelShape:
    table = model.table("shape", SHAPE_KEYS)
    family = cast(Family, table.choice("family", FAMILIES))
    hidden = table.integer("hidden", 8, 1 << 15)
    heads = _divisor(table, "heads", table.integer("heads", 1, 256), "hidden", hidden)
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


def _decoder_shape(model: Table) -> DecoderShape:
    table = model.table("shape", DECODER_SHAPE_KEYS)
    family = cast(DecoderFamily, table.choice("family", DECODER_FAMILIES))
    hidden = table.integer("hidden", 8, 1 << 15)
    heads = table.integer("heads", 1, 256)
    if not table.has("head_dim"):
        _divisor(table, "heads", heads, "hidden", hidden)
    return DecoderShape(
        family=family,
        layers=table.integer("layers", 1, 256),
        hidden=hidden,
        ffn=table.integer("ffn", 8, 1 << 17),
        heads=heads,
        kv_heads=_divisor(table, "kv_heads", table.integer("kv_heads", 1, 256, heads), "heads", heads),
        head_dim=table.integer("head_dim", 2, 1024, max(2, hidden // heads)),
        vocabulary=table.integer("vocabulary", 2, 1 << 21),
        positions=table.integer("positions", 8, 1 << 24),
        tied=table.flag("tied", False),
        qkv_bias=table.flag("qkv_bias", family == "qwen2"),
    )


def _divisor(table: Table, key: str, value: int, of: str, whole: int) -> int:
    if whole % value:
        raise table.bad(key, f"is {value}", allowed=f"a divisor of {of} = {whole}")
    return value
