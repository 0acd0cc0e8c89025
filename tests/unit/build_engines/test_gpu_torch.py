"""What bench-gpu asks of PyTorch and of the driver on a GPU: every call, with the real ones' signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from build_engines import nvidia
from build_engines.gpu import baselines, ceilings
from build_engines.gpu.models import LLM, EncoderSize, Sizes, write_model
from build_engines.random_model import RandomLlama

torch = pytest.importorskip("torch")

SIZES = Sizes(
    encoder=EncoderSize(layers=1, hidden=32, heads=2, ffn=64, vocabulary=1000, positions=64),
    llm=RandomLlama(layers=1, hidden=32, ffn=64, heads=2, kv_heads=1, vocabulary=1024, positions=64),
)


SMALL_CARD = ceilings.Sizes(buffer=1 << 20, edge=64, transfer=1 << 18)


class OnTheCpu(torch.overrides.TorchFunctionMode):  # type: ignore[misc, name-defined]
    """What is asked of the device "cuda" is done on the CPU, and pinned memory is ordinary memory."""

    def __torch_function__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        named = {name: self._moved(value) for name, value in (named or {}).items()}
        if named.get("pin_memory"):
            named["pin_memory"] = False
        return function(*(self._moved(value) for value in given), **named)

    @staticmethod
    def _moved(value: Any) -> Any:
        is_device = isinstance(value, str | torch.device)
        is_cuda = is_device and str(value).startswith("cuda")
        return torch.device("cpu") if is_cuda else value


class Event:
    """A mark in time of the GPU."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def elapsed_time(self, end_event: Event) -> float:
        assert self.recorded
        assert end_event.recorded
        return 2.0  # ms


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A GPU as torch shows one; the list says which of its functions were called, each as it may be."""
    called: list[str] = []

    def stand_in(name: str, answer: Any) -> Callable[..., Any]:
        signature = inspect.signature(getattr(torch.cuda, name))

        def call(*given: Any, **named: Any) -> Any:
            signature.bind(*given, **named)
            called.append(name)
            return answer

        return call

    for method in ("record", "elapsed_time"):
        real = set(inspect.signature(getattr(torch.cuda.Event, method)).parameters)
        assert set(inspect.signature(getattr(Event, method)).parameters) <= real
    assert "enable_timing" in inspect.signature(torch.cuda.Event).parameters
    answers = {"is_available": True, "synchronize": None, "empty_cache": None, "memory_allocated": 1 << 20}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, stand_in(name, answer))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with OnTheCpu():
        yield called
    baselines._loaded.clear()


@pytest.mark.parametrize("name", ceilings.UNITS)
def test_each_ceiling_is_timed_by_the_gpus_own_clock(gpu: list[str], name: str) -> None:
    low, median, high = ceilings.measure(name, "cuda", SMALL_CARD)
    assert low == median == high  # every run takes 2 ms
    sizes = SMALL_CARD
    expected = {
        "copy": 2 * sizes.buffer / 2e6,
        "read": sizes.buffer / 2e6,
        "fp16 product": 2 * sizes.edge**3 / 2e9,
        "int8 product": 2 * sizes.edge**3 / 2e9,
        "to the device": sizes.transfer / 2e6,
        "to the host": sizes.transfer / 2e6,
        "start and wait": 2000,
    }
    assert median == pytest.approx(expected[name])
    assert {"is_available", "synchronize", "empty_cache"} <= set(gpu)


def test_products_are_of_sizes_that_integer_cores_take() -> None:
    """torch._int_mm on CUDA: more than 16 rows, columns a multiple of 8."""
    for sizes in (SMALL_CARD, ceilings.Sizes()):
        assert sizes.edge > 16
        assert sizes.edge % 8 == 0


def test_encoders_wait_for_the_gpu_in_each_run(gpu: list[str], tmp_path: Path) -> None:
    write_model(tmp_path, "reranker", SIZES)
    assert baselines.load_encoder(tmp_path / "models" / "reranker", "rerank", "cuda") == 1 << 20
    for way in ("device", "host"):
        before = gpu.count("synchronize")
        times = baselines.time_encoder(baselines.EAGER, way, (2, 8), 0.0)
        # On the way to the host the copy itself waits.
        assert gpu.count("synchronize") - before == (len(times) + 3 if way == "device" else 0)
    baselines.free()
    assert gpu[-1] == "empty_cache"
    assert not baselines._loaded


def test_an_llm_waits_for_the_gpu_in_each_step(gpu: list[str], tmp_path: Path) -> None:
    write_model(tmp_path, LLM, SIZES)
    assert baselines.load_llm(tmp_path / "models" / LLM, "cuda") == 1 << 20
    assert min(baselines.time_prompt(baselines.EAGER, 16, 0.0)) > 0
    for way, waits in (("device", 6), ("host", 0)):
        before = gpu.count("synchronize")
        assert len(baselines.time_decode(baselines.EAGER, way, 2, 16, 6)) == 6
        assert gpu.count("synchronize") - before == waits
    assert baselines._modes() == ("reduce-overhead", "default")


def test_modes_of_compilation_are_torchs_own() -> None:
    known = torch._inductor.list_mode_options()
    assert set(baselines._MODES) <= set(known)
    assert known["reduce-overhead"] == {"triton.cudagraphs": True}


def test_a_static_cache_keeps_its_place(tmp_path: Path) -> None:
    """A recorded step reads and writes where it was recorded."""
    write_model(tmp_path, LLM, SIZES)
    baselines.load_llm(tmp_path / "models" / LLM, "cpu")
    lm = baselines._loaded["lm"]
    ids = torch.ones((2, 8), dtype=torch.int64)
    places = []
    try:
        for _ in range(2):
            cache = baselines._static_cache(lm, 2, 16)
            assert int(cache.get_seq_length()) == 0
            with torch.no_grad():
                lm(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            assert int(cache.get_seq_length()) == 8
            places.append([(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers])
    finally:
        baselines.free()
    assert places[0] == places[1]


def test_the_drivers_numbers_are_those_of_its_header() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    names = {
        "COMPUTE_CAPABILITY_MAJOR": nvidia.CAPABILITY_MAJOR,
        "COMPUTE_CAPABILITY_MINOR": nvidia.CAPABILITY_MINOR,
        "MULTIPROCESSOR_COUNT": nvidia.PROCESSORS,
        "CLOCK_RATE": nvidia.CLOCK_KHZ,
        "L2_CACHE_SIZE": nvidia.L2,
    }
    for name, number in names.items():
        found = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        assert int(found) == number, name
