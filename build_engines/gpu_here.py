"""The GPU in this machine and what is free on it right now, for those who plan and not for those who run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from build_engines.cards import MIB
from build_engines.nvidia import NoGpu, find_card, free_bytes

if TYPE_CHECKING:
    from build_engines.plan import Plan


@dataclass(frozen=True, slots=True)
class GpuHere:
    """`free_bytes` None: the driver does not say (a part of a GPU, a container without the library)."""

    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        free = "free memory unknown" if self.free_bytes is None else f"{self.free_bytes / MIB:,.0f} free now"
        total = f"{self.total_bytes / MIB:,.0f} MiB"
        return f"{self.name}, compute capability {self.compute_capability}, {total}, {free}"

    def differences(self, plan: Plan) -> list[str]:
        """What speaks against running the planned engines on this GPU now."""
        found = []
        if self.compute_capability != plan.card.compute_capability:
            found.append(
                f"it is another kind than the stack's card ({plan.card.compute_capability}): "
                "engines for one may not run on the other"
            )
        short = plan.used - self.free_bytes if self.free_bytes is not None else 0
        if short > 0:
            found.append(
                f"the engines take {plan.used / MIB:,.0f} MiB: {short / MIB:,.0f} more than is free right "
                "now (see nvidia-smi)"
            )
        return found

    def compared(self, plan: Plan) -> list[str]:
        """What a reader of the plan must know of this GPU, in lines."""
        return [f"GPU here: {self.line()}", *(f"  {line}" for line in self.differences(plan))]


def find_gpu() -> GpuHere | None:
    """The first GPU, or None without one; never raises."""
    try:
        card = find_card()
    except NoGpu:
        return None
    return GpuHere(card.name, card.compute_capability, card.total_bytes, free_bytes(card))
