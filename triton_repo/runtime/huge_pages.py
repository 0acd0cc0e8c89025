"""Weights in 2 MiB pages: where few tokens meet all weights, a third of the time goes to page walks.

Linux gives huge pages to a heap that asks (transparent huge pages, "madvise"), and ONNX Runtime does not ask.
MADV_COLLAPSE (Linux 6.1, madvise(2)) does it for memory that is already filled. Where the kernel knows no
such call, or has no page to spare, everything stays as it was.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

_MADV_COLLAPSE = 25
_HUGE = 2 << 20
_MAPS = Path("/proc/self/maps")


def collapse_heap(smallest: int = 8 << 20) -> int:
    """Ask for huge pages under every private, writable, anonymous mapping of at least `smallest` bytes.

    Returns the bytes that the kernel granted (0 where it cannot). Call it once, after the weights are loaded.
    """
    granted = 0
    with contextlib.suppress(OSError, ValueError, AttributeError):
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        for start, end in list(_anonymous(smallest)):
            length = ctypes.c_size_t(end - start)
            if madvise(ctypes.c_void_p(start), length, _MADV_COLLAPSE) == 0:
                granted += end - start
    return granted


def _anonymous(smallest: int) -> Iterator[tuple[int, int]]:
    for line in _MAPS.read_text(encoding="ascii", errors="replace").splitlines():
        fields = line.split()
        named = len(fields) > 5 and fields[5] != "[heap]"
        if named or fields[1] != "rw-p":
            continue
        first, last = (int(address, 16) for address in fields[0].split("-"))
        start, end = -(-first // _HUGE) * _HUGE, last // _HUGE * _HUGE
        if end - start >= smallest:
            yield start, end
