"""The whole service around an engine that hashes its cache: fields in, text out, bad requests by name."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llm_tokenizers
import numpy as np
import pytest
from hash_engine import HashEngine

from triton_repo.runtime.admission import Busy, Limits
from triton_repo.runtime.delivery import Delta
from triton_repo.runtime.generation import FIELDS, GenerationService
from triton_repo.runtime.scheduler import Scheduler
from triton_repo.runtime.texts import BadRequest, EngineFailed
from triton_repo.runtime.tokenization import TokenizerRefused

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CAPACITY = 160


class ServedHashEngine(HashEngine):
    def __init__(self, vocabulary: int, template: str | None) -> None:
        super().__init__(slots=4, capacity=CAPACITY, chunk=32, vocabulary=vocabulary)
        chat = {"template": template, "bos_token": "<s>", "eos_token": "</s>"}
        serving = {"task": "generate", "eos_ids": [llm_tokenizers.END], "bos_id": 1, "chat": chat}
        self.manifest = {"task": "generate", "serving": serving}


def serve(template: str | None = TEMPLATE, **limits: Any) -> GenerationService:
    tokenizer = llm_tokenizers.byte_level()
    engine = ServedHashEngine(tokenizer.get_vocab_size(), template)
    scheduler = Scheduler(engine, **limits)
    scheduler.start()
    return GenerationService(engine, tokenizer, scheduler)


@pytest.fixture(scope="module")
def shared() -> Iterator[GenerationService]:
    service = serve()
    yield service
    service.close()


TOKENIZER = llm_tokenizers.byte_level()


def streamed(service: GenerationService, **request: Any) -> list[Delta]:
    deltas: list[Delta] = []
    assert service.submit(request, deltas.append).wait(20)
    return deltas


def test_the_stream_is_the_whole_answer_and_what_its_tokens_decode_to(shared: GenerationService) -> None:
    for seed in range(12):
        request = {"text": "국수가 정말", "max_tokens": 40, "temperature": 1.5, "seed": seed, "n": 2}
        deltas = streamed(shared, **request)
        answers = shared.generate(request)
        assert deltas[-1].usage
        assert deltas[-1].usage["completion_tokens"] == sum(len(answer.token_ids) for answer in answers)
        for index, answer in enumerate(answers):
            assert "".join(delta.text for delta in deltas if delta.index == index) == answer.text
            ended = answer.finish_reason == "stop"
            assert (answer.token_ids[-1] == llm_tokenizers.END) == ended
            assert answer.text == TOKENIZER.decode(answer.token_ids)
            assert len(answer.token_ids) == 40 or ended


def test_requests_together_are_answered_as_alone(shared: GenerationService) -> None:
    requests = [
        {"text": f"{word} noodles", "max_tokens": 30, "temperature": 1.0, "seed": number}
        for number, word in enumerate(["good", "bad", "The", "국수가", "정말", "not", "again", "café"] * 3)
    ]
    alone = [shared.generate(request)[0].text for request in requests]
    together: list[list[Delta]] = [[] for _ in requests]
    handles = [
        shared.submit(request, deltas.append) for request, deltas in zip(requests, together, strict=True)
    ]
    assert all(handle.wait(20) for handle in handles)
    assert ["".join(delta.text for delta in deltas) for deltas in together] == alone


def test_special_tokens_are_added_once(shared: GenerationService) -> None:
    plain = TOKENIZER.encode("good", add_special_tokens=False).ids
    assert shared.prompt({"text": "good"}) == [1, *plain]
    assert shared.prompt({"text": "<s>good"}) == [1, *plain]
    messages = [{"role": "user", "content": "good"}]
    expected = TOKENIZER.encode("<s>user: good\nassistant:", add_special_tokens=False).ids
    assert expected.count(1) == 1
    for form in (messages, json.dumps(messages), json.dumps(messages).encode()):
        assert shared.prompt({"messages": form}) == expected


def test_the_next_turn_finds_the_conversation_in_its_slot() -> None:
    service = serve()
    messages = [{"role": "user", "content": "The noodles were good"}]
    first = service.generate({"messages": messages, "max_tokens": 12, "ignore_eos": True})[0]
    length = len(service.prompt({"messages": messages}))
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "again?"}]
    second = service.generate({"messages": messages, "max_tokens": 4})[0]
    assert second.usage["cached_tokens"] >= length - 1
    other = serve()
    assert other.generate({"messages": messages, "max_tokens": 4})[0].text == second.text
    service.close()
    other.close()


def test_fields_as_a_server_has_them(shared: GenerationService) -> None:
    mine = {"text": "good", "max_tokens": 9, "temperature": 0.5, "seed": 3, "stop": ["zz"], "top_k": 5}
    theirs = {
        "text": b"good",
        "max_tokens": np.array([9], dtype=np.int32),
        "temperature": np.float32(0.5),
        "seed": np.int64(3),
        "stop": np.array([b"zz"], dtype=object),
        "top_k": np.int32(5),
        "stop_token_ids": np.array([], dtype=np.int32),
        "logprobs": np.bool_(False),
        "min_p": None,
    }
    assert shared.generate(mine)[0].token_ids == shared.generate(theirs)[0].token_ids


def test_logprobs_when_asked_for(shared: GenerationService) -> None:
    answer = shared.generate({"text": "good", "max_tokens": 7, "ignore_eos": True, "logprobs": True})[0]
    assert len(answer.logprobs) == len(answer.token_ids) == 7
    assert all(value <= 0 for value in answer.logprobs)
    assert shared.generate({"text": "good", "max_tokens": 7})[0].logprobs == ()


def test_stop_strings_and_stop_ids(shared: GenerationService) -> None:
    request = {"text": "The service", "max_tokens": 60, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    whole = shared.generate(request)[0]
    text = whole.text
    middle = next(place for place in range(12, len(text)) if text[place : place + 3] not in text[: place + 2])
    stop = text[middle : middle + 3]
    answer = shared.generate(request | {"stop": [stop, "never there"]})[0]
    assert (answer.text, answer.finish_reason) == (text[:middle], "stop")
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) < 60
    token = whole.token_ids[20]
    by_id = shared.generate(request | {"stop_token_ids": [token]})[0]
    first = whole.token_ids.index(token)
    assert by_id.token_ids == whole.token_ids[: first + 1]
    assert by_id.text == TOKENIZER.decode(whole.token_ids[:first])


def test_the_end_of_text_can_be_ignored(shared: GenerationService) -> None:
    seeds = range(16)
    request = {"text": "a", "max_tokens": 100, "temperature": 3.0}
    ended = [seed for seed in seeds if shared.generate(request | {"seed": seed})[0].finish_reason == "stop"]
    assert ended
    ignoring = shared.generate(request | {"seed": ended[0], "ignore_eos": True})[0]
    assert len(ignoring.token_ids) == 100
    assert llm_tokenizers.END in ignoring.token_ids


GOOD = {"text": "good"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "give either 'text' or 'messages'"),
        ({"text": "a", "messages": []}, "give only one of 'text' or 'messages'"),
        ({"text": ""}, "'text' is empty"),
        ({"text": 5}, "'text' is a int, not a text"),
        ({"text": b"ok \xff\xfe"}, r"'text' is not valid UTF-8 \(byte 0xff at 3"),
        ({"text": "a\ud800"}, "'text' is not valid Unicode"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [{"role": "system", "content": "a"}] * 2}, "2 system messages"),
        (GOOD | {"max_token": 5}, "unknown field 'max_token'; did you mean 'max_tokens'"),
        (GOOD | {"zzz": 5}, "unknown field 'zzz'; known are text, messages, max_tokens"),
        (GOOD | {"max_tokens": 0}, "'max_tokens' is 0"),
        (GOOD | {"max_tokens": -3}, "'max_tokens' is -3"),
        (GOOD | {"max_tokens": "5"}, "'max_tokens' is '5', not an integer"),
        (GOOD | {"max_tokens": 1.5}, "'max_tokens' is 1.5, not an integer"),
        (GOOD | {"temperature": math.nan}, "'temperature' is nan"),
        (GOOD | {"temperature": np.float32(np.nan)}, "'temperature' is nan"),
        (GOOD | {"temperature": -1}, "'temperature' is -1"),
        (GOOD | {"temperature": True}, "'temperature' is True, not a number"),
        (GOOD | {"logprobs": 1}, "'logprobs' is 1, not true or false"),
        (GOOD | {"stop": "x" * 10_000}, "'stop' has 10000 characters; a stop string has at most 256"),
        (GOOD | {"stop": [b"\xff"]}, "'stop' is not valid UTF-8"),
        (GOOD | {"stop": 5}, "'stop' is 5, not a list"),
        (GOOD | {"stop_token_ids": ["a"]}, "'stop_token_ids' is 'a', not an integer"),
        (GOOD | {"stop_token_ids": 10_000}, "'stop_token_ids' has 10000; the model knows 0 to"),
        (GOOD | {"n": 5}, "'n' is 5; this model has 4 slots"),
    ],
)
def test_bad_requests_are_named_and_others_untouched(
    shared: GenerationService, request_: dict[str, Any], message: str
) -> None:
    running: list[Delta] = []
    refused = shared.snapshot()["rejections_total"]["bad_input"]
    handle = shared.submit({"text": "noodles", "max_tokens": 100, "ignore_eos": True}, running.append)
    with pytest.raises(BadRequest, match=message):
        shared.submit(request_, running.append)
    assert shared.snapshot()["rejections_total"]["bad_input"] == refused + 1
    assert handle.wait(20)
    assert sum(len(delta.token_ids) for delta in running) == 100
    assert running[-1].finish_reason == "length"


def test_prompts_longer_than_a_slot_are_refused_with_both_lengths(shared: GenerationService) -> None:
    text = "noodles were good " * 60
    count = len(TOKENIZER.encode(text).ids)
    assert count > CAPACITY
    with pytest.raises(
        BadRequest, match=f"the prompt has {count} tokens; a slot of this model holds {CAPACITY}"
    ):
        shared.generate({"text": text})
    messages = [{"role": "user", "content": text}]
    count = len(shared.prompt({"messages": messages}))
    with pytest.raises(BadRequest, match=f"the prompt has {count} tokens; .* holds {CAPACITY}"):
        shared.generate({"messages": messages})


def test_a_megabyte_is_refused_without_reading_it_all(
    shared: GenerationService, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    class Counting:
        def encode(self, text: str, **options: Any) -> Any:
            read.append(len(text))
            return TOKENIZER.encode(text, **options)

    monkeypatch.setattr(shared, "_tokenizer", Counting())
    with pytest.raises(BadRequest, match=rf"more than \d+ tokens \(900000 characters\); .* holds {CAPACITY}"):
        shared.generate({"text": "가나다 " * 225_000})
    assert sum(read) <= 32 * CAPACITY


def test_a_model_without_a_template_takes_text_only() -> None:
    service = serve(template=None)
    with pytest.raises(BadRequest, match="no chat template; send 'text'"):
        service.generate({"messages": [{"role": "user", "content": "a"}]})
    assert service.generate({"text": "a", "max_tokens": 3})[0].token_ids
    service.close()


def test_a_consumer_that_hangs_or_vanishes_holds_up_nobody(shared: GenerationService) -> None:
    never = threading.Event()

    def gone(delta: Delta) -> None:
        raise ConnectionResetError

    request = {"text": "bad", "max_tokens": 100, "ignore_eos": True}
    hanging = shared.submit(request, lambda _: never.wait(60))
    vanished = shared.submit(request, gone)
    for _ in range(3):
        assert len(shared.generate(request)[0].token_ids) == 100
    assert vanished.wait(10)
    assert not hanging.wait(0)
    assert shared.snapshot()["llm_slots_active"] == 0
    never.set()
    assert hanging.wait(10)


def test_cancelling_in_the_middle(shared: GenerationService) -> None:
    engine = shared._scheduler._engine
    decode, gate = engine.decode, threading.Event()

    def slowly(*arguments: Any) -> Any:
        gate.wait(0.002)
        return decode(*arguments)

    engine.decode = slowly  # type: ignore[method-assign]
    before = shared.snapshot()["requests_total"]["cancelled"]
    deltas: list[Delta] = []
    some = threading.Event()

    def consumer(delta: Delta) -> None:
        deltas.append(delta)
        some.set()

    handle = shared.submit({"text": "a", "max_tokens": 150, "ignore_eos": True}, consumer)
    assert some.wait(5)
    handle.cancel()
    assert handle.wait(5)
    gate.set()
    del engine.decode  # type: ignore[method-assign]
    assert deltas[-1].finish_reason == "cancelled"
    assert deltas[-1].usage
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert 0 < len(tokens) < 150
    assert "".join(delta.text for delta in deltas) == TOKENIZER.decode(tokens)
    assert shared.snapshot()["requests_total"]["cancelled"] == before + 1


def test_a_broken_engine_is_raised_and_then_forgotten() -> None:
    service = serve()
    engine = service._scheduler._engine
    assert isinstance(engine, HashEngine)
    engine.broken = {1}
    with pytest.raises(EngineFailed, match="device lost"):
        service.generate({"text": "a", "max_tokens": 5, "ignore_eos": True})
    assert len(service.generate({"text": "a", "max_tokens": 5, "ignore_eos": True})[0].token_ids) == 5
    service.close()
    with pytest.raises(Busy, match="unloaded"):
        service.generate({"text": "a"})


def test_opening_a_folder_takes_no_truncation_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = llm_tokenizers.byte_level()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    engine = ServedHashEngine(tokenizer.get_vocab_size(), TEMPLATE)
    opened = {(tmp_path, None, 1): engine}
    monkeypatch.setattr("triton_repo.runtime.engines.open_decoder_engine", lambda *given: opened[given])
    monkeypatch.setattr("triton_repo.runtime.generation.read_manifest", lambda _: {"target": "onnxruntime"})
    service = GenerationService.open(tmp_path, device=1, limits=Limits(max_size=3))
    text = "The noodles were good, the service was not"
    assert service.prompt({"text": text}) == TOKENIZER.encode(text).ids
    assert service.generate({"text": text, "max_tokens": 2})[0].usage["completion_tokens"] == 2
    service.close()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerRefused, match="not a tokenizer file"):
        GenerationService.open(tmp_path, device=1)


def test_every_field_is_known() -> None:
    assert set(FIELDS) == {
        "text",
        "messages",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "n",
        "logprobs",
        "ignore_eos",
    }
