"""A real tritonserver that generates: what is streamed is what is answered, whoever else talks meanwhile."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from small_llm import VOCABULARY, Talk, metrics, post, quiet
from small_models import Served

from triton_repo.runtime.generation import GenerationService

pytestmark = pytest.mark.serving

PROMPTS = [
    "국수가 정말",
    "the noodles",
    "배송이 👩‍🍳 느려요",
    "  spaces",
    "good review",
    "매우",
    "a",
    "맛있어요 정말",
]


@pytest.fixture(scope="module")
def talk(talking: Served) -> Iterator[Talk]:
    client = Talk(talking.grpc)
    yield client
    client.close()


@pytest.fixture(scope="module")
def local(talking: Served) -> Iterator[GenerationService]:
    """The same engine, run in this process."""
    service = GenerationService.open(talking.engines["talk"], threads=1)
    yield service
    service.close()


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def joined(answers: list[dict[str, Any]]) -> tuple[str, list[int]]:
    text = "".join(answer["text"][0] for answer in answers)
    return text, [token for answer in answers for token in answer["token_ids"]]


def test_a_stream_is_the_whole_answer_and_the_engine_s_own(talk: Talk, local: GenerationService) -> None:
    responses = 0
    for prompt in PROMPTS:
        asked = {"text": prompt, "max_tokens": 120, "ignore_eos": True}
        answers = list(talk.stream(**asked))
        whole = talk.whole(**asked)
        expected = local.generate(asked)[0]
        assert joined(answers) == (whole["text"][0], whole["token_ids"])
        assert joined(answers) == (expected.text, list(expected.token_ids))
        responses += len(answers)
        assert [answer["finish_reason"] for answer in answers[:-1]] == [[""]] * (len(answers) - 1)
        assert answers[-1]["finish_reason"] == whole["finish_reason"] == ["length"]
    # An engine this small runs ahead of the wire, and what gathers meanwhile goes out together.
    assert responses > 2 * len(PROMPTS)


def test_concurrent_streams_do_not_mix(talk: Talk, local: GenerationService) -> None:
    """More clients than slots, of different lengths and kinds, arriving when they like."""
    asked = [
        {"text": prompt, "max_tokens": 5 + 13 * place, "ignore_eos": True, "temperature": 0.5 * (place % 3)}
        | {"seed": place}
        for place, prompt in enumerate(PROMPTS)
    ]
    expected = [local.generate(request)[0] for request in asked]

    def one(job: int) -> None:
        place = job % len(asked)
        if job % 3 == 2:
            whole = talk.whole(**asked[place])
            assert (whole["text"][0], whole["token_ids"]) == (
                expected[place].text,
                list(expected[place].token_ids),
            )
        else:
            text, tokens = joined(list(talk.stream(**asked[place])))
            assert (text, tokens) == (expected[place].text, list(expected[place].token_ids))

    jobs = list(range(len(asked))) * 6
    random.Random(1).shuffle(jobs)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, jobs))


def test_no_response_breaks_a_character(talk: Talk) -> None:
    """The model's tokens are bytes, most of them parts of characters; a broken one would be another text."""
    for seed in range(4):
        asked = {"text": "국", "max_tokens": 80, "temperature": 1.5, "seed": seed, "ignore_eos": True}
        answers = list(talk.stream(**asked))
        assert joined(answers)[0] == talk.whole(**asked)["text"][0]
        # Every response was valid UTF-8 already (it was decoded); nor does one begin inside a cluster.
        assert not [answer for answer in answers if answer["text"][0][:1] in ("\u200d", "\ufe0f")]


def test_the_last_response_has_the_usage_and_no_other(talk: Talk) -> None:
    answers = list(talk.stream(text="the noodles were", max_tokens=7, ignore_eos=True))
    assert all(answer["usage"] is None for answer in answers[:-1])
    usage = answers[-1]["usage"]
    assert usage["completion_tokens"] == len(joined(answers)[1]) == 7
    assert usage["prompt_tokens"] > 2
    assert usage["total_ms"] >= usage["prefill_ms"] > 0
    assert set(usage) == {
        "prompt_tokens",
        "completion_tokens",
        "cached_tokens",
        "queue_ms",
        "prefill_ms",
        "total_ms",
    }


def test_samples_of_one_prompt_share_it(talk: Talk) -> None:
    asked = {"text": "good " * 30, "max_tokens": 12, "n": 3, "temperature": 1.0, "seed": 5, "logprobs": True}
    whole = talk.whole(**asked)
    assert whole["index"] == [0, 1, 2]
    assert len(set(whole["text"])) == 3
    assert sum(whole["token_counts"]) == len(whole["token_ids"]) == len(whole["logprobs"])
    assert all(value <= 0 for value in whole["logprobs"])
    assert whole["usage"]["completion_tokens"] == len(whole["token_ids"])
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for answer in talk.stream(**asked):
        assert len(answer["text"]) == len(answer["index"]) == len(answer["token_counts"]) == 1
        streamed[answer["index"][0]] += answer["text"][0]
    assert list(streamed.values()) == whole["text"]
    assert talk.whole(**asked | {"logprobs": False})["logprobs"] == []


def test_a_conversation_s_next_turn_prefills_only_what_is_new(talking: Served, talk: Talk) -> None:
    messages = [{"role": "system", "content": "zz " * 40}]
    before = quiet(talking.server.urls["metrics"], "talk")
    known = prompts = cached = 0
    for turn in range(4):
        messages.append(user(f"turn {turn}: the noodles"))
        whole = talk.whole(messages=messages, max_tokens=9, ignore_eos=True)
        usage = whole["usage"]
        # The last token's logits are wanted, so one known token may be computed again; the answer comes
        # back as text, whose tokens may be others than those that were generated.
        assert usage["cached_tokens"] >= known - 1
        assert usage["cached_tokens"] < usage["prompt_tokens"]
        known = usage["prompt_tokens"]
        prompts, cached = prompts + known, cached + usage["cached_tokens"]
        messages.append({"role": "assistant", "content": whole["text"][0]})
    assert cached > prompts / 2
    after = quiet(talking.server.urls["metrics"], "talk")
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == prompts
    assert after["cached_tokens_total"] - before["cached_tokens_total"] == cached


def test_metrics_tell_slots_cache_and_tokens(talking: Served, talk: Talk) -> None:
    before = quiet(talking.server.urls["metrics"], "talk")
    assert before["slots"] == 4
    assert before["cache_capacity_tokens"] == 4 * 8192
    talk.whole(text="count", max_tokens=30, ignore_eos=True)
    after = quiet(talking.server.urls["metrics"], "talk")
    assert after["generated_tokens_total"] == before["generated_tokens_total"] + 30
    assert after["slots_active"] == after["queue_requests"] == 0
    assert after["requests_total completed"] == before["requests_total completed"] + 1
    assert after["cache_tokens"] > 30
    assert "slots" not in metrics(talking.server.urls["metrics"], "vector")


def test_a_stop_string_never_shows(talk: Talk) -> None:
    asked = {"text": "stop here", "max_tokens": 60, "ignore_eos": True}
    text = talk.text(**asked)
    stop = text[20:23]
    cut = talk.text(**asked, stop=[stop, "never there"])
    assert cut == text[: text.index(stop)]
    assert list(talk.stream(**asked, stop=[stop]))[-1]["finish_reason"] == ["stop"]
    tokens = talk.whole(**asked)["token_ids"]
    ended = talk.whole(**asked, stop_token_ids=[tokens[5]])
    assert ended["token_ids"] == tokens[: tokens.index(tokens[5]) + 1]


def test_http_answers_and_streams_the_same(talking: Served, talk: Talk) -> None:
    asked = {"text": "the noodles", "max_tokens": 24, "ignore_eos": True, "stop": ["§§", "¶¶"], "seed": 3}
    whole = talk.whole(**asked)
    body = {**asked, "stream": False, "id": "a request"}
    status, text = post(talking.http, "/v2/models/talk/generate", body)
    assert status == 200
    answer = json.loads(text)
    # One value stands for a list of one.
    assert (answer["text"], answer["finish_reason"]) == (whole["text"][0], "length")
    assert answer["token_ids"] == whole["token_ids"]
    assert json.loads(answer["usage"])["completion_tokens"] == 24
    status, text = post(talking.http, "/v2/models/talk/generate_stream", asked)
    assert status == 200
    events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
    assert "".join(event["text"] for event in events) == whole["text"][0]
    assert json.loads(events[-1]["usage"])["completion_tokens"] == 24


def test_messages_go_through_the_model_s_template(talking: Served, talk: Talk) -> None:
    messages = [{"role": "system", "content": "짧게"}, user("안녕? 🙂")]
    rendered = "<s><|system|>짧게</s><|user|>안녕? 🙂</s><|assistant|>"
    options = {"max_tokens": 20, "ignore_eos": True}
    by_template = talk.whole(messages=messages, **options)
    assert by_template["token_ids"] == talk.whole(text=rendered, **options)["token_ids"]
    body = {"messages": json.dumps(messages), "stream": False, **options}
    status, text = post(talking.http, "/v2/models/talk/generate", body)
    assert (status, json.loads(text)["token_ids"]) == (200, by_template["token_ids"])


def test_an_encoder_of_the_same_repository_answers_meanwhile(talking: Served, talk: Talk) -> None:
    client = grpc_client.InferenceServerClient(talking.grpc)

    def vector() -> Any:
        made = grpc_client.InferInput("text", [1, 1], "BYTES")
        made.set_data_from_numpy(np.array([[b"the noodles"]], dtype=object))
        return client.infer("vector", [made]).as_numpy("embedding")

    alone = vector()
    asked = {"text": "beside", "max_tokens": 400, "ignore_eos": True}
    expected = talk.text(**asked)
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(talk.text, **asked) for _ in range(2)]
        for _ in range(20):
            np.testing.assert_allclose(vector(), alone, atol=2e-5)
        assert [stream.result() for stream in streams] == [expected, expected]


def test_the_configuration_and_the_summary_name_what_is_served(talking: Served) -> None:
    client = grpc_client.InferenceServerClient(talking.grpc)
    config = client.get_model_config("talk", as_json=True)["config"]
    parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
    expected = {"task": "generate", "slots": "4", "capacity": "8192", "chunk": "64", "precision": "fp32"}
    assert expected.items() <= parameters.items()
    models = json.loads(talking.stack_json.read_text())["models"]
    assert models["talk"]["slots"] == 4
    lines = Path(models["talk"]["evaluation"]).read_text().splitlines()
    assert [json.loads(line)["messages"][0]["role"] for line in lines] == ["user"] * 4
    assert set(models) == {"talk", "tight", "vector"}


def test_every_token_id_is_the_model_s(talk: Talk) -> None:
    whole = talk.whole(text="ids", max_tokens=50, temperature=2.0, seed=1, ignore_eos=True)
    assert all(0 <= token < VOCABULARY for token in whole["token_ids"])
