"""A real tritonserver under concurrency: every answer is the engine's own, every bad request fails alone."""

from __future__ import annotations

import json
import random
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from small_models import LABELS, WORDS, Served
from tritonclient.utils import InferenceServerException

from triton_repo.runtime.encode import Encoder

pytestmark = pytest.mark.serving

SECRET = "zebrafish"


@pytest.fixture(scope="module")
def grpc(served: Served) -> Any:
    return grpc_client.InferenceServerClient(served.grpc)


@pytest.fixture(scope="module")
def local(served: Served) -> dict[str, Encoder]:
    """The same engines, run in this process."""
    return {name: Encoder.open(folder, threads=1) for name, folder in served.engines.items()}


def tensor(name: str, values: Any, module: Any = grpc_client) -> Any:
    array = np.asarray(values, dtype=object)
    made = module.InferInput(name, list(array.shape), "BYTES")
    made.set_data_from_numpy(array)
    return made


def raw(texts: list[str] | list[bytes]) -> list[list[bytes]]:
    return [[text.encode() if isinstance(text, str) else text] for text in texts]


def ask(client: Any, model: str, texts: Any, **options: Any) -> Any:
    return client.infer(model, [tensor("text", raw(texts))], **options)


def rank(client: Any, query: str, passages: list[str]) -> Any:
    row = np.array([[p.encode() for p in passages]], dtype=object).reshape(1, len(passages))
    return client.infer("order", [tensor("query", [[query.encode()]]), tensor("passages", row)])


def sentences(count: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.choice([1, 3, 8, 20, 50]))) for _ in range(count)]


def vectors(encoder: Encoder, texts: list[str]) -> Any:
    return np.stack([encoder.encode([row])[0] for row in encoder.tokenizer.singles(texts)])


def test_every_answer_is_right_under_concurrency(grpc: Any, local: dict[str, Encoder]) -> None:
    texts = sentences(192, seed=1)
    expected = vectors(local["vector"], texts)
    batches = [
        texts[start : start + size] for start, size in zip(range(0, 192, 6), [1, 2, 6] * 11, strict=False)
    ]
    starts = list(range(0, 192, 6))

    def one(job: int) -> None:
        got = ask(grpc, "vector", batches[job]).as_numpy("embedding")
        wanted = expected[starts[job] : starts[job] + len(batches[job])]
        np.testing.assert_allclose(got, wanted, atol=2e-5)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, list(range(len(batches))) * 6))
    statistics = grpc.get_inference_statistics("vector").model_stats[0]
    assert statistics.inference_count > statistics.execution_count, "no requests were batched together"


def test_rankings_with_different_numbers_of_passages_share_batches(
    grpc: Any, local: dict[str, Encoder]
) -> None:
    passages = sentences(40, seed=2)
    groups = [(WORDS[size % 7], passages[size : size + size]) for size in (1, 2, 3, 5, 9, 17)]

    def one(index: int) -> None:
        query, own = groups[index % len(groups)]
        scores = rank(grpc, query, own).as_numpy("scores")
        rows = local["order"].tokenizer.pairs([(query, own)])[0]
        wanted = [[float(local["order"].encode([row])[0]) for row in rows]]
        np.testing.assert_allclose(scores, wanted, atol=2e-5)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(72)))


def test_labels_come_best_first(grpc: Any, local: dict[str, Encoder]) -> None:
    texts = sentences(5, seed=3)
    answer = ask(grpc, "label", texts)
    probabilities = vectors(local["label"], texts)
    labels, scores = answer.as_numpy("labels"), answer.as_numpy("scores")
    order = np.argsort(-probabilities, axis=1)
    assert labels.tolist() == [[LABELS[index].encode() for index in row] for row in order]
    np.testing.assert_allclose(scores, np.take_along_axis(probabilities, order, 1), atol=2e-5)


def test_http_answers_the_same(served: Served, grpc: Any) -> None:
    texts = sentences(3, seed=4)
    with http_client.InferenceServerClient(served.http) as client:
        got = client.infer("vector", [tensor("text", raw(texts), http_client)]).as_numpy("embedding")
    np.testing.assert_allclose(got, ask(grpc, "vector", texts).as_numpy("embedding"), atol=2e-5)


def wrong_type(client: Any) -> Any:
    made = grpc_client.InferInput("text", [1, 1], "FP32")
    made.set_data_from_numpy(np.ones((1, 1), np.float32))
    return client.infer("vector", [made])


def wrong_shape(client: Any) -> Any:
    return client.infer("vector", [tensor("text", [[b"a", b"b"]])])


def wrong_input(client: Any) -> Any:
    return client.infer("vector", [tensor("texts", [[b"a"]])])


LONG = "the noodles " * 8334  # 100,000 characters
BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "empty": (lambda c: ask(c, "vector", [b""]), "'text' is empty"),
    "blank": (lambda c: ask(c, "vector", ["good", " \n "]), "'text' 1 is blank"),
    "utf-8": (lambda c: ask(c, "vector", [b"caf\xe9 "]), "'text' is not valid UTF-8 (byte 0xe9 at 3"),
    "refused": (lambda c: ask(c, "strict", [LONG]), "has more than 64 tokens"),
    "huge": (lambda c: ask(c, "vector", [b"a" * 4_000_001]), "4000001 bytes; at most 1000000 characters"),
    "type": (wrong_type, "data-type"),
    "shape": (wrong_shape, "unexpected shape"),
    "input": (wrong_input, "unexpected inference input 'texts'"),
    "model": (lambda c: ask(c, "nobody", ["a"]), "unknown model: 'nobody'"),
    "batch": (lambda c: ask(c, "vector", ["a"] * 65), "must be <= 64"),
    "no passages": (lambda c: rank(c, "a", []), "passages"),
    "blank passage": (lambda c: rank(c, "a", ["b", ""]), "'passages' 1 is empty"),
    "passages": (lambda c: rank(c, "a", ["b"] * 1025), "at most 1024"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_a_precise_error(grpc: Any, case: str) -> None:
    send, message = BAD[case]
    with pytest.raises(InferenceServerException) as caught:
        send(grpc)
    assert message in str(caught.value)
    assert grpc.is_server_ready()


def test_neighbours_of_bad_requests_are_not_affected(grpc: Any, local: dict[str, Encoder]) -> None:
    texts = sentences(24, seed=5)
    expected = vectors(local["vector"], texts)
    bad = [b"", b"\xff", b"  "]

    def one(index: int) -> bool:
        if index % 3 == 2:
            with pytest.raises(InferenceServerException):
                ask(grpc, "vector", [bad[index // 3 % 3]])
            return False
        if index % 10 == 0:
            assert ask(grpc, "vector", [LONG]).as_numpy("truncated").tolist() == [[True]]
            return False
        own = index % 24
        got = ask(grpc, "vector", [texts[own]]).as_numpy("embedding")[0]
        np.testing.assert_allclose(got, expected[own], atol=2e-5)
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(one, range(240))) > 100


def test_a_long_text_is_cut_and_flagged(grpc: Any, local: dict[str, Encoder]) -> None:
    answer = ask(grpc, "vector", [LONG, "good"])
    assert answer.as_numpy("truncated").tolist() == [[True], [False]]
    wanted = vectors(local["vector"], [LONG])[0]
    np.testing.assert_allclose(answer.as_numpy("embedding")[0], wanted, atol=2e-5)
    ranked = rank(grpc, "good", ["noodles", LONG])
    assert ranked.as_numpy("truncated").tolist() == [[False, True]]


def test_a_full_queue_rejects_at_once_and_serves_the_rest(grpc: Any, local: dict[str, Encoder]) -> None:
    texts = sentences(64, seed=6)
    expected = vectors(local["narrow"], texts)

    def one(_: int) -> str:
        try:
            got = ask(grpc, "narrow", texts).as_numpy("embedding")
        except InferenceServerException as error:
            return str(error)
        np.testing.assert_allclose(got, expected, atol=2e-5)
        return ""

    with ThreadPoolExecutor(24) as pool:
        outcomes = list(pool.map(one, range(72)))
    rejected = [outcome for outcome in outcomes if outcome]
    assert rejected
    assert len(rejected) < len(outcomes)
    assert all("UNAVAILABLE] the queue is full: 1 requests are waiting" in outcome for outcome in rejected)


def test_a_lone_client_is_never_left_waiting(grpc: Any) -> None:
    """Half a second in an idle queue is what a queue policy costs in Triton 2.51; there is none here."""

    def seconds(text: str) -> float:
        started = time.perf_counter()
        ask(grpc, "vector", [text])
        return time.perf_counter() - started

    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(seconds, sentences(300, seed=7)))
    assert sum(value > 0.45 for value in taken) <= 2


def test_a_request_may_ask_for_priority_and_a_shorter_timeout(grpc: Any) -> None:
    answer = ask(grpc, "narrow", ["good"], parameters={"onecard_priority": 1}, timeout=1_000_000)
    assert answer.as_numpy("embedding").shape == (1, 32)


def test_a_repeated_request_comes_from_the_cache(grpc: Any) -> None:
    first, second = (ask(grpc, "strict", ["the same noodles again"]) for _ in range(2))
    assert first.as_numpy("embedding").tolist() == second.as_numpy("embedding").tolist()
    assert grpc.get_inference_statistics("strict").model_stats[0].inference_stats.cache_hit.count == 1


def test_truncation_and_padding_are_counted(served: Served, grpc: Any) -> None:
    def counter(name: str) -> float:
        with urllib.request.urlopen(f"http://{served.server.urls['metrics']}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        found = [line for line in lines if line.startswith(f'onecard_{name}_total{{model="label",')]
        return float(found[0].split()[-1])

    before = counter("truncated"), counter("tokens")
    ask(grpc, "label", [LONG, "good"])
    deadline = time.monotonic() + 5
    while counter("truncated") == before[0] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert counter("truncated") == before[0] + 1
    assert counter("tokens") >= before[1] + 64 + 3


def test_the_model_configuration_names_what_is_served(grpc: Any) -> None:
    config = grpc.get_model_config("order", as_json=True)["config"]
    parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
    assert {"task": "rerank", "precision": "fp32", "target": "onnxruntime"}.items() <= parameters.items()


def test_no_text_is_logged(served: Served, grpc: Any) -> None:
    ask(grpc, "vector", [SECRET])
    for text in (f"{SECRET} {LONG}".encode(), SECRET.encode() + b"\xff"):
        with pytest.raises(InferenceServerException) as caught:
            ask(grpc, "strict", [text])
        assert SECRET not in str(caught.value)
    assert SECRET not in served.server.log.read_text(errors="replace")


def test_the_summary_beside_the_repository_is_complete(served: Served) -> None:
    models = json.loads(served.stack_json.read_text())["models"]
    assert set(models) == {"label", "vector", "order", "strict", "narrow"}
    assert all((served.folder / "repository" / name).is_dir() for name in models)
