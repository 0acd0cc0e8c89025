"""SIGTERM with work in flight: answered, and nothing new is taken in; no longer than the exit timeout."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from chaos_tools import ONCE, figure, in_thread, serving
from small_llm import Talk, post

from client import Client, ClientError, ConnectionLost


def test_work_in_flight_is_answered_and_new_work_told_to_come_again(
    talk_repository: Path, tmp_path: Path
) -> None:
    with serving(talk_repository, tmp_path / "log") as served:
        urls = served.ready["urls"]
        talk, client = Talk(urls["grpc"]), Client(urls["grpc"], retry=ONCE)
        web = Client(f"http://{urls['http']}", retry=ONCE)
        client.embed("warm", model="vector")
        web.embed("warm", model="vector")
        asked = {"text": "noodles", "max_tokens": 3000, "ignore_eos": True}
        running = [
            in_thread(lambda: talk.whole(**asked)),
            in_thread(lambda: list(talk.stream(**asked))[-1]),
            in_thread(lambda: post(urls["http"], "/v2/models/talk/generate", asked | {"stream": False})),
            in_thread(
                lambda: post(urls["http"], "/v2/models/talk/generate_stream", asked | {"stream": True})
            ),
        ]
        time.sleep(0.5)
        served.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        time.sleep(0.2)
        refused = [refusal(client, "embed"), refusal(web, "embed"), refusal(client, "generate")]
        for thread, _ in running:
            thread.join(30)
        code, _ = served.ended()
        ended = time.monotonic()
    (whole, last, (status, _), (streamed, body)) = (results[0][1] for _, results in running)
    assert whole["usage"]["completion_tokens"] == last["usage"]["completion_tokens"] == 3000
    assert (status, streamed) == (200, 200)
    assert '\\"completion_tokens\\": 3000' in body
    assert code == 0
    assert all(error.retryable for error in refused), refused
    last_answer = max(results[0][0] for _, results in running)
    assert ended - last_answer < 4
    figure(
        "SIGTERM, 4 answers under way",
        answered="4 of 4",
        last_answer_s=last_answer - told,
        ended_s_after_it=ended - last_answer,
        new_requests=", ".join(sorted({type(error).__name__ for error in refused})),
    )


def refusal(client: Client, what: str) -> ClientError:
    try:
        client.embed("late", model="vector") if what == "embed" else client.generate(
            "late", model="talk", max_tokens=1
        )
    except ClientError as error:
        return error
    raise AssertionError("a server that stops has taken a request")


def test_work_that_takes_longer_than_the_exit_timeout_is_cut(talk_repository: Path, tmp_path: Path) -> None:
    with serving(talk_repository, tmp_path / "log", "--exit-timeout", "1") as served:
        client = Client(served.ready["urls"]["grpc"], retry=ONCE)
        asked = {"max_tokens": 8000, "ignore_eos": True, "model": "talk", "n": 4}
        thread, results = in_thread(lambda: list(client.generate_stream("noodles", **asked)))
        time.sleep(0.5)
        served.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        code, _ = served.ended()
        ended = time.monotonic() - told
        thread.join()
    assert code == 0
    assert ended < 3
    when, error = results[0]
    assert isinstance(error, ConnectionLost), error
    figure(
        "SIGTERM, work longer than --exit-timeout 1",
        client_told_s=when - told,
        with_error=type(error).__name__,
        ended_s=ended,
    )


def test_an_idle_server_stops_at_once(talk_repository: Path, tmp_path: Path) -> None:
    with serving(talk_repository, tmp_path / "log") as served:
        served.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        assert served.ended()[0] == 0
    ended = time.monotonic() - told
    assert ended < 3
    figure("SIGTERM, idle", ended_s=ended)
