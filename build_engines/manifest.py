"""What every stage leaves beside its files: a record of what went in, what came out and with what result.

A stage whose inputs did not change and whose files still match their digests is skipped. Files are written
aside and renamed together with their record, so that a killed run leaves nothing that a later one would
take for whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_engines.atomic import replaced_folder
from build_engines.errors import ArtifactError
from triton_repo.runtime.session import MANIFEST_FORMAT, manifest_digest, sha256

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
RECORD = "stage.json"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class StageRun:
    """A finished stage. `result` is what the stage said of itself; `seconds` is what it took when it ran."""

    folder: Path
    result: dict[str, Any]
    skipped: bool
    seconds: float

    def digests(self) -> dict[str, str]:
        """File name to SHA-256 of what the stage wrote."""
        record = _read_record(self.folder)
        assert record is not None
        return {name: found["sha256"] for name, found in record["outputs"].items()}


def run_stage(folder: Path, inputs: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> StageRun:
    """Return the stage in `folder` if it is whole and made from `inputs`, else let `build` fill a folder that
    takes its place.

    Args:
        inputs: everything that decides the result (JSON values: digests, settings, versions).
        build: writes files into the folder it is given and returns the stage's result (JSON values).

    Raises:
        OnecardError: what `build` raises, an OSError as ArtifactError; `folder` is then as it was before.
    """
    key = digest_of(inputs)
    record = _read_record(folder)
    if record is not None and record["key"] == key and _matches(folder, record["outputs"]):
        return StageRun(folder, record["result"], True, record["seconds"])
    started = time.monotonic()
    try:
        with replaced_folder(folder) as aside:
            result = build(aside)
            seconds = round(time.monotonic() - started, 3)
            outputs = {path.name: file_record(path) for path in sorted(aside.iterdir())}
            written = {"key": key, "inputs": inputs, "outputs": outputs, "result": result, "seconds": seconds}
            (aside / RECORD).write_text(json.dumps(written, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise ArtifactError(f"{folder} cannot be made: {error}") from error
        raise ArtifactError(
            f"{folder}: cannot be written ({error.strerror})",
            cause="the disk is full or the folder is read-only",
            next_step="free space or name another folder with --build-dir, then run again: "
            "finished stages are kept",
        ) from error
    return StageRun(folder, result, False, seconds)


def recorded_inputs(folder: Path) -> dict[str, Any] | None:
    """What the stage in `folder` was made from, by its record; None without one that can be believed."""
    record = _read_record(folder)
    inputs = record.get("inputs") if record else None
    return dict(inputs) if isinstance(inputs, dict) else None


def is_whole(folder: Path) -> bool:
    """Whether the files of the stage in `folder` still match its record; reads all of them."""
    record = _read_record(folder)
    return record is not None and _matches(folder, record["outputs"])


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def folder_files(folder: Path, suffixes: Iterable[str], *, without: Path | None = None) -> list[Path]:
    """Every file under `folder`, less those under `without`, with one of `suffixes`, in order."""
    wanted = tuple(suffixes)
    paths = (path for path in sorted(folder.rglob("*")) if path.name.endswith(wanted) and path.is_file())
    left_out = without.absolute() if without else None
    return [path for path in paths if left_out is None or not path.absolute().is_relative_to(left_out)]


def code_digest(*packages: str) -> str:
    """SHA-256 over the sources of our own modules that decide a stage's result."""
    root = Path(__file__).parent.parent
    digests = {}
    for package in packages:
        path = root / package
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        digests.update({str(file.relative_to(root)): sha256(file) for file in files})
    return digest_of(digests)


def write_manifest(folder: Path, manifest: dict[str, Any], engine_file: str) -> dict[str, Any]:
    """Complete `manifest` with the digests of all files in `folder` and write it there."""
    files = {path.name: file_record(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    engine = {"file": engine_file, **files.pop(engine_file)}
    whole: dict[str, Any] = {"format": MANIFEST_FORMAT, **manifest, "engine": engine, "files": files}
    # Through JSON once, so that the digest is that of the values a reader will see.
    whole = json.loads(json.dumps(whole, ensure_ascii=False))
    whole["digest"] = manifest_digest(whole)
    (folder / MANIFEST).write_text(json.dumps(whole, indent=1, ensure_ascii=False), encoding="utf-8")
    return whole


def read_engine_manifest(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and checked manifest of an engine, named by its folder or by a file in it.

    Raises:
        ArtifactError: no engine there, or one whose files do not match the manifest.
    """
    from triton_repo.runtime.session import EngineRefused, check_files, read_manifest

    folder = path if path.is_dir() else path.parent
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
    except EngineRefused as error:
        raise ArtifactError(str(error), next_step="build it again: build-engines build STACK") from None
    return folder, manifest


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The stage's record, or None where there is none that can be believed."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    expected: dict[str, type | tuple[type, ...]] = {
        "key": str,
        "outputs": dict,
        "result": dict,
        "seconds": (int, float),
    }
    if not isinstance(record, dict):
        return None
    return record if all(isinstance(record.get(name), kind) for name, kind in expected.items()) else None


def _matches(folder: Path, outputs: Mapping[str, Any]) -> bool:
    try:
        present = {name for name in os.listdir(folder) if name != RECORD}
        return present == set(outputs) and all(file_record(folder / n) == r for n, r in outputs.items())
    except OSError:
        return False


__all__ = [
    "MANIFEST",
    "RECORD",
    "StageRun",
    "code_digest",
    "digest_of",
    "file_record",
    "folder_files",
    "is_whole",
    "read_engine_manifest",
    "recorded_inputs",
    "run_stage",
    "write_manifest",
]
