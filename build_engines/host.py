"""This machine's processor and memory, as Linux states them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


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


def _cpuinfo(key: str) -> str:
    """The first processor's entry, or nothing."""
    try:
        lines = _CPUINFO.read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    entries = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in entries if name.strip() == key), "")
