"""The shapes that an engine is compiled for: one optimization profile for an encoder, two for an LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from build_engines.stack import Model

Range = tuple[int, int, int]

_OPT_BATCH: Final = 8
_OPT_SEQUENCE: Final = 64
_ONE: Final = (1, 1, 1)
# Positions of a prompt whose logits one run gives: serving wants the last one's, a gate every one's. Eight
# cost no memory: at no shape was their moment the largest of a prefill step.
LOGIT_ROWS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """An encoder's optimization profile: (smallest, the one kernels are tuned for, largest)."""

    batch: Range
    sequence: Range

    def as_dict(self) -> dict[str, list[int]]:
        return {"batch": list(self.batch), "sequence": list(self.sequence)}


def engine_profile(model: Model) -> Profile:
    """From one token to `max_batch` x `max_length`, tuned for 8 x 64: what a busy server runs."""
    return Profile(
        batch=(1, min(_OPT_BATCH, model.max_batch), model.max_batch),
        sequence=(1, min(_OPT_SEQUENCE, model.max_length), model.max_length),
    )


@dataclass(frozen=True, slots=True)
class DecoderProfile:
    """An LLM's two optimization profiles, and the length its caches are fixed to.

    `slots`: rows of the KV cache, and of a decode step. `capacity`: tokens of one row. `chunk`: prompt tokens
    of a prefill step.
    """

    slots: int
    capacity: int
    chunk: int

    @property
    def ranges(self) -> tuple[dict[str, Range], dict[str, Range]]:
        """Sizes of the symbolic dimensions by name: of a decode step (profile 0), of a prefill step (1).

        A prefill step is run with one row, and a decode step on a single slot too. Yet neither batch ends at
        1: for a batch that is always 1, TensorRT-RTX 1.7 arranges FP16 weights differently from a batch that
        is not, and an engine with both stores most of them twice (1.6 times the weights); and it widens the
        whole INT8 head ahead of its product.
        """
        logits = (1, 1, min(LOGIT_ROWS, self.chunk))
        decode = {"batch": (1, self.slots, max(2, self.slots)), "sequence": _ONE, "logits": _ONE}
        prefill = {"batch": (1, 1, 2), "sequence": (1, self.chunk, self.chunk), "logits": logits}
        return decode, prefill

    def as_dict(self) -> dict[str, int]:
        return {"slots": self.slots, "capacity": self.capacity, "chunk": self.chunk}


def decoder_profile(model: Model) -> DecoderProfile:
    """The profiles of a `generate` model whose slots and length are settled (plan.resolve_open)."""
    if not (model.slots and model.max_length):
        raise ValueError(f"models.{model.name}: slots or max_length is still open")
    return DecoderProfile(
        slots=model.slots, capacity=model.max_length, chunk=min(model.prefill_chunk, model.max_length)
    )
