"""Library and command line against a real tritonserver: every transport, every error, the whole bench."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from small_models import LABELS, WORDS, Served

from client import (
    AsyncClient,
    Client,
    ClientError,
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    QueueFull,
    QueueTimeout,
    RetryPolicy,
    UnexpectedAnswer,
    UnknownModel,
    Unreachable,
)
from client.cli import main
from triton_repo.ports import Ports
from triton_repo.server import Server, ServerOptions

pytestmark = pytest.mark.serving

NO_RETRY = RetryPolicy(attempts=1)
MAX_BATCH = 64
ASCII = [word for word in WORDS if word.isascii()]


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, served: Served) -> str:
    return f"{request.param}://{served.server.urls[request.param]}"


@pytest.fixture(params=["sync", "asyncio"])
def call(request: pytest.FixtureRequest, url: str) -> Callable[..., Any]:
    """One call by a client of its own, blocking or awaited, over gRPC or HTTP."""

    def do(method: str, *arguments: Any, **options: Any) -> Any:
        settings = {"retry": options.pop("retry", None)}
        if request.param == "sync":
            with Client(url, **settings) as client:
                return getattr(client, method)(*arguments, **options)

        async def go() -> Any:
            async with AsyncClient(url, **settings) as client:
                return await getattr(client, method)(*arguments, **options)

        return asyncio.run(go())

    return do


def sentences(count: int, seed: int = 3, words: list[str] = WORDS) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(words, k=chosen.choice([1, 4, 9, 30]))) for _ in range(count)]


def test_every_task_answers_over_every_transport(call: Any) -> None:
    one = call("classify", "the noodles were very good")
    assert one.label in LABELS
    assert set(one.scores) == set(LABELS)
    assert one.score == max(one.scores.values())
    assert sum(one.scores.values()) == pytest.approx(1, abs=1e-5)
    assert not one.truncated
    vector = call("embed", "맛있어요", model="vector").vector
    assert vector.shape == (32,)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    passages = sentences(5)
    ranked = call("rerank", "noodles", passages)
    assert [answer.score for answer in ranked] == sorted((a.score for a in ranked), reverse=True)
    assert all(answer.passage == passages[answer.index] for answer in ranked)


def test_the_log_tells_id_and_version(call: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "client")
    call("embed", sentences(MAX_BATCH + 1), model="vector", request_id="mine")
    ends = [vars(record) for record in caplog.records if record.name == "client"]
    assert sorted((end["request_id"], end["model_version"], end["texts"]) for end in ends) == [
        ("mine/0", "1", MAX_BATCH),
        ("mine/1", "1", 1),
    ]


def test_a_long_list_comes_back_in_order(call: Any, served: Served) -> None:
    texts = sentences(2 * MAX_BATCH + 7)
    answers = call("embed", texts, model="vector")
    assert len(answers) == len(texts)
    with Client(served.grpc) as client:
        for place in (0, MAX_BATCH - 1, MAX_BATCH, 2 * MAX_BATCH, len(texts) - 1):
            alone = client.embed(texts[place], model="vector")
            np.testing.assert_allclose(answers[place].vector, alone.vector, atol=2e-5)


def test_a_long_ranking_is_the_same_in_parts(served: Served) -> None:
    passages = sentences(MAX_BATCH + 9, seed=5)
    with Client(served.grpc) as client:
        whole = {answer.index: answer.score for answer in client.rerank("noodles", passages)}
        for place in (0, MAX_BATCH, MAX_BATCH + 8):
            alone = client.rerank("noodles", [passages[place]])[0]
            assert whole[place] == pytest.approx(alone.score, abs=2e-5)
    assert sorted(whole) == list(range(len(passages)))


def test_precision_names_the_variant(call: Any) -> None:
    assert call("embed", "good", model="vector", precision="fp32").vector.shape == (32,)
    with pytest.raises(UnknownModel, match="no int8 variant"):
        call("embed", "good", model="vector", precision="int8")


def test_long_texts_are_flagged_or_refused_as_the_model_says(call: Any) -> None:
    assert call("embed", "good " * 20_000, model="vector").truncated
    with pytest.raises(InvalidInput, match="more than 64 tokens") as caught:
        call("embed", "good " * 20_000, model="strict", request_id="r9")
    assert (caught.value.model, caught.value.request_id) == ("strict", "r9")
    answers = call("classify", ["good", "good " * 20_000])
    assert [answer.truncated for answer in answers] == [False, True]


def test_the_same_refusal_is_as_precise_the_second_time(call: Any) -> None:
    """`strict` has a response cache, which replays failures without their reason."""
    text = f"never {time.time_ns()} " * 40
    for _ in range(3):
        with pytest.raises(InvalidInput, match="more than 64 tokens"):
            call("embed", text, model="strict")


def test_unknown_models_and_wrong_tasks(call: Any) -> None:
    with pytest.raises(UnknownModel, match="nope"):
        call("classify", "good", model="nope")
    with pytest.raises(InvalidInput, match="task is embed, not classify"):
        call("classify", "good", model="vector")
    with pytest.raises(UnknownModel, match="narrow, strict, vector"):
        call("embed", "good")


def test_one_bad_text_in_a_split_list_fails_the_call_and_leaves_the_server_well(call: Any) -> None:
    texts = sentences(MAX_BATCH * 2)
    texts[MAX_BATCH + 3] = "good " * 500
    with pytest.raises(InvalidInput, match=r"text 3 .*items 64 to 127 of the list"):
        call("embed", texts, model="strict")
    assert len(call("embed", texts[:MAX_BATCH], model="strict")) == MAX_BATCH


def test_a_deadline_that_has_passed_is_a_deadline(call: Any) -> None:
    with pytest.raises(DeadlineExceeded):
        call("embed", longest_batch(), model="vector", timeout=0.001)
    texts = sentences(600, seed=8)
    # Sent side by side, the parts of the list are a crowd that the server may turn away at once.
    with pytest.raises((DeadlineExceeded, QueueFull)):
        call("embed", texts, model="vector", timeout=0.004)
    assert call("embed", "good", model="vector").vector.shape == (32,)


def test_time_that_runs_out_in_the_queue_is_the_callers(call: Any, url: str) -> None:
    """However it ends, here or there, at no time the server's own deadline (10 s) has passed."""
    seen = set()
    with occupied(url, "vector"):
        for place in range(40):
            try:
                call("embed", sentences(1, seed=place)[0], model="vector", timeout=0.001 + place / 4000)
            except (DeadlineExceeded, Overloaded) as error:
                seen.add(type(error))
    assert DeadlineExceeded in seen
    assert seen <= {DeadlineExceeded, QueueFull}


def test_the_same_client_is_right_after_a_deadline(url: str) -> None:
    """A late answer to the request that timed out must never be taken for the next request's."""
    texts = sentences(64, seed=9)
    with Client(url) as client:
        expected = {text: client.embed(text, model="vector").vector for text in texts}
        for text in texts:
            with contextlib.suppress(DeadlineExceeded):
                client.embed(texts[0], model="vector", timeout=0.0015)
            np.testing.assert_allclose(client.embed(text, model="vector").vector, expected[text], atol=2e-5)


def longest_batch() -> list[str]:
    return [" ".join(random.Random(place).choices(ASCII, k=60)) for place in range(MAX_BATCH)]


@contextlib.contextmanager
def occupied(url: str, model: str) -> Iterator[None]:
    """Three callers with the longest full batches: one runs, one waits, and a crowd meets a full queue.

    Single short texts alone do not do it: a fast machine answers each before the next one arrives.
    """
    done = threading.Event()
    batch = longest_batch()

    def work() -> None:
        with Client(url, retry=NO_RETRY) as client:
            while not done.is_set():
                with contextlib.suppress(QueueFull, QueueTimeout):
                    client.embed(batch, model=model)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=60)


def test_a_full_queue_rejects_and_retrying_gets_through(url: str) -> None:
    """`narrow` lets one request wait; 24 callers at once overrun it while it works on long batches."""
    rejected: list[ClientError] = []
    answered = []

    async def crowd(retry: RetryPolicy) -> None:
        async with AsyncClient(url, retry=retry) as client:
            await client.describe("narrow")
            calls = [client.embed(text, model="narrow") for text in sentences(24)]
            for result in await asyncio.gather(*calls, return_exceptions=True):
                (rejected if isinstance(result, ClientError) else answered).append(result)  # type: ignore[arg-type]

    with occupied(url, "narrow"):
        deadline = time.monotonic() + 20
        while not any(isinstance(error, QueueFull) for error in rejected) and time.monotonic() < deadline:
            asyncio.run(crowd(NO_RETRY))
    assert any(isinstance(error, QueueFull) for error in rejected)
    assert {type(error) for error in rejected} <= {QueueFull, QueueTimeout}
    assert rejected[0].model == "narrow"
    rejected.clear()
    answered.clear()
    asyncio.run(crowd(RetryPolicy(attempts=5000, initial=0.01, maximum=0.05, budget=math.inf)))
    assert (len(answered), rejected) == (24, [])


def test_threads_share_a_client(url: str) -> None:
    texts = sentences(40, seed=11)
    wrong: list[str] = []
    with Client(url) as client:
        expected = [answer.vector for answer in client.embed(texts, model="vector")]

        def work() -> None:
            for place, text in enumerate(texts):
                if not np.allclose(client.embed(text, model="vector").vector, expected[place], atol=2e-5):
                    wrong.append(text)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_the_wrong_port_is_recognised(served: Served) -> None:
    with (
        Client(f"http://{served.grpc}", retry=NO_RETRY) as client,
        pytest.raises(UnexpectedAnswer, match="gRPC"),
    ):
        client.embed("good", model="vector")
    metrics = served.server.urls["metrics"]
    with Client(f"http://{metrics}", retry=NO_RETRY) as client, pytest.raises(ClientError):
        client.embed("good", model="vector")


def test_retrying_bridges_a_restart(one_model: Path) -> None:
    with Server(one_model, ServerOptions(free_ports=True)) as server:
        url, ports = server.urls["grpc"], server.ports
        client = Client(url, timeout=60, retry=RetryPolicy(attempts=200, initial=0.1, maximum=0.2))
        before = client.embed("good").vector
    with Client(url, retry=NO_RETRY) as impatient, pytest.raises(Unreachable):
        impatient.embed("good", model="vector")
    assert isinstance(ports, Ports)
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(client.embed("good").vector))
    waiting.start()
    time.sleep(0.3)
    with Server(one_model, ServerOptions(ports=ports)):
        waiting.join(timeout=60)
    client.close()
    np.testing.assert_allclose(answers[0], before, atol=1e-6)


def settled_status(client: Client) -> dict[str, Any]:
    """The status by model once nothing changes any more: the models send their metrics once a second."""
    status, since = client.status(), time.monotonic()
    while time.monotonic() - since < 1.2:
        time.sleep(0.2)
        last, status = status, client.status()
        if last.models != status.models:
            since = time.monotonic()
    assert status.version
    assert status.metrics_error is None
    return {model.name: model for model in status.models}


def test_status_counts_what_was_asked(url: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_URL_METRICS", served.server.urls["metrics"])
    with Client(url, retry=NO_RETRY) as client:
        before = settled_status(client)
        client.embed(sentences(10, seed=21), model="vector")
        text = f"good {time.time_ns()}"[:40]
        for _ in range(3):
            client.embed(text, model="strict")
        with pytest.raises(InvalidInput):
            client.embed(f"{text} " * 100, model="strict")
        after = settled_status(client)
    assert after["vector"].texts - before["vector"].texts == 10
    assert after["vector"].runs > before["vector"].runs
    assert after["vector"].requests - before["vector"].requests == 1
    assert after["strict"].cache_hits - before["strict"].cache_hits == 2
    assert after["strict"].rejected["bad_input"] - before["strict"].rejected.get("bad_input", 0) == 1
    vector = after["vector"]
    assert (vector.task, vector.precision) == ("embed", "fp32")
    assert vector.mean_batch_size == pytest.approx(vector.texts / vector.runs)
    assert 0 <= vector.queue_ms < vector.request_ms
    assert 0 < vector.request_ms <= vector.p99_ms * 10
    assert vector.resident_bytes > 2**20


@pytest.fixture
def cli(served: Served) -> Callable[..., Any]:
    environment = {
        "ONECARD_URL_GRPC": served.grpc,
        "ONECARD_URL_HTTP": served.http,
        "ONECARD_URL_METRICS": served.server.urls["metrics"],
        "ONECARD_SERVER_PID": str(served.server.pid),
    }

    def invoke(*arguments: str, stdin: str | None = None) -> Any:
        return CliRunner(env=environment).invoke(main, list(arguments), input=stdin)

    return invoke


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_query_commands(cli: Any, protocol: str) -> None:
    result = cli("query", "classify", "very good", "[red]bad", "--json", "--protocol", protocol)
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    assert [answer["text"] for answer in answers] == ["very good", "[red]bad"]
    assert answers[0]["label"] in LABELS
    result = cli(
        "query", "embed", "--model", "vector", "--json", "--protocol", protocol, stdin="good\n\nbad\n"
    )
    assert [len(answer["vector"]) for answer in json.loads(result.stdout)] == [32, 32]
    result = cli("query", "rerank", "noodles", "good noodles", "bad", "--json", "--protocol", protocol)
    assert {answer["index"] for answer in json.loads(result.stdout)} == {0, 1}


def test_query_prints_tables_for_people(cli: Any) -> None:
    result = cli("query", "classify", "[red]bad", "good " * 100)
    assert "[red]bad" in result.stdout
    assert "truncated by the model" in result.stdout
    assert "32" in cli("query", "embed", "a", "--model", "vector").stdout
    assert "passage" in cli("query", "rerank", "a", "b", "c").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["query", "classify", "a", "--model", "nope"], 32, "unknown model"),
        (["query", "embed", "a", "--model", "vector", "--precision", "int4"], 32, "no int4 variant"),
        (["query", "embed", "a"], 32, "name the model"),
        (["query", "embed", "good " * 500, "--model", "strict"], 31, "more than 64 tokens"),
        (["query", "embed", "a", "--model", "label"], 31, "task is classify, not embed"),
    ],
)
def test_failures_are_one_line(cli: Any, arguments: list[str], code: int, message: str) -> None:
    result = cli(*arguments)
    assert result.exit_code == code
    assert message in result.stderr.lower()
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_status_command(cli: Any) -> None:
    models = json.loads(cli("status", "--json").stdout)["models"]
    assert [model["name"] for model in models] == ["label", "narrow", "order", "strict", "vector"]
    table = cli("status", "--protocol", "http").stdout
    assert "narrow" in table
    assert "cannot be read" not in table


def test_bench_refuses_a_server_without_the_model(cli: Any, served: Served, tmp_path: Path) -> None:
    document = json.loads(served.stack_json.read_text())
    document["models"]["vector"]["variants"] = {"fp32": "vector-that-is-not-there"}
    other = tmp_path / "stack.json"
    other.write_text(json.dumps(document))
    result = cli("bench", str(other), "--model", "vector")
    assert result.exit_code == 38
    assert "no model vector-that-is-not-there" in result.stderr


def test_bench_end_to_end(cli: Any, served: Served, tmp_path: Path) -> None:
    """All three tasks, short points: the JSON line, the files, and figures that must agree."""
    for needed in ("torch", "sentence_transformers", "matplotlib"):
        pytest.importorskip(needed)
    models = [word for name in ("label", "vector", "order") for word in ("--model", name)]
    # The little tokenizer's file and its class disagree about Hangul, so the comparison keeps to ASCII.
    document = json.loads(served.stack_json.read_text())
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text, "label": LABELS[0]}) for text in sentences(60, words=ASCII)]
    texts.write_text("\n".join(lines))
    for name in ("label", "vector"):
        document["models"][name]["evaluation"] = str(texts)
    summary = tmp_path / "stack.json"
    summary.write_text(json.dumps(document))
    result = cli("bench", str(summary), "--quick", "--seconds", "0.2", "--output", str(tmp_path), *models)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert document == json.loads((tmp_path / "bench.json").read_text())
    assert "http" not in (tmp_path / "report.html").read_text()
    assert document["machine"]["cores"] >= 1
    assert set(document["models"]) == {"label", "vector", "order"}
    for model in document["models"].values():
        assert set(model["baseline"]) == {"fp32", "bf16"}
        assert all(rate > 0 for speed in model["baseline"].values() for rate in speed.values())
        assert set(model["served"]["fp32"]) == {"1", "8", "32", "64"}
        for point in model["served"]["fp32"].values():
            assert point["per_s"] > 0
            assert 0 < point["p50_ms"] <= point["p90_ms"] <= point["p99_ms"]
        assert set(model["open_loop"]["fp32"]) == {"50", "80"}
        assert model["memory_mb"]["served"]["fp32"] > 10
        assert model["memory_mb"]["baseline"]["fp32"] > 100
        assert 0 <= model["served_padding"]["fp32"] < 1
    # The served engine is the same FP32 graph as the baseline, so the answers must be, too.
    assert document["models"]["vector"]["accuracy"]["fp32"]["min_cosine"] > 0.9999
    assert document["models"]["label"]["accuracy"]["fp32"]["agreement"] == 1
    assert document["models"]["order"]["accuracy"]["fp32"]["spearman"] == 1
