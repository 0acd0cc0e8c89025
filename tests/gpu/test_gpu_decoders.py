"""A small LLM on the GPU: prompts in chunks, steps, neighbours that come and go, copies, as on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_stack import SIZES

from build_engines.gpu.models import LLM

# FP16 caches and another order of sums, against FP32 on the CPU, where INT8 weights meet INT8 activations.
# The logits' standard deviation is 0.16.
_NEAR = {"fp16": 0.01, "int8-weights": 0.05}

pytestmark = pytest.mark.parametrize("precision", ["fp16", "int8-weights"])


@pytest.fixture
def both(cuda: Any, stacks: Any, target: str, precision: str) -> Any:
    """The engine on the GPU, and the same on the CPU."""
    from triton_repo.runtime.engines import open_decoder_engine

    stack = stacks(target)
    here = open_decoder_engine(stack.folder(LLM, precision, "onnxruntime"))
    there = open_decoder_engine(stack.folder(LLM, precision))
    yield there, here
    there.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(5, 900, length)]


def fill(engine: Any, slot: int, tokens: list[int]) -> Any:
    for start in range(0, len(tokens), engine.chunk):
        logits = engine.prefill(slot, tokens[start : start + engine.chunk], start)
    return np.array(logits)


@pytest.fixture
def near(precision: str) -> Any:
    """`near(found, expected)` fails for logits that are further apart than the precision explains."""

    def compare(found: Any, expected: Any) -> None:
        np.testing.assert_allclose(found, expected, atol=_NEAR[precision])

    return compare


def test_the_logits_of_a_prompt_are_those_of_the_cpu(both: Any, near: Any) -> None:
    there, here = both
    tokens = prompt(SIZES.capacity - 3)
    near(there.logits(tokens), here.logits(tokens))


@pytest.mark.parametrize("length", [1, 5, 16, 17, 40])
def test_prompts_of_every_length(both: Any, near: Any, length: int) -> None:
    there, here = both
    near(fill(there, 1, prompt(length)), fill(here, 1, prompt(length)))


def test_steps_of_rows_of_different_lengths(both: Any, near: Any) -> None:
    there, here = both
    lengths = [3, 21, 9]
    for slot, length in enumerate(lengths):
        near(fill(there, slot, prompt(length, slot)), fill(here, slot, prompt(length, slot)))
    for step in range(24):
        tokens = prompt(3, 100 + step)
        held = [length + step for length in lengths]
        near(there.decode([0, 1, 2], tokens, held), here.decode([0, 1, 2], tokens, held))


def test_slots_that_are_no_neighbours_in_any_order(both: Any, near: Any) -> None:
    there, here = both
    for engine in both:
        for slot in range(SIZES.slots):
            fill(engine, slot, prompt(4 + 3 * slot, slot))
    held = [4 + 3 * slot for slot in range(SIZES.slots)]
    for turn, slots in enumerate([[0, 3], [3, 1], [2], [3, 0, 1], [0, 1, 2, 3], [1, 3]]):
        tokens = prompt(len(slots), turn)
        lengths = [held[slot] for slot in slots]
        near(there.decode(slots, tokens, lengths), here.decode(slots, tokens, lengths))
        for slot in slots:
            held[slot] += 1


def test_a_copied_beginning_goes_on_like_its_source(both: Any, near: Any) -> None:
    there, here = both
    tokens = prompt(19)
    for engine in both:
        fill(engine, 0, tokens)
        engine.copy(0, 2, 12)
    near(there.prefill(2, prompt(5, 1), 12), here.prefill(2, prompt(5, 1), 12))
    near(there.decode([0], [7], [19]), here.decode([0], [7], [19]))


def test_nothing_is_written_beyond_a_slot(both: Any, near: Any) -> None:
    """The last place of a slot is used, and its neighbour's first tokens stay what they were."""
    there, here = both
    for engine in both:
        fill(engine, 0, prompt(SIZES.capacity - 1))
        fill(engine, 1, prompt(6, 1))
    near(
        there.decode([0, 1], [9, 8], [SIZES.capacity - 1, 6]),
        here.decode([0, 1], [9, 8], [SIZES.capacity - 1, 6]),
    )
    for engine in both:
        with pytest.raises(ValueError, match="do not fit"):
            engine.decode([0], [1], [SIZES.capacity])
    near(there.decode([1], [5], [7]), here.decode([1], [5], [7]))
