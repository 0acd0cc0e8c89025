"""When to try again and how long to wait: both clients share it, and tests need no time."""

from __future__ import annotations

import asyncio
import math
import random
import time
from dataclasses import dataclass

from . import records
from .codec import InferRequest
from .errors import ClientError, ConnectionLost, DeadlineExceeded, Overloaded


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

    `budget` keeps a client from adding to an overload: each rejection takes 1 from it, each answer gives 0.1
    back, and while no more than half is left a rejection is not tried again. `math.inf` lifts that.
    """

    attempts: int = 4
    initial: float = 0.1
    multiplier: float = 2.0
    maximum: float = 2.0
    jitter: float = 0.5
    budget: float = 20.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.initial < 0 or self.multiplier < 1 or not 0 <= self.jitter <= 1:
            raise ValueError(f"not a retry policy: {self}")
        if not self.budget > 0:
            raise ValueError(f"not a retry policy: {self}")

    def wait(self, failures: int, draw: float) -> float:
        """Seconds to wait after the given number of failures; `draw` is uniform in [0, 1)."""
        full = min(self.maximum, self.initial * self.multiplier ** (failures - 1))
        return full * (1 - self.jitter * draw)


class Budget:
    """What a client has left to try rejected requests again with; all its calls share it. gRPC throttles
    retries in this way."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._most = self._left = policy.budget

    def earn(self) -> None:
        self._left = min(self._most, self._left + 0.1)

    def spend(self) -> bool:
        """Take a rejection's share; whether it may be tried again."""
        self._left = max(0.0, self._left - 1)
        return self._left > self._most / 2 or math.isinf(self._most)


class Attempts:
    """The attempts of one request (None for a question to the server) against its deadline; logs how each
    ended."""

    def __init__(
        self,
        policy: RetryPolicy,
        clock: Clock,
        deadline: float,
        request: InferRequest | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.request = request
        self._budget = budget or Budget(policy)
        self._policy = policy
        self._clock = clock
        self._deadline = deadline
        self._number = 0
        self._started: float | None = None

    def begin(self) -> float:
        """Start an attempt: the seconds left before the deadline; DeadlineExceeded when there are none."""
        now = self._clock.now()
        if now >= self._deadline:
            raise DeadlineExceeded("no time left to send the request")
        self._number += 1
        self._started = now
        return self._deadline - now

    def end(self, outcome: str, *, version: str = "", error: ClientError | None = None) -> None:
        """Log the attempt that runs, if one does."""
        started, self._started = self._started, None
        if outcome == "completed":
            self._budget.earn()
        if started is not None and self.request is not None:
            seconds = self._clock.now() - started
            records.log_end(
                self.request,
                outcome,
                attempt=self._number,
                seconds=seconds,
                version=version,
                error=error,
            )

    def wait_after(self, error: ClientError, *, idempotent: bool) -> float:
        """Seconds to wait before the next attempt, or `error` raised again when there must be none."""
        self.end(records.outcome_of(error), error=error)
        unsafe = isinstance(error, ConnectionLost) and not idempotent
        if isinstance(error, Overloaded) and not self._budget.spend():
            raise error
        if not error.retryable or unsafe or self._number >= self._policy.attempts:
            raise error
        wait = self._policy.wait(self._number, random.random())
        if self._clock.now() + wait >= self._deadline:
            raise error  # it says more than "deadline exceeded" would
        return wait
