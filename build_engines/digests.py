"""`verify-digests`: every file of a build folder against the record that was written with it.

A folder with a record is a unit: a stage (stage.json), a fetched checkpoint (fetched.json), a version of a
served model (digests.json), or an engine that was copied somewhere without its stage (manifest.json). Nothing
else in a build folder is an artefact. Stages and engines check themselves when they are used; this reads all
of them, whether they are used or not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from build_engines.errors import ArtifactError
from build_engines.fetch import RECORD as FETCHED
from build_engines.manifest import MANIFEST, RECORD
from triton_repo.runtime.seal import MAX_RECORD_BYTES, beside, contents, is_model, is_version, read_record
from triton_repo.runtime.seal import RECORD as SEAL
from triton_repo.runtime.session import EngineRefused, read_manifest

What = Literal["altered", "missing", "extra", "unreadable"]
# (file, bytes read so far, bytes in all)
Progress = Callable[[str, int, int], None]
_CHUNK: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """A file that is not as it was recorded; `detail` says more where there is more to say."""

    path: str
    what: What
    detail: str = ""


class _Expected(NamedTuple):
    """A file as it was recorded: with one of `digests`."""

    size: int
    digests: frozenset[str]


_Files = Mapping[str, _Expected]


@dataclass(frozen=True, slots=True)
class _Unit:
    """Files by name in `folder`; `whole`: nothing else may be there."""

    folder: Path
    record: str
    files: _Files
    whole: bool


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found in `folder`: how many units, files and bytes were looked at, and what is wrong."""

    folder: str
    units: int
    files: int
    bytes: int
    problems: list[Problem] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify_digests(folder: Path, progress: Progress | None = None) -> Checked:
    """Compare every recorded file under `folder` with its record.

    Raises:
        ArtifactError: nothing under `folder` has a record.
    """
    problems: list[Problem] = []
    units = list(_units(folder, problems))
    if not units and not problems:
        raise ArtifactError(
            f"{folder} holds nothing that was built",
            cause="it is not a build folder, an engine or a repository, or nothing was built there yet",
            next_step="name the folder that `build-engines build` or `triton-repo write` wrote",
        )
    reader = _Reader(progress, sum(found.size for unit in units for found in unit.files.values()))
    for unit in units:
        problems += _compare(unit, reader)
    files = sum(len(unit.files) for unit in units)
    # A folder that cannot be read is met more than once.
    found = sorted(set(problems), key=lambda problem: problem.path)
    return Checked(str(folder), len(units), files, reader.read, found)


def require_whole(checked: Checked) -> None:
    """Raise ArtifactError that names every file in `checked.problems`; nothing where there is none."""
    if not checked.problems:
        return
    lines = [f"  {p.path}: {p.what}{f' ({p.detail})' if p.detail else ''}" for p in checked.problems]
    raise ArtifactError(
        f"{checked.folder}: {len(lines)} of {checked.files:,} files are not as they were written\n"
        + "\n".join(lines),
        cause="a copy was cut short, a disk is failing, somebody changed them, or you may not read them",
        next_step="build-engines build STACK, then triton-repo write STACK: what is altered is made again",
    )


def _units(folder: Path, problems: list[Problem]) -> Iterator[_Unit]:
    """Units of `folder` and below; what cannot be one is noted in `problems`."""

    def note(error: OSError) -> None:
        problems.append(_unreadable(error, folder))

    for place, folders, files in os.walk(folder, onerror=note):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        try:
            if RECORD in files:
                folders.clear()
                yield _stage(here)
            elif FETCHED in files:
                folders.clear()
                yield _Unit(here, FETCHED, _recorded(here, FETCHED, "files"), whole=True)
            elif is_version(here):
                folders.clear()
                yield _sealed(here, whole=True)
            elif is_model(here):
                folders[:] = [name for name in folders if name.isdecimal()]
                # Where no version has a record, that is what is wrong.
                if (written := _written(here)) or not folders:
                    yield _Unit(here, SEAL, written, whole=True)
            elif SEAL in files:
                yield _sealed(here, whole=False)
            elif MANIFEST in files:
                yield _Unit(here, MANIFEST, _listed(here), whole=True)
        except _Unreadable as error:
            problems.append(Problem(str(here / error.name), error.what, error.detail))
        except OSError as error:
            problems.append(_unreadable(error, here))


class _Unreadable(Exception):
    """A record that says nothing."""

    def __init__(self, name: str, detail: str, what: What = "unreadable") -> None:
        super().__init__(detail)
        self.name, self.detail, self.what = name, detail, what


def _stage(folder: Path) -> _Unit:
    files = _recorded(folder, RECORD, "outputs")
    if MANIFEST in files:
        _check_manifest(folder, files)
    return _Unit(folder, RECORD, files, whole=True)


def _written(model: Path) -> _Files:
    """What a model's own folder holds: each file as one of its versions has it, whatever its size is."""
    there = {name: (model / name).lstat().st_size for name in contents(model)}
    return {
        name: _Expected(there.get(name, 0), frozenset(digests)) for name, digests in beside(model).items()
    }


def _sealed(folder: Path, *, whole: bool) -> _Unit:
    if not (folder / SEAL).exists():
        raise _Unreadable(SEAL, "so nothing says what belongs here", "missing")
    try:
        files = _expected(read_record(folder)[0])
    except EngineRefused as error:
        raise _Unreadable(SEAL, str(error)) from None
    if MANIFEST in files:
        _check_manifest(folder, files)
    return _Unit(folder, SEAL, files, whole)


def _listed(folder: Path) -> _Files:
    try:
        manifest = read_manifest(folder)
        return _expected({manifest["engine"]["file"]: manifest["engine"], **manifest["files"]})
    except EngineRefused as error:
        raise _Unreadable(MANIFEST, str(error)[:300]) from None


def _check_manifest(folder: Path, files: _Files) -> None:
    """The record and the manifest in it must say the same of the files that both know."""
    try:
        listed = _listed(folder)
    except _Unreadable:
        return  # altered, as its own digest will show
    for name, found in listed.items():
        if name in files and files[name].digests != found.digests:
            raise _Unreadable(MANIFEST, f"says otherwise of {name} than the record beside it")


def _recorded(folder: Path, name: str, key: str) -> _Files:
    try:
        if (folder / name).stat().st_size > MAX_RECORD_BYTES:
            raise ValueError(f"more than {MAX_RECORD_BYTES:,} bytes")
        return _expected(json.loads((folder / name).read_bytes())[key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Unreadable(name, f"no record that can be read: {error!r:.200}") from None


def _expected(files: Mapping[str, Any]) -> _Files:
    """Of a record's {file: {"bytes", "sha256"}}."""
    return {
        str(name): _Expected(int(found["bytes"]), frozenset({str(found["sha256"])}))
        for name, found in files.items()
    }


def _compare(unit: _Unit, reader: _Reader) -> Iterator[Problem]:
    for name, expected in unit.files.items():
        path = unit.folder / name
        try:
            yield from _compare_file(path, expected, reader)
        except OSError as error:
            yield _unreadable(error, path)
    if unit.whole:
        try:
            there = contents(unit.folder)
        except OSError as error:
            yield _unreadable(error, unit.folder)
            return
        for name in there - unit.files.keys() - {unit.record}:
            yield Problem(str(unit.folder / name), "extra")


def _compare_file(path: Path, expected: _Expected, reader: _Reader) -> Iterator[Problem]:
    if not os.path.lexists(path):
        yield Problem(str(path), "missing")
    elif path.is_symlink() or not path.is_file():
        yield Problem(str(path), "altered", "it is a link or a folder")
    elif (size := path.stat().st_size) != expected.size:
        yield Problem(str(path), "altered", f"{size:,} bytes instead of {expected.size:,}")
    elif reader.digest(path) not in expected.digests:
        yield Problem(str(path), "altered")


def _unreadable(error: OSError, path: Path) -> Problem:
    """What the system said of `path`, or of what it names itself."""
    return Problem(str(error.filename or path), "unreadable", error.strerror or str(error))


class _Reader:
    """Digests of files; of one that has several names (a repository links its engines) once."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress or (lambda *_: None)
        self._total = total
        self._known: dict[tuple[int, int], str] = {}
        self.read = 0

    def digest(self, path: Path) -> str:
        found = path.stat()
        key = found.st_dev, found.st_ino
        if key in self._known:
            self._advance(path, found.st_size)
            return self._known[key]
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                self._advance(path, len(chunk))
        self._known[key] = digest.hexdigest()
        return self._known[key]

    def _advance(self, path: Path, count: int) -> None:
        self.read += count
        self._progress(path.name, self.read, self._total)
