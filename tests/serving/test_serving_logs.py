"""The real server's log as JSON lines; and no text of a request in it, answered or refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_llm import Refused, Talk, post

from client import Client, ClientError
from client.retry import RetryPolicy
from triton_repo import server_log
from triton_repo.server import Server, ServerOptions

pytestmark = pytest.mark.serving

MARK = "zebrafish"
GOOD = [f"the noodles of a {MARK} were good", MARK * 9000, f"{MARK}\n국수가 {MARK} 👩‍🍳"]
# (input, as text; its shape): each is refused, by Triton or by the model.
BAD: list[dict[str, Any]] = [
    {"name": "text", "datatype": "BYTES", "shape": [1, 2], "data": [MARK, MARK]},
    {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [MARK, MARK]},
    {"name": "text", "datatype": "INT32", "shape": [1, 1], "data": [MARK]},
    {"name": MARK, "datatype": "BYTES", "shape": [1, 1], "data": ["x"]},
    {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [" \t"], "parameters": {"x": MARK}},
]


@pytest.fixture(scope="module", params=["text", "json"])
def server(
    talk_stack: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("logs") / "log"
    options = ServerOptions(free_ports=True, log=log, log_format=request.param)
    # A folder has one server, and the session's may be on that one.
    repository = shutil.copytree(talk_stack[0] / "repository", log.parent / "site" / "repository")
    with Server(repository, options) as server:
        yield server


def test_no_text_is_logged_anywhere(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Client(server.urls["grpc"], retry=RetryPolicy(attempts=1)) as client:
        client.embed(GOOD, model="vector")
        client.generate(GOOD[0], model="talk", max_tokens=3)
        for text in ["", "\ud800" + MARK, MARK * 200_000]:
            with pytest.raises(ClientError) as failed:
                client.embed(text, model="vector")
            assert MARK not in str(failed.value)
        with pytest.raises(ClientError) as failed:
            client.generate(MARK * 9000, model="talk", max_tokens=3)
        assert MARK not in str(failed.value)
    for tensor in BAD:
        assert post(server.urls["http"], "/v2/models/vector/infer", {"inputs": [tensor]})[0] >= 400
    assert post(server.urls["http"], "/v2/models/talk/generate", {"text": "x", "stop": MARK * 2000})[0] == 400
    talk = Talk(server.urls["grpc"])
    for fields in ({"messages": f'[{{"role": "{MARK}"'}, {"text": b"\xff" + MARK.encode()}):
        with pytest.raises(Refused):
            talk.whole(**fields)
    assert server.fault() is None
    for path in server.log.parent.glob("log*"):
        assert MARK not in path.read_text()
    assert MARK not in caplog.text


def test_every_line_is_an_object_and_failures_are_read_from_it(server: Server) -> None:
    if server.options.log_format == "text":
        pytest.skip("of the JSON log")
    records = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert all({"time", "level", "source", "message"} <= record.keys() for record in records)
    assert any(record["message"] == "successfully loaded 'vector'" for record in records)
    assert server_log.loaded(server_log.read(server.log)) == {"vector", "talk", "tight"}
