"""A CUDA runtime whose device is host memory: the names, arguments and answers of cuda.bindings.runtime.

Work on a stream is done when the stream is synchronized, never before: a staging buffer that is overwritten
too early, or a result that is read too early, gives wrong numbers here as it does on a GPU. What CUDA leaves
undefined (use after free, copies out of range or of unpinned memory, a destroyed stream) raises Misuse, which
no `except Exception` catches, and is kept in `misuses`.

`tests/unit/triton_repo/fake_tensorrt.py` has the TensorRT module that runs on it.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
from cuda.bindings import runtime as real

_ALIGNMENT = 256
_GARBAGE = 0xFF  # NaN in every float type, -1 in every integer type
_OK = real.cudaError_t.cudaSuccess
Work = Callable[[], None]


class Misuse(BaseException):
    """A call whose outcome CUDA leaves undefined."""


@dataclass(eq=False)
class Block:
    """One allocation. `memory` is longer than asked for, so that `address` can be aligned."""

    address: int
    nbytes: int
    memory: Any
    pinned: bool
    freed: bool = False


@dataclass(eq=False)
class Stream:
    device: int
    work: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None  # while it is recorded
    broken_capture: bool = False
    destroyed: bool = False


@dataclass(eq=False)
class Graph:
    work: list[Work]
    destroyed: bool = False


@dataclass(eq=False)
class Event:
    """`time` is set once the device has come by."""

    time: float = math.nan
    destroyed: bool = False


class FakeCudart:
    """`FakeCudart(total_bytes=...)` is passed as `Device(api=...)`.

    `fail("cudaMalloc", nth=3)` lets the third call from now return an error. `used_by_others` bytes are taken
    from what is free. `calls` counts every call by name, `history` has them in order.
    """

    cudaError_t = real.cudaError_t
    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaStreamNonBlocking = real.cudaStreamNonBlocking
    cudaHostAllocDefault = real.cudaHostAllocDefault

    def __init__(
        self,
        total_bytes: int = 16 * 2**30,
        *,
        devices: int = 1,
        compute_capability: str = "12.0",
        name: str = "Fake GPU 16 GB",
    ) -> None:
        self.total_bytes, self.devices, self.name = total_bytes, devices, name
        self.compute_capability = compute_capability
        self.used_by_others = 0
        self.blocks: list[Block] = []
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, Graph] = {}
        self.events: dict[int, Event] = {}
        self.misuses: list[str] = []
        self.calls: dict[str, int] = {}
        self.history: list[str] = []
        self._failing: dict[str, list[tuple[int, Any]]] = {}
        self._next = 0x1000
        self._thread = threading.local()
        for attribute in dir(type(self)):
            function = getattr(self, attribute)
            if attribute.startswith("cuda") and callable(function) and not isinstance(function, type):
                setattr(self, attribute, self._watched(attribute, function))

    # ---- for tests

    def fail(self, name: str, nth: int = 1, code: str = "cudaErrorMemoryAllocation") -> None:
        """Let the nth call of `name` from now fail with `code`."""
        due = self.calls.get(name, 0) + nth
        self._failing.setdefault(name, []).append((due, getattr(real.cudaError_t, code)))

    def leaks(self) -> list[str]:
        """What was made and not given back."""
        kept = [f"{'pinned' if b.pinned else 'device'} {b.nbytes}" for b in self.blocks if not b.freed]
        for kind in ("streams", "graphs", "events"):
            kept += [kind for item in getattr(self, kind).values() if not item.destroyed]
        return kept

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory that are allocated now."""
        return sum(block.nbytes for block in self.blocks if not (block.freed or block.pinned))

    def view(self, address: int, shape: tuple[int, ...], dtype: Any, *, pinned: bool = False) -> Any:
        """The array at an address of the device (or of pinned memory); Misuse unless it is allocated."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self.check(address, nbytes, pinned=pinned)
        memory = (ctypes.c_byte * max(1, nbytes)).from_address(address)
        return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)

    def check(self, address: int, nbytes: int, *, pinned: bool = False) -> Block:
        """The allocation that holds these bytes; Misuse where there is none."""
        where = "pinned host memory" if pinned else "device memory"
        for block in reversed(self.blocks):
            if block.pinned == pinned and block.address <= address < block.address + block.nbytes:
                if block.freed:
                    continue
                if address + nbytes > block.address + block.nbytes:
                    past = address + nbytes - block.address - block.nbytes
                    self.misuse(f"{nbytes} bytes end {past} behind their {where} of {block.nbytes}")
                return block
        freed = any(b.freed and b.address <= address < b.address + b.nbytes for b in self.blocks)
        return self.misuse(f"{address:#x} is {'freed' if freed else 'no'} {where}")

    def misuse(self, message: str) -> NoReturn:
        self.misuses.append(message)
        raise Misuse(message)

    def put(self, stream: Any, work: Work) -> None:
        """What every asynchronous call does: do `work` when the stream gets there, or record it."""
        found = self.stream(stream)
        (found.work if found.captured is None else found.captured).append(work)

    def stream(self, handle: Any) -> Stream:
        found = self.streams.get(int(handle))
        if found is None or found.destroyed:
            self.misuse("the stream is destroyed or was never made")
        if found.device != self._current():
            self.misuse(f"a stream of device {found.device} used while {self._current()} is current")
        return found

    # ---- the runtime

    def cudaGetDeviceCount(self) -> Any:
        if not self.devices:
            return real.cudaError_t.cudaErrorNoDevice, 0
        return _OK, self.devices

    def cudaGetDeviceProperties(self, device: int) -> Any:
        major, minor = map(int, self.compute_capability.split("."))
        name = self.name.encode().ljust(256, b"\0")
        return _OK, SimpleNamespace(name=name, major=major, minor=minor, totalGlobalMem=self.total_bytes)

    def cudaDriverGetVersion(self) -> Any:
        return _OK, 13000

    def cudaRuntimeGetVersion(self) -> Any:
        return _OK, 13050

    def cudaGetErrorName(self, error: Any) -> Any:
        return _OK, error.name.encode()

    def cudaGetErrorString(self, error: Any) -> Any:
        return real.cudaGetErrorString(error)

    def cudaGetLastError(self) -> Any:
        return (_OK,)

    def cudaSetDevice(self, device: int) -> Any:
        if not 0 <= device < self.devices:
            return (real.cudaError_t.cudaErrorInvalidDevice,)
        self._thread.device = device
        return (_OK,)

    def cudaMemGetInfo(self) -> Any:
        return _OK, self._free(), self.total_bytes

    def cudaMalloc(self, size: int) -> Any:
        if size > self._free():
            return real.cudaError_t.cudaErrorMemoryAllocation, None
        return _OK, self._allocate(size, pinned=False)

    def cudaFree(self, devPtr: int) -> Any:
        self._finish_all()
        self._release(devPtr, pinned=False)
        return (_OK,)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return _OK, self._allocate(size, pinned=True)

    def cudaFreeHost(self, ptr: int) -> Any:
        self._finish_all()
        self._release(ptr, pinned=True)
        return (_OK,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Any) -> Any:
        self.check(devPtr, count)
        self.put(stream, lambda: self.view(devPtr, (count,), np.uint8).fill(value))
        return (_OK,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> Any:
        return self.cudaMemcpy2DAsync(dst, count, src, count, count, 1, kind, stream)

    def cudaMemcpy2DAsync(  # noqa: PLR0913, PLR0917
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> Any:
        kinds = real.cudaMemcpyKind
        if kind not in {
            kinds.cudaMemcpyHostToDevice,
            kinds.cudaMemcpyDeviceToHost,
            kinds.cudaMemcpyDeviceToDevice,
        }:
            self.misuse(f"a copy of kind {kind}")
        if width > min(dpitch, spitch):
            return (real.cudaError_t.cudaErrorInvalidPitchValue,)
        to_host, from_host = kind == kinds.cudaMemcpyDeviceToHost, kind == kinds.cudaMemcpyHostToDevice

        def rows(address: int, pitch: int, pinned: bool) -> Any:
            nbytes = (height - 1) * pitch + width
            flat = self.view(address, (nbytes,), np.uint8, pinned=pinned)
            return np.lib.stride_tricks.as_strided(flat, (height, width), (pitch, 1))

        def work() -> None:
            target, source = rows(dst, dpitch, to_host), rows(src, spitch, from_host)
            if np.shares_memory(target, source):
                self.misuse("a copy between places that overlap")
            target[...] = source

        # Looked at when it is asked for, and again when it is done.
        rows(dst, dpitch, to_host), rows(src, spitch, from_host)
        self.put(stream, work)
        return (_OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        if flags != real.cudaStreamNonBlocking:
            self.misuse("a stream that waits for the default stream")
        return _OK, real.cudaStream_t(self._handle(self.streams, Stream(self._current())))

    def cudaStreamDestroy(self, stream: Any) -> Any:
        if self.stream(stream).work:
            self.misuse("a stream is destroyed with work on it")
        self.stream(stream).destroyed = True
        return (_OK,)

    def cudaStreamSynchronize(self, stream: Any) -> Any:
        found = self.stream(stream)
        if found.captured is not None:
            found.broken_capture = True
            return (real.cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self._finish(found)
        return (_OK,)

    def cudaEventCreate(self) -> Any:
        return _OK, real.cudaEvent_t(self._handle(self.events, Event()))

    def cudaEventRecord(self, event: Any, stream: Any) -> Any:
        found = self._alive(self.events, event, "event")
        found.time = math.nan
        self.put(stream, lambda: setattr(found, "time", time.perf_counter()))
        return (_OK,)

    def cudaEventSynchronize(self, event: Any) -> Any:
        self._alive(self.events, event, "event")
        self._finish_all()
        return (_OK,)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> Any:
        first, last = (self._alive(self.events, event, "event").time for event in (start, end))
        if math.isnan(first) or math.isnan(last):
            return real.cudaError_t.cudaErrorInvalidResourceHandle, None
        return _OK, (last - first) * 1e3

    def cudaEventDestroy(self, event: Any) -> Any:
        self._alive(self.events, event, "event").destroyed = True
        return (_OK,)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Any:
        found = self.stream(stream)
        if found.captured is not None:
            return (real.cudaError_t.cudaErrorIllegalState,)
        found.captured, found.broken_capture = [], False
        return (_OK,)

    def cudaStreamEndCapture(self, stream: Any) -> Any:
        found = self.stream(stream)
        work, found.captured = found.captured, None
        if work is None:
            return real.cudaError_t.cudaErrorIllegalState, None
        if found.broken_capture:
            return real.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        return _OK, real.cudaGraph_t(self._handle(self.graphs, Graph(work)))

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        work = list(self._alive(self.graphs, graph, "graph").work)
        return _OK, real.cudaGraphExec_t(self._handle(self.graphs, Graph(work)))

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> Any:
        graph = self._alive(self.graphs, graphExec, "graph")

        def work() -> None:
            if graph.destroyed:
                self.misuse("a graph was destroyed before it was done")
            for step in graph.work:
                step()

        self.put(stream, work)
        return (_OK,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> Any:
        return self.cudaGraphDestroy(graphExec)

    def cudaGraphDestroy(self, graph: Any) -> Any:
        found = self._alive(self.graphs, graph, "graph")
        found.destroyed = True
        found.work.clear()
        return (_OK,)

    # ---- inside

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            self.history.append(name)
            for due, code in self._failing.get(name, []):
                if due == self.calls[name]:
                    return code, *[None] * (2 if name == "cudaMemGetInfo" else 1)
            return function(*arguments)

        return call

    def _current(self) -> int:
        return getattr(self._thread, "device", 0)

    def _free(self) -> int:
        return self.total_bytes - self.used_by_others - self.device_bytes

    def _capturing(self) -> bool:
        capturing = [s for s in self.streams.values() if s.captured is not None]
        for stream in capturing:
            stream.broken_capture = True
        return bool(capturing)

    def _allocate(self, size: int, *, pinned: bool) -> int:
        if self._capturing():
            self.misuse("memory is allocated while a stream is recorded")
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        if size <= 64 * 2**20:
            memory.fill(_GARBAGE)
        address = -(-memory.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self.blocks.append(Block(address, size, memory, pinned))
        return address

    def _release(self, address: int, *, pinned: bool) -> None:
        for block in reversed(self.blocks):
            if block.address == address and block.pinned == pinned and not block.freed:
                block.freed = True
                if block.nbytes > 2**20:  # small ones stay, so that their addresses are not given out again
                    self.blocks.remove(block)
                return
        self.misuse(f"{address:#x} is freed, but is not allocated")

    def _handle(self, table: dict[int, Any], item: Any) -> int:
        self._next += 8
        table[self._next] = item
        return self._next

    def _alive(self, table: dict[int, Any], handle: Any, kind: str) -> Any:
        item = table.get(int(handle))
        if item is None or item.destroyed:
            self.misuse(f"the {kind} is destroyed or was never made")
        return item

    def _finish_all(self) -> None:
        for stream in self.streams.values():
            self._finish(stream)

    @staticmethod
    def _finish(stream: Stream) -> None:
        while stream.work:
            stream.work.pop(0)()
