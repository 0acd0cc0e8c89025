"""Typed reading of one TOML table: every mistake becomes a StackError that says where and what is allowed.

Nothing here knows what a stack is; `stack.py` does. A reader never raises anything but StackError, whatever
TOML holds (dates, mixed arrays, NaN, integers of thousands of digits).
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from build_engines.errors import StackError

MAX_FILE_BYTES = 1 << 20
MAX_TEXT = 1024
_REFERENCE = "see docs/stack-file.md for every key"


class _Required:
    """Marks a key without a default."""


REQUIRED: Final = _Required()


def show(value: object) -> str:
    """A short, safe rendering of what the file holds (a huge integer cannot even be printed by Python)."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."


def one_of(names: Iterable[str]) -> str:
    return ", ".join(names)


def nearest(name: str, names: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(name.lower()[:MAX_TEXT], list(names), n=1, cutoff=0.5)
    return found[0] if found else None


def read_toml(path: Path) -> dict[str, Any]:
    """The parsed file; StackError for a missing, oversized or invalid one (with line and column)."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise _unreadable(path, "the stack file does not exist") from None
    except IsADirectoryError:
        raise _unreadable(path, "this is a folder, not a stack file") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, f"cannot be read: {error}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise StackError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes", cause="this is not a stack file")
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise StackError(f"{path}: not UTF-8 (line {line})", next_step="save the file as UTF-8") from None
    except ValueError as error:  # TOMLDecodeError, and int() of thousands of digits
        raise StackError(f"{path}: not valid TOML: {error}", next_step="correct that line") from None
    except RecursionError:
        raise StackError(
            f"{path}: not valid TOML: arrays or tables nested too deeply",
            cause="this is not a stack file",
        ) from None


def _unreadable(path: Path, what: str) -> StackError:
    return StackError(f"{path}: {what}", next_step="name a .toml file, for example stacks/demo.toml")


class Table:
    """One table of the file, at the dotted path `where` ("" at the top).

    Unknown keys are refused when the table is opened, so a misspelt key is never silently a default.
    """

    def __init__(self, file: Path, where: str, values: object, allowed: Iterable[str]) -> None:
        self.file = file
        self.where = where
        if not isinstance(values, dict):
            raise StackError(
                f"{file}: {where} must be a table, not {show(values)}", next_step=f"write [{where}]"
            )
        self._values: dict[str, Any] = values
        allowed = tuple(allowed)
        for key in values:
            if key not in allowed:
                raise self._unknown(key, allowed)

    def _unknown(self, key: str, allowed: tuple[str, ...]) -> StackError:
        near = nearest(key, allowed)
        hint = f"did you mean {near!r}?" if near else _REFERENCE
        return StackError(
            f"{self.file}: unknown key {self._dotted(key)}",
            cause=f"allowed here: {one_of(allowed)}",
            next_step=hint,
        )

    def _dotted(self, key: str) -> str:
        key = key if key.replace("-", "").replace("_", "").isalnum() else show(key)
        return f"{self.where}.{key}" if self.where else key

    def bad(self, key: str, what: str, *, allowed: str | None = None, hint: str | None = None) -> StackError:
        """The error for the value of `key`; `what` completes "<file>: <key> ..."."""
        cause = f"allowed: {allowed}" if allowed else None
        return StackError(
            f"{self.file}: {self._dotted(key)} {what}", cause=cause, next_step=hint or _REFERENCE
        )

    def has(self, key: str) -> bool:
        return key in self._values

    def raw(self, key: str) -> object:
        return self._values.get(key)

    def _get(self, key: str, default: Any) -> Any:
        if key in self._values:
            return self._values[key]
        if isinstance(default, _Required):
            raise self.bad(key, "is missing")
        return default

    def text(self, key: str, default: str | _Required | None = REQUIRED) -> Any:
        """A non-empty string without control characters (a path with a NUL is no path)."""
        value = self._get(key, default)
        if value is default and not self.has(key):
            return value
        if not isinstance(value, str):
            raise self.bad(key, f"must be a string, not {show(value)}")
        if not value.strip() or len(value) > MAX_TEXT or not value.isprintable():
            raise self.bad(key, f"is {show(value)}", allowed=f"1 to {MAX_TEXT:,} printable characters")
        return value

    def choice(self, key: str, allowed: Iterable[str], default: str | _Required | None = REQUIRED) -> Any:
        value = self._get(key, default)
        if value is default and not self.has(key):
            return value
        return self._chosen(key, value, tuple(allowed))

    def choices(self, key: str, allowed: Iterable[str], default: tuple[str, ...]) -> tuple[str, ...]:
        """A non-empty array of distinct names."""
        allowed = tuple(allowed)
        value = self._get(key, default)
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise self.bad(key, f"must be an array, not {show(value)}", allowed=one_of(allowed))
        if not value:
            raise self.bad(key, "is empty", allowed=f"one or more of {one_of(allowed)}")
        chosen = tuple(self._chosen(key, item, allowed) for item in value)
        if len(set(chosen)) != len(chosen):
            raise self.bad(key, f"names the same value twice: {show(list(chosen))}")
        return chosen

    def _chosen(self, key: str, value: object, allowed: tuple[str, ...]) -> str:
        if isinstance(value, str) and value in allowed:
            return value
        near = nearest(value, allowed) if isinstance(value, str) else None
        hint = f"did you mean {near!r}?" if near else None
        if isinstance(value, int | float) and show(value) in allowed:  # compute_capability = 12.0
            hint = f'write it in quotes: "{value}"'
        raise self.bad(key, f"is {show(value)}", allowed=one_of(allowed), hint=hint)

    def integer(
        self, key: str, low: int, high: int, default: int | _Required = REQUIRED, *, unit: str = ""
    ) -> int:
        value = self._get(key, default)
        # bool is a subclass of int, and `max_batch = true` is a mistake.
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            allowed = f"an integer from {low:,} to {high:,}{' ' + unit if unit else ''}"
            raise self.bad(key, f"is {show(value)}", allowed=allowed)
        return value

    def number(self, key: str, low: float, high: float, default: float | _Required = REQUIRED) -> float:
        value = self._get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:  # NaN is in no range
            raise self.bad(key, f"is {show(value)}", allowed=f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, f"is {show(value)}", allowed="true, false")
        return value

    def table(self, key: str, allowed: Iterable[str]) -> Table:
        """The table under `key`; an absent one reads as empty, so that its defaults apply."""
        return Table(self.file, self._dotted(key), self._values.get(key, {}), allowed)
