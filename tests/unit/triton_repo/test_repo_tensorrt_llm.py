"""The LLM API behind the scheduler's interface, against a stand-in that gives every prompt back."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llm_tokenizers
import pytest
from repo_fakes import reseal

from triton_repo.runtime.admission import Busy, Limits
from triton_repo.runtime.delivery import Delta
from triton_repo.runtime.generation import GenerationService
from triton_repo.runtime.jobs import Handle, NoText, Request, Written
from triton_repo.runtime.sampling import SamplingParams
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.tensorrt_llm import LlmScheduler
from triton_repo.runtime.texts import BadRequest, EngineFailed

LIBRARY = Path(__file__).parent / "fake_library"
TOKENIZER = llm_tokenizers.byte_level()
SLOTS, CAPACITY, CHUNK = 3, 120, 32
TEXTS = (
    "국수가 정말 맛있어요. 다음에도 다시 주문할게요!",
    "가족👨‍👩‍👧‍👦과 함께 갔어요 ❤️ 🇰🇷",
    "The noodles were good",
)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(LIBRARY))
    monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "")
    monkeypatch.delenv("TLLM_WORKER_USE_SINGLE_PROCESS")
    import tensorrt_llm

    tensorrt_llm.LLM.opened.clear()
    yield tensorrt_llm
    for name in ("tensorrt_llm", "tensorrt_llm.llmapi"):
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a build records: the checkpoint's files, tokenizer and manifest, flat."""
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    serving = {
        "slots": SLOTS,
        "capacity": CAPACITY,
        "chunk": CHUNK,
        "cache_tokens": SLOTS * 128,
        "vocabulary": TOKENIZER.get_vocab_size(),
        "eos_ids": [llm_tokenizers.END],
        "bos_id": 1,
        "chat": {"template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
    }
    return reseal(tmp_path, engine="config.json", target="tensorrt-llm", task="generate", serving=serving)


@pytest.fixture
def serve(library: Any, folder: Path) -> Iterator[Callable[..., GenerationService]]:
    opened: list[GenerationService] = []

    def one(**limits: Any) -> GenerationService:
        opened.append(GenerationService.open(folder, **limits))
        return opened[-1]

    yield one
    for service in opened:
        service.close()


def start(service: GenerationService, **request: Any) -> tuple[Any, list[Delta]]:
    deltas: list[Delta] = []
    return service.submit(request, deltas.append), deltas


def test_the_library_is_opened_as_the_plan_says(
    serve: Callable[..., Any], library: Any, folder: Path
) -> None:
    serve()
    (llm,) = library.LLM.opened
    cache = llm.arguments.pop("kv_cache_config")
    assert llm.arguments == {
        "model": str(folder),
        "max_batch_size": SLOTS,
        "max_input_len": CAPACITY,
        "max_seq_len": CAPACITY,
        "max_num_tokens": CHUNK + SLOTS,
        "enable_chunked_prefill": True,
    }
    assert (cache.max_tokens, cache.free_gpu_memory_fraction) == (SLOTS * 128, 0.9)
    assert os.environ["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1"


@pytest.mark.parametrize("shows_end", [True, False])
def test_texts_come_whole_and_end_by_themselves(
    serve: Callable[..., Any], library: Any, monkeypatch: pytest.MonkeyPatch, shows_end: bool
) -> None:
    """Whether the library gives the end token among the answer's tokens or not."""
    monkeypatch.setattr(library.LLM, "shows_end", shows_end)
    service = serve()
    for text in TEXTS:
        handle, deltas = start(service, text=text)
        assert handle.wait(10)
        assert "".join(delta.text for delta in deltas) == text
        # No piece ends inside a syllable, an emoji or its family: each is a text of its own.
        assert "�" not in "".join(delta.text for delta in deltas)
        assert not any(delta.text.endswith("\u200d") for delta in deltas)
        tokens = [token for delta in deltas for token in delta.token_ids]
        prompt = service.prompt({"text": text})
        assert tokens == [*prompt, *([llm_tokenizers.END] if shows_end else [])]
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
        usage = deltas[-1].usage
        assert usage is not None
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(tokens))
    assert service.snapshot()["requests_total"]["completed"] == len(TEXTS)


def test_ends_that_a_request_asks_for(serve: Callable[..., Any]) -> None:
    service = serve()
    text = TEXTS[0]
    prompt = service.prompt({"text": text})
    (answer,) = service.generate({"text": text, "max_tokens": 4})
    assert (answer.finish_reason, list(answer.token_ids)) == ("length", prompt[:4])
    (answer,) = service.generate({"text": text, "stop": ["다시 주"]})
    assert (answer.finish_reason, answer.text) == ("stop", "국수가 정말 맛있어요. 다음에도 ")
    (answer,) = service.generate({"text": text, "stop_token_ids": [prompt[5]]})
    assert (answer.finish_reason, list(answer.token_ids)) == ("stop", prompt[:6])
    (answer,) = service.generate({"text": "good", "ignore_eos": True, "max_tokens": 9})
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 9)
    (answer,) = service.generate({"messages": [{"role": "user", "content": "good"}], "max_tokens": 500})
    assert answer.text == "good"
    full = service.generate({"text": "good " * 50, "ignore_eos": True, "max_tokens": 500})[0]
    assert full.finish_reason == "length"
    assert full.usage["prompt_tokens"] + len(full.token_ids) == CAPACITY


def test_a_stop_string_ends_the_library_s_work_too(serve: Callable[..., Any], library: Any) -> None:
    service = serve()
    handle, _ = start(service, text="good", stop=["oo"], ignore_eos=True, max_tokens=100)
    assert handle.wait(10)
    library.wait_until(lambda: library.LLM.opened[0].aborted == 1)
    library.wait_until(lambda: service.snapshot()["llm_slots_active"] == 0)


def test_sampling_is_passed_on_or_left_out(serve: Callable[..., Any], library: Any) -> None:
    service = serve()
    service.generate({"text": "good", "top_k": 5})
    service.generate({"text": "good", "temperature": 1.0})
    answers = service.generate({"text": TEXTS[2], "temperature": 0.7, "top_k": 5, "top_p": 0.9, "n": 3})
    greedy, plain, *drawn = library.LLM.opened[0].params
    assert (plain.temperature, plain.top_k, plain.top_p) == (1.0, None, 1.0)
    assert (greedy.temperature, greedy.top_k, greedy.top_p) == (None, None, None)
    assert len(answers) == len(drawn) == 3
    assert {(params.temperature, params.top_k, params.top_p) for params in drawn} == {(0.7, 5, 0.9)}
    assert len({params.seed for params in drawn}) == 3, "samples of one request must differ"
    assert all(TEXTS[2].endswith(answer.text) for answer in answers)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("seed", 7, "one generator"),
        ("min_p", 0.1, "ignores it"),
        ("repetition_penalty", 1.2, "ignores it"),
        ("logprobs", True, "which distribution"),
    ],
)
def test_what_the_library_would_ignore_is_refused(
    serve: Callable[..., Any], field: str, value: Any, why: str
) -> None:
    service = serve()
    with pytest.raises(BadRequest, match=f"'{field}'.*TensorRT-LLM 1.2.*{why}"):
        service.generate({"text": "good", field: value})
    assert service.snapshot()["rejections_total"]["bad_input"] == 1


def test_bad_requests(serve: Callable[..., Any]) -> None:
    service = serve()
    for request, message in (
        ({"text": "good", "n": 4}, "3 slots"),
        ({"text": "good " * 200}, r"the prompt has .* tokens; a slot of this model holds 120"),
        ({"text": "good", "max_tokens": 0}, "max_tokens"),
        ({"text": "good", "stop_token_ids": [9999]}, "stop_token_ids"),
    ):
        with pytest.raises(BadRequest, match=message):
            service.generate(request)
    exact = "good" + "!" * 200
    while len(service.prompt({"text": exact})) > CAPACITY:
        exact = exact[:-1]
    with pytest.raises(BadRequest, match="120 tokens and fills the slot"):
        service.generate({"text": exact})


def test_more_requests_than_slots_wait_in_turn(serve: Callable[..., Any], library: Any) -> None:
    service = serve()
    order: list[int] = []
    done = threading.Event()

    def note(number: int) -> Callable[[Delta], None]:
        def hear(delta: Delta) -> None:
            if delta.usage is not None:
                order.append(number)
                if len(order) == 12:
                    done.set()

        return hear

    for number in range(12):
        service.submit({"text": TEXTS[2], "n": 1 + number % 3}, note(number))
    assert done.wait(20)
    assert library.LLM.opened[0].most_running == SLOTS
    assert [number for number in order if number % 3 == 2] == [2, 5, 8, 11]
    library.wait_until(lambda: service.snapshot()["llm_slots_active"] == 0)
    found = service.snapshot()
    assert (found["queue_requests"], found["llm_cache_tokens"]) == (0, 0)
    assert found["requests_total"]["completed"] == 12
    prompt = len(service.prompt({"text": TEXTS[2]}))
    assert found["llm_prompt_tokens_total"] == 12 * prompt
    assert found["llm_generated_tokens_total"] == 24 * (prompt + 1)


def test_a_full_queue_and_a_long_wait(serve: Callable[..., Any]) -> None:
    service = serve(limits=Limits(max_size=1))
    long = {"text": "good", "ignore_eos": True, "max_tokens": 100, "n": SLOTS}
    slow = [start(service, **long)]
    deadline = time.monotonic() + 5
    while service.snapshot()["llm_slots_active"] < SLOTS and time.monotonic() < deadline:
        time.sleep(0.001)
    deltas: list[Delta] = []
    late = service.submit({"text": "good"}, deltas.append, timeout_s=0.01)
    with pytest.raises(Busy, match="the queue is full: 1 requests"):
        start(service, text="good")
    assert late.wait(5)
    assert isinstance(deltas[-1].error, Busy)
    assert "the request's own timeout is 10 ms" in str(deltas[-1].error)
    assert slow[0][0].wait(20)
    found = service.snapshot()
    assert (found["rejections_total"]["expired"], found["rejections_total"]["queue_full"]) == (1, 1)
    assert found["requests_total"] == {"completed": 1, "failed": 0, "cancelled": 0, "rejected": 2}


def test_a_request_s_time_runs_from_its_arrival(serve: Callable[..., Any], library: Any) -> None:
    service = serve(limits=Limits(deadline_s=30.0))
    running, _ = start(service, text="good", ignore_eos=True, max_tokens=100, n=SLOTS)
    library.wait_until(lambda: service.snapshot()["llm_slots_active"] == SLOTS)
    long_ago = time.monotonic() - 20
    with pytest.raises(Busy, match="the wait is too long"):
        service.check(0, 30.0, long_ago)
    with pytest.raises(Busy, match="the wait is too long"):
        service.submit({"text": "good"}, [].append, arrived=long_ago)
    deltas: list[Delta] = []
    assert service.submit({"text": "good"}, deltas.append, arrived=time.monotonic() - 5).wait(20)
    assert deltas[-1].usage is not None
    assert deltas[-1].usage["queue_ms"] >= 5000
    assert running.wait(20)
    assert service.snapshot()["rejections_total"]["deadline"] == 1, "a check counts nothing"


def test_how_long_answers_take_is_learned_from_those_that_were_whole(
    serve: Callable[..., Any], library: Any
) -> None:
    service = serve()
    queue = service._scheduler._queue
    running, deltas = start(service, text="good", ignore_eos=True, max_tokens=100)
    library.wait_until(lambda: deltas)
    running.cancel()
    assert running.wait(5)
    assert queue.seconds_for(1.0) == math.inf
    began = time.monotonic()
    for _ in range(4):
        assert start(service, text="good", ignore_eos=True, max_tokens=20)[0].wait(20)
    each = (time.monotonic() - began) / 4
    assert 0 < queue.seconds_for(float(SLOTS)) <= each


class Stuck:
    """An engine with one slot and no end of an answer."""

    slots, capacity, vocabulary = 1, 64, 100
    llm = SimpleNamespace(shutdown=lambda: None)
    finished = False

    def check(self, params: SamplingParams) -> None:
        pass

    def generate(self, request: Request, prompt: list[int], limit: int) -> Stuck:
        return self

    def abort(self) -> None:
        pass

    def __aiter__(self) -> Stuck:
        return self

    async def __anext__(self) -> None:
        await asyncio.sleep(60)


@pytest.fixture
def stuck() -> Iterator[LlmScheduler]:
    engine: Any = Stuck()
    scheduler = LlmScheduler(engine, limits=Limits(deadline_s=0.5))
    scheduler.start()
    yield scheduler
    scheduler.close()


def ask(scheduler: LlmScheduler) -> Handle:
    return scheduler.submit(Request([1, 2], SamplingParams(max_tokens=4), lambda delta: None))


def test_those_that_wait_long_are_looked_at_now_and_then(
    stuck: LlmScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    begin = stuck._begin

    def counted(gave_up: Any = None) -> None:
        looks.append(time.monotonic())
        begin(gave_up)

    monkeypatch.setattr(stuck, "_begin", counted)
    running, *waiting = [ask(stuck) for _ in range(6)]
    for handle in waiting:
        assert handle.wait(5)
    assert stuck.snapshot()["rejections_total"]["expired"] == 5
    assert len(looks) <= 6 + 0.5 / 0.05 + 2, "a look for each that came, then by one timer"
    running.cancel()


def test_who_leaves_before_its_first_step_is_kept_nowhere(stuck: LlmScheduler) -> None:
    stuck._loop.call_soon_threadsafe(time.sleep, 0.1)  # so that all of it waits for one turn of the loop
    for _ in range(3):
        ask(stuck).cancel()
    deadline = time.monotonic() + 5
    while stuck.snapshot()["requests_total"]["cancelled"] < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), stuck._loop).result(5)
    assert (stuck._tasks, stuck._free) == ({}, 1)


def test_cancelling_wherever_a_request_is(serve: Callable[..., Any], library: Any) -> None:
    service = serve()
    long = {"text": "good", "ignore_eos": True, "max_tokens": 100}
    running = [start(service, **long) for _ in range(SLOTS)]
    waiting = [start(service, **long, n=2), start(service, text="good")]
    at_once, at_once_deltas = start(service, **long)
    at_once.cancel()
    library.wait_until(lambda: all(deltas for _, deltas in running))
    waiting[0][0].cancel()
    running[0][0].cancel()
    running[0][0].cancel()
    for handle, deltas in (running[0], waiting[0], (at_once, at_once_deltas)):
        assert handle.wait(5)
        assert deltas[-1].finish_reason == "cancelled"
        assert [delta for delta in deltas if delta.usage] == deltas[-1:]
    assert len(waiting[0][1]) == 2, "one end for each sample"
    assert waiting[1][0].wait(5), "the slot that became free goes to the next"
    assert waiting[1][1][-1].finish_reason == "stop"
    assert all(handle.wait(10) for handle, _ in running)
    assert library.LLM.opened[0].aborted == 1
    library.wait_until(lambda: service.snapshot()["llm_slots_active"] == 0)
    found = service.snapshot()
    assert (found["queue_requests"], found["requests_total"]["cancelled"]) == (0, 3)


def test_a_consumer_that_breaks_is_a_request_cancelled(serve: Callable[..., Any], library: Any) -> None:
    service = serve()

    def broken(delta: Delta) -> None:
        raise ConnectionError

    service.submit({"text": "good", "ignore_eos": True, "max_tokens": 100}, broken)
    library.wait_until(lambda: service.snapshot()["requests_total"]["cancelled"] == 1)


def test_an_engine_that_breaks_ends_that_request_alone(serve: Callable[..., Any], library: Any) -> None:
    service = serve()
    assert library.BREAKS in service.prompt({"text": "정말<unk>"})
    handle, deltas = start(service, text="정말<unk>정말", n=2)
    assert handle.wait(5)
    assert isinstance(deltas[-1].error, EngineFailed)
    assert "illegal memory access" in str(deltas[-1].error)
    assert deltas[-1].usage is not None
    assert service.generate({"text": "good"})[0].text == "good"
    library.wait_until(lambda: service.snapshot()["llm_slots_active"] == 0)
    assert service.snapshot()["requests_total"]["failed"] == 1


def test_unloading_ends_what_runs_and_waits(serve: Callable[..., Any]) -> None:
    service = serve()
    long = {"text": "good", "ignore_eos": True, "max_tokens": 100}
    started = [start(service, **long) for _ in range(SLOTS + 2)]
    service.close()
    for handle, _ in started:
        assert handle.wait(5)
    ends = [deltas[-1] for _, deltas in started]
    assert [end.finish_reason for end in ends] == ["cancelled"] * SLOTS + ["error"] * 2
    assert {str(end.error) for end in ends[SLOTS:]} == {"the model is being unloaded"}
    with pytest.raises(Busy, match="unloaded"):
        service.generate({"text": "good"})


def test_folders_that_are_refused(library: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(EngineRefused, match="altered after the build"):
        GenerationService.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(EngineRefused, match="missing"):
        GenerationService.open(folder)
    reseal(folder, engine="config.json")
    with pytest.raises(EngineRefused, match=r"TensorRT-LLM refuses it: .*no safetensors"):
        GenerationService.open(folder)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(EngineRefused, match="TensorRT-LLM cannot be imported"):
        GenerationService.open(folder)


def test_whatever_comes_every_request_ends_once_and_no_slot_is_lost(
    serve: Callable[..., Any], library: Any
) -> None:
    service = serve(limits=Limits(max_size=1000, deadline_s=300))
    dice = random.Random(5)
    started: list[tuple[Any, list[Delta], int]] = []
    for number in range(150):
        samples = dice.choice([1, 1, 2, 3])
        text = dice.choice([*TEXTS, "정말<unk>정말"])
        request = {"text": text, "n": samples, "ignore_eos": dice.random() < 0.3, "max_tokens": 20}
        handle, deltas = start(service, **request)
        started.append((handle, deltas, samples))
        if dice.random() < 0.4:
            threading.Timer(dice.random() * 0.3, handle.cancel).start()
        if number % 10 == 0:
            time.sleep(0.02)
    for handle, deltas, samples in started:
        assert handle.wait(60)
        ends = [delta.index for delta in deltas if delta.finish_reason]
        assert sorted(ends) == list(range(samples))
        assert [delta for delta in deltas if delta.usage] == deltas[-1:]
    library.wait_until(lambda: service.snapshot()["llm_slots_active"] == 0)
    found = service.snapshot()
    assert (found["queue_requests"], sum(found["requests_total"].values())) == (0, 150)
    assert library.LLM.opened[0].most_running == SLOTS


def test_a_step_that_arrives_behind_the_end_is_dropped(serve: Callable[..., Any], library: Any) -> None:
    """A task hears of its cancellation one turn of the event loop later than the client."""
    service = serve()
    handle, deltas = start(service, text="good", ignore_eos=True, max_tokens=100)
    library.wait_until(lambda: deltas)
    scheduler, job = service._scheduler, handle._job
    late = Written(job, 0, NoText(), 100)

    async def end_and_go_on() -> bool:
        scheduler._stop(job)
        return bool(scheduler._accept(late, library.CompletionOutput(0, token_ids=[5], finish_reason="stop")))

    assert asyncio.run_coroutine_threadsafe(end_and_go_on(), scheduler._loop).result(5)
    assert handle.wait(5)
    assert deltas[-1].finish_reason == "cancelled"
    assert service.snapshot()["requests_total"]["completed"] == 0
    assert service.snapshot()["llm_slots_active"] == 0
