"""Values out of fuzzing bytes, the same for every tool that makes them; what is over is zero or empty."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Draw:
    """Reads `data` from its start."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._place

    def byte(self) -> int:
        return next(iter(self.raw(1)), 0)

    def raw(self, count: int) -> bytes:
        found = self._data[self._place : self._place + count]
        self._place += len(found)
        return found

    def integer(self, low: int, high: int) -> int:
        return low + int.from_bytes(self.raw(4), "little") % (high - low + 1)

    def choice(self, values: Sequence[T]) -> T:
        return values[self.byte() % len(values)]

    def part(self) -> bytes:
        """Bytes that their length precedes."""
        return self.raw(self.integer(0, 4096))

    def text(self) -> str:
        return self.part().decode("utf-8", "replace")

    def rest(self) -> bytes:
        return self.raw(self.left)

    def value(self, depth: int = 0) -> Any:
        """Anything that JSON, or a caller in Python, can give."""
        made: list[Callable[[], Any]] = [
            lambda: None,
            lambda: True,
            lambda: False,
            lambda: self.integer(-5, 300),
            lambda: int.from_bytes(self.raw(9), "little", signed=True),
            lambda: self.choice([0.0, -0.5, 1.0, 0.7, 1e300, -1e-300, math.nan, math.inf]),
            self.text,
            self.part,
            lambda: {self.text(): self.value(depth + 1) for _ in range(self.byte() % 5)},
            lambda: [self.value(depth + 1) for _ in range(self.byte() % 5)],
            lambda: tuple(self.value(depth + 1) for _ in range(self.byte() % 5)),
        ]
        return self.choice(made if depth < 4 else made[:8])()


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """An empty folder, in memory where there is one of that kind."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as path:
        yield Path(path)
