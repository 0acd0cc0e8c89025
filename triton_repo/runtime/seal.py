"""What a served model's folders hold, by digest: what its manifest, which is the engine's, cannot know.

    <model>/digests.json             config.pbtxt and warmup/
    <model>/<version>/digests.json   model.py, the copied runtime, the manifest and what it lists

A version's folder can so be moved or added as it is. A record finds damage and mix-ups; it is no signature.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from triton_repo.runtime.session import EngineRefused, sha256

RECORD: Final = "digests.json"
_FORMAT: Final = 1
# Python writes these beside what it imports.
_COMPILED: Final = "__pycache__"


def sealed(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The record of `folder` as it is now; of `names` alone, where other files may lie beside them."""
    chosen = sorted(contents(folder) if names is None else names)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in chosen
    }
    return {"format": _FORMAT, "files": files}


def contents(folder: Path) -> set[str]:
    """Every file that belongs to a model's or a version's folder, by its name in it.

    A model's versions are folders of their own; records and what Python compiles belong to none.
    """
    return set(_files(folder, Path(), has_versions=(folder / "config.pbtxt").exists()))


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """{file: {"bytes", "sha256"}} of a sealed folder. Raises EngineRefused where there is none."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_bytes())
        files = {
            str(name): {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])}
            for name, f in record["files"].items()
        }
        if record["format"] != _FORMAT:
            raise ValueError(f"of format {record['format']!r:.40}")
    except FileNotFoundError:
        raise EngineRefused(f"{path}: missing, so nothing says what belongs here") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineRefused(f"{path}: unreadable record ({error!r:.100})") from None
    return files


def check_served(version: Path) -> None:
    """Raise EngineRefused unless a version's folder and its model's are as they were written.

    What the manifest lists is left to whoever opens the engine, which may be large.
    """
    manifest = version / "manifest.json"
    listed: Mapping[str, Any] = {}
    if manifest.exists():
        from triton_repo.runtime.session import read_manifest

        found = read_manifest(version)
        listed = {found["engine"]["file"]: None, **found["files"]}
    _check(version, listed)
    _check(version.parent, {})


def _check(folder: Path, left_out: Mapping[str, Any]) -> None:
    recorded, there = read_record(folder), contents(folder)
    for name in sorted(recorded.keys() | there):
        path = folder / name
        if name not in recorded:
            raise EngineRefused(f"{path}: was not there when the repository was written")
        if name not in there:
            raise EngineRefused(f"{path}: missing, though {RECORD} lists it")
        if name not in left_out and sha256(path) != recorded[name]["sha256"]:
            raise EngineRefused(f"{path}: altered after the repository was written (SHA-256 differs)")


def _files(folder: Path, inside: Path, *, has_versions: bool = False) -> Iterator[str]:
    with os.scandir(folder / inside) as entries:
        for entry in entries:
            name = inside / entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name != _COMPILED and not (has_versions and entry.name.isdecimal()):
                    yield from _files(folder, name)
            elif entry.name != RECORD or inside.parts:
                yield name.as_posix()
