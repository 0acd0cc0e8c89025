"""What `make` would run on a GPU machine: with its own interpreter nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def planned(target: str, **environment: str) -> list[str]:
    """The commands of a target, none of them run."""
    done = subprocess.run(
        ["make", "--dry-run", target],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("target", "command"),
    [("test-gpu", "-m pytest tests/gpu"), ("bench-gpu", "-m build_engines.cli bench-gpu build/gpu")],
)
def test_an_interpreter_that_is_named_is_taken_as_it_is(target: str, command: str) -> None:
    assert planned(target, PYTHON="python3") == [f"PYTHONPATH={ROOT} python3 {command}"]
    own = planned(target)
    assert own[-1] == f".venv/bin/python {command}"
    assert "pip" in " ".join(own) or (ROOT / ".venv" / ".ready").exists()
