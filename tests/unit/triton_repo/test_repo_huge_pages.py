"""Huge pages: asked for where the heap is large, and never a reason to fail."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from triton_repo.runtime import huge_pages


def huge_kilobytes(start: int) -> int:
    """AnonHugePages of the mapping that holds this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        bounds = line.split(" ", 1)[0]
        if "-" in bounds and not line.startswith(("Anon", "File", "Shmem")):
            first, last = (int(value, 16) for value in bounds.split("-"))
            inside = first <= start < last
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    return 0


def test_filled_memory_moves_to_huge_pages_and_keeps_its_values() -> None:
    size = 32 << 20
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_NOHUGEPAGE)
    values = np.frombuffer(region, np.uint8)
    values[:] = np.arange(size, dtype=np.uint32).astype(np.uint8)
    region.madvise(mmap.MADV_HUGEPAGE)
    start = values.ctypes.data
    before = huge_kilobytes(start)
    granted = huge_pages.collapse_heap(16 << 20)
    if not granted:
        pytest.skip("this kernel has no MADV_COLLAPSE, or no huge page to spare")
    assert huge_kilobytes(start) > before
    np.testing.assert_array_equal(values, np.arange(size, dtype=np.uint32).astype(np.uint8))


def test_where_the_kernel_tells_nothing_nothing_happens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "missing")
    assert huge_pages.collapse_heap() == 0


def test_only_private_anonymous_writable_memory_is_touched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "10000000-20000000 rw-p 00000000 00:00 0 \n"
        "20000000-30000000 r--p 00000000 00:00 0 \n"
        "30000000-40000000 rw-s 00000000 00:00 0 \n"
        "40000000-50000000 rw-p 00000000 08:01 123 /some/file\n"
        "50000000-50100000 rw-p 00000000 00:00 0 \n"
        "60100000-61000000 rw-p 00000000 00:00 0 [heap]\n"
    )
    monkeypatch.setattr(huge_pages, "_MAPS", maps)
    assert list(huge_pages._anonymous(8 << 20)) == [(0x10000000, 0x20000000), (0x60200000, 0x61000000)]
