"""A real tritonserver over TensorRT-LLM's LLM API, in whose place a stand-in gives every prompt back."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_llm import Silent, Talk, post, quiet, thrice, write_llm

from build_engines.errors import ServerError
from build_engines.pipeline import build_stack
from build_engines.stack import load_stack
from triton_repo.server import Server, ServerOptions
from triton_repo.writer import seal, write_repository

pytestmark = pytest.mark.serving

LIBRARY = Path(__file__).parents[1] / "unit" / "triton_repo" / "fake_library" / "tensorrt_llm"
SLOTS, CAPACITY = 3, 1024
STACK = f"""
name = "llm"
card = "rtx-5070-ti"

[models.talk]
task = "generate"
target = "tensorrt-llm"
source = "./llama"
slots = {SLOTS}
max_length = {CAPACITY}
[models.talk.queue]
max_size = 1
"""
TEXTS = ["국수가 정말 맛있어요 정말", "배송이 👩‍🍳 느려요", "  spaces  and\nlines ", "the noodles"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    (folder / "llm.toml").write_text(STACK)
    write_llm(folder / "llama", seed=1)
    stack = load_stack(folder / "llm.toml", build_dir=folder)
    build_stack(stack, Silent())
    return write_repository(stack, folder / "engines", folder / "repository")


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    # model.py puts its own folder first on the path, so that is where the library lies.
    whole = repository.with_name("with_library")
    shutil.copytree(repository, whole)
    shutil.copytree(LIBRARY, whole / "talk" / "1" / "tensorrt_llm")
    seal(whole / "talk" / "1")
    with Server(whole, ServerOptions(free_ports=True)) as running:
        yield running


@pytest.fixture
def talk(server: Server) -> Iterator[Talk]:
    client = Talk(server.urls["grpc"])
    yield client
    client.close()


def test_a_stream_is_the_whole_answer_in_whole_characters(talk: Talk) -> None:
    for text in TEXTS:
        answers = list(talk.stream(text=text))
        pieces = [answer["text"][0] for answer in answers]
        assert "".join(pieces) == text
        assert not any(piece.endswith(("�", "\u200d")) for piece in pieces)
        whole = talk.whole(text=text)
        assert whole["text"] == [text]
        assert whole["token_ids"] == [token for answer in answers for token in answer["token_ids"]]
        assert (whole["finish_reason"], whole["logprobs"]) == (["stop"], [])
        assert whole["usage"]["completion_tokens"] == len(whole["token_ids"])
        assert {"prompt_tokens", "cached_tokens", "queue_ms", "prefill_ms", "total_ms"} < whole[
            "usage"
        ].keys()
    asked = talk.whole(messages=[{"role": "user", "content": "정말"}], max_tokens=200)
    assert asked["text"] == ["정말"]


def test_many_talk_at_once(talk: Talk) -> None:
    def ask(number: int) -> bool:
        text = f"{number} {TEXTS[number % len(TEXTS)]}"
        return talk.text(text=text) == text

    with ThreadPoolExecutor(SLOTS + 1) as pool:
        assert all(pool.map(ask, range(24)))


def test_samples_stops_and_lengths(talk: Talk) -> None:
    answer = talk.whole(text="the noodles", n=3, max_tokens=2)
    assert answer["index"] == [0, 1, 2]
    assert answer["token_counts"] == [2, 2, 2]
    assert answer["finish_reason"] == ["length"] * 3
    assert talk.text(text="국수가 정말 맛있어요", stop=["말 맛"]) == "국수가 정"
    full = talk.whole(text="a", ignore_eos=True, max_tokens=CAPACITY * 2)
    assert full["finish_reason"] == ["length"]
    assert full["usage"]["prompt_tokens"] + full["usage"]["completion_tokens"] == CAPACITY


def test_errors_name_the_field_and_end_one_request(talk: Talk, server: Server) -> None:
    assert "'seed' cannot be had from TensorRT-LLM 1.2" in talk.error(text="good", seed=1)
    assert "'logprobs'" in talk.error(text="good", logprobs=True)
    assert "'temperature' is -1" in talk.error(text="good", temperature=-1.0)
    assert "a slot of this model holds" in talk.error(text="가나다" * CAPACITY)
    assert "illegal memory access" in talk.error(text="국수<pad>")
    status, body = post(
        server.urls["http"], "/v2/models/talk/generate", {"text": "a", "seed": 4, "stream": False}
    )
    assert status == 400
    assert "one generator" in json.loads(body)["error"]
    assert talk.text(text="good") == "good"


@thrice
def test_a_cancelled_call_frees_its_slot(talk: Talk, server: Server) -> None:
    before = quiet(server.urls["metrics"], "talk")
    calls = [talk.call(text="a", ignore_eos=True, max_tokens=900) for _ in range(SLOTS)]
    for call in calls:
        next(iter(call))
    waiting = talk.call(text="a")
    time.sleep(0.1)
    assert "the queue is full" in talk.error(text="a")
    calls[0].cancel()
    assert [response.error_message for response in waiting][-1] == ""
    for call in calls[1:]:
        call.cancel()
    after = quiet(server.urls["metrics"], "talk")
    assert after["requests_total cancelled"] - before["requests_total cancelled"] == SLOTS
    assert after["slots_active"] == 0


def test_metrics_count_what_was_done(talk: Talk, server: Server) -> None:
    before = quiet(server.urls["metrics"], "talk")
    answer = talk.whole(text="the noodles")
    after = quiet(server.urls["metrics"], "talk")
    assert after["requests_total completed"] == before["requests_total completed"] + 1
    made = after["generated_tokens_total"] - before["generated_tokens_total"]
    assert made == answer["usage"]["completion_tokens"]
    assert (after["slots"], after["cache_capacity_tokens"]) == (SLOTS, SLOTS * CAPACITY)


def test_without_the_library_the_load_error_says_so(repository: Path, tmp_path: Path) -> None:
    own = shutil.copytree(repository, tmp_path / "repository")
    with pytest.raises(ServerError, match="TensorRT-LLM cannot be imported"):
        Server(own, ServerOptions(free_ports=True)).start()
