"""What a run is made of: rows that were measured, that failed and that were skipped, each with its reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from build_engines.errors import OnecardError
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.texts import EngineFailed

Status = Literal["measured", "failed", "skipped"]
Part = Literal["machine", "ceilings", "build", "encoders", "decoders", "memory", "served"]
Say = Callable[[str], None]

_LONGEST_REASON = 300


class Failed(Exception):
    """A case could not be measured; the text says why. The next case goes on."""


class Skipped(Exception):
    """A case needs something that this machine does not have, or the time for it is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure, or why there is none.

    `case`: what was run ("32 x 128", "decode, 8 at once"). `contender`: who ran it. `way`: "device" when
    inputs and outputs stay on the GPU, "host" when arrays come from and go to the host's memory as a server
    has them. `limit`: what the hardware allows for the same work, in the same unit; `spread`: the tenth and
    the ninetieth percentile; `runs`: how many runs the median is of; `note`: what belongs beside it.
    """

    part: Part
    case: str
    model: str = ""
    contender: str = ""
    way: str = ""
    value: float | None = None
    unit: str = ""
    limit: float | None = None
    spread: tuple[float, float] | None = None
    runs: int = 0
    note: str = ""
    status: Status = "measured"
    reason: str = ""

    @property
    def share(self) -> float | None:
        """How much of the limit was reached, 0 to 1; of times the limit is the smaller one."""
        if not self.value or not self.limit:
            return None
        return self.limit / self.value if self.unit in {"ms", "us"} else self.value / self.limit

    def as_dict(self) -> dict[str, Any]:
        found = {key: value for key, value in asdict(self).items() if value is not None and value != ""}
        if self.share is not None:
            found["share_of_limit"] = round(self.share, 4)
        return found


@dataclass(slots=True)
class Outcome:
    """How a case ended."""

    status: Status = "measured"
    reason: str = ""

    @property
    def measured(self) -> bool:
        return self.status == "measured"


@dataclass(slots=True)
class Results:
    """All rows of a run in the order they came; `say` hears each case as it begins."""

    say: Say
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Keep a row; a figure that is measured again takes the first one's place, and its reason's."""
        if row.status != "measured":
            if row not in self.rows:  # what fails in the same way in every round is one row
                self.rows.append(row)
            return
        for place, known in enumerate(self.rows):
            if _same(known, row):
                self.rows[place] = row
                return
        self.rows.append(row)

    @contextmanager
    def case(self, part: Part, case: str, *, model: str = "", contender: str = "") -> Iterator[Outcome]:
        """Whatever is raised inside becomes a row, and the outcome says so; an interrupt alone goes on."""
        self.say(" ".join(word for word in (part, model, contender, case) if word))
        outcome = Outcome()
        try:
            yield outcome
        except Exception as error:  # any library may raise anything on a machine that is not known
            outcome.status = "skipped" if isinstance(error, Skipped) else "failed"
            outcome.reason = said(error)
            where = {"part": part, "case": case, "model": model, "contender": contender}
            self.add(Row(**where, status=outcome.status, reason=outcome.reason))  # type: ignore[arg-type]

    def measured(self, part: Part | None = None) -> list[Row]:
        return [row for row in self.rows if row.status == "measured" and part in {None, row.part}]


def _same(known: Row, row: Row) -> bool:
    names = ("part", "case", "model", "contender", "way")
    return known.status == "measured" and all(getattr(known, name) == getattr(row, name) for name in names)


def said(error: BaseException) -> str:
    """An exception as one line: its class where its text alone says too little, our errors with the cause."""
    if isinstance(error, OnecardError):
        text = error.message + (f" (cause: {error.cause})" if error.cause else "")
    elif isinstance(error, Failed | Skipped | EngineRefused | EngineFailed):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    line = " ".join(text.replace(f"{Path.cwd()}/", "").split())
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 1]}…"


class Clock:
    """The time that is left, of the whole run and of one part of it."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def part(self, seconds: float) -> Clock:
        """A clock for one part: no longer than what is left of this one."""
        return Clock(min(seconds, self.left))

    def need(self, seconds: float = 1.0) -> float:
        """What is left; Skipped when it is less than `seconds`."""
        if self.left < seconds:
            raise Skipped("the time for this part is over; --minutes gives more")
        return self.left
