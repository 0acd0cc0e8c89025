"""`client chat`, `client query generate` and `client status` over a fake transport."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import fake_llm
import pytest
from click.testing import CliRunner, Result
from fake_llm import WORDS

from client import Client, GenerationStatus, InvalidInput, display, metrics
from client.cli import main
from client.conversation import Conversation, talk
from client.transport import Endpoint

TEXT = "".join(WORDS)
METRICS = """# HELP onecard_llm_slots Slots
onecard_llm_slots{model="writer",version="1"} 8
onecard_llm_slots_active{model="writer"} 3
onecard_queue_requests{model="writer"} 2
onecard_llm_cache_tokens{model="writer"} 1024
onecard_llm_cache_capacity_tokens{model="writer"} 4096
onecard_llm_tokens_per_second{model="writer"} 118.25
onecard_llm_prompt_tokens_total{model="writer"} 700
onecard_llm_cached_tokens_total{model="writer"} 300
onecard_llm_generated_tokens_total{model="writer"} 9000
onecard_requests_total{model="writer",outcome="completed"} 5
onecard_requests_total{model="writer",outcome="cancelled"} 2
onecard_llm_slots{model="other"} 1
"""


@pytest.fixture
def server(transport: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    transport.configs = {"writer": fake_llm.config("writer"), "embedder": transport.configs["embedder"]}
    monkeypatch.delenv("ONECARD_URL_METRICS", raising=False)
    for module in ("cli", "options"):
        monkeypatch.setattr(f"client.{module}.open_client", lambda **server: Client(transport=transport))
    return transport


@pytest.fixture
def run(server: Any) -> Callable[..., Result]:
    return lambda *arguments, **options: CliRunner().invoke(main, arguments, **options)


def sent(server: Any) -> list[Any]:
    return [json.loads(request.inputs["messages"][0]) for request in server.requests]


def test_a_piped_conversation_keeps_its_turns(run: Any, server: Any) -> None:
    result = run(
        "chat", "--max-tokens", "9", input="안녕\n\n/system be brief\nmore\n/reset\nagain\n/quit\nnever\n"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{TEXT}\n" * 3
    user = {"role": "user", "content": "안녕"}
    answer = {"role": "assistant", "content": TEXT}
    system = {"role": "system", "content": "be brief"}
    assert sent(server) == [
        [user],
        [system, user, answer, {"role": "user", "content": "more"}],
        [system, {"role": "user", "content": "again"}],
    ]
    assert {request.inputs["max_tokens"][0] for request in server.requests} == {9}
    assert "tokens/s" in result.stderr
    assert "first after" in result.stderr
    assert "3 of 7 prompt tokens cached" in result.stderr


def test_an_unknown_command_is_no_message(run: Any, server: Any) -> None:
    result = run("chat", input="/nope\n/etc/hosts is a file\n")
    assert "no command /nope" in result.stderr
    assert [turns[-1]["content"] for turns in sent(server)] == ["/etc/hosts is a file"]


def test_a_failure_ends_a_piped_conversation_with_its_exit_code(run: Any, server: Any) -> None:
    server.scripts.append([InvalidInput("the prompt has 900 tokens; a slot of this model holds 512")])
    result = run("chat", input="long\nnever sent\n")
    assert result.exit_code == 31
    assert "900 tokens" in result.stderr
    assert len(server.requests) == 1
    assert run("chat", input=b"\xff\n").exit_code == 2


def test_an_interrupt_stops_the_answer_and_keeps_what_came(
    server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Conversation(Client(transport=server), {})
    whole = fake_llm.responses(type("R", (), {"inputs": {"stream": [True]}})())
    server.scripts.append([*whole[:2], KeyboardInterrupt()])
    talk.answer("hello")
    shown = capsys.readouterr()
    assert shown.out == "".join(WORDS[:2]) + "\n"
    assert "stopped" in shown.err
    assert server.streams[0].closed
    talk.answer("more")
    assert [turn["content"] for turn in sent(server)[-1]] == ["hello", "".join(WORDS[:2]), "more"]
    server.scripts.append([KeyboardInterrupt()])
    talk.answer("stopped before anything came")
    talk.answer("again")
    assert "stopped before anything came" not in [turn["content"] for turn in sent(server)[-1]]


def test_a_message_that_failed_is_forgotten(server: Any) -> None:
    talk = Conversation(Client(transport=server), {})
    server.scripts.append([InvalidInput("no")])
    with pytest.raises(InvalidInput):
        talk.answer("bad")
    talk.answer("good")
    assert sent(server)[-1] == [{"role": "user", "content": "good"}]


def test_a_blank_answer_does_not_end_the_conversation(server: Any) -> None:
    talk = Conversation(Client(transport=server), {})
    server.scripts.append([fake_llm.arrays([" \n"], [0], [1], reasons=["stop"], usage=fake_llm.USAGE)])
    talk.answer("first")
    talk.answer("second")
    assert sent(server)[-1] == [{"role": "user", "content": "second"}]


@pytest.mark.parametrize("terminal", [True, False])
def test_answers_do_not_command_the_terminal(
    server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    text = "back \r, title \x1b]0;x\x07, \x9d1;y\x9c\n\tend"
    clean = "back , title ]0;x, 1;y\n\tend"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    server.scripts += [[fake_llm.arrays([text], [0], [1], reasons=["stop"], usage=fake_llm.USAGE)]] * 2
    client = Client(transport=server)
    Conversation(client, {}).answer("hello")
    display.print_generations(["hello"], [client.generate("hello")])
    assert capsys.readouterr().out == f"{clean if terminal else text}\n" * 2


def test_at_a_terminal_a_failure_and_an_interrupt_are_not_the_end(
    server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: list[Any] = ["bad", KeyboardInterrupt(), "/system be brief", "", "good", EOFError()]

    def read(prompt: str) -> str:
        line = typed.pop(0)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    server.scripts.append([InvalidInput("the prompt has 900 tokens")])
    talk(Client(transport=server), {})
    shown = capsys.readouterr()
    assert shown.out == f"\n{TEXT}\n"
    assert "error: the prompt has 900 tokens" in shown.err
    assert "/quit leaves" in shown.err
    assert [turn["content"] for turn in sent(server)[-1]] == ["be brief", "good"]


def test_query_generate_prints_the_answers_or_one_document(run: Any, server: Any) -> None:
    assert run("query", "generate", "The soup").stdout == f"{TEXT}\n"
    options = (
        "--chat",
        "-n",
        "2",
        "--logprobs",
        "--temperature",
        "0",
        "--stop",
        "\n",
        "--stop",
        "끝",
        "--json",
    )
    [answer] = json.loads(run("query", "generate", "a", *options).stdout)
    assert answer["prompt"] == "a"
    assert [sample["text"] for sample in answer["samples"]] == [TEXT, TEXT]
    assert answer["samples"][0]["logprobs"] == [-0.5] * 5
    assert answer["usage"]["prompt_tokens"] == 7
    inputs = server.requests[-1].inputs
    assert inputs["temperature"].tolist() == [0.0]
    assert inputs["stop"].tolist() == [b"\n", "끝".encode()]
    assert "messages" in inputs
    several = run("query", "generate", input="one\ntwo\n")
    assert several.stdout == f"# one\n{TEXT}\n# two\n{TEXT}\n"
    assert run("query", "generate", "a", "--max-tokens", "0").exit_code == 31


@pytest.fixture
def metrics_url() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS.encode())

        def log_message(self, *_: Any) -> None:
            pass

    web = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()


def test_status_shows_slots_rate_and_cache(
    run: Any, server: Any, metrics_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "slots busy" not in run("status").stdout
    monkeypatch.setenv("ONECARD_URL_METRICS", metrics_url)
    shown = run("status").stdout
    for wanted in ("slots busy", "3/8", "118.2", "1,024/4,096 (25%)", "9,000"):
        assert wanted in shown
    models = {model["name"]: model for model in json.loads(run("status", "--json").stdout)["models"]}
    assert models["embedder"]["generation"] is None
    assert models["writer"]["generation"] == {
        "slots": 8,
        "slots_active": 3,
        "queued": 2,
        "cache_tokens": 1024,
        "cache_capacity_tokens": 4096,
        "tokens_per_second": 118.25,
        "prompt_tokens": 700,
        "cached_tokens": 300,
        "generated_tokens": 9000,
    }
    monkeypatch.setenv("ONECARD_URL_METRICS", "127.0.0.1:1")
    missing = run("status")  # nobody there: the rest is shown all the same
    assert missing.exit_code == 0
    assert "metrics at 127.0.0.1:1 cannot be read" in missing.stdout
    assert "writer" in missing.stdout


def test_metrics_are_looked_for_beside_the_server_only_on_its_usual_ports() -> None:
    def found(url: str, **variables: str) -> str:
        return metrics.address_for(Endpoint.parse(url, None, {}), variables)

    assert found("card:8001") == "card:8002"
    assert found("http://[::1]:8000/triton") == "[::1]:8002"
    assert found("card:9001") == ""  # what answers at 8002 there may be another server's
    assert found("card:9001", ONECARD_URL_METRICS="m:1") == "m:1"


def test_only_a_model_that_generates_has_slots() -> None:
    scrape = metrics.parse(METRICS + 'onecard_tokens_total{model="embedder"} 1\n')
    assert metrics.generation_status(scrape, "embedder") is None
    assert isinstance(metrics.generation_status(scrape, "writer"), GenerationStatus)
