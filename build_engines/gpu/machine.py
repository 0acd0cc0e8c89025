"""The machine that a figure was measured on: card, driver, processor, packages, and what is missing.

The GPU is asked through the driver's own libraries (libcuda, NVML), which need no package and no context of
ours on the card; whatever does not answer is a reason in words.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

MIB: Final = 1 << 20
PACKAGES: Final = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "nvidia-pytriton",
    "tritonclient",
)
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _PROCESSORS, _CLOCK_KHZ, _L2 = 75, 76, 16, 13, 38


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


class NoGpu(Exception):
    """There is no GPU to measure on; the text says what was asked and what answered."""


def find_card(device: int = 0) -> Card:
    """GPU number `device`, as CUDA counts. Raises NoGpu."""
    cuda = _library("libcuda.so.1", "no NVIDIA driver is installed (libcuda.so.1 cannot be loaded)")
    _ask(cuda.cuInit, 0, what="cuInit")
    count = ctypes.c_int()
    _ask(cuda.cuDeviceGetCount, ctypes.byref(count), what="cuDeviceGetCount")
    if device >= count.value:
        raise NoGpu(f"the driver shows {count.value} GPUs here, and number {device} is asked for")
    handle = ctypes.c_int()
    _ask(cuda.cuDeviceGet, ctypes.byref(handle), device, what="cuDeviceGet")
    name, bus = ctypes.create_string_buffer(128), ctypes.create_string_buffer(32)
    total, version = ctypes.c_size_t(), ctypes.c_int()
    _ask(cuda.cuDeviceGetName, name, 128, handle, what="cuDeviceGetName")
    _ask(cuda.cuDeviceTotalMem_v2, ctypes.byref(total), handle, what="cuDeviceTotalMem")
    _ask(cuda.cuDeviceGetPCIBusId, bus, 32, handle, what="cuDeviceGetPCIBusId")
    _ask(cuda.cuDriverGetVersion, ctypes.byref(version), what="cuDriverGetVersion")

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _ask(cuda.cuDeviceGetAttribute, ctypes.byref(value), number, handle, what="cuDeviceGetAttribute")
        return value.value

    return Card(
        name=name.value.decode("utf-8", "replace"),
        compute_capability=f"{attribute(_CAPABILITY_MAJOR)}.{attribute(_CAPABILITY_MINOR)}",
        total_bytes=total.value,
        bus=bus.value.decode(),
        driver=_driver_version(),
        driver_cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        processors=attribute(_PROCESSORS),
        clock_mhz=attribute(_CLOCK_KHZ) // 1000,
        l2_bytes=attribute(_L2),
    )


def used_bytes(card: Card) -> int:
    """What all processes together hold of the card now, seen from outside. Raises NoGpu without NVML."""
    memory = _memory(card)
    return int(memory.total - memory.free)


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _memory(card: Card) -> Any:
    nvml = _nvml()
    handle, memory = ctypes.c_void_p(), _Memory()
    _ask(
        nvml.nvmlDeviceGetHandleByPciBusId_v2,
        card.bus.encode(),
        ctypes.byref(handle),
        what="nvmlDeviceGetHandleByPciBusId",
    )
    _ask(nvml.nvmlDeviceGetMemoryInfo, handle, ctypes.byref(memory), what="nvmlDeviceGetMemoryInfo")
    return memory


def _nvml() -> Any:
    nvml = _library(
        "libnvidia-ml.so.1", "NVML (libnvidia-ml.so.1), which counts the card's memory, is missing"
    )
    _ask(nvml.nvmlInit_v2, what="nvmlInit")
    return nvml


def _driver_version() -> str:
    try:
        text = ctypes.create_string_buffer(96)
        _ask(_nvml().nvmlSystemGetDriverVersion, text, 96, what="nvmlSystemGetDriverVersion")
        return text.value.decode()
    except NoGpu:
        return "unknown"


def _library(name: str, missing: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise NoGpu(missing) from None


def _ask(function: Any, *arguments: Any, what: str) -> None:
    if code := function(*arguments):
        raise NoGpu(f"the NVIDIA driver answered {what} with error {code}")


def describe(card: Card | None, why_no_card: str = "") -> dict[str, Any]:
    """Facts for the report: GPU, processor, versions, compiler, in JSON values."""
    packages = {name: found for name in PACKAGES if (found := version(name))}
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return {
        "gpu": asdict(card) if card else None,
        "no_gpu": why_no_card or None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "c_compiler": os.environ.get("CC") or compiler,
        "packages": packages,
        "missing": [name for name in PACKAGES if name not in packages],
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
