"""The GPU in this machine and what is free on it right now, for those who plan and not for those who run.

Free memory is asked of the driver's management library: CUDA would have to make a context first, and count
its own few hundred MiB as taken.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from build_engines.cards import MIB
from triton_repo.runtime.gpu.cuda import DeviceInfo, cudart, find_device

if TYPE_CHECKING:
    from build_engines.plan import Plan


@dataclass(frozen=True, slots=True)
class GpuHere:
    """`free_bytes` None: the driver does not say (a part of a GPU, a container without the library)."""

    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def compared(self, plan: Plan) -> list[str]:
        """What a reader of the plan must know of this GPU, in sentences."""
        total = f"{self.total_bytes / MIB:,.0f} MiB"
        free = "free memory unknown" if self.free_bytes is None else f"{self.free_bytes / MIB:,.0f} free now"
        lines = [f"GPU here: {self.name}, compute capability {self.compute_capability}, {total}, {free}"]
        if self.compute_capability != plan.card.compute_capability:
            lines.append(
                f"  it is another kind than the stack's card ({plan.card.compute_capability}): "
                "engines for one may not run on the other"
            )
        short = plan.used - self.free_bytes if self.free_bytes is not None else 0
        if self.free_bytes is not None and short > 0:
            lines.append(
                f"  the engines take {plan.used / MIB:,.0f} MiB: {short / MIB:,.0f} more than is free right "
                "now (see nvidia-smi)"
            )
        return lines


def find_gpu(index: int = 0, *, api: Any = None, nvml: Any = None) -> GpuHere | None:
    """The GPU, or None without one. `api` and `nvml` are the modules of cuda.bindings; never raises."""
    found = find_device(index, api=api)
    if not isinstance(found, DeviceInfo):
        return None
    free = _free_bytes(found, api or cudart(), nvml)
    return GpuHere(found.name, found.compute_capability, found.total_bytes, free)


def _free_bytes(device: DeviceInfo, api: Any, nvml: Any) -> int | None:
    try:
        if nvml is None:
            nvml = importlib.import_module("cuda.bindings.nvml")
        error, bus = api.cudaDeviceGetPCIBusId(32, device.index)
        if error != api.cudaError_t.cudaSuccess:
            return None
        nvml.init_v2()
        try:
            handle = nvml.device_get_handle_by_pci_bus_id_v2(bus.split(b"\0")[0].decode())
            memory = nvml.device_get_memory_info_v2(handle)
        finally:
            nvml.shutdown()
    except Exception:  # no such library, no such function, no permission: each has an exception of its own
        return None
    # Of a GPU that is divided the library counts the whole, CUDA the part.
    return int(memory.free) if memory.total <= 1.1 * device.total_bytes else None
