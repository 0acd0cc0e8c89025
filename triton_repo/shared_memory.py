"""The Python backend's shared memory, named per server so that what a dead one left can be removed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

from build_engines.errors import ServerError

SHM = Path("/dev/shm")
# Triton makes one region per model instance, 1 MiB at first, and grows it with the largest request.
_FREE_BYTES_PER_INSTANCE = 4 << 20
_NAME = re.compile(r"onecard_(\d+)_(\d+)_[0-9a-f]{8}_")


def new_prefix() -> str:
    """A prefix for the regions of one server: process namespace, this process, and a random part."""
    return f"onecard_{_namespace()}_{os.getpid()}_{secrets.token_hex(4)}_"


def remove(prefix: str) -> list[str]:
    """Unlink the regions of one server; the names removed. Running processes keep what they have mapped."""
    removed = []
    for path in SHM.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            path.unlink()
            removed.append(path.name)
    return removed


def remove_stale() -> list[str]:
    """Unlink the regions of servers whose starting process is gone (after kill -9, a lost container)."""
    removed = []
    for path in stale():
        with contextlib.suppress(OSError):
            path.unlink()
            removed.append(path.name)
    return removed


def stale() -> list[Path]:
    """The regions of servers whose starting process is gone."""
    found = []
    for path in SHM.glob("onecard_*"):
        match = _NAME.match(path.name)
        # A number means another process in another namespace: leave those alone.
        if match and match[1] == _namespace() and not Path(f"/proc/{match[2]}").exists():
            found.append(path)
    return found


def check_room(instances: int) -> None:
    """Raise ServerError when /dev/shm cannot hold the regions of that many model instances."""
    try:
        status = os.statvfs(SHM)
    except OSError as error:
        raise ServerError(
            f"{SHM} is not available: {error.strerror}", next_step="mount a tmpfs on /dev/shm"
        ) from None
    free, needed = status.f_bavail * status.f_frsize, needed_bytes(instances)
    if free < needed:
        raise ServerError(
            f"{SHM} has {free >> 20} MiB free; {instances} model instances need {needed >> 20} MiB",
            next_step="give the container a larger one (docker run --shm-size=1g), or remove what fills it",
        )


def needed_bytes(instances: int) -> int:
    """What must be free for that many model instances."""
    return instances * _FREE_BYTES_PER_INSTANCE


def _namespace() -> str:
    """The inode of this process's PID namespace: a PID means nothing outside it."""
    match = re.search(r"\d+", os.readlink("/proc/self/ns/pid"))
    return match[0] if match else "0"
