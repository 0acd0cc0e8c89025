"""The text of one sample while it is generated: stop strings found, nothing cut that belongs together."""

from __future__ import annotations

from collections.abc import Sequence

from triton_repo.runtime.clusters import settled
from triton_repo.runtime.detokenize import Detokenizer


class TextStream:
    """Text to hand out per token. `stopped` becomes True when a stop string was generated.

    The joined texts are what the tokens decode to, up to the first stop string: the one that is complete
    first, the longest of those complete at the same character. It is not part of the text, wherever token
    borders are.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._detokenizer = detokenizer
        self._stops = [_Stop(stop) for stop in stops]
        self._held = ""

    def push(self, token: int) -> str:
        """Text that can be shown now; nothing more after a stop."""
        return self._add(self._detokenizer.push(token), final=False)

    def flush(self) -> str:
        """The rest of the text when no token follows."""
        return self._add(self._detokenizer.flush(), final=True)

    def _add(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        if self._stops:
            whole = text if final else text + self._detokenizer.pending()
            end = self._search(whole, len(self._held), len(text))
            if end is not None:
                self.stopped = True
                return whole[:end]
        waiting = max((stop.matched for stop in self._stops), default=0)
        cut = len(text) if final else settled(text[: len(text) - waiting])
        self._held = text[cut:]
        return text[:cut]

    def _search(self, text: str, start: int, certain: int) -> int | None:
        """Where the first stop string begins that one of the characters from `start` on completes.

        From `certain` on the text may still change if it goes on: a stop string there ends it, all else is
        looked at again.
        """
        matched: list[int] = []
        for place in range(start, len(text)):
            if place == certain:
                matched = [stop.matched for stop in self._stops]
            complete = [len(stop.text) for stop in self._stops if stop.step(text[place])]
            if complete:
                return place + 1 - max(complete)
        for stop, length in zip(self._stops, matched, strict=False):
            stop.matched = length
        return None


class _Stop:
    """How much of a stop string the text ends with (Knuth, Morris and Pratt: one look per character)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # For every matched length, the next shorter one that the same characters also match.
        self._shorter = [0, 0]
        for character in text[1:]:
            length = self._shorter[-1]
            while length and text[length] != character:
                length = self._shorter[length]
            self._shorter.append(length + (text[length] == character))

    def step(self, character: str) -> bool:
        """Whether this character completes the stop string."""
        matched = self.matched
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        self.matched = matched + (self.text[matched] == character)
        return self.matched == len(self.text)
