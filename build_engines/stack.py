"""The stack file: TOML into frozen dataclasses, resolved once, before anything runs.

`load_stack` is the only way in. What it returns is complete (every default filled in, every source and data
path absolute) and consistent, so no later stage checks a key again. What it refuses, it refuses with a
StackError that names the file, the dotted key, the nearest valid name and what is allowed; docs/stack-file.md
lists them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from build_engines.cards import (
    CARDS,
    KNOWN_COMPUTE_CAPABILITIES,
    PORTABLE_FROM,
    RTX_COMPUTE_CAPABILITIES,
    Card,
    capability_at_least,
    custom_card,
)
from build_engines.errors import StackError
from build_engines.stack_fields import Table, nearest, one_of, read_toml, show
from build_engines.stack_model import MODEL_KEYS, read_model
from build_engines.stack_types import (
    BUNDLED_SETS,
    BUNDLED_SPLITS,
    DATA_SUFFIXES,
    DECODER_FAMILIES,
    DEFAULT_CONTEXT_MIB,
    DEFAULT_GATES,
    DEFAULT_RESERVE_MIB,
    FAMILIES,
    GENERATE_PRECISIONS,
    LLM_CAPABILITIES,
    MAX_CAPACITY,
    MAX_MODELS,
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
    CalibrationMethod,
    DataRef,
    DecoderFamily,
    DecoderShape,
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
    TableType,
    Target,
    Task,
    compiles,
)

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_STACK_KEYS = ("name", "card", "targets", "portable", "reserve_mib", "context_mib", "models")
_CUSTOM_CARD_KEYS = ("memory_mib", "compute_capability")


def load_stack(path: Path, *, build_dir: Path | None = None) -> Stack:
    """Read, check and resolve a stack file.

    `build_dir` defaults to build/<stack name> under the current folder. Raises StackError and nothing else.
    """
    top = Table(path, "", read_toml(path), _STACK_KEYS)
    name = _stack_name(top, path)
    card = _card(top)
    named = top.raw("targets")
    if isinstance(named, list) and "tensorrt-llm" in named:
        raise top.bad(
            "targets",
            "names tensorrt-llm, which is the choice of one model",
            hint='write target = "tensorrt-llm" into the [models.<name>] table of an LLM',
        )
    targets = cast(tuple[Target, ...], top.choices("targets", TARGETS, ("onnxruntime",)))
    portable = _portable(top, card, targets)
    models = _models(top, card)
    for model in models.values():
        _require_target(top, model, targets)
    return Stack(
        name=name,
        path=path,
        card=card,
        targets=targets,
        models=models,
        reserve_mib=top.integer("reserve_mib", 0, 1 << 20, DEFAULT_RESERVE_MIB, unit="MiB"),
        context_mib=top.integer("context_mib", 0, 1 << 20, DEFAULT_CONTEXT_MIB, unit="MiB"),
        portable=portable,
        build_dir=build_dir if build_dir is not None else Path("build") / name,
    )


def _portable(top: Table, card: Card, targets: tuple[Target, ...]) -> bool:
    """Whether TensorRT-RTX compiles for several generations at once; refuses a card that its engines miss."""
    portable = top.flag("portable", False)
    capability = card.compute_capability
    if portable and "tensorrt-rtx" not in targets:
        raise top.bad(
            "portable",
            "is for TensorRT-RTX engines, and targets does not name tensorrt-rtx",
            hint='remove it, or add "tensorrt-rtx" to targets',
        )
    if portable and not capability_at_least(capability, PORTABLE_FROM):
        raise top.bad(
            "portable",
            f"makes engines for compute capability 8.0 and newer, and the card has {capability}",
            hint="remove it: the engines are then compiled for this card",
        )
    if "tensorrt-rtx" in targets and not portable and capability not in RTX_COMPUTE_CAPABILITIES:
        raise top.bad(
            "targets",
            f"names tensorrt-rtx, which does not compile for compute capability {capability}",
            allowed=f"tensorrt-rtx with {one_of(RTX_COMPUTE_CAPABILITIES)}; else onnxruntime, tensorrt",
            hint="portable = true compiles for 8.0, 8.6, 8.9, 12.0 and later, and runs perhaps on others"
            if capability_at_least(capability, PORTABLE_FROM)
            else None,
        )
    return portable


def _require_target(top: Table, model: Model, targets: tuple[Target, ...]) -> None:
    """Every precision of the model has at least one target that makes an engine of it."""
    for precision in () if model.target else model.precisions:
        if not any(compiles(target, model.task, precision) for target in targets):
            able = [target for target in TARGETS if compiles(target, model.task, precision)]
            raise top.bad(
                "targets",
                f"has none that runs {model.name} in {precision}",
                allowed=f"{one_of(able)} for {precision}",
                hint=f'name one of these too, or write precisions = ["fp16"] in [models.{model.name}]',
            )


def _stack_name(top: Table, path: Path) -> str:
    name = cast(str, top.text("name", path.stem))
    if not _NAME.fullmatch(name):
        raise top.bad(
            "name",
            f"is {show(name)}{'' if top.has('name') else ', as the file is called'}",
            allowed="a-z, 0-9 and '-', at most 64 characters, first a letter or digit",
            hint=None if top.has("name") else 'write name = "..." into the file, or rename it',
        )
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


def _models(top: Table, card: Card) -> dict[str, Model]:
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
        models[name] = read_model(name, outer.table(name, MODEL_KEYS), card)
    for model in models.values():
        for precision in model.precisions:
            if f"{model.name}-{precision}" in models:
                raise outer.bad(
                    f"{model.name}-{precision}",
                    f"collides with the {precision} engine of models.{model.name}, which has that name",
                    hint="rename one of the two models",
                )
    return models


__all__ = [
    "BUNDLED_SETS",
    "BUNDLED_SPLITS",
    "DATA_SUFFIXES",
    "DECODER_FAMILIES",
    "DEFAULT_GATES",
    "DEFAULT_RESERVE_MIB",
    "FAMILIES",
    "GENERATE_PRECISIONS",
    "LLM_CAPABILITIES",
    "MAX_CAPACITY",
    "MAX_MODELS",
    "MAX_SLOTS",
    "METHODS",
    "OVERFLOWS",
    "POOLINGS",
    "PRECISIONS",
    "SMOOTHINGS",
    "TABLE_TYPES",
    "TARGETS",
    "TASKS",
    "Calibration",
    "CalibrationMethod",
    "Card",
    "DataRef",
    "DecoderFamily",
    "DecoderShape",
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
    "TableType",
    "Target",
    "Task",
    "compiles",
    "load_stack",
]
