"""The versions of a model: which is served, which other one is kept, and what each was written with.

<repository>/<model>/config.pbtxt      names the version that is served, and no other; a model that is being
                                       added has none
<repository>/<model>/<N>/config.pbtxt  the same, as it was written with version N
<repository>/<model>/<N>/served.json   what the client's summary says of it, and when it was written
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from build_engines.errors import RepositoryError
from triton_repo.config_pbtxt import parse
from triton_repo.runtime.seal import CONFIG, is_model, read_record
from triton_repo.runtime.session import EngineRefused

SERVED: Final = "served.json"
_AGAIN = "stop the server and write the repository again: triton-repo write STACK"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One Triton model of a repository and its version folders."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> int:
        """The one that config.pbtxt names. Raises RepositoryError."""
        return version_of(self.config)

    @property
    def config(self) -> Any:
        """The ModelConfig message. Raises RepositoryError."""
        return _config(self.folder / CONFIG)

    @property
    def kept(self) -> list[int]:
        """All versions that have a folder, oldest first."""
        names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    @property
    def previous(self) -> int | None:
        """The newest that is older than the served one."""
        served = self.version
        return max((version for version in self.kept if version < served), default=None)

    def path(self, version: int) -> Path:
        return self.folder / str(version)

    def config_of(self, version: int) -> Any:
        """The ModelConfig message that a version was written with. Raises RepositoryError."""
        return _config(self.path(version) / CONFIG)

    def manifest(self, version: int) -> dict[str, Any]:
        """The engine's manifest, unchecked: the model checks it when it loads. Raises RepositoryError."""
        return _json(self.path(version) / "manifest.json")

    def summary(self, version: int) -> dict[str, Any]:
        """What served.json holds. Raises RepositoryError."""
        return _json(self.path(version) / SERVED)

    def written(self, version: int) -> str:
        """When a version was written: all of one deploy have the same, later ones a greater one."""
        return str(self.summary(version)["written"])

    def beside(self, version: int) -> set[str]:
        """Files in the model's own folder that a version was written with, by name, its config left out."""
        with contextlib.suppress(EngineRefused):  # no record: it does not load, with or without them
            return set(read_record(self.path(version))[1]) - {CONFIG}
        return set()


def served_versions(repository: Path) -> list[ServedModel]:
    """Every Triton model of a repository, by name."""
    return [ServedModel(path.parent) for path in sorted(repository.glob(f"*/{CONFIG}"))]


def unfinished(repository: Path) -> list[ServedModel]:
    """Models that a deploy has begun to add, and was killed: no config.pbtxt says that they are served."""
    folders = [path for path in sorted(repository.iterdir()) if not (path / CONFIG).exists()]
    return [ServedModel(path) for path in folders if is_model(path)]


def last_deployed(models: Sequence[ServedModel], name: str | None) -> list[tuple[ServedModel, int]]:
    """What was deployed together last, of all models or of the one called `name`, each with the version to go
    back to.

    Raises RepositoryError where there is none, or, of all models, that deploy is undone already.
    """
    chosen = [model for model in models if name in (None, model.summary(model.version)["model"])]
    back = [(model, model.previous) for model in chosen]
    found = [(model, version) for model, version in back if version is not None]
    if not found:
        raise RepositoryError(
            f"no earlier version of {name or 'any model'} is kept",
            cause="nothing was deployed over what was written, or it was rolled back already",
            next_step="build the engines to be served, then: triton-repo deploy STACK",
        )
    if name:
        last = max(model.written(model.version) for model, _ in found)
    else:  # a version newer than the served one was rolled back, or never got so far
        last = max(model.written(model.kept[-1]) for model in models)
    found = [(model, version) for model, version in found if model.written(model.version) == last]
    if not found:
        raise RepositoryError(
            "there is nothing to undo of the last deploy",
            cause="it was rolled back already, was cut off, or only added models",
            next_step="to go further back, name a model: triton-repo rollback STACK --model MODEL",
        )
    return found


def version_of(config: Any) -> int:
    """The one version that a ModelConfig message names. Raises RepositoryError."""
    versions = list(config.version_policy.specific.versions)
    if len(versions) != 1:
        raise RepositoryError(
            f"{config.name}: {CONFIG} does not name one version",
            cause="it was written by an older triton-repo",
            next_step=_AGAIN,
        )
    return int(versions[0])


def _config(path: Path) -> Any:
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RepositoryError(f"{path}: {error.strerror or error}", next_step=_AGAIN) from None


# Asked for again and again during a rollout, and nobody changes what it gets.
_parsed = functools.cache(parse)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise RepositoryError(f"{path}: unreadable ({error})", next_step=_AGAIN) from None
    return found
