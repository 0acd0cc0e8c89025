"""What a written repository holds, read from its config.pbtxt files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from build_engines.errors import RepositoryError, ServerError
from triton_repo.config_pbtxt import parse


def served_models(repository: Path) -> dict[str, int]:
    """Instances by model name, from the config.pbtxt files. Raises ServerError when there are none."""
    models = {
        name: sum(group.count or 1 for group in config.instance_group) or 1
        for name, config in _configs(repository).items()
    }
    if not models:
        raise ServerError(
            f"{repository} is no Triton repository: it has no <model>/config.pbtxt",
            next_step="write one: triton-repo write STACK",
        )
    return models


def uses_cache(repository: Path) -> bool:
    return any(config.response_cache.enable for config in _configs(repository).values())


def all_in_python(repository: Path) -> bool:
    """Whether every model runs in the Python backend, so in a process of its own."""
    return all(config.backend == "python" for config in _configs(repository).values())


def _configs(repository: Path) -> dict[str, Any]:
    """Parsed before Triton reads them: its own message does not say what is wrong in the file."""
    found = {}
    for path in sorted(repository.glob("*/config.pbtxt")):
        try:
            found[path.parent.name] = parse(path.read_text("utf-8"))
        except (OSError, ValueError, RepositoryError) as error:
            raise ServerError(
                f"{path}: {error}", next_step="write the repository again: triton-repo write STACK"
            ) from None
    return found
