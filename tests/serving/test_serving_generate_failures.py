"""What a real tritonserver does with bad requests and clients that go: names it, frees the slot, goes on."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from small_llm import Refused, Talk, outputs, post, quiet, thrice
from small_models import Served

pytestmark = pytest.mark.serving

SECRET = "zebrafish"
FOREVER = {"ignore_eos": True, "max_tokens": 8000}


@pytest.fixture(scope="module")
def talk(talking: Served) -> Iterator[Talk]:
    client = Talk(talking.grpc)
    yield client
    client.close()


@pytest.fixture(scope="module")
def tight(talking: Served) -> Iterator[Talk]:
    """One slot; one request may wait, 300 ms at most."""
    client = Talk(talking.grpc, "tight")
    yield client
    client.close()


def state(talking: Served, model: str = "talk") -> dict[str, float]:
    return quiet(talking.server.urls["metrics"], model)


def turns(*contents: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": content} for content in contents]


NAN = float("nan")
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "give either 'text' or 'messages'"),
    "both": ({"text": "a", "messages": turns("a")}, "give only one of 'text' or 'messages'"),
    "too long": ({"text": "z" * 9000}, "the prompt has 9000 tokens; a slot of this model holds 8192"),
    "endless": ({"text": "z" * 900_000}, "(900000 characters); a slot of this model holds 8192"),
    "no tokens": ({"text": "a", "max_tokens": 0}, "'max_tokens' is 0; it must be at least 1"),
    "negative": ({"text": "a", "max_tokens": -5}, "'max_tokens' is -5"),
    "nan": ({"text": "a", "temperature": NAN}, "'temperature' is nan"),
    "cold": ({"text": "a", "temperature": -0.1}, "'temperature' is -0.1; it must be 0 (greedy) or above"),
    "top p": ({"text": "a", "top_p": 1.5}, "'top_p' is 1.5"),
    "samples": ({"text": "a", "n": 5}, "'n' is 5; this model has 4 slots"),
    "no messages": ({"messages": []}, "'messages' is empty"),
    "json": ({"messages": b"[{"}, "'messages' is not JSON"),
    "role": ({"messages": turns("a", role="robot")}, "'messages' 0 has the unknown role 'robot'"),
    "field": ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "unknown field 'name'"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, "'content' is a number, not a text"),
    "systems": ({"messages": turns("a", "b", role="system")}, "'messages' has 2 system messages"),
    "stop": ({"text": "a", "stop": "x" * 10_000}, "'stop' has 10000 characters"),
    "no stop": ({"text": "a", "stop": ""}, "'stop' is empty"),
    "utf-8": ({"text": b"caf\xe9 au"}, "'text' is not valid UTF-8 (byte 0xe9 at 3"),
    "surrogate": ({"messages": b'[{"role": "user", "content": "\\ud83d"}]'}, "lone surrogate U+D83D"),
    "empty": ({"text": ""}, "'text' is empty"),
    "parameter": ({"text": "a", "parameters": {"temprature": 1}}, "did you mean 'temperature'?"),
    "no such": ({"text": "a", "parameters": {"beams": 1}}, "unknown parameter 'beams'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_a_precise_error(talk: Talk, case: str) -> None:
    inputs, message = BAD[case]
    assert message in talk.error(**inputs)


def test_what_triton_itself_refuses_has_its_error(talk: Talk) -> None:
    for inputs, message in (
        ({"text": "a", "temprature": 1}, "unexpected inference input 'temprature'"),
        ({"text": ["a", "b"]}, "unexpected shape for input 'text'"),
    ):
        assert message in talk.error(**inputs)


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_errors_over_http_are_the_same(talking: Served, endpoint: str) -> None:
    for body, message in (
        ({"text": "a", "max_tokens": 0, "stream": False}, "'max_tokens' is 0"),
        ({"text": "a", "temprature": 0.5, "stream": False}, "unknown parameter 'temprature'; did you mean"),
        ({"text": "z" * 9000, "stream": False}, "9000 tokens; a slot of this model holds 8192"),
    ):
        status, text = post(talking.http, f"/v2/models/talk/{endpoint}", body)
        assert (status, message in text) == (400, True), text
    status, text = post(talking.http, f"/v2/models/talk/{endpoint}", {"text": "a", "max_tokens": "b"})
    assert status >= 400
    assert "error" in text


def test_other_streams_do_not_notice_bad_requests(talking: Served, talk: Talk) -> None:
    asked = {"text": "undisturbed", "max_tokens": 600, "ignore_eos": True}
    expected = talk.text(**asked)

    def bad(place: int) -> None:
        inputs, message = list(BAD.values())[place % len(BAD)]
        assert message in talk.error(**inputs)

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(talk.text, **asked) for _ in range(3)]
        list(pool.map(bad, range(2 * len(BAD))))
        assert [stream.result() for stream in streams] == [expected] * 3
    assert state(talking)["requests_total failed"] == 0


@thrice
def test_a_cancelled_stream_stops_and_frees_its_slot(talking: Served, talk: Talk) -> None:
    before = state(talking)
    calls = [talk.call(text=f"cancel {place}", **FOREVER) for place in range(4)]
    for call in calls:
        assert outputs(next(call))["finish_reason"] == [""]
        call.cancel()
    # All four slots were taken, so this one answers only because they are free again.
    assert talk.whole(text="next", max_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3
    after = state(talking)
    assert after["slots_active"] == 0
    assert after["requests_total cancelled"] == before["requests_total cancelled"] + 4
    assert after["generated_tokens_total"] - before["generated_tokens_total"] < 4 * 6000


@thrice
def test_a_request_that_waits_is_cancelled_too(talking: Served, talk: Talk) -> None:
    before = state(talking)
    running = [talk.call(text=f"busy {place}", **FOREVER) for place in range(4)]
    for call in running:
        next(call)
    waiting = talk.call(text="never runs", **FOREVER)
    time.sleep(0.2)
    waiting.cancel()
    time.sleep(0.3)
    for call in running:
        call.cancel()
    after = state(talking)
    assert after["requests_total cancelled"] == before["requests_total cancelled"] + 5
    # Each of the four prompts has its own tokens; the one that waited was never read.
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] < 4 * 9


VANISHING = """
import sys
sys.path.insert(0, {here!r})
from small_llm import Talk
call = Talk({address!r}).call(text="vanish", ignore_eos=True, max_tokens=8000)
next(call)
print("running", flush=True)
sys.stdin.read()
"""


@thrice
def test_a_client_that_is_killed_frees_its_slot(talking: Served, talk: Talk) -> None:
    before = state(talking)
    program = textwrap.dedent(VANISHING).format(here=str(Path(__file__).parent), address=talking.grpc)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "running\n"
        client.kill()
    after = state(talking)
    assert after["requests_total cancelled"] == before["requests_total cancelled"] + 1


@thrice
def test_an_http_client_that_hangs_up_frees_its_slot(talking: Served) -> None:
    before = state(talking)
    host, port = talking.http.split(":")
    body = json.dumps({"text": "hang up", **FOREVER}).encode()
    head = f"POST /v2/models/talk/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        assert b"200 OK" in connection.recv(1000)
    after = state(talking)
    assert after["requests_total cancelled"] == before["requests_total cancelled"] + 1


def test_a_slow_reader_holds_up_nobody(talking: Served, talk: Talk) -> None:
    slow = talk.call(text="slow", ignore_eos=True, max_tokens=3000)
    next(slow)
    started = time.monotonic()
    fast = talk.whole(text="fast", max_tokens=300, ignore_eos=True)
    assert fast["usage"]["completion_tokens"] == 300
    assert time.monotonic() - started < 10
    rest = [outputs(response) for response in slow]
    assert rest[-1]["usage"]["completion_tokens"] == 3000


def test_a_full_queue_and_a_long_wait_are_refused(talking: Served, tight: Talk) -> None:
    before = state(talking, "tight")
    running = tight.call(text="busy", **FOREVER)
    next(running)
    waiting = tight.call(text="waits", max_tokens=3)
    time.sleep(0.1)
    assert "the queue is full: 1 requests are waiting" in tight.error(text="one too many", max_tokens=3)
    try:
        outcome = outputs(list(waiting)[-1])["finish_reason"][0]
    except Refused as error:
        outcome = str(error)
    late = "the wait was too long: the deadline is 300 ms"
    assert outcome in ("length", "stop") or outcome.startswith(late)
    running.cancel()
    assert tight.whole(text="again", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2
    assert state(talking, "tight")["rejections_total queue_full"] == before["rejections_total queue_full"] + 1


def test_many_short_and_cancelled_requests_lose_no_slot(talking: Served, talk: Talk) -> None:
    def one(place: int) -> int:
        gives_up = place % 3 == 0
        count = 8000 if gives_up else 1 + place % 9
        call = talk.call(text=f"short {place}", max_tokens=count, ignore_eos=True, n=1 + place % 2)
        if gives_up:
            call.cancel()
        with contextlib.suppress(grpc.RpcError):
            return len([outputs(response) for response in call])
        return 0

    with ThreadPoolExecutor(8) as pool:
        assert sum(map(bool, pool.map(one, range(240)))) == 160
    after = state(talking)
    assert (after["slots_active"], after["queue_requests"]) == (0, 0)
    assert talk.whole(text="all", n=4, max_tokens=2, ignore_eos=True)["index"] == [0, 1, 2, 3]


def test_no_text_is_logged(talking: Served, talk: Talk) -> None:
    talk.whole(text=f"{SECRET} here", max_tokens=2)
    for inputs in (
        {"text": f"{SECRET} " * 5000},
        {"text": SECRET.encode() + b"\xff"},
        {"messages": f"[{SECRET}"},
        {"messages": turns(SECRET, role=SECRET[:3])},
        {"text": "a", "stop": SECRET * 100},
    ):
        assert SECRET not in talk.error(**inputs)
    call = talk.call(text=f"{SECRET} cancelled", **FOREVER)
    next(call)
    call.cancel()
    state(talking)
    log = talking.server.log.read_text(errors="replace")
    assert SECRET not in log
    assert "Traceback" not in log
