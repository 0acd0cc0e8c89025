"""Which row of the cache holds which slot, so that the slots of a step are neighbours there.

An engine runs a batch over neighbouring rows. A slot is therefore a name and a row its place: when the slots
that decode have gaps between them, rows are swapped, which happens as requests come and go and never between
two steps of the same set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# swap(row, other, length): exchange the first `length` tokens of two rows.
Swap = Callable[[int, int, int], None]


class Rows:
    """The places of `slots` slots, and how many tokens lie in each: `used[slot]`."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.used = [0] * slots
        self._capacity = capacity
        self._rows = list(range(slots))

    def __getitem__(self, slot: int) -> int:
        """The row of a slot."""
        return self._rows[slot]

    def check(self, slot: int, start: int, count: int) -> None:
        """Raise ValueError unless `count` tokens from position `start` on lie inside the slot."""
        # The kernels write where they are told to: a position too far is another slot's memory.
        inside = start >= 0 and count > 0 and start + count <= self._capacity
        if not (inside and 0 <= slot < len(self._rows)):
            raise ValueError(f"{count} tokens at {start} of slot {slot} do not fit {self._capacity}")

    def gather(self, slots: Sequence[int], swap: Swap) -> int:
        """Swap rows until those of `slots` (each once) are neighbours; returns the first.

        A swap that raises leaves both slots where they were.
        """
        rows = sorted(self._rows[slot] for slot in slots)
        size = len(rows)
        if rows[-1] - rows[0] == size - 1:
            return rows[0]
        # The window that already holds most of them moves least.
        starts = range(len(self._rows) - size + 1)
        first = max(starts, key=lambda start: sum(start <= row < start + size for row in rows))
        window = range(first, first + size)
        free = [row for row in window if row not in rows]
        for row in rows:
            if row not in window:
                self._swap(row, free.pop(), swap)
        return first

    def _swap(self, row: int, other: int, swap: Swap) -> None:
        slot, displaced = self._rows.index(row), self._rows.index(other)
        swap(row, other, max(self.used[slot], self.used[displaced]))
        self._rows[slot], self._rows[displaced] = other, row
