"""The engines of a stack that can be served: each checked, and built as the stack file says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_engines.errors import ArtifactError, RepositoryError
from build_engines.stack import Model, Stack, compiles
from triton_repo.runtime.session import EngineRefused, check_files, read_manifest

_BUILD_AGAIN = "build it again: build-engines build STACK"


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of a repository: a finished engine under its Triton name."""

    name: str
    model: Model
    folder: Path
    manifest: dict[str, Any]


def find_entries(stack: Stack, engines_dir: Path, target: str) -> list[Entry]:
    """Every engine of the stack for `target`, checked. Raises ArtifactError or RepositoryError."""
    others = [model for model in stack.models.values() if model.target is None]
    if others and target not in stack.targets:
        raise RepositoryError(
            f"{stack.path}: targets names {', '.join(stack.targets)}, not {target}",
            next_step=f'write --target {stack.targets[0]}, or add "{target}" to targets and build it',
        )
    entries = [entry for model in stack.models.values() for entry in _entries(model, engines_dir, target)]
    if not entries:
        raise RepositoryError(f"{stack.path}: no model of this stack has an engine for target {target}")
    return entries


def _entries(model: Model, engines_dir: Path, target: str) -> list[Entry]:
    entries = []
    target = model.target or target
    for precision, name in model.variants.items():
        if not compiles(target, model.task, precision):
            continue
        folder = engines_dir / model.name / precision / target
        try:
            manifest = read_manifest(folder)
            check_files(folder, manifest)
        except EngineRefused as error:
            raise ArtifactError(str(error), next_step=_BUILD_AGAIN) from None
        expected = {"model": model.name, "task": model.task, "precision": precision, "target": target}
        wrong = {key: manifest.get(key) for key, value in expected.items() if manifest.get(key) != value}
        if wrong:
            raise ArtifactError(
                f"{folder}: the engine was built for {wrong}, this place is for {expected}",
                next_step=_BUILD_AGAIN,
            )
        if stale := _stale(model, manifest["serving"]):
            raise ArtifactError(f"{folder}: the engine was built with {stale}", next_step=_BUILD_AGAIN)
        entries.append(Entry(name, model, folder, manifest))
    return entries


def _stale(model: Model, serving: Mapping[str, Any]) -> str:
    """What the stack file now says otherwise than the engine was built; empty when nothing.

    A length is bounded by the positions that the checkpoint has. What an LLM's stack file leaves open (0) is
    the plan's choice, and the engine holds what it chose.
    """
    if model.task == "generate":
        slots, capacity, chunk = serving["slots"], serving["capacity"], serving["chunk"]
        limit = serving.get("positions") or model.max_length
        pairs = [
            ("slots", slots, model.slots or slots),
            ("max_length", capacity, min(model.max_length, limit) or capacity),
            ("prefill_chunk", min(chunk, capacity), min(model.prefill_chunk, capacity)),
        ]
    else:
        limit = serving.get("max_positions") or model.max_length
        pairs = [
            ("overflow", serving["overflow"], model.overflow),
            ("max_batch", serving["max_batch"], model.max_batch),
            ("max_length", serving["max_length"], min(model.max_length, limit)),
        ]
    return ", ".join(
        f"{name} = {built!r} where the stack file says {wanted!r}"
        for name, built, wanted in pairs
        if built != wanted
    )
