"""One log record at the end of every request, with its id and without its text."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import fake_llm
import pytest
from click.testing import CliRunner

from client import AsyncClient, Client, ClientError, InvalidInput, QueueFull, RetryPolicy, ServerFault
from client.cli import main
from client.records import FIELDS, LOGGER

RETRY = RetryPolicy(attempts=3, initial=0.1, jitter=0)


@pytest.fixture(params=["sync", "asyncio"])
def server(request: pytest.FixtureRequest, transport: Any, async_transport: Any) -> Any:
    chosen = transport if request.param == "sync" else async_transport
    chosen.configs["writer"] = fake_llm.config("writer")
    return chosen


@pytest.fixture
def call(server: Any, transport: Any, clock: Any) -> Any:
    """One call; of a stream, `count` pieces are read and it is closed."""

    def do(method: str, *arguments: Any, count: int = 99, **options: Any) -> Any:
        if server is transport:
            with Client(transport=server, clock=clock, retry=RETRY) as client:
                found = getattr(client, method)(*arguments, **options)
                return read(found, count) if method == "stream" else found

        async def go() -> Any:
            async with AsyncClient(transport=server, clock=clock, retry=RETRY) as client:
                found = getattr(client, method)(*arguments, **options)
                return await read_async(found, count) if method == "stream" else await found

        return asyncio.run(go())

    return do


def read(stream: Any, count: int) -> None:
    with stream:
        for place, _ in enumerate(stream, start=1):
            if place == count:
                return


async def read_async(stream: Any, count: int) -> None:
    async with stream:
        place = 0
        async for _ in stream:
            place += 1
            if place == count:
                return


def ends(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Of each record its level and fields, in the order of ids and attempts."""
    found = [
        {"level": record.levelname, **{name: getattr(record, name) for name in FIELDS}}
        for record in caplog.records
        if record.name == "client"
    ]
    return sorted(found, key=lambda record: (record["request_id"], record["attempt"]))


def test_every_part_of_a_call_ends_in_a_record(
    call: Any, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "client")
    call("embed", ["secret text"] * 5, request_id="r")
    first, second = ends(caplog)
    assert first == {
        "level": "DEBUG",
        "request_id": "r/0",
        "model": "embedder",
        "model_version": "1",
        "task": "embed",
        "texts": 4,
        "milliseconds": 0.0,
        "outcome": "completed",
        "error": None,
        "attempt": 1,
    }
    assert (second["request_id"], second["texts"]) == ("r/1", 1)
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(QueueFull("full"), "rejected"), (InvalidInput("no"), "rejected"), (ServerFault("no"), "failed")],
)
def test_failures_are_told_with_their_attempts(
    call: Any, server: Any, caplog: pytest.LogCaptureFixture, error: ClientError, outcome: str
) -> None:
    caplog.set_level(logging.INFO, "client")
    server.script = [error] * 3
    with pytest.raises(type(error)):
        call("classify", "good", request_id="r")
    records = ends(caplog)
    assert [record["attempt"] for record in records] == [1, 2, 3][: 3 if error.retryable else 1]
    assert {(record["outcome"], record["error"]) for record in records} == {(outcome, type(error).__name__)}
    assert {record["level"] for record in records} == {"INFO"}


def test_a_rejection_that_was_retried_ends_completed(
    call: Any, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "client")
    server.script = [QueueFull("full")]
    call("classify", "good")
    assert [(record["attempt"], record["outcome"]) for record in ends(caplog)] == [
        (1, "rejected"),
        (2, "completed"),
    ]


@pytest.mark.parametrize(
    ("count", "script", "expected"),
    [
        (99, None, ["completed"]),
        (2, None, ["cancelled"]),
        (99, [ServerFault("the engine failed")], ["failed"]),
        (99, [], ["failed"]),  # an end without an answer
    ],
)
def test_a_stream_ends_in_one_record(
    call: Any,
    server: Any,
    caplog: pytest.LogCaptureFixture,
    count: int,
    script: list[Any] | None,
    expected: list[str],
) -> None:
    caplog.set_level(logging.DEBUG, "client")
    if script is not None:
        server.scripts = [script]
    try:
        call("stream", "secret prompt", model="writer", request_id="r", count=count)
    except ClientError:
        assert expected == ["failed"]
    records = ends(caplog)
    assert [record["outcome"] for record in records] == expected
    assert [(record["task"], record["request_id"]) for record in records] == [("generate", "r")]
    assert "secret" not in caplog.text


def test_a_whole_answer_and_a_retried_stream_too(
    call: Any, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "client")
    call("generate", ["a", "b"], model="writer", request_id="r")
    server.scripts = [[QueueFull("full")]]
    call("stream", "c", model="writer", request_id="s")
    assert [(record["request_id"], record["outcome"]) for record in ends(caplog)] == [
        ("r/0", "completed"),
        ("r/1", "completed"),
        ("s", "rejected"),
        ("s", "completed"),
    ]


def test_a_cancelled_call_ends_cancelled(
    async_transport: Any, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "client")

    async def hang(request: Any, timeout: float) -> Any:
        await asyncio.sleep(30)

    async_transport.infer = hang

    async def go() -> None:
        async with AsyncClient(transport=async_transport, clock=clock) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.classify("good", request_id="r")

    asyncio.run(go())
    assert [(record["request_id"], record["outcome"]) for record in ends(caplog)] == [("r", "cancelled")]


def test_nothing_is_said_unless_asked_for(transport: Any, clock: Any, capfd: Any) -> None:
    transport.script = [ServerFault("no")]
    with Client(transport=transport, clock=clock) as client, pytest.raises(ServerFault):
        client.classify("good")
    assert capfd.readouterr() == ("", "")
    assert not LOGGER.isEnabledFor(logging.INFO)


def test_the_command_line_writes_lines_of_json(
    transport: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.client.open_transport", lambda endpoint, access: transport)
    file = tmp_path / "log.jsonl"
    try:
        for text in ("secret good", "secret bad"):
            result = CliRunner().invoke(main, ["query", "classify", text, "--log-json", str(file)])
            assert result.exit_code == 0, result.output
            LOGGER.handlers.pop().close()  # a process of its own has one
    finally:
        LOGGER.setLevel(logging.NOTSET)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["model"], line["outcome"], line["level"]) for line in lines] == [
        ("sentiment", "completed", "debug")
    ] * 2
    assert lines[0]["time"] < lines[1]["time"]
    assert len({line["request_id"] for line in lines}) == 2
    assert "secret" not in file.read_text()
    nowhere = CliRunner().invoke(main, ["query", "classify", "a", "--log-json", "/nowhere/log"])
    assert nowhere.exit_code == 2
    assert "--log-json /nowhere/log" in nowhere.stderr
