"""What this card can do at most, measured in the same run: every other figure is read beside it.

Memory bandwidth by copying and by reading, matrix products in FP16 and INT8, transfers from and to pinned
host memory, and what starting one kernel and waiting for it takes. Through PyTorch, which calls cuBLAS.
Runs in a side process; `device` is "cuda", or "cpu" with small sizes where the code itself is tried.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from build_engines.gpu.results import Results, Row, Skipped
from build_engines.gpu.sides import Side

_REPEATS: Final = 15
_WARM_UP: Final = 4
TORCH: Final = "torch"  # the side process of all that PyTorch does
UNITS: Final = {
    "copy": "GB/s",
    "read": "GB/s",
    "fp16 product": "TFLOP/s",
    "int8 product": "TOP/s",
    "to the device": "GB/s",
    "to the host": "GB/s",
    "start and wait": "us",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Per second: bytes of the device's memory, floating-point operations in FP16, integer ones in INT8.

    None where it could not be measured: figures then stand without their limit.
    """

    bandwidth: float | None = None
    fp16: float | None = None
    int8: float | None = None

    def seconds(self, *, operations: float, moved: float, integer: bool = False) -> float | None:
        """The least time for so many operations and so many bytes; None when either rate is unknown."""
        rate = self.int8 if integer else self.fp16
        if rate is None or self.bandwidth is None:
            return None
        return max(operations / rate, moved / self.bandwidth)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a buffer, far beyond the caches, and the edge of a square matrix."""

    buffer: int = 1 << 30
    edge: int = 8192
    transfer: int = 256 << 20


def measure_ceilings(side: Side, device: str, results: Results, sizes: Sizes, seconds: float) -> Ceilings:
    """One row for each; what fails is a row too, and None in the result."""
    found: dict[str, float] = {}
    for name, unit in UNITS.items():
        with results.case("ceilings", name, contender="torch"):
            low, middle, high = side.call(measure, name, device, sizes, seconds=seconds)
            found[name] = middle
            results.add(
                Row(
                    part="ceilings",
                    case=name,
                    contender="torch",
                    value=middle,
                    unit=unit,
                    spread=(low, high),
                    runs=_REPEATS,
                )
            )
    bandwidths = [found[name] * 1e9 for name in ("copy", "read") if name in found]
    return Ceilings(
        bandwidth=max(bandwidths, default=None),
        fp16=found["fp16 product"] * 1e12 if "fp16 product" in found else None,
        int8=found["int8 product"] * 1e12 if "int8 product" in found else None,
    )


# --- in the side process ----------------------------------------------------------------------------------


def measure(name: str, device: str, sizes: Sizes) -> tuple[float, float, float]:
    """Tenth percentile, median and ninetieth percentile of one ceiling, in its unit."""
    torch = usable_torch(device)
    with torch.inference_mode():
        run, amount = _WORK[name](torch, device, sizes)
        times = sorted(timed(torch, device, run, _REPEATS))
    del run  # and its buffers
    if device == "cuda":
        torch.cuda.empty_cache()
    figures = sorted(amount / seconds if amount else 1e6 * seconds for seconds in times)
    tenth = len(figures) // 10
    return figures[tenth], statistics.median(figures), figures[-1 - tenth]


def usable_torch(device: str) -> Any:
    """The torch module, if it can compute there. Raises Skipped with what is missing."""
    try:
        import torch
    except ImportError as error:
        raise Skipped(f"PyTorch cannot be imported ({error})") from None
    if device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA at all: this is its CPU build"
        raise Skipped(f"PyTorch {torch.__version__} sees no GPU; it was built for {built}")
    return torch


def timed(torch: Any, device: str, run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each run after a few that do not count; on a GPU between two events of its own clock."""
    for _ in range(_WARM_UP):
        run()
    if device != "cuda":
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return times
    torch.cuda.synchronize()
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for before, after in marks:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in marks]


def _copy(torch: Any, device: str, sizes: Sizes) -> tuple[Callable[[], object], float]:
    source = torch.ones(sizes.buffer // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * sizes.buffer / 1e9


def _read(torch: Any, device: str, sizes: Sizes) -> tuple[Callable[[], object], float]:
    source = torch.ones(sizes.buffer // 4, device=device)
    return source.sum, sizes.buffer / 1e9


def _fp16(torch: Any, device: str, sizes: Sizes) -> tuple[Callable[[], object], float]:
    # Random numbers: on zeros a card draws less power and runs faster than it ever will at work.
    left, right = (torch.randn(sizes.edge, sizes.edge, device=device).half() for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.matmul(left, right, out=out), 2 * sizes.edge**3 / 1e12


def _int8(torch: Any, device: str, sizes: Sizes) -> tuple[Callable[[], object], float]:
    left, right = (
        torch.randint(-127, 128, (sizes.edge, sizes.edge), dtype=torch.int8, device=device) for _ in range(2)
    )
    transposed = right.t()  # the arrangement that integer tensor cores read
    return lambda: torch._int_mm(left, transposed), 2 * sizes.edge**3 / 1e12


def _to_device(torch: Any, device: str, sizes: Sizes) -> tuple[Callable[[], object], float]:
    host = torch.ones(sizes.transfer, dtype=torch.uint8, pin_memory=device == "cuda")
    target = torch.empty(sizes.transfer, dtype=torch.uint8, device=device)
    return lambda: target.copy_(host, non_blocking=True), sizes.transfer / 1e9


def _to_host(torch: Any, device: str, sizes: Sizes) -> tuple[Callable[[], object], float]:
    host = torch.ones(sizes.transfer, dtype=torch.uint8, pin_memory=device == "cuda")
    source = torch.ones(sizes.transfer, dtype=torch.uint8, device=device)
    return lambda: host.copy_(source, non_blocking=True), sizes.transfer / 1e9


def _launch(torch: Any, device: str, sizes: Sizes) -> tuple[Callable[[], object], float]:
    del sizes
    value = torch.zeros(1, device=device)

    def run() -> None:
        value.add_(1)
        if device == "cuda":
            torch.cuda.synchronize()

    return run, 0.0


_WORK: Final = {
    "copy": _copy,
    "read": _read,
    "fp16 product": _fp16,
    "int8 product": _int8,
    "to the device": _to_device,
    "to the host": _to_host,
    "start and wait": _launch,
}
