"""`client status --watch` over a small metrics server: what is shown, a server that goes away, leaving."""

from __future__ import annotations

import itertools
import json
import math
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from client import metrics
from client.cli import main
from client.live import History, render
from client.metrics import Scrape


def page(seconds: float) -> str:
    """The metrics after so many seconds of 10 requests per second."""
    count = int(10 * seconds)
    labels = 'model="m",version="1"'
    return (
        f'onecard_requests_total{{{labels},outcome="completed"}} {count}\n'
        f'onecard_rejections_total{{{labels},reason="queue_full"}} {2 * count}\n'
        f'onecard_request_seconds_bucket{{{labels},le="0.1"}} {count}\n'
        f'onecard_request_seconds_bucket{{{labels},le="+Inf"}} {count}\n'
        f"onecard_queue_requests{{{labels}}} 3\n"
        f"onecard_llm_slots{{{labels}}} 4\nonecard_llm_slots_active{{{labels}}} 2\n"
        f"onecard_llm_generated_tokens_total{{{labels}}} {5 * count}\n"
        f"onecard_resident_bytes{{{labels}}} {2**29}\nonecard_planned_bytes{{{labels}}} {2**30}\n"
    )


def at(seconds: float) -> Scrape:
    return metrics.parse(page(seconds), seconds)


def shown(snapshot: Any) -> str:
    console = Console(width=140, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(render(snapshot, "here:8002"))
    return capture.get()


def test_rates_are_over_the_last_seconds() -> None:
    history = History(5)
    snapshots = [history.add(at(second)) for second in range(12)]
    assert snapshots[0].window_s == 0
    assert snapshots[3].window_s == 3
    assert 5 <= snapshots[-1].window_s <= 6
    [model] = snapshots[-1].models
    assert (model.requests_per_s, model.rejected_per_s) == (10, {"queue_full": 20})
    text = shown(snapshots[-1])
    for wanted in (
        "rates over the last 6 s",
        "m rejects: queue_full 20.0/s",
        "512/1024",
        "2/4",
        "50.0",
        "99.0",
    ):
        assert wanted in text


def test_a_server_that_is_away_is_said_and_forgotten_when_back() -> None:
    history = History(5)
    for second in range(3):
        history.add(at(second))
    away = history.add(Scrape(20, error="refused"))
    assert (away.error, away.age_s, away.models[0].requests_per_s) == ("refused", 18, 10)
    assert "the server is away (refused); what follows is 18 s old" in shown(away)
    restarted = [history.add(metrics.parse(page(second), 30 + second)) for second in (0, 1)]
    assert restarted[0].window_s == 0
    assert (restarted[1].window_s, restarted[1].models[0].requests_per_s) == (1, 10)
    assert restarted[1].error is None
    never = History(5).add(Scrape(0, error="refused"))
    assert never.models == ()
    assert "the server is away (refused)" in shown(never)


def test_a_counter_that_began_again_within_the_window_gives_no_negative_rate() -> None:
    history = History(5)
    history.add(at(100))
    [model] = history.add(metrics.parse(page(0.5), 101)).models
    assert model.requests_per_s == 5
    assert all(rate >= 0 and not math.isinf(rate) for rate in model.rejected_per_s.values())


@pytest.fixture
def server() -> Iterator[Callable[[], HTTPServer]]:
    """Starts a metrics server that counts, always on the same port."""
    start, started, ports = time.monotonic(), [], [0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = page(time.monotonic() - start).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    def serve() -> HTTPServer:
        web = HTTPServer(("127.0.0.1", ports[0]), Handler)
        ports[0] = web.server_port
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        started.append(web)
        return web

    yield serve
    stop(started[-1])


def stop(web: HTTPServer) -> None:
    web.shutdown()
    web.server_close()


def command(port: int, *options: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "ONECARD_URL_METRICS": f"127.0.0.1:{port}", "TERM": "xterm"}
    return [sys.executable, "-m", "client", "status", "--watch", "--interval", "0.2", *options], environment


def test_lines_of_json_go_on_while_the_server_is_away(server: Callable[[], HTTPServer]) -> None:
    web = server()
    words, environment = command(web.server_port, "--json")
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = (json.loads(line) for line in iter(process.stdout.readline, b""))

        def until(wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
            return next(line for line in itertools.islice(lines, 60) if wanted(line))

        first = until(lambda line: line["window_s"] > 0.3)
        assert first["models"][0]["requests_per_s"] == pytest.approx(10, abs=8)
        stop(web)
        away = until(lambda line: line["error"] is not None)
        assert "refused" in away["error"].lower() or "reset" in away["error"].lower()
        server()
        assert until(lambda line: line["error"] is None)["models"]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_at_a_terminal_ctrl_c_leaves_it_as_it_was(server: Callable[[], HTTPServer]) -> None:
    words, environment = command(server().server_port)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen(words, env=environment, stdout=theirs, stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        screen, deadline = "", time.monotonic() + 20
        while "req/s" not in screen and time.monotonic() < deadline:
            screen += os.read(ours, 65536).decode()
        assert "\x1b[?1049h" in screen  # a screen of its own
        process.send_signal(signal.SIGINT)
        try:
            while chunk := os.read(ours, 65536):
                screen += chunk.decode()
        except OSError:  # Linux says so when nobody has the other end any more
            pass
        assert process.wait(10) == 0
    os.close(ours)
    assert screen.rindex("\x1b[?1049l") > screen.rindex("req/s")
    assert "Traceback" not in screen


@pytest.mark.parametrize(
    "option", [("--token-file", "t"), ("--ca", "c"), ("--timeout", "3"), ("--log-json", "l")]
)
def test_an_option_that_would_not_be_heeded_is_refused(option: tuple[str, str]) -> None:
    refused = CliRunner().invoke(main, ["status", "--watch", "--json", "--url", "card:9001", *option])
    assert refused.exit_code == 2
    assert f"leave out {option[0]}" in refused.stderr


def test_what_cannot_be_watched_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONECARD_URL_METRICS", raising=False)
    piped = CliRunner().invoke(main, ["status", "--watch"])
    assert piped.exit_code == 2
    assert "--watch --json" in piped.stderr
    unknown = CliRunner().invoke(main, ["status", "--watch", "--json", "--url", "card:9001"])
    assert unknown.exit_code == 34
    assert "ONECARD_URL_METRICS" in unknown.stderr
