"""What would fit: changes to a stack that is too large, each planned again before it is proposed.

A proposal is never a guess. Every candidate is a changed copy of the stack, and it is kept only if its own
plan fits; within a kind, the smallest sacrifice comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from build_engines.plan import on_card, plan_shapes
from build_engines.shapes import Shape
from build_engines.stack import Model, Precision, Stack, compiles

_EIGHT_BIT: Final[tuple[Precision, ...]] = ("int8", "int8-weights")
_MIN_LENGTH: Final = 8
_MIN_CAPACITY: Final = 16
_MAX_DROPS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """`what` is the edit in words, `stack` the stack after it, `used` the bytes its engines then take."""

    kind: str
    what: str
    used: int
    stack: Stack

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "what": self.what, "used_bytes": self.used}


Change = tuple[str, Stack]


def propose(stack: Stack, shapes: dict[str, Shape]) -> tuple[Proposal, ...]:
    """Changes after which the stack fits: INT8, slots, batch, length, instances, a model less, or several."""
    found: list[Proposal] = []

    def first_fit(kind: str, changes: Iterator[Change], limit: int = 1) -> None:
        kept = 0
        for what, changed in changes:
            plan = plan_shapes(changed, shapes)
            if plan.fits:
                found.append(Proposal(kind=kind, what=what, used=plan.used, stack=changed))
                kept += 1
            if kept == limit:
                return

    first_fit("precision", _by_saving(_smallest_precisions(stack), shapes))
    first_fit("slots", _slots(stack))
    first_fit("batch", _caps(stack, "max_batch", 1))
    first_fit("length", _caps(stack, "max_length", _MIN_LENGTH))
    first_fit("instances", _one_instance(stack))
    if not found:
        first_fit("combined", _combined(stack))
    first_fit("drop", _by_saving(_without_one(stack), shapes), _MAX_DROPS)
    if not any(proposal.kind == "drop" for proposal in found):
        first_fit("drop", _without_many(stack, shapes))
    return tuple(found)


def _by_saving(changes: Iterator[Change], shapes: dict[str, Shape]) -> Iterator[Change]:
    """The change that keeps the most comes first."""
    yield from sorted(changes, key=lambda change: -plan_shapes(change[1], shapes).used)


def _change(stack: Stack, models: list[Model]) -> Stack:
    return replace(stack, models=stack.models | {model.name: model for model in models})


def _to_smallest(stack: Stack, model: Model) -> Model:
    """INT8 alone, or FP16 where no target of the stack has INT8; an FP32 engine for the CPU stays."""
    on_cpu = tuple(p for p in model.precisions if not on_card(stack, model, p))
    if model.target or on_cpu == model.precisions:  # a checkpoint is served as it is stored
        return model
    eight: Precision = "int8-weights" if model.task == "generate" else "int8"
    has_eight = any(compiles(target, model.task, eight) for target in stack.targets)
    smallest: tuple[Precision, ...] = (eight, *_EIGHT_BIT) if has_eight else ("fp16",)
    kept = next((p for p in smallest if p in model.precisions), smallest[0])
    return replace(model, precisions=(kept, *on_cpu))


def _precision_words(model: Model, changed: Model) -> str:
    return f"models.{model.name}.precisions = [{', '.join(f'{p!r}' for p in changed.precisions)}]".replace(
        "'", '"'
    )


def _smallest_precisions(stack: Stack) -> Iterator[Change]:
    """The smallest precision alone, for one model, then for all."""
    changed = [(model, _to_smallest(stack, model)) for model in stack.models.values()]
    changed = [(model, new) for model, new in changed if new != model]
    for model, new in changed:
        yield _precision_words(model, new), _change(stack, [new])
    if len(changed) > 1:
        words = " and ".join(_precision_words(model, new) for model, new in changed)
        yield words, _change(stack, [new for _, new in changed])


def _slots(stack: Stack) -> Iterator[Change]:
    """One slot less, and so on, as a cap for every LLM that has more; open ones are chosen by the plan."""
    for cap in range(max((model.slots for model in stack.models.values()), default=0) - 1, 0, -1):
        over = [model for model in stack.models.values() if model.slots > cap]
        words = f"slots = {cap} for {', '.join(model.name for model in over)}"
        yield words, _change(stack, [replace(model, slots=cap) for model in over])


def _caps(stack: Stack, key: str, low: int) -> Iterator[Change]:
    """The largest power of two that fits, as a cap on `key` of every model that has more."""
    largest = max(getattr(model, key) for model in stack.models.values())
    # The largest power of two below it.
    cap = 1 << max(0, largest - 1).bit_length() >> 1
    while cap >= low:
        capped = _capped(stack, key, cap)
        changed = [model for name, model in capped.models.items() if model != stack.models[name]]
        if changed:
            # An LLM's length stops at a smallest one, below the cap that the encoders still take.
            yield f"{key} = {cap} for {', '.join(model.name for model in changed)}", capped
        cap //= 2


def _capped(stack: Stack, key: str, cap: int) -> Stack:
    def cap_one(model: Model) -> Model:
        if key == "max_batch":
            return replace(model, max_batch=min(model.max_batch, cap))
        if model.task != "generate":
            return replace(model, max_length=min(model.max_length, cap))
        length = min(model.max_length, max(cap, _MIN_CAPACITY))
        chunk = min(model.prefill_chunk, length) if length else model.prefill_chunk
        return replace(model, max_length=length, prefill_chunk=chunk)

    return _change(stack, [cap_one(model) for model in stack.models.values()])


def _one_instance(stack: Stack) -> Iterator[Change]:
    several = [model for model in stack.models.values() if model.instances > 1]
    if several:
        names = ", ".join(model.name for model in several)
        yield f"instances = 1 for {names}", _change(stack, [replace(model, instances=1) for model in several])


def _combined(stack: Stack) -> Iterator[Change]:
    """Smallest precision and one instance everywhere, then fewer slots, smaller batches, smaller lengths."""
    models = [replace(_to_smallest(stack, model), instances=1) for model in stack.models.values()]
    small = _change(stack, models)
    eight = any(precision in _EIGHT_BIT for model in models for precision in model.precisions)
    words = f"{'INT8' if eight else 'FP16'} alone and one instance of every model"
    yield words, small
    for slot_words, less in _slots(small):
        yield f"{words}, {slot_words}", less
    if any(model.slots > 1 for model in models):
        words += ", slots = 1"
        small = _change(small, [replace(m, slots=min(1, m.slots)) for m in small.models.values()])
    for batch_words, less in _caps(small, "max_batch", 1):
        yield f"{words}, {batch_words}", less
    least = _capped(small, "max_batch", 1)
    if any(model.max_batch > 1 for model in models):
        words += ", max_batch = 1"
    for length_words, less in _caps(least, "max_length", _MIN_LENGTH):
        yield f"{words}, {length_words}", less


def _without(stack: Stack, names: list[str]) -> Stack:
    return replace(stack, models={name: model for name, model in stack.models.items() if name not in names})


def _without_one(stack: Stack) -> Iterator[Change]:
    if len(stack.models) > 1:
        for name in stack.models:
            yield f"drop models.{name}", _without(stack, [name])


def _without_many(stack: Stack, shapes: dict[str, Shape]) -> Iterator[Change]:
    """The largest models first, until what is left fits; one always stays."""

    def size(name: str) -> int:
        return plan_shapes(_change(replace(stack, models={}), [stack.models[name]]), shapes).used

    by_size = sorted(stack.models, key=size, reverse=True)
    for count in range(2, len(by_size)):
        names = by_size[:count]
        yield "drop " + ", ".join(f"models.{name}" for name in names), _without(stack, names)
