"""Slots keep their tokens wherever their rows go, whatever sets decode one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_repo.runtime.rows import Rows

SLOTS, CAPACITY = 6, 8
Step = tuple[list[int], list[int]]


@st.composite
def steps(draw: st.DrawFn) -> list[Step]:
    """Sets of slots that decode, each with the tokens that its slots hold by then."""
    slots = st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True)
    lengths = st.lists(st.integers(0, CAPACITY), min_size=SLOTS, max_size=SLOTS)
    return draw(st.lists(st.tuples(slots, lengths), min_size=1, max_size=12))


class Cache:
    """Rows of tokens, and what each slot ought to hold."""

    def __init__(self) -> None:
        self.rows = Rows(SLOTS, CAPACITY)
        self.cells = np.full((SLOTS, CAPACITY), -1)
        self.swaps: list[tuple[int, int, int]] = []

    def write(self, slot: int, length: int, mark: int) -> None:
        self.cells[self.rows[slot], :length] = mark
        self.rows.used[slot] = length

    def swap(self, row: int, other: int, length: int) -> None:
        self.swaps.append((row, other, length))
        self.cells[[row, other], :length] = self.cells[[other, row], :length]


@given(steps())
def test_the_slots_of_a_step_are_neighbours_and_hold_what_they_held(plan: list[Step]) -> None:
    cache = Cache()
    held: dict[int, list[int]] = {}
    for number, (slots, lengths) in enumerate(plan):
        for slot, length in enumerate(lengths):
            mark = 100 * number + slot
            cache.write(slot, length, mark)
            held[slot] = [mark] * length
        cache.swaps.clear()
        first = cache.rows.gather(slots, cache.swap)
        assert sorted(cache.rows[slot] for slot in slots) == list(range(first, first + len(slots)))
        assert sorted(cache.rows[slot] for slot in range(SLOTS)) == list(range(SLOTS))
        for slot, tokens in held.items():
            assert cache.cells[cache.rows[slot], : len(tokens)].tolist() == tokens
        assert len(cache.swaps) <= len(slots) - 1
        assert all(length <= max(lengths) for _, _, length in cache.swaps)
        # A set that stays moves nothing.
        cache.swaps.clear()
        assert cache.rows.gather(slots[::-1], cache.swap) == first
        assert not cache.swaps


@given(st.sets(st.integers(0, SLOTS - 1), min_size=1))
def test_no_window_would_have_moved_fewer(slots: set[int]) -> None:
    cache = Cache()
    cache.rows.gather(sorted(slots), cache.swap)
    windows = [range(first, first + len(slots)) for first in range(SLOTS - len(slots) + 1)]
    assert len(cache.swaps) == min(len(slots - set(window)) for window in windows)


def test_a_swap_that_fails_leaves_the_slots_where_they_were() -> None:
    rows = Rows(4, CAPACITY)
    calls: list[Any] = []

    def broken(*swap: int) -> None:
        calls.append(swap)
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        rows.gather([0, 3], broken)
    assert [rows[slot] for slot in range(4)] == [0, 1, 2, 3]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("slot", "start", "count"), [(0, 0, 9), (0, 8, 1), (0, -1, 2), (0, 3, 0), (6, 0, 1), (-1, 0, 1)]
)
def test_positions_outside_a_slot_are_refused(slot: int, start: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} tokens at {start} of slot {slot} do not fit 8"):
        Rows(SLOTS, CAPACITY).check(slot, start, count)
    Rows(SLOTS, CAPACITY).check(5, 7, 1)
