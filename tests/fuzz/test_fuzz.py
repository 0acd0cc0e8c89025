"""Every fuzz target, for less than a second: its seeds, and what hypothesis makes of them.

`make fuzz` runs them for longer, by what they cover. What they found is in the tests of what was wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import run
from examples import search
from run import TARGETS, load, timed


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str) -> None:
    assert search(load(name), seconds=0.5, most=200) > len(load(name).SEEDS)


def test_what_is_slow_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SLOW_S", 0)
    with pytest.raises(AssertionError, match=r"\d s"):
        timed(lambda _: sum(range(100_000)), b"")


def test_what_a_target_lets_out_is_a_finding() -> None:
    module = load("messages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BadRequest", KeyError)
        with pytest.raises(Exception, match="'messages'"):
            search(module, seconds=2)
