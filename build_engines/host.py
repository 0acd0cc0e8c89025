"""This machine's processor and memory, as Linux states them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores that this process may use, which a container can make fewer than there are."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """What the processor can do, in the kernel's words ("avx512_vnni"); empty where it does not say."""
    return frozenset(_cpuinfo("flags").split())


def memory_bytes() -> int:
    """All memory of the machine, whatever a container may have of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Memory that a new process can have: the kernel's estimate, or what the container has left if less."""
    entries = (line.split() for line in _MEMINFO.read_text("utf-8").splitlines())
    available = next(int(entry[1]) << 10 for entry in entries if entry[0] == "MemAvailable:")
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit ("max"), or none that is written there
        return available
    # Files that were read count as used until someone needs the memory.
    return max(0, min(available, limit - used + int(stat["inactive_file"])))


def _cpuinfo(key: str) -> str:
    """The first processor's entry, or nothing."""
    try:
        lines = _CPUINFO.read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    entries = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in entries if name.strip() == key), "")
