"""Which slot a prompt gets, what it keeps of it, and from where it copies."""

from __future__ import annotations

import numpy as np
import pytest

from triton_repo.runtime.slots import WORTH_COPYING, SlotTable


def tokens(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def table(*contents: list[int], capacity: int = 64) -> SlotTable:
    """Free slots that hold these tokens; the first one was used longest ago."""
    slots = SlotTable(len(contents), capacity)
    for number, content in enumerate(contents):
        slots._busy[number] = True
        slots.free -= 1
        slots.extend(number, content)
        if content:
            slots.release(number)
        else:  # never used
            slots._busy[number] = False
            slots.free += 1
    return slots


def test_the_longest_common_beginning_is_taken_in_place() -> None:
    slots = table([1, 2, 3], [1, 2, 3, 4, 5], [])
    assert slots.take(tokens(1, 2, 3, 4, 5, 6), 5) == 1
    assert slots.length(1) == 5
    assert slots.free == 2


def test_at_most_the_limit_is_kept() -> None:
    slots = table([1, 2, 3], [])
    assert slots.take(tokens(1, 2, 3), 2) == 0
    assert slots.length(0) == 2


def test_a_short_common_beginning_does_not_cost_a_long_conversation() -> None:
    """The empty slot, then the one unused for longest, rather than one that loses most of what it holds."""
    conversation = [1, 2, *range(10, 40)]
    slots = table([7, 8, 9], conversation, [])
    assert slots.take(tokens(1, 2, 50, 51), 3) == 2
    assert slots.take(tokens(1, 2, 60, 61), 3) == 0
    assert slots.length(0) == 0
    # Nothing else is left.
    assert slots.take(tokens(1, 2, 70, 71), 3) == 1
    assert slots.length(1) == 2


def test_an_empty_slot_before_any_that_holds_something() -> None:
    slots = table([1, 2, 3], [4, 5, 6], [])
    slots._touch(2)
    assert slots.take(tokens(9, 9), 1) == 2


def test_the_slot_unused_for_longest_goes_first() -> None:
    slots = table([1, 2], [3, 4], [5, 6])
    assert slots.take(tokens(3, 4, 9), 2) == 1
    slots.release(1)
    assert [slots.take(tokens(9, 9), 1) for _ in range(3)] == [0, 2, 1]


def test_what_is_copied_from_counts_as_used() -> None:
    shared = list(range(30))
    slots = table(shared, [90, 91], [92, 93])
    target = slots.take(tokens(*shared, 50), 30)
    assert target == 0
    slots.release(target)
    slots._used = [1, 2, 3]
    slots.copied(0, 1, 30)
    assert slots.take(tokens(99, 98), 1) == 1
    assert slots.take(tokens(99, 98), 1) == 2


def test_a_copy_comes_from_busy_slots_too_when_it_is_worth_it() -> None:
    system = list(range(WORTH_COPYING + 4))
    slots = table([*system, 77, 78, 79], [])
    assert slots.take(tokens(*system, 77, 50), len(system) + 1) == 0
    prompt = tokens(*system, 60, 61)
    target = slots.take(prompt, len(prompt) - 1)
    assert target == 1
    assert slots.source(prompt, len(prompt) - 1, target) == (0, len(system))
    slots.copied(0, 1, len(system))
    assert slots.source(prompt, len(prompt) - 1, target) is None
    short = tokens(*system[: WORTH_COPYING - 1], 60)
    assert SlotTable(2, 64).source(short, len(short) - 1, 0) is None
    few = table(list(range(WORTH_COPYING - 1)), [])
    assert few.source(short, len(short) - 1, 1) is None


def test_tokens_are_counted() -> None:
    slots = table([1, 2, 3], [4])
    assert slots.cached == 4
    assert slots.take(tokens(4, 5), 1) == 1
    slots.append([1], [5])
    assert (slots.cached, slots.length(1)) == (5, 2)
    slots.forget(1)
    assert slots.cached == 3


def test_a_slot_is_released_once() -> None:
    slots = table([1])
    with pytest.raises(ValueError, match="slot 0 is not busy"):
        slots.release(0)


def test_a_full_slot_is_compared_to_its_end() -> None:
    slots = table([1, 2, 3, 4], capacity=4)
    assert slots.take(tokens(1, 2, 3, 4), 4) == 0
    assert slots.length(0) == 4
