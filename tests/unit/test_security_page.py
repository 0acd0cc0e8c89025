"""docs/security.md's table of bounds says what the constants are."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
_ROW = re.compile(r"^\| [^|]+ \| ([\d,]+) \| `([\w.]+)\.(\w+)` \|$", re.MULTILINE)


def test_every_bound_is_the_constants_value() -> None:
    rows = _ROW.findall(PAGE.read_text("utf-8"))
    assert len(rows) > 20
    wrong = [
        f"{module}.{name} is {value}, the page says {written}"
        for written, module, name in rows
        if (value := getattr(importlib.import_module(module), name)) != int(written.replace(",", ""))
    ]
    assert wrong == []


def test_every_bound_is_in_the_table() -> None:
    """Of the modules that the table names, what they define."""
    named: dict[str, set[str]] = {}
    for _, module, name in _ROW.findall(PAGE.read_text("utf-8")):
        named.setdefault(module, set()).add(name)
    for module, names in named.items():
        source = Path(str(importlib.import_module(module).__file__)).read_text("utf-8")
        defined = set(re.findall(r"^(MAX_\w+)(?::| =)", source, re.MULTILINE))
        # How long a text of the stack file may be is said there.
        assert defined - names <= {"MAX_TEXT"}, module
