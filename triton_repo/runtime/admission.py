"""Which requests may wait for a model, in which order, and when one is rejected.

A queue that grows while the model is at its limit makes every answer late. So a request that is not going to
be answered in time, by the rate at which requests were taken lately, is rejected when it arrives, and one
whose time runs out while it waits is not started any more.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeVar

from triton_repo.runtime.texts import BadRequest

# Triton's own priority is used up by its queue and never reaches a Python model.
PRIORITY: Final = "onecard_priority"

# HTTP's generate endpoint passes Triton's own timeout on as a parameter, unread.
TIMEOUT: Final = "timeout"

T = TypeVar("T")
Reason = Literal["queue_full", "deadline", "expired", "displaced", "unloading"]

# The rate is an average over about so many seconds in which somebody waited.
_RATE_SECONDS = 2.0
# The share of a deadline that an estimated wait may fill: the rest is for what the estimate does not see.
_WAIT_SHARE = 0.6
# The share that goes by where no queue sees it: before a request is taken in, and behind its answer.
_UNSEEN_SHARE = 0.1
# Nobody is rejected by a rate that so few observations, of so few seconds, have told.
_CERTAIN_COUNT, _CERTAIN_SECONDS = 4, 1.0
_LEAST_SHARE = 0.05


class Busy(Exception):
    """The request was not started; another try may succeed. `reason` is its label in the metrics."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True)
class Limits:
    """What may wait for a model: at most `max_size` requests, each for `deadline_s` seconds at most, in
    `levels` priorities. Level 1 is served first; a request that names none has `default_level`."""

    max_size: int = 256
    deadline_s: float = 60.0
    levels: int = 3
    default_level: int = 2

    @classmethod
    def read(cls, parameters: Mapping[str, str]) -> Limits:
        """From the parameters of config.pbtxt (build_engines.stack.Queue)."""
        return cls(
            max_size=int(parameters["max_queue"]),
            deadline_s=int(parameters["deadline_ms"]) / 1000,
            levels=int(parameters["priority_levels"]),
            default_level=int(parameters["default_priority"]),
        )


def read_level(parameters: str) -> int:
    """A request's priority from its parameters (JSON, "" for none); 0 where it names none. Raises
    BadRequest."""
    if PRIORITY not in parameters:
        return 0
    level = json.loads(parameters).get(PRIORITY, 0)
    if isinstance(level, bool) or not isinstance(level, int) or level < 0:
        raise BadRequest(f"'{PRIORITY}' is {level!r:.40}; 1 is the most urgent, 0 the model's default")
    return level


def read_timeout(parameters: str) -> float:
    """Seconds after which nobody waits any more, from a request's parameters (JSON, microseconds); infinite
    where it names none. Raises BadRequest."""
    if TIMEOUT not in parameters:
        return math.inf
    limit = json.loads(parameters).get(TIMEOUT, 0)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise BadRequest(f"'{TIMEOUT}' is {limit!r:.40}; it is in whole microseconds, 0 for none")
    return limit / 1e6 or math.inf


@dataclass(slots=True)
class _Entry:
    work: float
    arrived: float
    limit: float  # seconds, of which the last ones are for being served

    def expires(self, service: float) -> float:
        spare = (1 - _WAIT_SHARE - _UNSEEN_SHARE) * self.limit
        return self.arrived + (1 - _UNSEEN_SHARE) * self.limit - min(service, spare)


class AdmissionQueue(Generic[T]):
    """Waiting requests by priority, then by arrival. One caller at a time: the owner has the lock.

    `work` is in any unit that serving takes time in proportion to; the queue learns how many seconds a unit
    takes from the times at which its owner comes back for more, and from `served`. `slots`: how many are
    served side by side, each answered from its start on, as an LLM does; 0 for an owner that serves batches.
    """

    def __init__(
        self, limits: Limits, clock: Callable[[], float] = time.monotonic, *, slots: int = 0
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._slots = slots
        self._levels: list[dict[T, _Entry]] = [{} for _ in range(limits.levels)]
        self._work = [0.0] * limits.levels
        self.soonest = math.inf  # when the next one may run out of time; never later than it does
        self._rate = _Rate(limits.levels)
        self._taken = [0.0] * limits.levels  # work of the last take, by level
        self._taken_at = 0.0
        self._backlog = False  # somebody has waited ever since the last take

    def snapshot(self) -> dict[str, float]:
        """How many wait, and the limits, as metrics."""
        return {
            "queue_requests": len(self),
            "queue_limit_requests": self.limits.max_size,
            "deadline_seconds": self.limits.deadline_s,
        }

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def offer(
        self,
        item: T,
        *,
        level: int = 0,
        work: float = 1.0,
        timeout_s: float = math.inf,
        room: int = 0,
        arrived: float | None = None,
    ) -> T | None:
        """Let `item` wait, at most `timeout_s` seconds if that is less than the deadline, since it `arrived`
        by the queue's clock (None: now).

        `level` 0 is the default one; beyond the last one counts as the last. `room`: how many requests could
        start at once and are therefore not waiting. Returns the request that gave up its place, if one did:
        a full queue rejects the youngest of the least urgent. Raises Busy.
        """
        self.check(level=level, work=work, timeout_s=timeout_s, room=room, arrived=arrived)
        place = self._place(level)
        displaced = self._make_room() if len(self) >= self.limits.max_size + room else None
        since = self._clock() if arrived is None else arrived
        entry = _Entry(work, since, min(self.limits.deadline_s, timeout_s))
        self._levels[place][item] = entry
        self._work[place] += work
        self.soonest = min(self.soonest, entry.expires(math.inf))
        return displaced

    def check(
        self,
        *,
        level: int = 0,
        work: float = 1.0,
        timeout_s: float = math.inf,
        room: int = 0,
        arrived: float | None = None,
    ) -> None:
        """Raises Busy if `offer` would."""
        size, place = len(self), self._place(level)
        if size < room:
            return
        if size >= self.limits.max_size + room and self._least_urgent() <= place:
            raise full(size)
        limit = min(self.limits.deadline_s, timeout_s)
        waited = 0.0 if arrived is None else self._clock() - arrived
        wait = waited + self._wait(place, work)
        if wait > _WAIT_SHARE * limit:
            raise Busy(
                f"the wait is too long: about {wait * 1000:.0f} ms, and the deadline is "
                f"{limit * 1000:.0f} ms after arrival; try again later",
                "deadline",
            )

    def take(
        self, fits: Callable[[T], bool], *, most: int | None = None, seconds: float = math.inf
    ) -> list[T]:
        """Remove the first ones for as long as `fits` says yes to the next: `most` at most, and no more than
        are served in about so many `seconds`, unless it is one."""
        taken: list[T] = []
        work, now, pace = [0.0] * len(self._levels), self._clock(), self._rate.pace
        waited = self._backlog  # whoever is taken last ends it
        while len(taken) != most and (found := self._first()) is not None and fits(found[1]):
            place, item = found
            entry = self._levels[place][item]
            if taken and (sum(work) + entry.work) * pace > seconds:
                break
            work[place] += entry.work
            self.discard(item, place)
            taken.append(item)
        if taken:
            if waited:
                self._rate.learn(self._taken, now - self._taken_at)
            self._taken, self._taken_at, self._backlog = work, now, len(self) > 0
        return taken

    def seconds_for(self, work: float) -> float:
        """About how long so much work takes; infinity while that is not known."""
        return work * self._rate.pace or math.inf

    def served(self, work: float, seconds: float) -> None:
        """So much work was done in so many seconds (of one slot). Where somebody waits, `take` sees that by
        itself."""
        if self._backlog:
            return
        of_default = [0.0] * len(self._levels)
        of_default[self.limits.default_level - 1] = work
        self._rate.learn(of_default, seconds / (self._slots or 1))

    def expired(self) -> list[T]:
        """Remove those that could not be answered in time any more."""
        now = self._clock()
        if now < self.soonest:
            return []
        service = sum(self._taken) * self._rate.pace
        gone = [
            (place, item)
            for place, waiting in enumerate(self._levels)
            for item, entry in waiting.items()
            if entry.expires(service) <= now
        ]
        for place, item in gone:
            self.discard(item, place)
        left = (entry.expires(math.inf) for waiting in self._levels for entry in waiting.values())
        self.soonest = min(left, default=math.inf)
        return [item for _, item in gone]

    def discard(self, item: T, place: int | None = None) -> None:
        """Remove one that gave up."""
        places = range(len(self._levels)) if place is None else (place,)
        for index in places:
            if (entry := self._levels[index].pop(item, None)) is not None:
                # Sums of floats drift; an empty level has no work.
                self._work[index] = self._work[index] - entry.work if self._levels[index] else 0.0
        self._backlog = self._backlog and len(self) > 0

    def drain(self) -> list[T]:
        """Remove all, in the order they would have been served in."""
        items = [item for waiting in self._levels for item in waiting]
        for item in items:
            self.discard(item)
        return items

    def _first(self) -> tuple[int, T] | None:
        for place, waiting in enumerate(self._levels):
            if waiting:
                return place, next(iter(waiting))
        return None

    def _place(self, level: int) -> int:
        return min(level or self.limits.default_level, self.limits.levels) - 1

    def _least_urgent(self) -> int:
        return max((place for place, waiting in enumerate(self._levels) if waiting), default=0)

    def _make_room(self) -> T:
        least = self._least_urgent()
        youngest = next(reversed(self._levels[least]))
        self.discard(youngest, least)
        return youngest

    def _wait(self, place: int, work: float) -> float:
        """Seconds until a request of this priority would be answered; 0 while that is not certain."""
        # How long work takes in batches is known by batches alone that others waited behind.
        if not (self._rate.is_certain and (self._backlog or self._slots)):
            return 0.0
        pace = self._rate.pace
        ahead = sum(self._work[: place + 1]) + (0.0 if self._slots else work)
        # More urgent ones are going to take their share again where all of the time is taken.
        left = self._rate.left_for(place) if self._backlog else 1.0
        return ahead * pace / left + self._rest(pace)

    def _rest(self, pace: float) -> float:
        """Seconds until the next take: what was taken last either still needs a while, or it is late (for who
        waits), and what comes behind it is going to be no earlier."""
        now, due = self._clock(), self._taken_at + sum(self._taken) * pace
        if now < due or self._backlog:
            return abs(due - now)
        arrivals = (next(iter(waiting.values())).arrived for waiting in self._levels if waiting)
        return now - max(due, min(arrivals, default=now))


class _Rate:
    """How fast work is done, and which share of it is of which level: averages over the last seconds."""

    def __init__(self, levels: int) -> None:
        self._work = [0.0] * levels
        self._seconds = 0.0
        self._count = 0

    @property
    def is_certain(self) -> bool:
        """Whether somebody may be rejected by it."""
        return self._count >= _CERTAIN_COUNT or (self._count > 1 and self._seconds >= _CERTAIN_SECONDS)

    @property
    def pace(self) -> float:
        """Seconds for a unit of work; 0 while that is not known."""
        work = sum(self._work)
        return self._seconds / work if work else 0.0

    def left_for(self, place: int) -> float:
        """The share that more urgent levels leave: what they took lately they are going to take again."""
        return max(1 - sum(self._work[:place]) / sum(self._work), _LEAST_SHARE)

    def learn(self, work: list[float], seconds: float) -> None:
        # The first work of a process loads what all later finds loaded: it counts until there is other.
        kept = math.exp(-seconds / _RATE_SECONDS) if self._count > 1 else 0.0
        self._work = [old * kept + new for old, new in zip(self._work, work, strict=True)]
        self._seconds = self._seconds * kept + seconds
        self._count += 1


def full(size: int) -> Busy:
    """What the sender of a request is told that found `size` before it and no place."""
    return Busy(f"the queue is full: {size} requests are waiting; try again later", "queue_full")


def displaced() -> Busy:
    """What the sender of a request is told that gave up its place."""
    return Busy("the queue is full: more urgent requests took the places; try again later", "displaced")


def expired(limits: Limits, timeout_s: float) -> Busy:
    """What the sender of a request is told whose time ran out: the model's, or its own where that is less."""
    if timeout_s < limits.deadline_s:
        limit = f"the request's own timeout is {timeout_s * 1000:.0f} ms; allow more"
    else:
        limit = f"the deadline is {limits.deadline_s * 1000:.0f} ms after arrival; try again later"
    return Busy(f"the wait was too long: {limit}", "expired")


def unloading() -> Busy:
    """What the sender of a request is told whose model goes away."""
    return Busy("the model is being unloaded", "unloading")
