"""What one stream costs the others, and what a conversation saves: first tokens beside running streams, their
pauses while a long prompt comes in, turns that begin with what is in the cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from ..errors import BenchError
from .generate_data import Prompt
from .generate_load import Streamer, Timed, serialize
from .loadgen import percentile

QUIET_S = 0.25  # between probes, so that the streams run undisturbed before each
READY_S = 60.0
ANSWER_TOKENS = 24
TURNS = 8


class Background:
    """Streams that run until the end of the block, each begun again whenever it ends."""

    def __init__(self, streamer: Streamer, payloads: Iterator[bytes], count: int) -> None:
        self._streamer, self._payloads, self._count = streamer, payloads, count
        self._current: list[Timed] = []
        self.all: list[Timed] = []

    async def __aenter__(self) -> Self:
        self._current = [Timed(time.perf_counter()) for _ in range(self._count)]
        self.all += self._current
        self._tasks = [asyncio.create_task(self._run(place)) for place in range(self._count)]
        await self.ready()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ready(self) -> None:
        """Until every stream decodes."""
        async with asyncio.timeout(READY_S):
            while not all(len(timed.times) > 1 for timed in self._current):
                for task in self._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.005)

    async def _run(self, place: int) -> None:
        while True:
            await self._streamer.run(next(self._payloads), self._current[place])
            self._current[place] = Timed(time.perf_counter())
            self.all.append(self._current[place])


def median(values: Sequence[float]) -> float:
    return percentile(sorted(values), 0.5)


async def first_tokens(
    streamer: Streamer, payloads: Iterator[bytes], *, repeats: int, background: Background | None = None
) -> float:
    """Median seconds to the first token of single requests, with the background's streams running."""
    firsts = []
    for _ in range(repeats):
        if background is not None:
            await asyncio.sleep(QUIET_S)
            await background.ready()
        timed = (await streamer.run(next(payloads))).read()
        if timed.first_s is None:
            raise BenchError("a request was answered without a token")
        firsts.append(timed.first_s)
    return median(firsts)


async def pauses(
    streamer: Streamer, long: Iterator[bytes], *, repeats: int, background: Background
) -> dict[str, float]:
    """The longest pause of a running stream while a long prompt is read, the usual one, both in ms, and the
    prompt's tokens."""
    windows: list[tuple[float, float]] = []
    prompt_tokens = 0.0
    for _ in range(repeats):
        await asyncio.sleep(QUIET_S)
        await background.ready()
        timed = (await streamer.run(next(long))).read()
        windows.append((timed.start, timed.last))
        prompt_tokens = timed.usage.get("prompt_tokens", 0.0)
    await asyncio.sleep(QUIET_S)  # the pieces that were held up come now
    for timed in background.all:
        timed.read()
    streams = [timed for timed in background.all if timed.tokens]

    def longest(begin: float, end: float) -> float:
        # A pause counts when any part of it lies in the window: the piece after it came then or was the next.
        return max(
            (
                gap
                for timed in streams
                for gap, _, at in timed.gaps(begin, end + 10)
                if at >= begin and at - gap <= end
            ),
            default=0.0,
        )

    usual = [gap for timed in streams for gap, _, _ in timed.gaps(0, windows[0][0])]
    return {
        "longest_ms": max(longest(*window) for window in windows) * 1e3,
        "usual_ms": (median(usual) if usual else 0.0) * 1e3,
        "prompt_tokens": prompt_tokens,
    }


@dataclass(slots=True)
class Conversation:
    """One conversation that grows: messages for a chat template, or one text for a model without."""

    chat: bool
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        # Replacement characters are halves of characters that a random model cuts; they are other tokens.
        self.turns.append({"role": "assistant", "content": text.replace("\ufffd", "").strip() or "."})

    def prompt(self) -> Prompt:
        if self.chat:
            return Prompt(messages=tuple(dict(turn) for turn in self.turns))
        return Prompt(text=" ".join(turn["content"] for turn in self.turns))


async def converse(
    streamer: Streamer, model: str, texts: Sequence[str], *, chat: bool, numbers: Callable[[], int]
) -> tuple[list[dict[str, Any]], Prompt]:
    """One turn for each text; what each turn's prompt was made of, and the last turn's prompt.

    `new` counts the tokens that the turn added to the prompt of the turn before: the answer to that and the
    turn's own message; `prefilled` those that were not in the cache.
    """
    conversation = Conversation(chat)
    turns: list[dict[str, Any]] = []
    for text in texts:
        conversation.ask(text if turns else f"{numbers()}. {text}")
        prompt = conversation.prompt()
        payload = serialize(model, prompt, ANSWER_TOKENS, ignore_eos=False)
        timed = (await streamer.run(payload)).read()
        if timed.first_s is None:
            raise BenchError("a turn of the conversation was answered without a token", model=model)
        count, cached = (int(timed.usage.get(key, 0)) for key in ("prompt_tokens", "cached_tokens"))
        turns.append(
            {
                "prompt_tokens": count,
                "new": count - (turns[-1]["prompt_tokens"] if turns else 0),
                "prefilled": count - cached,
                "first_token_ms": timed.first_s * 1e3,
            }
        )
        conversation.answered(timed.text)
    return turns, prompt


async def conversations(
    streamer: Streamer,
    model: str,
    texts: Sequence[str],
    *,
    chat: bool,
    repeats: int,
    numbers: Callable[[], int],
) -> dict[str, Any]:
    """The last turn's first token with what the turns before left in the cache, and without it: the same
    prompt with another beginning. Medians over `repeats` conversations; the turns are the first one's."""
    first: list[dict[str, Any]] = []
    reused, fresh = [], []
    for _ in range(repeats):
        turns, prompt = await converse(streamer, model, texts, chat=chat, numbers=numbers)
        first = first or turns
        reused.append(turns[-1]["first_token_ms"])
        payload = serialize(model, prompt.distinct(numbers()), 1)
        timed = (await streamer.run(payload)).read()
        fresh.append((timed.first_s or 0.0) * 1e3)
    return {
        "turns": [{**turn, "first_token_ms": round(turn["first_token_ms"], 2)} for turn in first],
        "history_tokens": first[-1]["prompt_tokens"] - first[-1]["new"],
        "only_new_prefilled": all(turn["prefilled"] <= turn["new"] for turn in first[1:]),
        "first_token_ms": round(median(reused), 2),
        "first_token_without_reuse_ms": round(median(fresh), 2),
        "ratio": round(median(reused) / median(fresh), 3),
    }


async def steady_rates(
    streamer: Streamer, payloads: Iterator[bytes], counts: Sequence[int], repeats: int
) -> dict[int, float]:
    """Median tokens per second of n streams that all decode, for each n."""
    rates = {}
    for count in counts:
        found = [
            rate
            for _ in range(repeats)
            if (rate := await streamer.steady([next(payloads) for _ in range(count)])) is not None
        ]
        if found:
            rates[count] = median(found)
    return rates
