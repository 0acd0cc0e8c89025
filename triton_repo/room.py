"""Has the card room for two versions of a model at once? By what the plan promised each engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from build_engines.errors import PlanError
from triton_repo.versions import ServedModel

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version that is to be loaded under `name`: bytes of the card that it takes, 0 for one on the CPU."""

    name: str
    bytes: int

    @classmethod
    def of(cls, name: str, manifest: Mapping[str, Any], config: Any) -> Candidate:
        return cls(name, _promised(manifest, config))


def require_room(models: Sequence[ServedModel], candidates: Sequence[Candidate], usable: int) -> None:
    """Raises PlanError where `usable` bytes do not hold what is served and each candidate beside it in turn.

    A candidate takes the place of the version that has its name.
    """
    served = {model.name: _promised(model.manifest(model.version), model.config) for model in models}
    for candidate in candidates:
        held = sum(served.values())
        if candidate.bytes and held + candidate.bytes > usable:
            raise PlanError(
                f"the card has no room for two versions of {candidate.name} at once: what is served takes "
                f"{_mib(held)}, the new version {_mib(candidate.bytes)}, and {_mib(usable)} are usable",
                cause="while one version takes over, the one before it still answers",
                next_step="stop the server, then: triton-repo write STACK and triton-repo serve STACK; "
                "nothing was changed",
            )
        served[candidate.name] = candidate.bytes


def _promised(manifest: Mapping[str, Any], config: Any) -> int:
    parts: Mapping[str, int] = manifest.get("memory") or {}
    return sum(parts.values()) * sum(group.count or 1 for group in config.instance_group)


def _mib(size: int) -> str:
    return f"{size / _MIB:,.0f} MiB"
