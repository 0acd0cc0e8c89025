"""What the load's own checks notice: they judge every answer of a run, so they must be able to say no."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from load_figures import Report, trend
from load_generator import ANSWERED, REFUSED, REJECTED, _failure, _judged
from load_work import Expected, Refusal, Shot, Tensors, Tokens
from tritonclient.grpc import service_pb2


def answer(vector: list[float], truncated: bool = False) -> bytes:
    message = service_pb2.ModelInferResponse(model_name="vector")
    message.outputs.add(name="embedding", datatype="FP32", shape=[1, len(vector)])
    message.outputs.add(name="truncated", datatype="BOOL", shape=[1, 1])
    message.raw_output_contents.append(np.array(vector, np.float32).tobytes())
    message.raw_output_contents.append(np.array([truncated]).tobytes())
    made: bytes = message.SerializeToString()
    return made


def shot(expected: Expected) -> Shot:
    return Shot(model="vector", payload=b"", expected=expected)


def test_an_answer_may_differ_by_rounding_only() -> None:
    wanted = Tensors({"embedding": np.array([[0.5, -0.5]], np.float32), "truncated": np.array([[False]])})
    assert wanted.fault(answer([0.5, -0.5])) == ""
    assert wanted.fault(answer([0.5005, -0.5])) == ""
    assert "off by 0.002" in wanted.fault(answer([0.502, -0.5]))
    assert "off by nan" in wanted.fault(answer([float("nan"), -0.5]))
    assert "truncated differs" in wanted.fault(answer([0.5, -0.5], truncated=True))
    assert "(1, 1), not (1, 2)" in wanted.fault(answer([0.5]))


def test_a_stream_must_have_all_of_its_tokens_unless_it_was_left() -> None:
    assert Tokens((4, 5, 6)).fault([4, 5, 6]) == ""
    assert Tokens((4, 5, 6)).fault([4, 5]) == "2 tokens came of 3"
    assert Tokens((4, 5, 6)).fault([4, 9, 6]) == "token 1 of 3 is another"
    assert Tokens((4, 5, 6)).fault([4, 5, 6, 7]) == "token 3 of 3 is another"
    assert Tokens((4, 5, 6), whole=False).fault([4, 5]) == ""
    assert Tokens((4, 5, 6), whole=False).fault([4, 6]) == "token 1 of 3 is another"


def test_only_a_retryable_error_counts_as_a_rejection() -> None:
    good = shot(Tokens((1,)))
    told = "the queue is full: 64 requests are waiting; try again later"
    assert _failure(good, "UNAVAILABLE", told) == f"{REJECTED}the queue is full"
    assert _failure(good, "INTERNAL", told).startswith("failed: INTERNAL")
    assert _failure(good, "UNAVAILABLE", "Socket closed").startswith("failed: UNAVAILABLE")
    assert _failure(good, "DEADLINE_EXCEEDED", "Deadline Exceeded").startswith("failed: DEADLINE_EXCEEDED")


def test_a_bad_request_must_get_its_own_error() -> None:
    bad = shot(Refusal("INVALID_ARGUMENT", r"'text' is empty"))
    assert _failure(bad, "INVALID_ARGUMENT", "'text' is empty") == REFUSED
    assert _failure(bad, "INVALID_ARGUMENT", "'text' is blank").startswith("wrong")
    assert _failure(bad, "INTERNAL", "'text' is empty").startswith("wrong")
    assert _judged(bad, "") == "wrong: answered instead of refused"
    assert _judged(shot(Tokens((1,))), "") == ANSWERED


def test_growth_is_seen_and_noise_is_not() -> None:
    times = [float(second) for second in range(100)]
    flat = trend(times, [600 + (-1) ** second for second in range(100)])
    assert flat.spread < 0.02
    assert abs(flat.drift) < 0.001
    grown = trend(times, [600 + 0.2 * second for second in range(100)])
    assert grown.drift == pytest.approx(0.2 * 99 / 609.9, rel=0.01)
    assert grown.per_hour == pytest.approx(720)


def test_a_broken_promise_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("load_figures.OUT", tmp_path)
    report = Report("nothing")
    report.hold("it holds", "it did", True)
    report.finish()
    report.hold("it is quick", "9 s", False)
    with pytest.raises(AssertionError, match="it is quick: 9 s"):
        report.finish()
