"""What real requests may carry beside their texts, and from where a real server counts them."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from small_llm import metrics
from small_models import Served

from triton_repo.server import Server, ServerOptions

pytestmark = pytest.mark.serving


def send(address: str, path: str, body: bytes) -> tuple[int, str]:
    """Status and body of a POST of any bytes: a client library would refuse those that are not UTF-8."""
    host, _, port = address.rpartition(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    status, _, rest = answer.partition(b"\r\n")
    return int(status.split()[1]), rest.partition(b"\r\n\r\n")[2].decode(errors="replace")


def classify(text: str, rest: bytes) -> bytes:
    inputs = [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [text]}]
    return b'{%s, "inputs": %s}' % (rest, json.dumps(inputs).encode())


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_id_that_is_not_utf8_is_answered_and_escaped_in_the_log(served: Served) -> None:
    """Triton passes it on."""
    path = "/v2/models/label/infer"
    assert send(served.http, path, classify("good", b'"id": "\xff-1"'))[0] == 200
    status, body = send(served.http, path, classify(" ", b'"id": "\xff-2"'))
    assert (status, "blank" in body) == (400, True)
    # Triton quotes its messages as JSON does.
    line = r"request_id=\\xff-2 model=label event=rejected"
    until(lambda: line in served.server.log.read_text(errors="replace"))


def test_over_grpc_no_such_id_gets_to_the_model(served: Served) -> None:
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name="label", id="idid")
    tensor = request.inputs.add(name="text", datatype="BYTES", shape=[1, 1])
    tensor.contents.bytes_contents.append(b"good")
    with grpc.insecure_channel(served.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        plain = request.SerializeToString()
        assert b"idid" in infer(plain, timeout=20)
        with pytest.raises(grpc.RpcError):
            infer(plain.replace(b"idid", b"\xff\xff-1"), timeout=20)


def test_parameters_that_are_not_utf8_are_bad_input(served: Served, talking: Served) -> None:
    message = "the request's parameters are not valid UTF-8"
    body = classify("good", b'"parameters": {"note": "\xff"}')
    status, told = send(served.http, "/v2/models/label/infer", body)
    assert (status, message in told) == (400, True)
    for name in (b"id", b"note"):
        body = b'{"text": "a", "max_tokens": 2, "stream": false, "%s": "\xff"}' % name
        status, told = send(talking.http, "/v2/models/talk/generate", body)
        assert (status, message in told) == (400, True)
    body = b'{"text": "a", "max_tokens": 2, "stream": false, "id": "r-1"}'
    assert send(talking.http, "/v2/models/talk/generate", body)[0] == 200


def test_counters_begin_with_triton_s_own_warm_up(
    talk_stack: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """One request, which looks like any other; the golden requests and the measuring before it are not in."""
    repository = shutil.copytree(talk_stack[0] / "repository", tmp_path / "repository")
    with Server(repository, ServerOptions(free_ports=True)) as server:
        address = server.urls["metrics"]
        until(lambda: metrics(address, "talk").get("requests_total completed"))
        until(lambda: metrics(address, "vector").get("requests_total completed"))
        llm, encoder = metrics(address, "talk"), metrics(address, "vector")
    assert (llm["requests_total completed"], encoder["requests_total completed"]) == (1, 1)
    assert 1 <= llm["generated_tokens_total"] <= 4
    assert llm["prompt_tokens_total"] < 4
    assert (encoder["runs_total"], encoder["rows_total"]) == (1, 1)
