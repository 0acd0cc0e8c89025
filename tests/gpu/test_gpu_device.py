"""The door to CUDA on a real device: memory, copies, pinned arrays, events, graphs, a full card."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from triton_repo.runtime.gpu.cuda import DeviceMemoryFull, find_device


def test_the_device_is_the_card_that_the_driver_names(card: Any, device: Any) -> None:
    assert find_device(0) == device.info
    assert device.info.compute_capability == card.compute_capability
    free, total = device.memory()
    assert 0 < free <= total


def test_what_is_uploaded_comes_back(device: Any) -> None:
    there = device.array((3, 1000), np.float32, "test")
    sent, back = (device.pinned((3, 1000), np.float32) for _ in range(2))
    sent[:] = np.arange(3000).reshape(3, 1000)
    back[:] = -1
    device.upload(there.address, sent)
    device.download(back, there.address)
    device.synchronize()
    np.testing.assert_array_equal(back, sent)


def test_zeroed_memory_is_zero(device: Any) -> None:
    there = device.array((4096,), np.int32, "test", zeroed=True)
    back = device.pinned((4096,), np.int32)
    back[:] = 7
    device.download(back, there.address)
    device.synchronize()
    assert not back.any()


def test_rows_are_copied_in_two_dimensions(device: Any) -> None:
    """As the KV cache swaps rows: the first part of each head's row, and nothing beside it."""
    source, target = (device.array((4, 64), np.float16, "test", zeroed=True) for _ in range(2))
    sent, back = (device.pinned((4, 64), np.float16) for _ in range(2))
    sent[:] = np.arange(256).reshape(4, 64)
    device.upload(source.address, sent)
    device.copy_rows(target.address, source.address, width=2 * 10, pitch=2 * 64, rows=4)
    device.download(back, target.address)
    device.synchronize()
    np.testing.assert_array_equal(back[:, :10], sent[:, :10])
    assert not back[:, 10:].any()


def test_memory_is_given_back(device: Any) -> None:
    size = 64 << 20
    before = device.memory()[0]
    there = device.array((size,), np.uint8, "test")
    held = before - device.memory()[0]
    there.close()
    assert held >= size
    assert before - device.memory()[0] < size


def test_a_full_card_says_what_was_asked_and_what_is_free(device: Any) -> None:
    _, total = device.memory()
    with pytest.raises(DeviceMemoryFull, match=r"asked for .* for cache.* MiB are free"):
        device.array((2 * total,), np.uint8, "cache")
    there = device.array((1024,), np.uint8, "test")  # and the device goes on
    device.synchronize()
    there.close()


def test_events_measure_the_time_between_them(device: Any) -> None:
    source, target = (device.array((32 << 20,), np.uint8, "test") for _ in range(2))
    before, after = device.event(), device.event()
    before.record()
    for _ in range(20):
        device.copy(target.address, source.address, 32 << 20)
    after.record()
    assert 0 < before.elapsed_ms(after) < 10_000


def test_a_graph_does_again_what_was_recorded(device: Any) -> None:
    source, target = (device.array((256,), np.int32, "test", zeroed=True) for _ in range(2))
    sent, back = (device.pinned((256,), np.int32) for _ in range(2))
    graph = device.capture(lambda: device.copy(target.address, source.address, 1024))
    for value in (1, 2):
        sent[:] = value
        device.upload(source.address, sent)
        graph.launch()
        device.download(back, target.address)
        device.synchronize()
        assert (back == value).all()
    graph.close()


def test_a_recording_that_fails_leaves_the_stream_usable(device: Any) -> None:
    def work() -> None:
        raise KeyError("no such thing")

    with pytest.raises(KeyError):
        device.capture(work)
    there = device.array((16,), np.uint8, "test", zeroed=True)
    device.synchronize()
    there.close()
