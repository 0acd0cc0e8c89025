"""The GPU beside the plan: what is here, what is free on it now, and what that means for the stack."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_driver import FakeDriver

from build_engines import nvidia
from build_engines.gpu_here import GpuHere, find_gpu
from build_engines.plan import plan_stack
from build_engines.stack import load_stack

MIB = 2**20
KOREAN = Path(__file__).parents[3] / "stacks" / "korean-reviews.toml"


def found(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> GpuHere:
    monkeypatch.setattr(nvidia.ctypes, "CDLL", driver.CDLL)
    gpu = find_gpu()
    assert gpu is not None
    return gpu


def card(free: int, capability: str = "12.0") -> FakeDriver:
    return FakeDriver(capability=capability, total=16_303 * MIB, free=free * MIB)


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia.ctypes, "CDLL", FakeDriver(absent="libcuda").CDLL)
    assert find_gpu() is None


def test_what_is_free_now_is_held_against_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_stack(load_stack(KOREAN))
    needed = plan.used // MIB
    (line,) = found(monkeypatch, card(needed + 10)).compared(plan)
    assert f"16,303 MiB, {needed + 10:,} free now" in line
    line, short = found(monkeypatch, card(needed - 500)).compared(plan)
    assert f"the engines take {plan.used / MIB:,.0f} MiB" in short
    assert any(f"{missing} more than is free" in short for missing in (500, 501))


def test_another_card_than_the_stacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_stack(load_stack(KOREAN))
    gpu = found(monkeypatch, card(16_000, "8.9"))
    assert any("another kind than the stack's card (12.0)" in line for line in gpu.compared(plan))


def test_free_memory_that_cannot_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a GPU, whose library counts the whole; a container without the library."""
    plan = plan_stack(load_stack(KOREAN))
    part = FakeDriver(total=16_303 * MIB, nvml_total=81_920 * MIB, free=70_000 * MIB)
    for driver in (part, FakeDriver(absent="nvidia-ml"), FakeDriver(nvmlDeviceGetMemoryInfo=4)):
        gpu = found(monkeypatch, driver)
        assert (gpu.free_bytes, driver.nvml_open) == (None, 0)
        assert "free memory unknown" in gpu.compared(plan)[0]
