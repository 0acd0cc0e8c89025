"""Both clients over a fake transport: answers, order, splitting, variants, checks before sending."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from client import AsyncClient, Client, ClientError, InvalidInput, UnexpectedAnswer, UnknownModel

Call = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]


@pytest.fixture(params=["sync", "asyncio"])
def server(request: pytest.FixtureRequest, transport: Any, async_transport: Any) -> Any:
    return transport if request.param == "sync" else async_transport


@pytest.fixture
def call(server: Any, transport: Any, clock: Any) -> Any:
    """Calls a method of whichever client the server belongs to; the same tests hold for both."""

    def do(method: str, *arguments: Any, **options: Any) -> Any:
        if server is transport:
            with Client(transport=server, clock=clock) as client:
                return getattr(client, method)(*arguments, **options)

        async def go() -> Any:
            async with AsyncClient(transport=server, clock=clock) as client:
                return await getattr(client, method)(*arguments, **options)

        return asyncio.run(go())

    return do


def test_one_text_gives_one_answer_and_a_list_gives_a_list(call: Any) -> None:
    one = call("classify", "good soup")
    assert (one.label, one.score, one.truncated) == ("positive", 0.75, False)
    assert one.scores == {"positive": 0.75, "negative": 0.25}
    assert [answer.label for answer in call("classify", ["good", "bad"])] == ["positive", "negative"]
    assert call("classify", []) == []


def test_long_lists_are_split_to_the_models_batch_and_keep_their_order(call: Any, server: Any) -> None:
    texts = ["x" * n for n in range(1, 12)]
    answers = call("embed", texts)
    assert [int(answer.vector[0]) for answer in answers] == list(range(1, 12))
    assert sorted(request.inputs["text"].shape[0] for request in server.requests) == [3, 4, 4]


def test_a_vector_is_its_own_writable_float32_array(call: Any) -> None:
    vector = call("embed", "abc").vector
    assert vector.dtype == np.float32
    assert vector.flags.writeable
    assert vector.base is None


def test_rerank_scores_a_long_list_in_parts_and_sorts_it_as_a_whole(call: Any, server: Any) -> None:
    passages = ["xx", "xxxxx", "x", "xxxx", "xxx", "y"]
    ranked = call("rerank", "query", passages)
    assert [(answer.index, answer.passage) for answer in ranked][:2] == [(1, "xxxxx"), (3, "xxxx")]
    assert [answer.index for answer in ranked][-2:] == [2, 5]  # equal scores keep their order
    assert sorted(request.inputs["passages"].shape for request in server.requests) == [(1, 2), (1, 4)]
    assert all(request.inputs["query"].shape == (1, 1) for request in server.requests)


def test_precision_picks_the_variant_and_the_first_one_is_the_plain_name(call: Any, server: Any) -> None:
    call("classify", "a", model="sentiment", precision="int8")
    call("classify", "a", model="sentiment", precision="fp16")
    call("classify", "a", precision="fp16")
    assert [r.model for r in server.requests] == ["sentiment", "sentiment-fp16", "sentiment-fp16"]
    with pytest.raises(UnknownModel, match="no fp8 variant"):
        call("classify", "a", precision="fp8")


def test_a_model_is_found_by_task_only_when_there_is_one(call: Any, server: Any) -> None:
    server.configs["mood"] = {"config": {**server.configs["sentiment"]["config"], "name": "mood"}}
    with pytest.raises(UnknownModel, match="mood, sentiment"):
        call("classify", "a")
    del server.configs["reranker"]
    with pytest.raises(UnknownModel, match="can rerank"):
        call("rerank", "a", ["b"])


def test_configurations_are_asked_once_per_client(transport: Any, clock: Any) -> None:
    with Client(transport=transport, clock=clock) as client:
        for _ in range(3):
            client.embed("a", model="embedder")
    assert transport.questions == [("config", "embedder")]
    assert transport.closed


def test_a_rejected_request_makes_the_client_ask_again(transport: Any, clock: Any) -> None:
    with Client(transport=transport, clock=clock) as client:
        client.embed("a", model="embedder")
        transport.script.append(InvalidInput("batch-size must be <= 2"))
        with pytest.raises(InvalidInput):
            client.embed("a", model="embedder")
        client.embed("a", model="embedder")
    assert transport.questions == [("config", "embedder")] * 2


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("classify", (["a", 3],), "text 1 must be str, not int"),
        ("classify", (["a", b"b"],), "text 1 must be str, not bytes"),
        ("classify", (b"a",), "not bytes"),
        ("classify", (None,), "not NoneType"),
        ("embed", ("",), "text 0 is empty"),
        ("embed", (["a", " \n"],), "text 1 is empty"),
        ("embed", ("ab\udc80",), "surrogate '\\\\udc80' at character 2"),
        ("rerank", ("", ["a"]), "query is empty"),
        ("rerank", ("q", []), "no passages"),
        ("rerank", ("q", "abc"), "list of passages, not str"),
        ("rerank", ("q", ["a", ""]), "passage 1 is empty"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    call: Any, server: Any, method: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(method, *arguments)
    assert not server.requests


@pytest.mark.parametrize(
    "options",
    [
        {"priority": -1},
        {"priority": True},
        {"model": ""},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"request_id": "two words"},
        {"request_id": "line\nbreak"},
        {"request_id": "x" * 101},
    ],
)
def test_bad_options_are_refused(call: Any, server: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        call("embed", "a", **options)
    assert not server.requests


def test_an_unknown_option_names_the_known_ones(call: Any) -> None:
    with pytest.raises(TypeError, match=r"unknown option modl; known: model, precision"):
        call("embed", "a", modl="embedder")


def test_a_model_for_another_task_is_refused(call: Any, server: Any) -> None:
    with pytest.raises(InvalidInput, match="task is embed, not classify"):
        call("classify", "a", model="embedder")
    server.configs["embedder"]["config"]["output"].pop()
    with pytest.raises(InvalidInput, match="it lacks truncated"):
        call("embed", "a", model="embedder")


def test_request_ids_and_priority_go_along(call: Any, server: Any) -> None:
    call("embed", ["a"] * 5, request_id="mine", priority=2)
    assert sorted(request.request_id for request in server.requests) == ["mine/0", "mine/1"]
    assert {request.priority for request in server.requests} == {2}
    call("embed", "a")
    call("embed", "a")
    first, second = (request.request_id for request in server.requests[-2:])
    assert first != second
    assert re.fullmatch("[0-9a-f]{12}", first)


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"embedding": np.zeros((2, 3), np.float32), "truncated": np.zeros((2, 1), bool)},
        {"embedding": np.zeros((1,), np.float32), "truncated": np.zeros((1, 1), bool)},
    ],
)
def test_an_answer_that_breaks_the_promise_is_an_error(
    call: Any, server: Any, outputs: dict[str, Any]
) -> None:
    server.replies = lambda request: outputs
    with pytest.raises(UnexpectedAnswer) as caught:
        call("embed", "a", request_id="r7")
    assert (caught.value.model, caught.value.request_id) == ("embedder", "r7")


def test_too_few_scores_are_never_matched_with_the_wrong_passages(call: Any, server: Any) -> None:
    server.replies = lambda request: {
        "scores": np.zeros((1, 1), np.float32),
        "truncated": np.zeros((1, 1), bool),
    }
    with pytest.raises(UnexpectedAnswer, match="2 passages were sent"):
        call("rerank", "q", ["a", "b"])


def test_the_first_failure_of_a_split_list_is_raised_with_its_part(call: Any, server: Any) -> None:
    server.script.append(InvalidInput("text 1 is too long"))
    with pytest.raises(
        InvalidInput, match=r"text 1 is too long \[counted within items \d+ to \d+ of the list\]"
    ):
        call("embed", ["a"] * 11)


def test_a_closed_client_says_so(transport: Any) -> None:
    client = Client(transport=transport)
    client.close()
    with pytest.raises(ClientError, match="closed"):
        client.embed("a")


def test_status_lists_models_without_statistics_too(call: Any) -> None:
    status = call("status")
    assert (status.server, status.version, len(status.models)) == ("triton", "2.51.0", 4)
    assert status.models[0].mean_batch_size is None


@pytest.mark.parametrize(("method", "arguments"), [("embed", ("abc",)), ("rerank", ("q", ["abc", "d"]))])
def test_a_failure_replayed_from_the_cache_is_asked_for_again(
    call: Any, server: Any, method: str, arguments: tuple[Any, ...]
) -> None:
    """The cache answers a request that failed before with a success without outputs."""
    model = {"embed": "embedder", "rerank": "reranker"}[method]
    server.configs[model]["config"]["response_cache"] = {"enable": True}
    seen: list[bytes] = []

    def cache(request: Any) -> dict[str, Any]:
        text = request.inputs["passages" if method == "rerank" else "text"].flat[-1]
        seen.append(text)
        if len(seen) == 1:
            return {}
        raise InvalidInput("the real reason")

    server.replies = cache
    with pytest.raises(InvalidInput, match="the real reason"):
        call(method, *arguments)
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert seen[0] == seen[1].strip()
