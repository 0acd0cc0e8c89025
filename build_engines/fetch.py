"""Bring a model's checkpoint to its folder: from the hub, from the hub's local cache, or check the user's
folder.

Nothing is taken that is not needed, nothing that runs code (`build_engines.fetch_rules`). A download goes on
where it stopped, is checked against the hub's digests, and appears under its name only when it is complete,
with a record of what it is (`fetched.json`): a record that matches is a checkpoint that needs no network.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from build_engines.atomic import link_or_copy, locked, replaced_folder
from build_engines.errors import FetchError
from build_engines.fetch_convert import convert_pickles
from build_engines.fetch_hub import Repository, download, read_repository
from build_engines.fetch_rules import (
    CONVERTIBLE_SUFFIXES,
    NAMING_CODE,
    folder_files,
    needed_files,
    refuse_remote_code,
)
from build_engines.stack import Model
from triton_repo.runtime.session import sha256

RECORD: Final = "fetched.json"
_FORMAT: Final = 1
# File systems need room for their own bookkeeping, and the record is written too.
_DISK_MARGIN: Final = 64 << 20

# (file, bytes there so far, bytes in all): called as a download advances.
Progress = Callable[[str, int, int], None]
Origin = Literal["folder", "present", "hub", "cache", "converted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Where the checkpoint is, and what it is. `digests`: SHA-256 by name; `commit`: None for folders."""

    path: Path
    origin: Origin
    commit: str | None
    size: int
    digests: dict[str, str]


def fetch_model(
    model: Model, dest: Path, *, offline: bool = False, progress: Progress | None = None
) -> Fetched:
    """Make the checkpoint of `model` available, in its own folder or in `dest` (see `Stack.checkpoint_dir`).

    A folder source is checked where it is. A hub source is downloaded once; it stays until `source` or
    `revision` changes or `dest` is removed. `offline` (or HF_HUB_OFFLINE=1) never touches the network: it
    takes what `dest` or the hub's local cache has. Raises FetchError, and BusyError where another process
    fetches into `dest`.
    """
    try:
        return _fetch(model, dest, offline, progress)
    except OSError as error:
        raise FetchError(
            f"{model.source}: {error.filename or dest}: {error.strerror or error}",
            cause="a file cannot be read, or the folder is read-only",
            next_step="correct that, or name another folder with --build-dir, then run again",
        ) from error


def _fetch(model: Model, dest: Path, offline: bool, progress: Progress | None) -> Fetched:
    if model.source_dir is not None:
        return _from_folder(model, model.source_dir, dest)
    present = present_checkpoint(model, dest)
    if present is not None:
        return present
    with _lock(dest):
        if offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            return _from_cache(model, dest)
        return _from_hub(model, dest, progress or (lambda *_: None))


def _from_folder(model: Model, source: Path, dest: Path) -> Fetched:
    names = check_folder(model, source)
    if any(name.endswith(CONVERTIBLE_SUFFIXES) for name in names):
        with _lock(dest):
            return _publish(model, source, names, dest, origin="converted", commit=None)
    digests = {name: sha256(source / name) for name in names}
    size = sum((source / name).stat().st_size for name in names)
    return Fetched(path=source, origin="folder", commit=None, size=size, digests=digests)


def check_folder(model: Model, source: Path) -> list[str]:
    """The files of the user's folder that are taken, none of them read whole. Raises FetchError."""
    names = needed_files(model, folder_files(source))
    _refuse_named_code(model, source, names)
    return names


def _config_name(names: list[str]) -> str:
    """config.json at the top, or in the first module's folder (older sentence-transformers)."""
    return min((n for n in names if n.rsplit("/", 1)[-1] == "config.json"), key=lambda n: (n.count("/"), n))


def _refuse_named_code(model: Model, folder: Path, names: list[str]) -> None:
    for name in names:
        if name.rsplit("/", 1)[-1] in NAMING_CODE:
            refuse_remote_code(model, folder / name)


def _from_hub(model: Model, dest: Path, progress: Progress) -> Fetched:
    repository = read_repository(model.source, model.revision)
    names = needed_files(model, repository.sizes)
    partial = _partial_folder(dest, repository)
    config = _config_name(names)
    total = sum(repository.files[name].size for name in names)
    _check_disk(model, partial, repository, names)
    done = sum(_bytes_there(partial / name) for name in names)
    # The small file that can refuse the whole checkpoint comes first.
    for name in sorted(names, key=lambda name: (name != config, name)):

        def on_bytes(count: int, name: str = name) -> None:
            nonlocal done
            done += count
            progress(name, done, total)

        if not (partial / name).is_file():
            download(repository, repository.files[name], partial / name, on_bytes)
        _refuse_named_code(model, partial, [name])
    fetched = _publish(model, partial, names, dest, origin="hub", commit=repository.commit)
    shutil.rmtree(partial)
    return fetched


def _partial_folder(dest: Path, repository: Repository) -> Path:
    """Where a download collects its files. Those of another commit are no use and are removed."""
    partial = dest.with_name(f".{dest.name}.partial")
    marker = partial / ".commit"
    identity = f"{repository.source} {repository.commit}"
    if partial.exists() and not (marker.is_file() and marker.read_text(encoding="utf-8") == identity):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    marker.write_text(identity, encoding="utf-8")
    return partial


def _bytes_there(path: Path) -> int:
    part = path.with_name(path.name + ".part")
    return sum(found.stat().st_size for found in (path, part) if found.is_file())


def _check_disk(model: Model, partial: Path, repository: Repository, names: list[str]) -> None:
    missing = sum(max(0, repository.files[name].size - _bytes_there(partial / name)) for name in names)
    # A pickle and the safetensors made from it are there at the same time.
    copies = sum(repository.files[name].size for name in names if name.endswith(CONVERTIBLE_SUFFIXES))
    _require_disk(model.source, partial, missing + copies)


def _require_disk(source: str, folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size + _DISK_MARGIN > free:
        raise FetchError(
            f"{source}: {size:,} bytes have yet to be written, and {folder} has {free:,} bytes free",
            cause="the disk is too small; nothing more was downloaded",
            next_step=f"make room for {size + _DISK_MARGIN - free:,} bytes more, then run it again",
        )


def _from_cache(model: Model, dest: Path) -> Fetched:
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(model.source, revision=model.revision, local_files_only=True))
    except (OSError, ValueError):
        raise FetchError(
            f"{model.source}: not fetched yet, and this is offline mode",
            cause=f"neither {dest} nor the hub's local cache has it",
            next_step="run the same command without --offline (and without HF_HUB_OFFLINE) once",
        ) from None
    there = [path for path in found.rglob("*") if path.is_file()]
    names = needed_files(model, {path.relative_to(found).as_posix(): path.stat().st_size for path in there})
    _refuse_named_code(model, found, names)
    return _publish(model, found, names, dest, origin="cache", commit=found.name)


def _publish(
    model: Model, source: Path, names: list[str], dest: Path, *, origin: Origin, commit: str | None
) -> Fetched:
    """Collect the files aside, convert what must be, write the record, and put the folder in its place."""
    if origin != "hub":
        size = sum((source / name).stat().st_size for name in names)
        _require_disk(model.source, _existing(dest), 2 * size)
    try:
        with replaced_folder(dest) as aside:
            for name in names:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                # The cache's files are links to elsewhere: what is published must be the bytes themselves.
                link_or_copy((source / name).resolve(), aside / name)
            kept = convert_pickles(aside, names)
            digests = {name: sha256(aside / name) for name in kept}
            sizes = {name: (aside / name).stat().st_size for name in kept}
            record = {
                "format": _FORMAT,
                **_identity(model),
                "origin": origin,
                "commit": commit,
                "files": {name: {"bytes": sizes[name], "sha256": digests[name]} for name in kept},
            }
            (aside / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise FetchError(
            f"{model.source}: the disk is full", next_step="make room, then run the same command again"
        ) from None
    return Fetched(path=dest, origin=origin, commit=commit, size=sum(sizes.values()), digests=digests)


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _identity(model: Model) -> dict[str, Any]:
    return {"source": model.source, "revision": model.revision}


def present_checkpoint(model: Model, dest: Path) -> Fetched | None:
    """What an earlier run published, if it is this model's and every file still has its size; else None."""
    try:
        record = json.loads((dest / RECORD).read_bytes())
        files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in record["files"].items()}
        if record["format"] != _FORMAT or any(record[k] != v for k, v in _identity(model).items()):
            return None
        if any((dest / name).stat().st_size != size for name, (size, _) in files.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    # A checkpoint fetched while the stack file allowed more than it does now is checked again.
    _refuse_named_code(model, dest, list(files))
    return Fetched(
        path=dest,
        origin="present",
        commit=record["commit"],
        size=sum(size for size, _ in files.values()),
        digests={name: digest for name, (_, digest) in files.items()},
    )


@contextlib.contextmanager
def _lock(dest: Path) -> Iterator[None]:
    """One fetch into `dest` at a time: two would write the same partial file. The kernel frees a dead one's
    lock.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    lock = dest.with_name(f".{dest.name}.fetch-lock")
    with locked(lock, f"{dest} is being fetched by another process"):
        yield
