"""The GPU beside the plan: what is here, what is free on it now, and what that means for the stack."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda.bindings import nvml as real_nvml
from cuda.bindings import runtime
from fake_gpu import FakeCudart

from build_engines.gpu_here import GpuHere, find_gpu
from build_engines.plan import plan_stack
from build_engines.stack import load_stack

MIB = 2**20
KOREAN = Path(__file__).parents[3] / "stacks" / "korean-reviews.toml"


class Cudart(FakeCudart):
    """With the one call more that is made here."""

    def cudaDeviceGetPCIBusId(self, length: int, device: int) -> Any:
        assert length >= 13
        assert device < self.devices
        return runtime.cudaError_t.cudaSuccess, b"0000:01:00.0".ljust(length, b"\0")


class Nvml:
    """The driver's management library, as far as it is asked; counts what is left open."""

    def __init__(self, free: int, total: int = 16_303 * MIB) -> None:
        self.memory = SimpleNamespace(free=free, total=total)
        self.open = 0

    def init_v2(self) -> None:
        self.open += 1

    def shutdown(self) -> None:
        self.open -= 1

    def device_get_handle_by_pci_bus_id_v2(self, pci_bus_id: str) -> int:
        assert pci_bus_id == "0000:01:00.0"
        return 7

    def device_get_memory_info_v2(self, device: int) -> Any:
        assert (device, self.open) == (7, 1)
        return self.memory


def found(free: int, **card: Any) -> GpuHere:
    gpu = find_gpu(api=Cudart(16_303 * MIB, **card), nvml=Nvml(free * MIB))
    assert gpu is not None
    return gpu


def test_the_names_are_those_of_the_real_libraries() -> None:
    for name in ("init_v2", "shutdown", "device_get_handle_by_pci_bus_id_v2", "device_get_memory_info_v2"):
        given = list(inspect.signature(getattr(Nvml, name)).parameters)[1:]
        promised = (getattr(real_nvml, name).__doc__ or "").splitlines()[0]
        assert all(parameter in promised for parameter in given), promised
    assert {"free", "total"} <= set(dir(real_nvml.Memory_v2))
    assert "cudaDeviceGetPCIBusId(int length, int device)" in (runtime.cudaDeviceGetPCIBusId.__doc__ or "")


def test_no_driver_is_no_gpu() -> None:
    assert find_gpu(api=Cudart(devices=0)) is None


def test_what_is_free_now_is_held_against_the_stack() -> None:
    plan = plan_stack(load_stack(KOREAN))
    needed = plan.used // MIB
    (line,) = found(needed + 10).compared(plan)
    assert f"16,303 MiB, {needed + 10:,} free now" in line
    line, short = found(needed - 500).compared(plan)
    assert f"the engines take {plan.used / MIB:,.0f} MiB" in short
    assert any(f"{missing} more than is free" in short for missing in (500, 501))


def test_another_card_than_the_stacks_is_said() -> None:
    plan = plan_stack(load_stack(KOREAN))
    gpu = found(16_000, compute_capability="8.9")
    assert any("another kind than the stack's card (12.0)" in line for line in gpu.compared(plan))


def test_free_memory_that_cannot_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a GPU, whose library counts the whole; a container without the library."""
    part = find_gpu(api=Cudart(16_303 * MIB), nvml=Nvml(70_000 * MIB, 81_920 * MIB))
    assert part is not None
    assert part.free_bytes is None
    assert "free memory unknown" in part.compared(plan_stack(load_stack(KOREAN)))[0]
    nvml = Nvml(0)
    monkeypatch.setattr(nvml, "device_get_memory_info_v2", lambda device: 1 / 0)
    broken = find_gpu(api=Cudart(16_303 * MIB), nvml=nvml)
    assert broken is not None
    assert (broken.free_bytes, nvml.open) == (None, 0)
    # Here, where no driver is, the library itself refuses.
    real = find_gpu(api=Cudart(16_303 * MIB))
    assert real is not None
    assert real.free_bytes is None or real.free_bytes > 0
