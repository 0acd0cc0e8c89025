"""INT8 codes on disk: written part by part as they are found, mapped when the graph is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from build_engines.errors import ArtifactError
from build_engines.quantize.clipping import Codes
from build_engines.quantize.linears import FloatArray

Source = Callable[[], tuple[Codes, FloatArray]]


class CodeStore:
    """The quantized weights of one model in `folder`, by the Linear's name. What is mapped costs no memory
    that the kernel could not take back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._scales: dict[str, FloatArray] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def create(self, name: str, shape: tuple[int, int]) -> Codes:
        """A writable int8 array of `shape` in the file of `name`; its scales follow with `finish`.

        Raises:
            ArtifactError: no room on the disk.
        """
        path = self._path(name)
        try:
            codes: Codes = np.lib.format.open_memmap(path, mode="w+", dtype=np.int8, shape=shape)
            # A mapped file that finds the disk full kills the process: its room is taken now.
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            return codes
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self, name: str, scale: FloatArray) -> None:
        """`scale` float32: one per output channel, or per row of an embedding table."""
        self._scales[name] = scale

    def read(self, name: str) -> tuple[Codes, FloatArray]:
        """The codes, mapped read-only, and their scales."""
        return np.load(self._path(name), mmap_mode="r", allow_pickle=False), self._scales[name]

    def sources(self, names: Iterable[str]) -> dict[str, Source]:
        """What the writer of the graph asks for codes when it comes to them."""

        def source(name: str) -> Source:
            return lambda: self.read(name)

        return {name: source(name) for name in names}

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _unwritable(self, error: OSError) -> ArtifactError:
        return ArtifactError(
            f"{self.folder}: the INT8 weights cannot be written: {error.strerror or error}",
            cause="they need a byte for every parameter of the model while its graph is made",
            next_step="free some disk space or choose another build folder, then run the same command",
        )
