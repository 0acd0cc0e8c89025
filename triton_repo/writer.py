"""Engines to a Triton model repository, written aside and renamed.

    <repository>/<Triton model>/config.pbtxt
    <repository>/<Triton model>/warmup/<tensor>
    <repository>/<Triton model>/1/model.py, manifest.json, engine, tokenizer and chat template (hard links)
    <repository>/<Triton model>/1/triton_repo/__init__.py, runtime/**/*.py
    <repository>/<Triton model>/1/digests.json: of all these

An encoder in the native layout is several Triton models (triton_repo.native).

Beside it: stack.json, which tells the client what is served, and evaluation/<model>.jsonl.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_engines.atomic import link_or_copy, replaced_folder, write_text
from build_engines.errors import ArtifactError, OnecardError, RepositoryError
from build_engines.stack import Model, Stack, compiles
from triton_repo.config_pbtxt import render, to_message
from triton_repo.encoders import WARMUP_FILE, encoder_spec, warmup_bytes
from triton_repo.generators import generator_spec, warmup_files
from triton_repo.native import check_native, native_parts
from triton_repo.runtime import fingerprint
from triton_repo.runtime.seal import RECORD, sealed, sealed_files
from triton_repo.runtime.session import EngineRefused, check_files, read_manifest

_PACKAGE = Path(__file__).parent
_BUILD_AGAIN = "build it again: build-engines build STACK"


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the repository: a finished engine under its Triton name."""

    name: str
    model: Model
    folder: Path
    manifest: dict[str, Any]


def write_repository(
    stack: Stack, engines_dir: Path, out: Path, *, target: str = "onnxruntime", native: bool = False
) -> Path:
    """Write the repository of every engine of `stack` for `target` to `out` and return `out`.

    Engines are read from engines_dir/<model>/<precision>/<target>; a model with a target of its own keeps it.
    `native`: Triton's TensorRT backend runs the encoders. After an error `out` is as it was before.

    Raises:
        ArtifactError: an engine is missing or altered, or `out` holds something else.
        RepositoryError: an engine cannot be served so, or the repository cannot be written.
    """
    others = [model for model in stack.models.values() if model.target is None]
    if others and target not in stack.targets:
        raise RepositoryError(
            f"{stack.path}: targets names {', '.join(stack.targets)}, not {target}",
            next_step=f'write --target {stack.targets[0]}, or add "{target}" to targets and build it',
        )
    if native:
        for model in stack.models.values():
            if model.task != "generate":
                check_native(model, target)
    entries = [entry for model in stack.models.values() for entry in _entries(model, engines_dir, target)]
    if not entries:
        raise RepositoryError(f"{stack.path}: no model of this stack has an engine for target {target}")
    runtime = fingerprint()
    try:
        with replaced_folder(out, ours="*/config.pbtxt") as aside:
            for entry in entries:
                if native and entry.model.task != "generate":
                    _write_native(entry, aside, runtime)
                else:
                    _write_model(entry, aside / entry.name, runtime)
        _write_summary(stack, entries, out.absolute().parent)
    except OnecardError:
        raise
    except OSError as error:
        raise RepositoryError(
            f"{out}: cannot be written ({error.strerror or error})",
            cause="the disk is full or the folder is read-only",
            next_step="free space or name another folder, then run again; nothing half-written is left",
        ) from error
    return out


def seal(version: Path) -> None:
    """Write the `digests.json` of a version's folder: after all else that is in it and beside it."""
    write_text(version / RECORD, json.dumps(sealed(version), indent=1) + "\n")


def not_judged(repository: Path) -> list[str]:
    """Triton models whose engine no gate has run yet: it was compiled where no GPU could run it."""
    manifests = {path.parent.parent.name: path for path in sorted(repository.glob("*/1/manifest.json"))}
    found = []
    for name, path in manifests.items():
        manifest = json.loads(path.read_text("utf-8"))
        runs_here = (path.parent / manifest["engine"]["file"]).exists()
        judged = "engine" in manifest.get("gates", {"engine": None})
        # What TensorRT-LLM serves is the checkpoint itself: there is no gate to pass.
        if manifest["target"] not in {"onnxruntime", "tensorrt-llm"} and runs_here and not judged:
            found.append(name)
    return found


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


def _write_model(entry: Entry, folder: Path, runtime: str) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    if entry.model.task == "generate":
        spec, warmup = generator_spec(entry.model, entry.name, entry.manifest, runtime), warmup_files()
    else:
        spec = encoder_spec(entry.model, entry.name, entry.manifest, runtime)
        warmup = {WARMUP_FILE: warmup_bytes()}
    _write_config(folder, render(to_message(spec)), warmup)
    for name in ("manifest.json", entry.manifest["engine"]["file"], *entry.manifest["files"]):
        link_or_copy(entry.folder / name, version / name)
    _copy_code("generator.py" if entry.model.task == "generate" else "encoder.py", version)
    seal(version)


def _write_native(entry: Entry, repository: Path, runtime: str) -> None:
    for part in native_parts(entry.model, entry.name, entry.manifest, runtime):
        folder = repository / part.spec.name
        # An ensemble's version folder has nothing to serve, and must be there.
        (folder / "1").mkdir(parents=True)
        for name in part.files:
            link_or_copy(entry.folder / name, folder / "1" / name)
        warmup = {WARMUP_FILE: warmup_bytes()} if part.warmup else {}
        _write_config(folder, render(to_message(part.spec)), warmup)
        if part.source is not None:
            _copy_code(part.source, folder / "1")
        seal(folder / "1")


def _write_config(folder: Path, config: str, warmup: Mapping[str, bytes]) -> None:
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    if warmup:
        (folder / "warmup").mkdir()
    for name, content in warmup.items():
        (folder / "warmup" / name).write_bytes(content)


def _copy_code(served_by: str, version: Path) -> None:
    """model.py and the runtime that it imports, subfolders too."""
    shutil.copyfile(_PACKAGE / "models" / served_by, version / "model.py")
    package, runtime = version / "triton_repo", _PACKAGE / "runtime"
    package.mkdir()
    shutil.copyfile(_PACKAGE / "__init__.py", package / "__init__.py")
    for source in sorted(runtime.rglob("*.py")):
        copy = package / "runtime" / source.relative_to(runtime)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)


def _write_summary(stack: Stack, entries: list[Entry], folder: Path) -> None:
    models: dict[str, Any] = {}
    for entry in entries:
        model, serving = entry.model, entry.manifest["serving"]
        if model.name not in models:
            models[model.name] = {
                "task": model.task,
                "target": entry.manifest["target"],
                "source": str(stack.checkpoint_dir(model).absolute()),
                "variants": {},
                "evaluation": _write_evaluation(model, folder / "evaluation" / f"{model.name}.jsonl"),
                **_limits(model, serving),
            }
        models[model.name]["variants"][entry.manifest["precision"]] = entry.name
    summary = {"stack": stack.name, "models": models}
    write_text(folder / "stack.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    evaluation = [f"evaluation/{name}.jsonl" for name, found in models.items() if found["evaluation"]]
    record = sealed_files(folder, ["stack.json", *evaluation])
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


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


def _write_evaluation(model: Model, out: Path) -> str | None:
    """Copy the evaluation data as JSONL, so that the client needs nothing of the build tool to read it."""
    if model.evaluation is None:
        return None
    from calibration.samples import load_conversations, load_groups, load_texts

    reference = model.evaluation.path or model.evaluation.spec
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
    return str(out)
