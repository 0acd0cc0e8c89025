"""The one door to CUDA: a device with a stream, its memory, copies, events, graphs. Every call is checked."""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.texts import EngineFailed

MIB = 2**20
# After these the driver refuses every further call of the process.
_LOST = frozenset(
    {"cudaErrorIllegalAddress", "cudaErrorLaunchFailure", "cudaErrorHardwareStackError", "cudaErrorAssert"}
    | {"cudaErrorIllegalInstruction", "cudaErrorMisalignedAddress", "cudaErrorECCUncorrectable"}
)
_CAUSES = {
    "cudaErrorInsufficientDriver": "there is no NVIDIA driver, or it is older than this CUDA runtime; "
    "see what `nvidia-smi` says",
    "cudaErrorNoDevice": "the driver sees no GPU; see `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    "cudaErrorInvalidDevice": "there is no GPU of this number; see `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    "cudaErrorSystemDriverMismatch": "the driver's kernel module and library differ; restart the machine",
    "cudaErrorDevicesUnavailable": "another process holds the GPU exclusively; see `nvidia-smi`",
}


class CudaError(EngineFailed):
    """A CUDA call failed. `code` is CUDA's name for it ("cudaErrorIllegalAddress").

    Behind one that is `lost` no call of this process can succeed.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.lost = code in _LOST


class DeviceMemoryFull(CudaError):
    """The device has no room for what was asked."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """`compute_capability`, `driver` and `runtime` as "12.0"; the driver is the newest CUDA it knows."""

    index: int
    name: str
    compute_capability: str
    total_bytes: int
    driver: str
    runtime: str


@dataclass(frozen=True, slots=True)
class NoDevice:
    """Why there is no such GPU here."""

    reason: str


def find_device(index: int = 0, *, api: Any = None) -> DeviceInfo | NoDevice:
    """What GPU `index` is for this process, or why it has none. Allocates nothing there, never raises."""
    try:
        return _describe(_Calls(api or cudart()), index)
    except CudaError as error:
        return NoDevice(str(error))


def cudart() -> Any:
    """The module cuda.bindings.runtime. Raises CudaError where it is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise CudaError(
            f"the Python module cuda.bindings is missing ({error}); run: pip install cuda-bindings"
        ) from error
    return runtime


class _Calls:
    """Calls functions of the CUDA runtime by name.

    Returns what follows the error code (several values as a list), or raises CudaError.
    """

    def __init__(self, api: Any) -> None:
        self.api = api
        self._success = api.cudaError_t.cudaSuccess

    def __call__(self, name: str, *arguments: Any) -> Any:
        try:
            error, *values = getattr(self.api, name)(*arguments)
        except RuntimeError as missing:  # so cuda-bindings before 12.9, where there is no driver
            code = "cudaErrorInsufficientDriver"
            raise CudaError(f"{name} failed: {missing}; {_CAUSES[code]}", code) from missing
        if error != self._success:
            raise self._error(name, error)
        return values if len(values) > 1 else values[0] if values else None

    def _error(self, name: str, error: Any) -> CudaError:
        code, text = self._text("cudaGetErrorName", error), self._text("cudaGetErrorString", error)
        cause = _CAUSES.get(code, "")
        if code in _LOST:
            cause = "CUDA is unusable in this process from here on; load the model again"
        return CudaError(f"{name} failed: {code} ({text})" + (f"; {cause}" if cause else ""), code)

    def _text(self, name: str, error: Any) -> str:
        try:
            _, value = getattr(self.api, name)(error)
        except RuntimeError:
            return str(error.name)
        return value.decode() if isinstance(value, bytes) else str(value)


def _describe(call: _Calls, index: int) -> DeviceInfo:
    count = int(call("cudaGetDeviceCount"))
    if not 0 <= index < count:
        raise CudaError(
            f"there is no GPU {index}: this process sees {count}; see `nvidia-smi` and CUDA_VISIBLE_DEVICES",
            "cudaErrorInvalidDevice",
        )
    properties = call("cudaGetDeviceProperties", index)
    return DeviceInfo(
        index=index,
        name=properties.name.split(b"\0")[0].decode(errors="replace"),
        compute_capability=f"{properties.major}.{properties.minor}",
        total_bytes=int(properties.totalGlobalMem),
        driver=_version(call("cudaDriverGetVersion")),
        runtime=_version(call("cudaRuntimeGetVersion")),
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


class DeviceArray:
    """Memory on the device. Unless it was zeroed its content is undefined until something is copied to it."""

    def __init__(
        self, device: Device, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike, purpose: str
    ) -> None:
        self.address = address
        self.purpose = purpose
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        self._device = device

    def close(self) -> None:
        """Free it; a second time does nothing."""
        self._device._close_one(self)


class Event:
    """A point in the stream, to measure time between two of them."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device, self._handle = device, handle

    def record(self) -> None:
        """Mark the present end of the stream."""
        self._device._call("cudaEventRecord", self._handle, self._device.stream)

    def elapsed_ms(self, other: Event) -> float:
        """Milliseconds from this event to a later one; waits until the device has reached that."""
        self._device._call("cudaEventSynchronize", other._handle)
        return float(self._device._call("cudaEventElapsedTime", self._handle, other._handle))

    def close(self) -> None:
        """Destroy it; a second time does nothing."""
        self._device._close_one(self)


class Graph:
    """Recorded work, launched as a whole."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device, self._handle = device, handle

    def launch(self) -> None:
        """Put the recorded work on the stream."""
        self._device._call("cudaGraphLaunch", self._handle, self._device.stream)

    def close(self) -> None:
        """Destroy it; a second time does nothing. The device must have finished with it."""
        self._device._close_one(self)


class Device:
    """One GPU with one stream. Everything but `synchronize` and `elapsed_ms` only puts work on the stream.

    For one thread at a time, which may be another one each time. `promised` says for each purpose how many
    bytes the plan counted; `api` is the CUDA runtime's module.
    """

    def __init__(self, index: int = 0, *, promised: Mapping[str, int] | None = None, api: Any = None) -> None:
        """Raises CudaError: no driver, no such device."""
        self._checked = _Calls(api or cudart())
        self.info = _describe(self._checked, index)
        self._promised = dict(promised or {})
        self._bound = threading.local()
        self._closers: dict[Any, Callable[[], Any]] = {}  # in the order in which they were made
        self._kinds = self._checked.api.cudaMemcpyKind
        self._handle = self._call("cudaStreamCreateWithFlags", self._checked.api.cudaStreamNonBlocking)
        self.stream = int(self._handle)
        self._closers["stream"] = lambda: self._call("cudaStreamDestroy", self._handle)

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def bind(self) -> None:
        """Make this the device of the calling thread; libraries that call CUDA themselves rely on it."""
        if not getattr(self._bound, "here", False):
            self._checked("cudaSetDevice", self.info.index)
            self._bound.here = True

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device, as the driver counts them."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def array(
        self, shape: Sequence[int], dtype: npt.DTypeLike, purpose: str, *, zeroed: bool = False
    ) -> DeviceArray:
        """Allocate. `purpose` names it in errors ("weights", "cache"). Raises DeviceMemoryFull."""
        shape = tuple(int(size) for size in shape)
        nbytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)  # an empty tensor has an address too
        try:
            address = int(self._call("cudaMalloc", nbytes))
        except CudaError as error:
            if error.code != "cudaErrorMemoryAllocation":
                raise
            raise self._full(nbytes, purpose) from error
        array = DeviceArray(self, address, shape, dtype, purpose)
        self._closers[array] = lambda: self._call("cudaFree", address)
        if zeroed:
            self._call("cudaMemsetAsync", address, 0, nbytes, self.stream)
        return array

    def taken(self) -> dict[str, int]:
        """Bytes of the arrays that are allocated now, by purpose; not what a library took by itself."""
        found: dict[str, int] = {}
        for array in self._closers:
            if isinstance(array, DeviceArray):
                found[array.purpose] = found.get(array.purpose, 0) + array.nbytes
        return found

    def require(self, nbytes: int, purpose: str) -> None:
        """Raise DeviceMemoryFull unless `nbytes` are free, for a library that allocates by itself."""
        if self.memory()[0] < nbytes:
            raise self._full(nbytes, purpose)

    def pinned(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array in page-locked host memory, undefined at first. It is gone once the device is closed."""
        kind, count = np.dtype(dtype), math.prod(shape)
        nbytes = max(1, count * kind.itemsize)
        address = int(self._call("cudaHostAlloc", nbytes, self._checked.api.cudaHostAllocDefault))
        self._closers[address] = lambda: self._call("cudaFreeHost", address)
        memory: Any = (ctypes.c_byte * nbytes).from_address(address)
        array: npt.NDArray[Any] = np.frombuffer(memory, kind, count).reshape(tuple(shape))
        return array

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous pinned array to the device; it must not change before the stream has come by."""
        kind = self._kinds.cudaMemcpyHostToDevice
        self._copy(address, _contiguous(array).ctypes.data, array.nbytes, kind)

    def download(self, array: npt.NDArray[Any], address: int) -> None:
        """Copy from the device into a contiguous pinned array; it is there after `synchronize`."""
        kind = self._kinds.cudaMemcpyDeviceToHost
        self._copy(_contiguous(array).ctypes.data, address, array.nbytes, kind)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between two places of the device that do not overlap."""
        self._copy(target, source, nbytes, self._kinds.cudaMemcpyDeviceToDevice)

    def copy_rows(self, target: int, source: int, *, width: int, pitch: int, rows: int) -> None:
        """Copy the first `width` bytes of each of `rows` rows that are `pitch` bytes apart, on the device."""
        kind = self._kinds.cudaMemcpyDeviceToDevice
        if width and rows:
            self._call("cudaMemcpy2DAsync", target, pitch, source, pitch, width, rows, kind, self.stream)

    def synchronize(self) -> None:
        """Wait until the device has done all that was put on the stream. Errors of that work surface here."""
        self._call("cudaStreamSynchronize", self.stream)

    def event(self) -> Event:
        handle = self._call("cudaEventCreate")
        event = Event(self, handle)
        self._closers[event] = lambda: self._call("cudaEventDestroy", handle)
        return event

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` puts on the stream, without doing it.

        Raises what `work` raises, or CudaError where the recording cannot be kept; the stream stays usable.
        """
        modes = self._checked.api.cudaStreamCaptureMode
        # Other threads (another model's, a library's) may allocate meanwhile.
        self._call("cudaStreamBeginCapture", self.stream, modes.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except BaseException:
            with contextlib.suppress(CudaError):
                self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", self.stream))
            self._checked.api.cudaGetLastError()  # what the failed recording left must not meet the next call
            raise
        try:
            recorded = self._call("cudaStreamEndCapture", self.stream)
        except CudaError:
            self._checked.api.cudaGetLastError()
            raise
        try:
            handle = self._call("cudaGraphInstantiate", recorded, 0)
        finally:
            self._call("cudaGraphDestroy", recorded)
        graph = Graph(self, handle)
        self._closers[graph] = lambda: self._call("cudaGraphExecDestroy", handle)
        return graph

    def close(self) -> None:
        """Wait for the stream, then free everything, the newest first; a second time does nothing.

        Nothing is left out when a call fails; the first failure is raised at the end.
        """
        failures: list[CudaError] = []
        if self._closers:
            self._attempt(self.synchronize, failures)
        while self._closers:
            _, closer = self._closers.popitem()
            self._attempt(closer, failures)
        if failures:
            raise failures[0]

    @staticmethod
    def _attempt(closer: Callable[[], Any], failures: list[CudaError]) -> None:
        try:
            closer()
        except CudaError as error:
            failures.append(error)

    def _close_one(self, owned: Any) -> None:
        if closer := self._closers.pop(owned, None):
            closer()

    def _call(self, name: str, *arguments: Any) -> Any:
        self.bind()
        return self._checked(name, *arguments)

    def _copy(self, target: int, source: int, nbytes: int, kind: Any) -> None:
        if nbytes:
            self._call("cudaMemcpyAsync", target, source, nbytes, kind, self.stream)

    def _full(self, nbytes: int, purpose: str) -> DeviceMemoryFull:
        # The failed call's code would otherwise be handed to whoever asks CUDA for the last error.
        self._checked.api.cudaGetLastError()
        free, total = self.memory()
        promised = self._promised.get(purpose)
        planned = "the plan does not name it" if promised is None else f"the plan promised {_mib(promised)}"
        if promised is not None and nbytes > promised:
            cause = "it takes more than the plan counted; build the engine again, with smaller sizes"
        else:
            cause = (
                "other models or programs hold the rest; see `nvidia-smi`, stop what is not needed, or make "
                "slots, max_length or max_batch smaller and build again"
            )
        return DeviceMemoryFull(
            f"the GPU is full: asked for {_mib(nbytes)} for {purpose}; {planned} for it; "
            f"{free / MIB:,.0f} of {total / MIB:,.0f} MiB are free; {cause}",
            "cudaErrorMemoryAllocation",
        )


def _contiguous(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not array.flags.c_contiguous:
        raise ValueError("only contiguous arrays are copied to or from the device")
    return array


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:,.0f} MiB"
