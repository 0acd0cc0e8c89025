"""When to try again and how long to wait: no I/O, so that both clients share it and tests need no time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from .errors import ClientError, ConnectionLost, DeadlineExceeded


class Clock:
    """Time as the client sees it; tests replace it."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def sleep_async(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff: attempt n waits initial * multiplier**(n-1) seconds, at most `maximum`.

    `jitter` is the share of each wait that is drawn at random, so that clients which were rejected together
    do not come back together. `attempts` counts the first one; 1 turns retrying off.
    """

    attempts: int = 4
    initial: float = 0.1
    multiplier: float = 2.0
    maximum: float = 2.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.initial < 0 or self.multiplier < 1 or not 0 <= self.jitter <= 1:
            raise ValueError(f"not a retry policy: {self}")

    def wait(self, failures: int, draw: float) -> float:
        """Seconds to wait after the given number of failures; `draw` is uniform in [0, 1)."""
        full = min(self.maximum, self.initial * self.multiplier ** (failures - 1))
        return full * (1 - self.jitter * draw)


class Attempts:
    """The attempts of one request against its deadline."""

    def __init__(
        self,
        policy: RetryPolicy,
        clock: Clock,
        deadline: float,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._deadline = deadline
        self._draw = draw
        self._failures = 0

    def remaining(self) -> float:
        """Seconds left before the deadline; raises DeadlineExceeded when there are none."""
        left = self._deadline - self._clock.now()
        if left <= 0:
            raise DeadlineExceeded("no time left to send the request")
        return left

    def wait_after(self, error: ClientError, *, idempotent: bool) -> float:
        """Seconds to wait before the next attempt, or `error` raised again when there must be none."""
        self._failures += 1
        unsafe = isinstance(error, ConnectionLost) and not idempotent
        if not error.retryable or unsafe or self._failures >= self._policy.attempts:
            raise error
        wait = self._policy.wait(self._failures, self._draw())
        if self._clock.now() + wait >= self._deadline:
            raise error  # it says more than "deadline exceeded" would
        return wait
