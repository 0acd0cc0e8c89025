"""libcuda and NVML as ctypes loads them: one GPU, and answers through the addresses that they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

GIB = 1 << 30
ATTRIBUTES = {75: 12, 76: 0, 13: 2_450_000}
# The C functions that are called, in either library.
CALLED: set[str] = set()


class FakeDriver:
    """Stands for both libraries: `CDLL` is put in the place of ctypes'.

    `failing`: the error that a function returns. `absent`: a part of a library's name that cannot be loaded.
    `nvml_open` counts initializations that were not shut down.
    """

    def __init__(
        self,
        *,
        capability: str = "12.0",
        total: int = 16 * GIB,
        free: int = 15 * GIB,
        nvml_total: int | None = None,
        absent: str | None = None,
        **failing: int,
    ) -> None:
        major, minor = map(int, capability.split("."))
        self.attributes = {**ATTRIBUTES, 75: major, 76: minor}
        self.memory = (nvml_total or total, free)
        self.values = {"cuDeviceGetCount": 1, "cuDriverGetVersion": 13010, "cuDeviceTotalMem_v2": total}
        self.absent, self.failing, self.nvml_open = absent, failing, 0

    def CDLL(self, name: str) -> Any:
        if self.absent and self.absent in name:
            raise OSError(name)
        return self

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith(("cu", "nvml")):
            raise AttributeError(name)
        CALLED.add(name)

        def call(*arguments: Any) -> int:
            if name in self.failing:
                return self.failing[name]
            texts = {
                "cuDeviceGetName": b"NVIDIA GeForce",
                "cuDeviceGetPCIBusId": b"0000:01:00.0",
                "nvmlSystemGetDriverVersion": b"580.1",
            }
            if name in self.values:
                arguments[0]._obj.value = self.values[name]
            elif name in texts:
                arguments[0].value = texts[name]
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = self.attributes.get(arguments[1], 1)
            elif name == "nvmlDeviceGetHandleByPciBusId_v2":
                assert arguments[0] == texts["cuDeviceGetPCIBusId"]
            elif name == "nvmlDeviceGetMemoryInfo":
                assert self.nvml_open
                arguments[1]._obj.total, arguments[1]._obj.free = self.memory
            self.nvml_open += {"nvmlInit_v2": 1, "nvmlShutdown": -1}.get(name, 0)
            return 0

        return call
