"""Does the stack fit the card? Pure arithmetic over the stack file and each checkpoint's config.json.

`plan_stack` answers in milliseconds, before anything is fetched, exported or compiled, and imports no model
library. Each engine that the stack serves is counted, every instance of it: they are on the card together.
The per-engine numbers are `build_engines.memory`'s; docs/plan.md states how each is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from build_engines.cards import MIB, Card
from build_engines.errors import PlanError
from build_engines.memory import EngineMemory, engine_memory
from build_engines.shapes import resolve_shape
from build_engines.stack import Model, ModelShape, Precision, Stack, Task

if TYPE_CHECKING:
    from rich.console import RenderableType

    from build_engines.proposals import Proposal

# FP32 attention has no TensorRT kernel, so an FP32 engine is an ONNX Runtime one and takes none of the card.
CPU_ONLY: Final[tuple[Precision, ...]] = ("fp32",)
_OPT_BATCH: Final = 8
_OPT_SEQUENCE: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """An engine's optimization profile: (smallest, the one kernels are tuned for, largest)."""

    batch: tuple[int, int, int]
    sequence: tuple[int, int, int]

    def as_dict(self) -> dict[str, list[int]]:
        return {"batch": list(self.batch), "sequence": list(self.sequence)}


def engine_profile(model: Model) -> Profile:
    """From one token to `max_batch` x `max_length`, tuned for 8 x 64: what a busy server runs."""
    return Profile(
        batch=(1, min(_OPT_BATCH, model.max_batch), model.max_batch),
        sequence=(1, min(_OPT_SEQUENCE, model.max_length), model.max_length),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """One engine on the card. `memory` is one instance's; `variant` is the Triton model name."""

    model: str
    task: Task
    precision: Precision
    variant: str
    instances: int
    profile: Profile
    memory: EngineMemory

    @property
    def total(self) -> int:
        return self.instances * self.memory.total

    def as_dict(self) -> dict[str, Any]:
        """Bytes; the parts are one instance's, `total_bytes` is all of them."""
        return {
            "model": self.model,
            "task": self.task,
            "precision": self.precision,
            "triton_model": self.variant,
            "instances": self.instances,
            "profile": self.profile.as_dict(),
            "weights_bytes": self.memory.weights,
            "tensor_bytes": self.memory.tensors,
            "code_bytes": self.memory.code,
            "activation_bytes": self.memory.activations,
            "buffer_bytes": self.memory.buffers,
            "context_bytes": self.memory.context,
            "total_bytes": self.total,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole stack against its card, in bytes. `proposals` is empty when the stack fits."""

    stack: str
    card: Card
    reserve: int
    engines: tuple[EnginePlan, ...]
    cpu_only: tuple[str, ...] = ()
    proposals: tuple[Proposal, ...] = ()

    def _sum(self, part: str) -> int:
        return sum(engine.instances * int(getattr(engine.memory, part)) for engine in self.engines)

    @property
    def weights(self) -> int:
        return self._sum("weights")

    @property
    def activations(self) -> int:
        """Scratch memory and input/output buffers."""
        return self._sum("activations") + self._sum("buffers")

    @property
    def context(self) -> int:
        return self._sum("context")

    @property
    def used(self) -> int:
        """What the engines take, without the reserve."""
        return self._sum("total")

    @property
    def usable(self) -> int:
        return self.card.memory_bytes - self.reserve

    @property
    def free(self) -> int:
        """Negative when the stack does not fit."""
        return self.usable - self.used

    @property
    def fits(self) -> bool:
        return self.free >= 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "stack": self.stack,
            "card": {
                "name": self.card.name,
                "title": self.card.title,
                "compute_capability": self.card.compute_capability,
                "memory_bytes": self.card.memory_bytes,
            },
            "engines": [engine.as_dict() for engine in self.engines],
            "cpu_only": list(self.cpu_only),
            "total": {
                "weights_bytes": self.weights,
                "activation_bytes": self.activations,
                "context_bytes": self.context,
                "reserve_bytes": self.reserve,
                "used_bytes": self.used + self.reserve,
                "free_bytes": self.free,
            },
            "fits": self.fits,
            "proposals": [proposal.as_dict() for proposal in self.proposals],
        }


def plan_stack(stack: Stack) -> Plan:
    """The plan, with proposals where the stack does not fit (see `require_fit` for the refusal).

    Raises PlanError where a model's sizes are unknown, malformed or too small for its max_length.
    """
    shapes = {model.name: resolve_shape(stack, model) for model in stack.models.values()}
    plan = plan_shapes(stack, shapes)
    if plan.fits:
        return plan
    from build_engines.proposals import propose

    return plan_shapes(stack, shapes, propose(stack, shapes))


def plan_shapes(stack: Stack, shapes: dict[str, ModelShape], proposals: tuple[Proposal, ...] = ()) -> Plan:
    """The arithmetic alone, for models whose sizes are known."""
    engines: list[EnginePlan] = []
    cpu_only: list[str] = []
    for model in stack.models.values():
        for precision, variant in model.variants.items():
            if precision in CPU_ONLY:
                cpu_only.append(variant)
                continue
            memory = engine_memory(model, shapes[model.name], precision, stack.context_mib * MIB)
            engines.append(
                EnginePlan(
                    model=model.name,
                    task=model.task,
                    precision=precision,
                    variant=variant,
                    instances=model.instances,
                    profile=engine_profile(model),
                    memory=memory,
                )
            )
    return Plan(
        stack=stack.name,
        card=stack.card,
        reserve=stack.reserve_mib * MIB,
        engines=tuple(engines),
        cpu_only=tuple(cpu_only),
        proposals=proposals,
    )


def require_fit(plan: Plan) -> None:
    """Raises PlanError for a stack that does not fit, with what would."""
    if plan.fits:
        return
    largest = sorted(plan.engines, key=lambda engine: engine.total, reverse=True)[:3]
    shares = ", ".join(f"{engine.variant} {mib(engine.total)}" for engine in largest)
    options = "\n".join(f"         - {proposal.what}: {mib(proposal.used)}" for proposal in plan.proposals)
    raise PlanError(
        f"stack {plan.stack} needs {mib(plan.used)} and does not fit {plan.card.title}: "
        f"{mib(plan.usable)} are usable ({mib(plan.card.memory_bytes)} less {mib(plan.reserve)} reserve), "
        f"{mib(-plan.free)} too few",
        cause=f"the largest engines: {shares}" if shares else "the reserve alone is more than the card has",
        next_step=f"each of these fits:\n{options}"
        if options
        else "nothing smaller of this stack fits: name a smaller model or a larger card",
    )


def mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"


def render_plan(plan: Plan) -> RenderableType:
    """The table that `build-engines plan` prints; sizes in MiB, rounded, so a column may be off by one."""
    from rich.console import Group
    from rich.table import Table

    table = Table(
        title=f"{plan.stack} on {plan.card.title} (compute capability {plan.card.compute_capability})"
    )
    table.add_column("engine")
    table.add_column("precision")
    for heading in ("texts x tokens", "instances", "weights", "activations", "context", "total MiB"):
        table.add_column(heading, justify="right")
    for engine in plan.engines:
        memory, n = engine.memory, engine.instances
        table.add_row(
            engine.variant,
            engine.precision,
            f"{engine.profile.batch[2]} x {engine.profile.sequence[2]}",
            str(n),
            *(
                _cell(n * part)
                for part in (memory.weights, memory.activations + memory.buffers, memory.context)
            ),
            _cell(engine.total),
        )
    table.add_section()
    table.add_row(
        "all engines", "", "", "", *map(_cell, (plan.weights, plan.activations, plan.context, plan.used))
    )
    table.add_row("reserve", *[""] * 6, _cell(plan.reserve))
    table.add_row("card", *[""] * 6, _cell(plan.card.memory_bytes))
    style = "green" if plan.fits else "red"
    table.add_row("free" if plan.fits else "missing", *[""] * 6, _cell(abs(plan.free)), style=style)
    notes = [f"{name} runs on the CPU only" for name in plan.cpu_only]
    return Group(table, *notes)


def _cell(size: int) -> str:
    return f"{size / MIB:,.0f}"
