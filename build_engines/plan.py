"""Does the stack fit the card? Pure arithmetic over the stack file and each checkpoint's config.json.

`plan_stack` answers in milliseconds, before anything is fetched, exported or compiled, and imports no model
library. Each engine that the stack serves is counted, every instance of it: they are on the card together.
The per-engine numbers are `build_engines.memory`'s; docs/plan.md states how each is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from build_engines.cards import MIB, Card
from build_engines.decoder_memory import cache_bytes_per_token, decoder_engine_memory, llm_memory
from build_engines.errors import PlanError
from build_engines.memory import EngineMemory, engine_memory
from build_engines.profiles import DecoderProfile, Profile, decoder_profile, engine_profile
from build_engines.shapes import Shape, resolve_shape
from build_engines.stack import MAX_CAPACITY, DecoderShape, Model, Precision, Stack, Task, compiles

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from build_engines.proposals import Proposal

# What an LLM gets where the stack file leaves it open: slots as long as most conversations or, where not even
# one such fits, shorter; and as many as fit, up to where reading the weights no longer decides a step's time.
_OPEN_LENGTH: Final = 2048
_SHORTEST_OPEN_LENGTH: Final = 256
_MOST_OPEN_SLOTS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """One engine on the card. `memory` is one instance's; `variant` is the Triton model name."""

    model: str
    task: Task
    precision: Precision
    variant: str
    instances: int
    profile: Profile | DecoderProfile
    memory: EngineMemory
    cache_per_token: int = 0

    @property
    def total(self) -> int:
        return self.instances * self.memory.total

    @property
    def largest(self) -> str:
        """The most that runs at once: texts x tokens, or slots x tokens."""
        if isinstance(self.profile, DecoderProfile):
            return f"{self.profile.slots} slots x {self.profile.capacity}"
        return f"{self.profile.batch[2]} x {self.profile.sequence[2]}"

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
            "kv_cache_bytes": self.memory.cache,
            "kv_cache_bytes_per_token": self.cache_per_token,
            "context_bytes": self.memory.context,
            "total_bytes": self.total,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole stack against its card, in bytes. `proposals` is empty when the stack fits.

    `chosen`: what the stack file left open, in words.
    """

    stack: str
    card: Card
    reserve: int
    engines: tuple[EnginePlan, ...]
    cpu_only: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
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
    def cache(self) -> int:
        """Keys and values of the LLMs' slots."""
        return self._sum("cache")

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
            "chosen": list(self.chosen),
            "total": {
                "weights_bytes": self.weights,
                "activation_bytes": self.activations,
                "kv_cache_bytes": self.cache,
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

    return replace(plan, proposals=propose(stack, shapes))


def resolve_open(stack: Stack) -> Stack:
    """The stack with `slots` and `max_length` settled for every LLM; all later stages work on this one.

    What the stack file leaves open is chosen for its card: `max_length` is 2,048 (or the checkpoint's
    positions), and slots are as many as fit beside all other engines, from 1 to 16. Where not even one slot
    of that length fits, an open length is halved, down to 256. Several open LLMs get slots in turn.

    Raises PlanError as `plan_stack`, but only for a stack that leaves something open.
    """
    if not _open_models(stack):
        return stack
    return _settle(stack, {model.name: resolve_shape(stack, model) for model in stack.models.values()})


def _open_models(stack: Stack) -> list[Model]:
    return [model for model in stack.models.values() if model.is_open]


def _settle(stack: Stack, shapes: dict[str, Shape]) -> Stack:
    def filled(slots: dict[str, int], longest: int) -> Stack:
        models = dict(stack.models)
        for model in open_models:
            positions = min(shapes[model.name].positions, MAX_CAPACITY)
            length = model.max_length or min(longest, positions)
            models[model.name] = replace(
                model,
                slots=model.slots or slots[model.name],
                max_length=length,
                prefill_chunk=min(model.prefill_chunk, length),
            )
        return replace(stack, models=models)

    def fits(candidate: Stack) -> bool:
        return _used(candidate, shapes) <= candidate.card.memory_bytes - candidate.reserve_mib * MIB

    open_models = _open_models(stack)
    slots = {model.name: 1 for model in open_models}
    lengths = [_OPEN_LENGTH >> step for step in range(4) if _OPEN_LENGTH >> step >= _SHORTEST_OPEN_LENGTH]
    longest = next((length for length in lengths if fits(filled(slots, length))), None)
    if longest is None:
        return filled(slots, _OPEN_LENGTH)
    growing = [model.name for model in open_models if not model.slots]
    while growing:
        for name in list(growing):
            more = slots | {name: slots[name] + 1}
            if more[name] <= _MOST_OPEN_SLOTS and fits(filled(more, longest)):
                slots = more
            else:
                growing.remove(name)
    return filled(slots, longest)


def _used(stack: Stack, shapes: dict[str, Shape]) -> int:
    """Bytes that the engines of a settled stack take."""
    return sum(engine.total for engine in _engines(stack, shapes))


def plan_shapes(stack: Stack, shapes: dict[str, Shape]) -> Plan:
    """The arithmetic alone, for models whose sizes are known; what is open is settled first."""
    settled = _settle(stack, shapes) if _open_models(stack) else stack
    return Plan(
        stack=stack.name,
        card=stack.card,
        reserve=stack.reserve_mib * MIB,
        engines=tuple(_engines(settled, shapes)),
        cpu_only=tuple(
            variant
            for model in stack.models.values()
            for precision, variant in model.variants.items()
            if not on_card(stack, model, precision)
        ),
        chosen=tuple(
            f"{model.name}: the plan chose {chosen.slots} slots of {chosen.max_length:,} tokens"
            for model in _open_models(stack)
            for chosen in [settled.models[model.name]]
        ),
    )


def on_card(stack: Stack, model: Model, precision: Precision) -> bool:
    """Whether the plan counts this engine: all but FP32 ones that no target of the stack runs on a GPU.

    Others are counted even where the stack names no target for a GPU yet.
    """
    on_gpu = [target for target in stack.targets if target != "onnxruntime"]
    return precision != "fp32" or any(compiles(target, model.task, precision) for target in on_gpu)


def _engines(stack: Stack, shapes: dict[str, Shape]) -> Iterator[EnginePlan]:
    context = stack.context_mib * MIB
    for model in stack.models.values():
        shape = shapes[model.name]
        for precision, variant in model.variants.items():
            if not on_card(stack, model, precision):
                continue
            profile: Profile | DecoderProfile
            if isinstance(shape, DecoderShape):
                profile, per_token = decoder_profile(model), cache_bytes_per_token(shape)
                of = llm_memory if model.target else decoder_engine_memory
                memory = of(model, shape, precision, context)
            else:
                profile, per_token = engine_profile(model), 0
                memory = engine_memory(model, shape, precision, context)
            yield EnginePlan(
                model=model.name,
                task=model.task,
                precision=precision,
                variant=variant,
                instances=model.instances,
                profile=profile,
                memory=memory,
                cache_per_token=per_token,
            )


def promised_memory(stack: Stack, model: Model, precision: Precision) -> dict[str, int]:
    """Bytes that the plan counts for one instance of one engine, by what they are for; of a CPU engine none.

    Raises PlanError as `plan_stack`.
    """
    alone = replace(stack, models={model.name: replace(model, precisions=(precision,))})
    engines = _engines(alone, {model.name: resolve_shape(alone, model)})
    return next((engine.memory.promised() for engine in engines), {})


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
    for heading in (
        "texts x tokens",
        "instances",
        "weights",
        "activations",
        "KV cache",
        "context",
        "total MiB",
    ):
        table.add_column(heading, justify="right")
    for engine in plan.engines:
        _add_engine(table, engine)
    table.add_section()
    parts = (plan.weights, plan.activations, plan.cache, plan.context, plan.used)
    table.add_row("all engines", "", "", "", *map(_cell, parts))
    table.add_row("reserve", *[""] * 7, _cell(plan.reserve))
    table.add_row("card", *[""] * 7, _cell(plan.card.memory_bytes))
    style = "green" if plan.fits else "red"
    table.add_row("free" if plan.fits else "missing", *[""] * 7, _cell(abs(plan.free)), style=style)
    caches = {engine.model: engine.cache_per_token for engine in plan.engines if engine.cache_per_token}
    notes = [
        *plan.chosen,
        *(f"{name}: {size / 1024:,.0f} KiB of KV cache for each token" for name, size in caches.items()),
        *(f"{name} runs on the CPU only" for name in plan.cpu_only),
    ]
    return Group(table, *notes)


def _add_engine(table: Table, engine: EnginePlan) -> None:
    memory, n = engine.memory, engine.instances
    parts = (memory.weights, memory.activations + memory.buffers, memory.cache, memory.context)
    table.add_row(
        engine.variant,
        engine.precision,
        engine.largest,
        str(n),
        *(_cell(n * part) for part in parts),
        _cell(engine.total),
    )


def _cell(size: int) -> str:
    return f"{size / MIB:,.0f}"


__all__ = [
    "DecoderProfile",
    "EnginePlan",
    "Plan",
    "Profile",
    "decoder_profile",
    "engine_profile",
    "mib",
    "on_card",
    "plan_shapes",
    "plan_stack",
    "promised_memory",
    "render_plan",
    "require_fit",
    "resolve_open",
]
