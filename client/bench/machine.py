"""The machine, the versions and the memory of processes, from /proc and package metadata."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "onnxruntime",
    "tritonclient",
    "nvidia-pytriton",
    "numpy",
)


def describe(server_version: str, busy: float | None) -> dict[str, Any]:
    """Facts for the document; `busy` is `busy_share` from before the run."""
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "tritonserver": server_version,
        "busy_before": None if busy is None else round(busy, 3),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def cores() -> int:
    """Cores this process may use, which a container can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_share(seconds: float = 0.5, stat: Path = Path("/proc/stat")) -> float | None:
    """Share of all cores' time that was not idle over the next `seconds`; None where that is not known."""
    before = _cpu_times(stat)
    time.sleep(seconds)
    after = _cpu_times(stat)
    if before is None or after is None or after[1] <= before[1]:
        return None
    return 1 - (after[0] - before[0]) / (after[1] - before[1])


def _cpu_times(stat: Path) -> tuple[int, int] | None:
    """Idle and total time since the start; idle includes waiting for disks."""
    try:
        ticks = [int(value) for value in stat.read_text().split("\n", 1)[0].split()[1:]]
        return ticks[3] + ticks[4], sum(ticks)
    except (OSError, ValueError, IndexError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def resident_mib(pid: int | str = "self", proc: Path = Path("/proc")) -> float | None:
    """Resident memory of one process, in MiB; None when it is gone."""
    try:
        status = (proc / str(pid) / "status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return None


def process_tree(root: int, proc: Path = Path("/proc")) -> list[int]:
    """`root` and every process below it."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                # The command may hold blanks and brackets; the parent comes after its last bracket.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    tree, pending = [], [root]
    while pending:
        pid = pending.pop()
        tree.append(pid)
        pending += children.get(pid, [])
    return tree


def tree_resident_mib(pids: Iterable[int], proc: Path = Path("/proc")) -> float:
    """Sum of resident memory; pages that processes share count once for each."""
    return sum(resident_mib(pid, proc) or 0.0 for pid in pids)


def model_pids(pids: Iterable[int], model: str, proc: Path = Path("/proc")) -> list[int]:
    """Those of the processes that run one model: the Python backend's stubs name its model.py as argument."""
    found = []
    for pid in pids:
        try:
            arguments = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(f"/{model}/" in argument.decode("utf-8", "replace") + "/" for argument in arguments[1:]):
            found.append(pid)
    return found
