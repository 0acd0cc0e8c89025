"""Which tokens lie in which slot of the cache, and which slot serves a new prompt with the least work.

A slot is one row of the KV cache. When its sequence ends it keeps its tokens until another needs the room,
so that the next turn of a conversation, or the next user of a system prompt, finds its beginning there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.int32]

# A copy reads and writes some tens of kilobytes per token, a prefill multiplies all weights; below this
# number of tokens the fixed cost of the call is what counts.
WORTH_COPYING = 16


class SlotTable:
    """The tokens of every slot, in the order of their positions. One thread owns it, the scheduler's."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self._tokens = np.zeros((slots, capacity), dtype=np.int32)
        self._lengths = [0] * slots
        self._busy = [False] * slots
        self._used = [0] * slots
        self._tick = 0
        self.free = slots

    def length(self, slot: int) -> int:
        """Tokens in the slot, which is also the position that the next one is written at."""
        return self._lengths[slot]

    @property
    def cached(self) -> int:
        """Tokens in all slots, of running sequences and of ended ones."""
        return sum(self._lengths)

    def take(self, prompt: TokenArray, limit: int) -> int:
        """Make a free slot busy for a prompt; what it shares with it (at most `limit` tokens) stays, the
        rest goes.

        The free slot with the longest common beginning, if that is at least half of what it holds; else the
        one that was not used for the longest time, so that a prompt that shares only its system prompt with
        a long conversation does not cost that conversation its cache. The caller has seen that one is
        `free`.
        """
        common = self._common(prompt[:limit])
        free = [slot for slot in range(self.slots) if not self._busy[slot]]
        best = max(free, key=lambda slot: (common[slot], -self._lengths[slot], -self._used[slot]))
        if not common[best] or 2 * common[best] < self._lengths[best]:
            best = min(free, key=lambda slot: (self._lengths[slot] > 0, self._used[slot]))
        self._busy[best] = True
        self._lengths[best] = common[best]
        self.free -= 1
        return best

    def source(self, prompt: TokenArray, limit: int, target: int) -> tuple[int, int] | None:
        """(slot, tokens): another slot, busy or not, from which a copy saves `target` much of its prefill."""
        common = self._common(prompt[:limit])
        best = max(range(self.slots), key=lambda slot: (slot != target, common[slot]))
        if best == target or common[best] < self._lengths[target] + WORTH_COPYING:
            return None
        return best, common[best]

    def copied(self, source: int, target: int, length: int) -> None:
        """Record a copy that the engine has made."""
        self._tokens[target, :length] = self._tokens[source, :length]
        self._lengths[target] = length
        # Somebody shares this beginning: it stays longer than what nobody asked for.
        self._touch(source)

    def extend(self, slot: int, tokens: Sequence[int] | TokenArray) -> None:
        """Record tokens that the engine has written behind the slot's last one."""
        start = self._lengths[slot]
        self._tokens[slot, start : start + len(tokens)] = tokens
        self._lengths[slot] = start + len(tokens)

    def append(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Record a decode step: one token behind the last one of each slot."""
        lengths = self._lengths
        self._tokens[slots, [lengths[slot] for slot in slots]] = tokens
        for slot in slots:
            lengths[slot] += 1

    def forget(self, slot: int) -> None:
        """Nothing is known of what the slot holds: an engine call on it broke."""
        self._lengths[slot] = 0

    def release(self, slot: int) -> None:
        """Make a busy slot free; its tokens stay."""
        if not self._busy[slot]:
            raise ValueError(f"slot {slot} is not busy")
        self._busy[slot] = False
        self.free += 1
        self._touch(slot)

    def _touch(self, slot: int) -> None:
        self._tick += 1
        self._used[slot] = self._tick

    def _common(self, prompt: TokenArray) -> list[int]:
        """For every slot, how many of its first tokens are the prompt's."""
        width = len(prompt)
        if not width:
            return [0] * self.slots
        differs = self._tokens[:, :width] != prompt
        first = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
        common: list[int] = np.minimum(first, self._lengths).tolist()
        return common
