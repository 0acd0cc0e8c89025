"""Tensors of a generate request to fields, and deltas back to tensors: nothing lost, nothing guessed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_repo.generators import INPUTS, OUTPUTS
from triton_repo.runtime.delivery import Delta
from triton_repo.runtime.generation import FIELDS, read_params
from triton_repo.runtime.texts import BadRequest, EngineFailed
from triton_repo.runtime.wire import Cancelled, Reply, output_arrays, read_fields

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def raw(*values: str | bytes) -> Any:
    return np.array([value.encode() if isinstance(value, str) else value for value in values], dtype=object)


def one(value: Any, dtype: Any) -> Any:
    return np.array([value], dtype=dtype)


def test_every_input_of_the_config_is_a_field_and_no_other() -> None:
    assert {tensor.name for tensor in INPUTS} == {*FIELDS, "stream"}


def test_every_output_of_the_config_is_written_in_its_type() -> None:
    arrays = output_arrays([Delta(0, "a", (1,), (-0.5,))], None)
    assert list(arrays) == [tensor.name for tensor in OUTPUTS]
    types = {"STRING": "O", "INT32": "int32", "FP32": "float32"}
    assert [array.dtype for array in arrays.values()] == [types[tensor.data_type] for tensor in OUTPUTS]


def test_values_arrive_as_they_were_sent() -> None:
    fields, stream = read_fields(
        {
            "text": raw("맛있어요? 👩‍🍳"),
            "max_tokens": one(7, np.int32),
            "temperature": one(0.7, np.float32),
            "seed": one(-(1 << 63), np.int64),
            "stop": raw("끝", "\n\n"),
            "stop_token_ids": np.array([3], np.int32),
            "logprobs": one(True, np.bool_),
            "stream": one(False, np.bool_),
        }
    )
    assert not stream
    assert fields == {
        "text": "맛있어요? 👩‍🍳".encode(),
        "max_tokens": 7,
        "temperature": 0.7,
        "seed": -(1 << 63),
        "stop": ["끝".encode(), b"\n\n"],
        "stop_token_ids": [3],
        "logprobs": True,
    }
    params = read_params(fields)
    assert (params.max_tokens, params.temperature, params.stop_token_ids) == (7, 0.7, (3,))
    assert params.stop == ("끝", "\n\n")


def test_a_stream_is_the_default() -> None:
    assert read_fields({"text": raw("a")}, "") == ({"text": b"a"}, True)
    parameters = '{"id": "7", "timeout": 5, "onecard_priority": 1}'
    assert read_fields({"text": raw("a")}, parameters) == ({"text": b"a"}, True)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ('{"temprature": 0.5}', "unknown parameter 'temprature'; did you mean 'temperature'?"),
        ('{"strem": true}', "did you mean 'stream'?"),
        ('{"beams": 4}', "'beams'; this model reads text, messages, max_tokens"),
    ],
)
def test_unknown_parameters_are_named(parameters: str, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_fields({"text": raw("a")}, parameters)
    assert message in str(caught.value)


class Sent:
    """What a reply sent: answers, and which of them was final."""

    def __init__(self, *, stream: bool) -> None:
        self.answers: list[Any] = []
        self.final: list[bool] = []
        self.reply = Reply(self._keep, stream=stream)

    def _keep(self, answer: Any, final: bool) -> None:
        self.answers.append(answer)
        self.final.append(final)

    def texts(self, name: str = "text") -> list[list[str]]:
        return [[value.decode() for value in answer[name]] for answer in self.answers]


def test_a_stream_sends_each_delta_and_closes_with_the_usage() -> None:
    sent = Sent(stream=True)
    sent.reply(Delta(0, "가", (5,), (-0.25,)))
    sent.reply(Delta(1, "", (6,), (-0.5,), "stop"))
    sent.reply(Delta(0, "나", (7, 8), (-1.0, -2.0), "length", USAGE))
    assert sent.final == [False, False, True]
    assert sent.texts() == [["가"], [""], ["나"]]
    assert sent.texts("finish_reason") == [[""], ["stop"], ["length"]]
    assert [answer["index"].tolist() for answer in sent.answers] == [[0], [1], [0]]
    assert [answer["token_ids"].tolist() for answer in sent.answers] == [[5], [6], [7, 8]]
    assert [answer["token_counts"].tolist() for answer in sent.answers] == [[1], [1], [2]]
    assert sent.answers[2]["logprobs"].tolist() == [-1.0, -2.0]
    assert sent.texts("usage")[:2] == [[""], [""]]
    assert json.loads(sent.texts("usage")[2][0]) == USAGE


def test_a_whole_answer_has_one_entry_for_each_sample_in_order() -> None:
    sent = Sent(stream=False)
    sent.reply(Delta(1, "b", (2,)))
    sent.reply(Delta(0, "a", (1,)))
    sent.reply(Delta(0, "c", (3,), (), "stop"))
    assert sent.answers == []
    sent.reply(Delta(1, "d", (4, 5), (), "length", USAGE))
    assert sent.final == [True]
    assert sent.texts() == [["ac", "bd"]]
    assert sent.texts("finish_reason") == [["stop", "length"]]
    arrays = sent.answers[0]
    assert arrays["index"].tolist() == [0, 1]
    assert arrays["token_ids"].tolist() == [1, 3, 2, 4, 5]
    assert arrays["token_counts"].tolist() == [2, 3]
    assert arrays["logprobs"].shape == (0,)


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_is_the_last_answer(stream: bool) -> None:
    sent = Sent(stream=stream)
    failure = EngineFailed("out of memory")
    sent.reply(Delta(0, "a", (1,)))
    sent.reply(Delta(0, "held", (), (), "error", None, failure))
    sent.reply(Delta(1, "", (), (), "error", USAGE, failure))
    assert sent.answers[-1] is failure
    assert sent.final == [False] * (len(sent.final) - 1) + [True]
    assert [answer["text"][0] for answer in sent.answers[:-1]] == ([b"a", b"held"] if stream else [])


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_request_says_so(stream: bool) -> None:
    sent = Sent(stream=stream)
    sent.reply(Delta(0, "left", (), (), "cancelled", USAGE))
    assert isinstance(sent.answers[-1], Cancelled)
    assert sent.final[-1]


@given(st.lists(st.tuples(st.integers(0, 3), st.text(max_size=3), st.lists(st.integers(0, 99), max_size=3))))
def test_streamed_and_whole_answers_hold_the_same(parts: list[tuple[int, str, list[int]]]) -> None:
    deltas = [Delta(index, text, tuple(tokens)) for index, text, tokens in parts]
    deltas += [Delta(index, "", (), (), "stop", USAGE if index == 3 else None) for index in range(4)]
    streamed, whole = Sent(stream=True), Sent(stream=False)
    for delta in deltas:
        streamed.reply(delta)
        whole.reply(delta)
    joined = dict.fromkeys(range(4), "")
    for answer in streamed.answers:
        joined[int(answer["index"][0])] += answer["text"][0].decode()
    assert whole.texts() == [list(joined.values())]
