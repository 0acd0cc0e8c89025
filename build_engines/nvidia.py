"""The GPU in this machine, asked of the driver's own libraries (libcuda, NVML): what it is, what it holds.

They need no package and no context of ours on the card; whatever does not answer is a reason in words.
Whether this process can compute on the GPU is another question, which `triton_repo.runtime.gpu.cuda` asks the
CUDA runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CAPABILITY_MAJOR, CAPABILITY_MINOR, PROCESSORS, CLOCK_KHZ, L2 = 75, 76, 16, 13, 38  # CU_DEVICE_ATTRIBUTE_*
_NO_DRIVER = "no NVIDIA driver is installed (libcuda.so.1 cannot be loaded)"
_NO_NVML = "NVML (libnvidia-ml.so.1), which counts the card's memory, is missing"

Count = Callable[[], tuple[int, int]]


class NoGpu(Exception):
    """There is no GPU, or it does not answer; the text says what was asked and what answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU as its driver describes it. `driver_cuda`: the newest CUDA version that the driver serves."""

    name: str
    compute_capability: str
    total_bytes: int
    bus: str
    driver: str
    driver_cuda: str
    processors: int
    clock_mhz: int
    l2_bytes: int


def find_card(index: int = 0) -> Card:
    """GPU number `index`, as CUDA counts. Raises NoGpu."""
    cuda, handle = _device(index)
    name, bus = ctypes.create_string_buffer(128), ctypes.create_string_buffer(32)
    total, version = ctypes.c_size_t(), ctypes.c_int()
    _ask(cuda.cuDeviceGetName, name, 128, handle, what="cuDeviceGetName")
    _ask(cuda.cuDeviceTotalMem_v2, ctypes.byref(total), handle, what="cuDeviceTotalMem")
    _ask(cuda.cuDeviceGetPCIBusId, bus, 32, handle, what="cuDeviceGetPCIBusId")
    _ask(cuda.cuDriverGetVersion, ctypes.byref(version), what="cuDriverGetVersion")
    return Card(
        name=name.value.decode("utf-8", "replace"),
        compute_capability=_capability(cuda, handle),
        total_bytes=total.value,
        bus=bus.value.decode(),
        driver=_driver_version(),
        driver_cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        processors=_attribute(cuda, handle, PROCESSORS),
        clock_mhz=_attribute(cuda, handle, CLOCK_KHZ) // 1000,
        l2_bytes=_attribute(cuda, handle, L2),
    )


def gpu_compute_capability(index: int = 0) -> str | None:
    """The compute capability of a GPU ("12.0"), or None without a driver or such a device."""
    try:
        return _capability(*_device(index))
    except NoGpu:
        return None


@contextlib.contextmanager
def counting(card: Card) -> Iterator[Count]:
    """A function that gives free and total bytes of the card, over all processes, seen from outside.

    Of a GPU that is divided these are the whole GPU's. Raises NoGpu without NVML, here or later.
    """
    with _nvml() as nvml:
        handle = ctypes.c_void_p()
        bus, found = card.bus.encode(), ctypes.byref(handle)
        _ask(nvml.nvmlDeviceGetHandleByPciBusId_v2, bus, found, what="nvmlDeviceGetHandleByPciBusId")

        def count() -> tuple[int, int]:
            memory = _Memory()
            _ask(nvml.nvmlDeviceGetMemoryInfo, handle, ctypes.byref(memory), what="nvmlDeviceGetMemoryInfo")
            return int(memory.free), int(memory.total)

        yield count


def free_bytes(card: Card) -> int | None:
    """What is free on the card now; None where that cannot be known.

    CUDA would have to make a context first, and count its own few hundred MiB as taken.
    """
    try:
        with counting(card) as count:
            free, total = count()
    except NoGpu:
        return None
    # Of a GPU that is divided NVML counts the whole, CUDA the part.
    return free if total <= 1.1 * card.total_bytes else None


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _device(index: int) -> tuple[Any, ctypes.c_int]:
    cuda = _library("libcuda.so.1", _NO_DRIVER)
    _ask(cuda.cuInit, 0, what="cuInit")
    count, handle = ctypes.c_int(), ctypes.c_int()
    _ask(cuda.cuDeviceGetCount, ctypes.byref(count), what="cuDeviceGetCount")
    if index >= count.value:
        raise NoGpu(f"the driver shows {count.value} GPUs here, and number {index} is asked for")
    _ask(cuda.cuDeviceGet, ctypes.byref(handle), index, what="cuDeviceGet")
    return cuda, handle


def _capability(cuda: Any, handle: ctypes.c_int) -> str:
    major, minor = (_attribute(cuda, handle, number) for number in (CAPABILITY_MAJOR, CAPABILITY_MINOR))
    return f"{major}.{minor}"


def _attribute(cuda: Any, handle: ctypes.c_int, number: int) -> int:
    value = ctypes.c_int()
    _ask(cuda.cuDeviceGetAttribute, ctypes.byref(value), number, handle, what="cuDeviceGetAttribute")
    return value.value


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    nvml = _library("libnvidia-ml.so.1", _NO_NVML)
    _ask(nvml.nvmlInit_v2, what="nvmlInit")
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _driver_version() -> str:
    text = ctypes.create_string_buffer(96)
    try:
        with _nvml() as nvml:
            _ask(nvml.nvmlSystemGetDriverVersion, text, 96, what="nvmlSystemGetDriverVersion")
    except NoGpu:
        return "unknown"
    return text.value.decode()


def _library(name: str, missing: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise NoGpu(missing) from None


def _ask(function: Any, *arguments: Any, what: str) -> None:
    if code := function(*arguments):
        raise NoGpu(f"the NVIDIA driver answered {what} with error {code}")
