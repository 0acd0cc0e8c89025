"""What a served model's folders hold, by digest: what its manifest, which is the engine's, cannot know.

<model>/<version>/digests.json lists the version's folder (model.py, the copied runtime, the manifest and what
that lists) and, "beside" it, the model's config.pbtxt and warmup/ as they were written with this version. So
a version's folder can be moved or added as it is. A record finds damage and mix-ups; it is no signature.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from triton_repo.runtime.session import EngineRefused, read_manifest, sha256

RECORD: Final = "digests.json"
CONFIG: Final = "config.pbtxt"
MAX_RECORD_BYTES: Final = 16 << 20
_FORMAT: Final = 1
# Python writes these beside what it imports.
_COMPILED: Final = "__pycache__"

Digests = dict[str, dict[str, Any]]


def sealed(version: Path) -> dict[str, Any]:
    """The record of a version's folder and of what is beside it, as they are now."""
    model = version.parent
    beside = _digests(model, contents(model))
    if (version / CONFIG).exists():  # which may be in the model's folder only later
        beside[CONFIG] = _digests(version, [CONFIG])[CONFIG]
    return {"format": _FORMAT, "files": _digests(version, contents(version)), "beside": beside}


def sealed_files(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """The record of some files of a folder, where others may lie beside them."""
    return {"format": _FORMAT, "files": _digests(folder, names)}


def is_model(folder: Path) -> bool:
    """Whether this is a served model's folder: with a config, or with a version that has a record."""
    return (folder / CONFIG).exists() or any(
        path.parent.name.isdecimal() for path in folder.glob(f"*/{RECORD}")
    )


def is_version(folder: Path) -> bool:
    """Whether this is a version's folder of a served model."""
    folder = Path(os.path.abspath(folder))  # `.` has neither a name nor a parent; a link keeps its own
    return folder.name.isdecimal() and is_model(folder.parent)


def contents(folder: Path) -> set[str]:
    """Every file that belongs to a version's folder, or to a model's without its versions, by name in it.

    Records, what Python compiles and hidden files, which nothing imports or opens, belong to none.
    """
    has_versions = is_model(folder) and not is_version(folder)
    return set(_files(folder, Path(), has_versions=has_versions))


def read_record(folder: Path) -> tuple[Digests, Digests]:
    """{file: {"bytes", "sha256"}} in a sealed folder, and beside it. Raises EngineRefused without one."""
    path = folder / RECORD
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError(f"more than {MAX_RECORD_BYTES:,} bytes")
        record = json.loads(path.read_bytes())
        if record["format"] != _FORMAT:
            raise ValueError(f"of format {record['format']!r:.40}")
        return _parsed(record["files"]), _parsed(record.get("beside", {}))
    except FileNotFoundError:
        raise EngineRefused(f"{path}: missing, so nothing says what belongs here") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineRefused(f"{path}: unreadable record ({error!r:.100})") from None


def check_served(version: Path) -> None:
    """Raise EngineRefused unless a version's folder, and its model's, are as they were written.

    What the manifest lists is left to whoever opens the engine, which may be large.
    """
    recorded, _ = read_record(version)
    left_out: set[str] = set()
    if (version / "manifest.json").exists():
        manifest = read_manifest(version)
        left_out = {manifest["engine"]["file"], *manifest["files"]}
    there = contents(version)
    for name in sorted(recorded.keys() | there):
        path = version / name
        if name not in recorded:
            raise EngineRefused(f"{path}: was not there when the repository was written")
        if name not in there:
            raise EngineRefused(f"{path}: missing, though {RECORD} lists it")
        if name not in left_out and sha256(path) != recorded[name]["sha256"]:
            raise EngineRefused(f"{path}: altered after the repository was written (SHA-256 differs)")
    _check_beside(version.parent)


def beside(model: Path) -> dict[str, set[str]]:
    """Digests that each file of a model's own folder was written with, by any version that has a record."""
    found: dict[str, set[str]] = {}
    for version in (path for path in model.iterdir() if path.name.isdecimal() and path.is_dir()):
        with contextlib.suppress(EngineRefused):
            for name, record in read_record(version)[1].items():
                found.setdefault(name, set()).add(record["sha256"])
    return found


def _check_beside(model: Path) -> None:
    written = beside(model)
    for name in sorted(contents(model)):
        path = model / name
        if name not in written:
            raise EngineRefused(f"{path}: was not there when the repository was written")
        if sha256(path) not in written[name]:
            raise EngineRefused(f"{path}: altered after the repository was written (SHA-256 differs)")


def _digests(folder: Path, names: Iterable[str]) -> Digests:
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in sorted(names)
    }


def _parsed(files: Any) -> Digests:
    return {
        str(name): {"bytes": int(found["bytes"]), "sha256": str(found["sha256"])}
        for name, found in files.items()
    }


def _files(folder: Path, inside: Path, *, has_versions: bool = False) -> Iterator[str]:
    with os.scandir(folder / inside) as entries:
        for entry in entries:
            name = inside / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if entry.name != _COMPILED and not (has_versions and entry.name.isdecimal()):
                    yield from _files(folder, name)
            elif entry.name != RECORD or inside.parts:
                yield name.as_posix()
