"""Engines to a Triton model repository, written aside and renamed.

    <repository>/<Triton model>/config.pbtxt
    <repository>/<Triton model>/warmup/<tensor>
    <repository>/<Triton model>/1/model.py, manifest.json, engine, tokenizer and chat template (hard links)
    <repository>/<Triton model>/1/triton_repo/__init__.py, runtime/**/*.py
    <repository>/<Triton model>/1/config.pbtxt, served.json: what this version was written with
    <repository>/<Triton model>/1/digests.json: of all these

`triton-repo deploy` adds versions 2, 3, ... (triton_repo.deploy). An encoder in the native layout is several
Triton models (triton_repo.native).

Beside it: stack.json, which tells the client what is served, and evaluation/<model>.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from build_engines.atomic import link_or_copy, replaced_folder, write_text
from build_engines.errors import RepositoryError, ServerError
from build_engines.stack import Stack
from triton_repo.config_pbtxt import parse, render, to_message
from triton_repo.encoders import WARMUP_FILE, encoder_spec, warmup_bytes
from triton_repo.engine_entries import Entry, find_entries
from triton_repo.generators import generator_spec, warmup_files
from triton_repo.native import check_native, native_parts
from triton_repo.running import read_running
from triton_repo.runtime import fingerprint
from triton_repo.runtime.seal import CONFIG, RECORD, sealed
from triton_repo.summary import now, served_record, write_evaluation, write_summary
from triton_repo.versions import SERVED, ServedModel, served_versions, version_of

_PACKAGE = Path(__file__).parent


def write_repository(
    stack: Stack, engines_dir: Path, out: Path, *, target: str = "onnxruntime", native: bool = False
) -> Path:
    """Write the repository of every engine of `stack` for `target` to `out` and return `out`.

    Engines are read from engines_dir/<model>/<precision>/<target>; a model with a target of its own keeps it.
    `native`: Triton's TensorRT backend runs the encoders. After an error `out` is as it was before.

    Raises:
        ArtifactError: an engine is missing or altered, or `out` holds something else.
        RepositoryError: an engine cannot be served so, a server runs on `out`, or it cannot be written.
    """
    _refuse_served(out)
    if native:
        for model in stack.models.values():
            if model.task != "generate":
                check_native(model, target)
    entries = find_entries(stack, engines_dir, target)
    runtime, beside, written = fingerprint(), out.absolute().parent, now()
    records = {entry.name: served_record(stack, entry, beside, written) for entry in entries}
    with errors_of_ours(out):
        with replaced_folder(out, ours=f"*/{CONFIG}") as aside:
            for entry in entries:
                if native and entry.model.task != "generate":
                    _write_native(entry, aside, runtime)
                    continue
                config = config_text(entry, runtime, 1)
                write_version(entry, aside / entry.name, config, records[entry.name])
        write_evaluation((entry.model for entry in entries), beside)
        write_summary(records.values(), beside)
    return out


@contextlib.contextmanager
def errors_of_ours(out: Path) -> Iterator[None]:
    """Turn an OSError inside into RepositoryError."""
    try:
        yield
    except OSError as error:
        raise RepositoryError(
            f"{out}: cannot be written ({error.strerror or error})",
            cause="the disk is full or the folder is read-only",
            next_step="free space or name another folder, then run again; nothing half-written is left",
        ) from error


def _refuse_served(out: Path) -> None:
    """What a server has loaded it reads again later: its files must not be taken from under it."""
    try:
        pid = read_running(out).pid
    except ServerError:
        return
    raise RepositoryError(
        f"{out}: a server runs on it (process {pid})",
        next_step="replace its models while it serves: triton-repo deploy STACK; or stop it first",
    )


def seal(version: Path) -> None:
    """Write the `digests.json` of a version's folder: after all else that is in it and beside it."""
    write_text(version / RECORD, json.dumps(sealed(version), indent=1) + "\n")


def not_judged(repository: Path) -> list[str]:
    """Triton models whose engine no gate has run yet: it was compiled where no GPU could run it."""
    found = []
    for model in served_versions(repository):
        folder = model.path(model.version)
        if not (folder / "manifest.json").exists():  # an ensemble
            continue
        manifest = model.manifest(model.version)
        runs_here = (folder / manifest["engine"]["file"]).exists()
        judged = "engine" in manifest.get("gates", {"engine": None})
        # What TensorRT-LLM serves is the checkpoint itself: there is no gate to pass.
        if manifest["target"] not in {"onnxruntime", "tensorrt-llm"} and runs_here and not judged:
            found.append(model.name)
    return found


def write_version(entry: Entry, folder: Path, config: str, served: Mapping[str, Any]) -> None:
    """Write a model's folder that has the one version which `config` names."""
    version = folder / str(version_of(parse(config)))
    version.mkdir(parents=True)
    for path in (folder / CONFIG, version / CONFIG):
        path.write_text(config, encoding="utf-8")
    (version / SERVED).write_text(json.dumps(served, indent=1, ensure_ascii=False), encoding="utf-8")
    generates = entry.model.task == "generate"
    _write_warmup(folder, warmup_files() if generates else {WARMUP_FILE: warmup_bytes()})
    for name in ("manifest.json", entry.manifest["engine"]["file"], *entry.manifest["files"]):
        link_or_copy(entry.folder / name, version / name)
    _copy_code("generator.py" if generates else "encoder.py", version)
    seal(version)


def config_text(entry: Entry, runtime: str, version: int) -> str:
    """config.pbtxt of one version; `runtime` is the fingerprint of the runtime beside it."""
    of = generator_spec if entry.model.task == "generate" else encoder_spec
    spec = of(entry.model, entry.name, entry.manifest, runtime)
    return render(to_message(replace(spec, version=version)))


def is_current(entry: Entry, model: ServedModel) -> bool:
    """Whether `model` serves this very engine by the config and the code that would be written now."""
    version = model.version
    served_by = "generator.py" if entry.model.task == "generate" else "encoder.py"
    return (
        model.manifest(version)["digest"] == entry.manifest["digest"]
        and model.config == parse(config_text(entry, fingerprint(), version))
        and (model.path(version) / "model.py").read_bytes() == (_PACKAGE / "models" / served_by).read_bytes()
    )


def _write_native(entry: Entry, repository: Path, runtime: str) -> None:
    for part in native_parts(entry.model, entry.name, entry.manifest, runtime):
        folder = repository / part.spec.name
        # An ensemble's version folder has nothing to serve, and must be there.
        (folder / "1").mkdir(parents=True)
        for name in part.files:
            link_or_copy(entry.folder / name, folder / "1" / name)
        (folder / CONFIG).write_text(render(to_message(part.spec)), encoding="utf-8")
        if part.warmup:
            _write_warmup(folder, {WARMUP_FILE: warmup_bytes()})
        if part.source is not None:
            _copy_code(part.source, folder / "1")
        seal(folder / "1")


def _write_warmup(folder: Path, files: Mapping[str, bytes]) -> None:
    (folder / "warmup").mkdir()
    for name, content in files.items():
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
