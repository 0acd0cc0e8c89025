"""What all tests share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _frozen_heap() -> None:
    """What is imported by now is not looked through again: a collection over PyTorch's and its users' objects
    takes half a second, and tests that look for leaks ask for dozens."""
    gc.collect()
    gc.freeze()
