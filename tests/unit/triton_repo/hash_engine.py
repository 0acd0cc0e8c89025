"""An engine whose answer is a hash of what its slots really hold, so that any mix-up of caches changes it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from triton_repo.runtime.delivery import Delta, Outbox
from triton_repo.runtime.jobs import Handle, NoText, Request, TextOut
from triton_repo.runtime.sampling import FloatArray, Sampler, SamplingParams
from triton_repo.runtime.scheduler import Scheduler

_GARBAGE = -7


def hash_logits(tokens: Sequence[int], vocabulary: int) -> FloatArray:
    """Deterministic logits [vocabulary] that depend on every token and its place."""
    seed = zlib.crc32(np.asarray(tokens, dtype=np.int32).tobytes())
    places = np.arange(1, vocabulary + 1, dtype=np.uint64)
    mixed = (np.uint64(seed | 1) * places * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return (mixed.astype(np.float32) / np.float32(1 << 24) * 6 - 3).astype(np.float32)


class HashEngine:
    """Checks every position that it is told to write. A call in `broken` (counted from 0) fails and leaves
    garbage in the slots that it was about."""

    def __init__(self, slots: int = 3, capacity: int = 24, chunk: int = 4, vocabulary: int = 32) -> None:
        self.slots, self.capacity, self.chunk, self.vocabulary = slots, capacity, chunk, vocabulary
        self.cache = np.full((slots, capacity), _GARBAGE, dtype=np.int32)
        self.valid = [0] * slots
        self.calls: list[tuple[str, int]] = []  # what, and how many tokens
        self.broken: set[int] = set()
        self.closed = False

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        assert 1 <= len(tokens) <= self.chunk
        assert 0 <= start <= self.valid[slot], "a gap in the cache"
        assert start + len(tokens) <= self.capacity
        self._call("prefill", len(tokens), [slot])
        self.cache[slot, start : start + len(tokens)] = tokens
        self.valid[slot] = start + len(tokens)
        return self._logits(slot)

    def decode(self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> FloatArray:
        assert 1 <= len(slots) == len(set(slots)) == len(tokens) == len(lengths)
        for slot, length in zip(slots, lengths, strict=True):
            # Going back is allowed: a slot may be reused up to where its tokens still fit.
            assert 0 < length <= self.valid[slot], "a gap in the cache"
            assert length < self.capacity
        self._call("decode", len(slots), slots)
        for slot, token, length in zip(slots, tokens, lengths, strict=True):
            assert 0 <= token < self.vocabulary
            self.cache[slot, length] = token
            self.valid[slot] = length + 1
        return np.stack([self._logits(slot) for slot in slots])

    def copy(self, source: int, target: int, length: int) -> None:
        assert source != target
        assert 0 < length <= self.valid[source]
        self._call("copy", length, [target])
        self.cache[target, :length] = self.cache[source, :length]
        self.valid[target] = length

    def close(self) -> None:
        self.closed = True

    def _call(self, kind: str, tokens: int, slots: Sequence[int]) -> None:
        assert not self.closed
        self.calls.append((kind, tokens))
        if len(self.calls) - 1 in self.broken:
            for slot in slots:
                self.cache[slot] = _GARBAGE
                self.valid[slot] = 0
            raise RuntimeError("device lost")

    def _logits(self, slot: int) -> FloatArray:
        return hash_logits(self.cache[slot, : self.valid[slot]].tolist(), self.vocabulary)


class Inline:
    """A delivery that gives at once, on the thread that posts."""

    def post(self, batch: Iterable[tuple[Outbox, Delta]]) -> None:
        for outbox, delta in batch:
            outbox.give([delta])

    def close(self) -> None:
        pass


class Asked:
    """One request in a scheduler under test: what it wanted, and what came of it."""

    def __init__(self, prompt: Sequence[int], params: SamplingParams, stop_ids: frozenset[int]) -> None:
        self.prompt, self.params, self.stop_ids = list(prompt), params, stop_ids
        self.deltas: list[Delta] = []
        self.handle: Handle | None = None
        self.cancelled = False

    def submit(self, scheduler: Scheduler, open_text: type[TextOut] = NoText) -> None:
        request = Request(self.prompt, self.params, self.deltas.append, self.stop_ids, open_text)
        self.handle = scheduler.submit(request)

    @property
    def done(self) -> bool:
        return bool(self.deltas) and self.deltas[-1].usage is not None

    def tokens(self, index: int = 0) -> list[int]:
        return [token for delta in self.deltas if delta.index == index for token in delta.token_ids]

    def reasons(self) -> dict[int, str]:
        return {delta.index: delta.finish_reason for delta in self.deltas if delta.finish_reason}

    def alone(self, capacity: int, vocabulary: int, index: int = 0) -> tuple[list[int], str]:
        """The answer of an engine that serves nobody else, without any scheduler."""
        sampler = Sampler(self.params, self.prompt, vocabulary, sample=index)
        tokens: list[int] = []
        while True:
            token, _ = sampler.sample(hash_logits([*self.prompt, *tokens], vocabulary))
            tokens.append(token)
            if token in self.stop_ids:
                return tokens, "stop"
            if len(tokens) >= min(self.params.max_tokens, capacity - len(self.prompt) + 1):
                return tokens, "length"
