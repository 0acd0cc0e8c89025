"""What TensorRT calls back while it works: the one logger of a process, and a reader that streams a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from typing import Any, BinaryIO

# As much of an engine as is in memory at a time while it goes to the GPU.
CHUNK_BYTES = 64 * 2**20


@cache
def shared_logger(trt: Any) -> Any:
    """The logger of the module `trt` in this process.

    TensorRT keeps the first it is given and ignores every other, so only its `sink` changes: a function of
    severity and message, or None.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.sink: Any = None

        def log(self, severity: Any, message: str) -> None:
            if self.sink is not None:
                self.sink(severity, message)

    return Logger()


@contextlib.contextmanager
def errors_of(trt: Any) -> Iterator[list[str]]:
    """The messages of severity ERROR and worse that TensorRT logs inside the block."""
    logger, errors = shared_logger(trt), list[str]()
    before = logger.sink

    def sink(severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR and message not in errors:
            errors.append(message)

    logger.sink = sink
    try:
        yield errors
    finally:
        logger.sink = before


def file_reader(trt: Any, file: BinaryIO) -> Any:
    """An IStreamReaderV2 over `file`. What goes wrong inside is in `raised`: C++ frames cannot carry it."""
    whence = {
        trt.SeekPosition.SET: os.SEEK_SET,
        trt.SeekPosition.CUR: os.SEEK_CUR,
        trt.SeekPosition.END: os.SEEK_END,
    }

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)
            self.raised: BaseException | None = None

        def read(self, num_bytes: int, stream: int) -> bytes:
            try:
                return file.read(min(num_bytes, CHUNK_BYTES))
            except BaseException as error:
                self.raised = error
                return b""

        def seek(self, offset: int, where: Any) -> bool:
            try:
                file.seek(-abs(offset) if where == trt.SeekPosition.END else offset, whence[where])
            except BaseException as error:
                self.raised = error
                return False
            return True

    return Reader()
