"""Kernels that TensorRT-RTX compiled on this GPU, kept in a file for the next start."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("onecard")


def cache_path(engine_digest: str, gpu: str) -> Path:
    """The file for one engine on one kind of GPU, in $ONECARD_CACHE_DIR or ~/.cache/onecard."""
    folder = os.environ.get("ONECARD_CACHE_DIR")
    home = Path(folder) if folder else Path(os.path.expanduser("~")) / ".cache" / "onecard"
    kind = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return home / f"{engine_digest[:16]}-{kind}.cache"


class RuntimeCache:
    """TensorRT-RTX's cache object with its file. A file that cannot be used is as good as none.

    The library itself compares version, GPU and driver when it reads one.
    """

    def __init__(self, cache: Any, path: Path) -> None:
        self.cache, self.path = cache, path
        self.read = False  # the file was there and fitted
        self._kept = b""
        with contextlib.suppress(OSError):
            if stored := path.read_bytes():
                self.read = bool(cache.deserialize(stored))
                self._kept = stored if self.read else b""

    def save(self) -> None:
        """Write the file if there is anything new; another process reads the old one or the new one."""
        memory = self.cache.serialize()
        content = b"" if memory is None else bytes(memory)
        if not content or content == self._kept:
            return
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_bytes(content)
            os.replace(draft, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            _LOG.warning(
                "%s cannot be written (%s), so kernels are compiled again at the next start; "
                "set ONECARD_CACHE_DIR to a folder that can be written",
                self.path,
                error.strerror or error,
            )
            return
        self._kept = content
