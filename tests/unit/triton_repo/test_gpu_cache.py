"""The cache on the device: rows keep what they hold through swaps and copies, and nothing else moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeCudart

from triton_repo.runtime.gpu.cache import DeviceCache
from triton_repo.runtime.gpu.cuda import Device, DeviceMemoryFull
from triton_repo.runtime.session import EngineRefused

SERVING = {"layers": 2, "kv_heads": 2, "head_dim": 16, "slots": 3, "capacity": 8}
SHAPE = (4, 3, 2, 8, 16)  # arrays, slots, heads, tokens, elements


@pytest.fixture
def api() -> FakeCudart:
    return FakeCudart(2**20)


@pytest.fixture
def device(api: FakeCudart) -> Iterator[Device]:
    with Device(api=api, promised={"cache": 6_144}) as device:
        yield device


def content(api: FakeCudart, cache: DeviceCache) -> Any:
    """The whole cache, as the device has it."""
    return api.view(cache.addresses(0)["past_key.0"], SHAPE, np.float16)


def test_it_is_one_allocation_of_zeros_bound_in_place(api: FakeCudart, device: Device) -> None:
    cache = DeviceCache(device, SERVING, np.float16)
    assert api.calls["cudaMalloc"] == 2  # and the spare row
    device.synchronize()
    assert not content(api, cache).any()
    first = cache.addresses(0)
    assert list(first) == [
        f"{side}_{kind}.{layer}"
        for layer in (0, 1)
        for kind in ("key", "value")
        for side in ("past", "present")
    ]
    row, array = 2 * 8 * 16 * 2, 3 * 2 * 8 * 16 * 2
    for place, name in enumerate(cache.shapes(1)):
        present = name.replace("past", "present")
        assert first[name] == first[present] == first["past_key.0"] + place * array
        assert cache.addresses(2)[name] == first[name] + 2 * row
    assert cache.shapes(3) == dict.fromkeys(cache.shapes(1), (3, 2, 8, 16))


def test_swaps_and_copies_move_the_used_tokens_of_two_rows(api: FakeCudart, device: Device) -> None:
    cache = DeviceCache(device, SERVING, np.float16)
    device.synchronize()
    random = np.random.default_rng(0)
    expected = random.standard_normal(SHAPE).astype(np.float16)
    content(api, cache)[...] = expected
    for number in range(40):
        one, two = random.choice(3, 2, replace=False)
        length = int(random.integers(0, 9))
        if number % 2:
            cache.swap(int(one), int(two), length)
            expected[:, [one, two], :, :length] = expected[:, [two, one], :, :length]
        else:
            cache.copy(int(one), int(two), length)
            expected[:, two, :, :length] = expected[:, one, :, :length]
        if number % 3 == 0:
            expected[:, :, :, 7] += 1  # so that rows never become equal
            device.synchronize()
            content(api, cache)[:, :, :, 7] += 1
    device.synchronize()
    np.testing.assert_array_equal(content(api, cache), expected)
    assert not api.misuses


def test_no_room_says_what_the_plan_promised(api: FakeCudart, device: Device) -> None:
    api.used_by_others = 2**20 - 6_000
    with pytest.raises(DeviceMemoryFull, match="for cache; the plan promised 0 MiB"):
        DeviceCache(device, SERVING, np.float16)


def test_rows_that_no_tensor_may_begin_at_are_refused(device: Device) -> None:
    with pytest.raises(EngineRefused, match=r"7 tokens takes 448 bytes .* multiple of 8"):
        DeviceCache(device, SERVING | {"capacity": 7}, np.float16)
