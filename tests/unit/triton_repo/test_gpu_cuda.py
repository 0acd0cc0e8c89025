"""The door to CUDA over a device that is host memory, and over the real module on machines without a GPU."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeCudart, Misuse

from triton_repo.runtime.gpu.cuda import (
    CudaError,
    Device,
    DeviceInfo,
    DeviceMemoryFull,
    NoDevice,
    cudart,
    find_device,
)

MIB = 2**20


@pytest.fixture
def api() -> FakeCudart:
    return FakeCudart(devices=2)


@pytest.fixture
def device(api: FakeCudart) -> Iterator[Device]:
    with Device(0, api=api) as device:
        yield device
    assert api.leaks() == []


def test_the_fake_has_the_real_functions_with_their_arguments() -> None:
    real, faked = cudart(), [name for name in vars(FakeCudart) if name.startswith("cuda")]
    assert len(faked) > 30
    for name in faked:
        if not inspect.isfunction(fake := vars(FakeCudart)[name]):
            assert getattr(real, name) == vars(FakeCudart)[name]
            continue
        signature = getattr(real, name).__doc__.split("\n")[0]
        inside = signature[len(name) + 1 : -1]
        expected = [part.split(":")[0].split()[-1] for part in inside.split(",") if part.strip()]
        assert list(inspect.signature(fake).parameters)[1:] == expected, signature


def test_the_real_module_takes_the_arguments_that_it_is_given() -> None:
    """Without a driver each of its functions looks at its arguments and returns an error."""
    if isinstance(find_device(), DeviceInfo):
        pytest.skip("this machine has a GPU")
    real, answers = cudart(), dict[str, tuple[Any, ...]]()

    class Both(FakeCudart):
        def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            fake = super()._watched(name, function)

            def call(*arguments: Any) -> Any:
                answers[name] = getattr(real, name)(*arguments)
                answer = fake(*arguments)
                assert len(answer) == len(answers[name]), name
                return answer

            return call

    with Device(api=Both()) as device:
        device.memory()
        there, here = device.array((4, 4), np.float32, "x", zeroed=True), device.pinned((4, 4), np.float32)
        device.upload(there.address, here)
        device.copy(there.address, there.address + 32, 16)
        device.copy_rows(there.address, there.address + 32, width=4, pitch=8, rows=2)
        before, after = device.event(), device.event()
        before.record()
        after.record()
        before.elapsed_ms(after)
        graph = device.capture(lambda: device.download(here, there.address))
        graph.launch()
        device.synchronize()
        graph.close()
    assert len(answers) > 25
    assert all(isinstance(answer[0], real.cudaError_t) for answer in answers.values())


@pytest.mark.parametrize("function", ["cudaGetErrorString", "cudaGetDeviceCount"])
def test_bindings_that_raise_where_there_is_no_driver(
    api: FakeCudart, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError('Function "cuInit" not found')

    api.fail("cudaGetDeviceCount", code="cudaErrorInsufficientDriver")
    monkeypatch.setattr(api, function, missing)
    found = find_device(api=api)
    assert isinstance(found, NoDevice)
    assert "cudaGetDeviceCount failed" in found.reason
    assert "nvidia-smi" in found.reason


def test_without_a_driver_there_is_no_gpu_and_a_reason() -> None:
    if isinstance(find_device(), DeviceInfo):
        pytest.skip("this machine has a GPU")
    found = find_device()
    assert isinstance(found, NoDevice)
    assert "driver" in found.reason or "no GPU" in found.reason
    assert "\n" not in found.reason
    with pytest.raises(CudaError, match="nvidia-smi"):
        Device()


def test_a_device_that_is_not_there(api: FakeCudart) -> None:
    assert isinstance(find_device(1, api=api), DeviceInfo)
    found = find_device(2, api=api)
    assert isinstance(found, NoDevice)
    assert "no GPU 2: this process sees 2" in found.reason
    api.devices = 0
    found = find_device(0, api=api)
    assert isinstance(found, NoDevice)
    assert "CUDA_VISIBLE_DEVICES" in found.reason


def test_info_and_memory(device: Device, api: FakeCudart) -> None:
    assert find_device(0, api=api) == device.info
    assert device.info.name == "Fake GPU 16 GB"
    assert device.info.compute_capability == "12.0"
    assert (device.info.driver, device.info.runtime) == ("13.0", "13.5")
    device.array((MIB,), np.float16, "cache")
    assert device.memory() == (16 * 1024 * MIB - 2 * MIB, 16 * 1024 * MIB)


def test_copies_there_and_back(device: Device) -> None:
    host, back = device.pinned((4, 3), np.float32), device.pinned((4, 3), np.float32)
    host[...] = np.arange(12).reshape(4, 3)
    first = device.array((4, 3), np.float32, "buffers")
    second = device.array((4, 3), np.float32, "buffers", zeroed=True)
    device.upload(first.address, host)
    device.copy(second.address, first.address, 6 * 4)
    device.download(back, second.address)
    assert np.isnan(back).all(), "nothing is there before the stream has come by"
    device.synchronize()
    assert back.ravel().tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0]


def test_rows_are_copied_by_their_first_bytes(device: Device) -> None:
    back = device.pinned((2, 4), np.uint8)
    source = device.array((2, 4), np.uint8, "cache", zeroed=True)
    target = device.array((2, 4), np.uint8, "cache")
    device.copy_rows(target.address, source.address, width=3, pitch=4, rows=2)
    device.copy_rows(target.address, source.address, width=0, pitch=4, rows=2)
    device.download(back, target.address)
    device.synchronize()
    assert back.tolist() == [[0, 0, 0, 255]] * 2


def test_strided_arrays_are_refused(device: Device) -> None:
    target = device.array((8,), np.float32, "buffers")
    host = device.pinned((4, 4), np.float32)
    with pytest.raises(ValueError, match="contiguous"):
        device.upload(target.address, host[:, :2])
    with pytest.raises(ValueError, match="contiguous"):
        device.download(host[:, :2], target.address)


def test_full_memory_names_purpose_promise_and_what_is_free(api: FakeCudart) -> None:
    api.used_by_others = api.total_bytes - 100 * MIB
    with Device(api=api, promised={"cache": 200 * MIB}) as device:
        with pytest.raises(DeviceMemoryFull) as full:
            device.array((150, MIB), np.int8, "cache")
        assert "asked for 150 MiB for cache; the plan promised 200 MiB for it" in str(full.value)
        assert "100 of 16,384 MiB are free" in str(full.value)
        assert "stop what is not needed" in str(full.value)
        with pytest.raises(DeviceMemoryFull, match="takes more than the plan counted"):
            device.array((250, MIB), np.int8, "cache")
        with pytest.raises(DeviceMemoryFull, match="the plan does not name it"):
            device.array((250, MIB), np.int8, "context")
        device.array((50, MIB), np.int8, "cache")  # the failures cost nothing
    assert api.leaks() == []


def test_what_is_taken_is_known_by_purpose(device: Device) -> None:
    device.array((10,), np.float32, "buffers")
    cache = device.array((3, 100), np.float16, "cache", zeroed=True)
    device.array((20,), np.float32, "buffers")
    device.pinned((1000,), np.float32)  # the host's
    assert device.taken() == {"buffers": 120, "cache": 600}
    cache.close()
    assert device.taken() == {"buffers": 120}


def test_other_failures_keep_their_code(device: Device, api: FakeCudart) -> None:
    api.fail("cudaMalloc", code="cudaErrorIllegalAddress")
    with pytest.raises(CudaError, match="cudaMalloc failed: cudaErrorIllegalAddress") as error:
        device.array((1,), np.int8, "buffers")
    assert error.value.lost
    assert "load the model again" in str(error.value)


def test_freed_once_newest_first_and_then_never_again(api: FakeCudart) -> None:
    device = Device(api=api)
    first, second = (device.array((4,), np.int8, "buffers") for _ in range(2))
    device.pinned((4,), np.int8)
    first.close()
    first.close()
    with pytest.raises(Misuse):
        device.copy(second.address, first.address, 4)
    api.history.clear()
    device.event().record()
    device.close()
    device.close()
    assert api.leaks() == []
    assert api.history[3:] == [
        "cudaEventDestroy",
        "cudaFreeHost",
        "cudaFree",
        "cudaStreamDestroy",
    ]
    api.misuses.clear()


def test_closing_goes_on_behind_a_failure(api: FakeCudart) -> None:
    device = Device(api=api)
    device.array((4,), np.int8, "buffers")
    device.event()
    api.fail("cudaEventDestroy", code="cudaErrorIllegalAddress")
    with pytest.raises(CudaError, match="cudaEventDestroy"):
        device.close()
    assert api.leaks() == ["events"]


def test_time_between_events(device: Device) -> None:
    start, end = device.event(), device.event()
    array = device.array((MIB,), np.int8, "buffers")
    start.record()
    for _ in range(20):
        device.copy(array.address, array.address + MIB // 2, MIB // 2)
    end.record()
    assert 0 < start.elapsed_ms(end) < 10_000


def test_a_graph_is_recorded_without_being_done_and_launched_many_times(device: Device) -> None:
    host, back = device.pinned((4,), np.int32), device.pinned((4,), np.int32)
    array = device.array((4,), np.int32, "buffers", zeroed=True)
    host[...] = 7
    graph = device.capture(lambda: device.upload(array.address, host))
    for value, launched in ((7, False), (1, True), (2, True)):
        host[...] = value
        if launched:
            graph.launch()
        device.download(back, array.address)
        device.synchronize()
        assert back.tolist() == [value if launched else 0] * 4
    graph.close()
    graph.close()


def test_failed_recordings_leave_the_stream_usable(device: Device, api: FakeCudart) -> None:
    array = device.array((4,), np.int32, "buffers", zeroed=True)

    def broken() -> None:
        raise RuntimeError("not this one")

    with pytest.raises(RuntimeError, match="not this one"):
        device.capture(broken)
    with pytest.raises(CudaError, match="CaptureUnsupported"):
        device.capture(device.synchronize)
    api.fail("cudaGraphInstantiate", code="cudaErrorNotSupported")
    with pytest.raises(CudaError, match="cudaGraphInstantiate"):
        device.capture(lambda: device.copy(array.address, array.address + 8, 8))
    device.copy(array.address, array.address + 8, 8)
    device.synchronize()


def test_another_thread_uses_the_right_device(api: FakeCudart) -> None:
    device = Device(1, api=api)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            device.array((4,), np.int8, "buffers", zeroed=True).close()
            device.synchronize()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [stream.device for stream in api.streams.values()] == [1]
    device.close()
    assert failed == []
    assert api.leaks() == []


def test_the_emulator_sees_what_cuda_leaves_undefined(api: FakeCudart) -> None:
    device = Device(api=api)
    array = device.array((4,), np.int32, "buffers")
    for misuse in (
        lambda: device.copy(array.address, array.address + 8, 12),
        lambda: device.copy(array.address, array.address + 300, 8),
        lambda: device.upload(array.address, np.zeros(4, np.int32)),
        lambda: device.copy_rows(array.address, array.address + 8, width=8, pitch=8, rows=2),
    ):
        with pytest.raises(Misuse):
            misuse()
    device.copy(array.address, array.address + 4, 8)
    with pytest.raises(Misuse, match="overlap"):
        device.synchronize()
    assert len(api.misuses) == 5
