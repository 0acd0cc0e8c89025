"""The driver's own libraries, as they are asked for the GPU: answers, refusals, and what is not there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from fake_driver import CALLED, GIB, FakeDriver

from build_engines import nvidia

MIB = 1 << 20


def plug_in(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> FakeDriver:
    monkeypatch.setattr(nvidia.ctypes, "CDLL", driver.CDLL)
    return driver


def test_the_card_as_the_driver_describes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = plug_in(monkeypatch, FakeDriver())
    card = nvidia.find_card()
    assert (card.name, card.compute_capability, card.driver, card.driver_cuda) == (
        "NVIDIA GeForce",
        "12.0",
        "580.1",
        "13.1",
    )
    assert (card.total_bytes, card.bus, card.clock_mhz) == (16 * GIB, "0000:01:00.0", 2450)
    with nvidia.counting(card) as count:
        free, total = count()
        assert total - free == 1 << 30
        assert driver.nvml_open == 1
    assert driver.nvml_open == 0


@pytest.mark.parametrize(
    ("failing", "words"),
    [({"cuInit": 100}, "cuInit with error 100"), ({"cuDeviceGetCount": 3}, "cuDeviceGetCount with error 3")],
)
def test_a_driver_that_refuses_is_quoted(
    monkeypatch: pytest.MonkeyPatch, failing: dict[str, int], words: str
) -> None:
    plug_in(monkeypatch, FakeDriver(**failing))
    with pytest.raises(nvidia.NoGpu, match=words):
        nvidia.find_card()
    assert nvidia.gpu_compute_capability() is None


def test_a_second_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeDriver(capability="8.9"))
    with pytest.raises(nvidia.NoGpu, match="shows 1 GPUs here, and number 1 is asked for"):
        nvidia.find_card(1)
    assert (nvidia.gpu_compute_capability(), nvidia.gpu_compute_capability(1)) == ("8.9", None)


def test_no_driver_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeDriver(absent="libcuda"))
    with pytest.raises(nvidia.NoGpu, match="no NVIDIA driver is installed"):
        nvidia.find_card()
    assert nvidia.gpu_compute_capability() is None


def test_without_nvml_the_driver_version_is_unknown_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeDriver(absent="nvidia-ml"))
    card = nvidia.find_card()
    assert card.driver == "unknown"
    assert nvidia.free_bytes(card) is None
    with pytest.raises(nvidia.NoGpu, match="NVML"), nvidia.counting(card):
        pass


def test_free_memory_is_unknown_where_nvml_fails_or_counts_another_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part of a GPU, whose library counts the whole; a question that it does not answer."""
    plug_in(monkeypatch, FakeDriver())
    card = nvidia.find_card()
    assert nvidia.free_bytes(card) == 15 * GIB
    plug_in(monkeypatch, FakeDriver(nvml_total=80 * GIB, free=70 * GIB))
    assert nvidia.free_bytes(card) is None
    driver = plug_in(monkeypatch, FakeDriver(nvmlDeviceGetMemoryInfo=4))
    assert (nvidia.free_bytes(card), driver.nvml_open) == (None, 0)


def test_the_functions_are_those_of_the_real_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda-bindings lists every function of both, and NVML's record of memory."""
    bindings = pytest.importorskip("cuda.bindings.nvml", reason="cuda-bindings is not installed")
    fields = nvidia._Memory._fields_
    assert [name for name, _ in fields] == list(bindings.memory_dtype.names)
    assert all(
        (getattr(nvidia._Memory, name).offset, getattr(nvidia._Memory, name).size)
        == (bindings.memory_dtype.fields[name][1], bindings.memory_dtype[name].itemsize)
        for name, _ in fields
    )
    driver = plug_in(monkeypatch, FakeDriver())
    assert nvidia.free_bytes(nvidia.find_card()) == driver.memory[1]
    spec = importlib.util.find_spec("cuda.bindings")
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or ()))) / "_internal"
    known = "".join((folder / f"{name}.pxd").read_text() for name in ("driver", "nvml"))
    assert len(CALLED) > 10
    # NVML keeps the first form of a function beside the second.
    assert [name for name in CALLED if f"_{name}(" not in known and f"_{name}_v2(" not in known] == []
