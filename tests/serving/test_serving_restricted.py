"""The APIs that change the server want the admin key, the others are open; the key lies where it should."""

from __future__ import annotations

import stat
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from triton_repo.running import read_running, state_file
from triton_repo.server import Server, ServerOptions

pytestmark = pytest.mark.serving

RESTRICTED = [
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/vector/load"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("POST", "/v2/systemsharedmemory/unregister"),
    ("GET", "/v2/systemsharedmemory/region/none/status"),
    ("GET", "/v2/cudasharedmemory/status"),
    ("POST", "/v2/cudasharedmemory/unregister"),
    ("GET", "/v2/trace/setting"),
    ("POST", "/v2/trace/setting"),
    ("GET", "/v2/models/vector/trace/setting"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
]
OPEN = [
    "/v2/health/live",
    "/v2/health/ready",
    "/v2",
    "/v2/models/vector",
    "/v2/models/vector/config",
    "/v2/models/vector/ready",
    "/v2/models/vector/stats",
    "/v2/models/stats",
]
# Calls of the gRPC client by what they do; each takes `headers`.
RESTRICTED_CALLS: dict[str, Callable[..., Any]] = {
    "index": lambda grpc, **key: grpc.get_model_repository_index(**key),
    "load": lambda grpc, **key: grpc.load_model("vector", **key),
    "system shared memory": lambda grpc, **key: grpc.get_system_shared_memory_status(**key),
    "unregister system": lambda grpc, **key: grpc.unregister_system_shared_memory(**key),
    "cuda shared memory": lambda grpc, **key: grpc.get_cuda_shared_memory_status(**key),
    "unregister cuda": lambda grpc, **key: grpc.unregister_cuda_shared_memory(**key),
    "trace": lambda grpc, **key: grpc.get_trace_settings(**key),
    "log": lambda grpc, **key: grpc.get_log_settings(**key),
    "set log": lambda grpc, **key: grpc.update_log_settings({"log_verbose_level": 0}, **key),
}
OPEN_CALLS: dict[str, Callable[..., Any]] = {
    "live": lambda grpc: grpc.is_server_live(),
    "ready": lambda grpc: grpc.is_server_ready(),
    "metadata": lambda grpc: grpc.get_server_metadata(),
    "model": lambda grpc: grpc.get_model_metadata("vector"),
    "config": lambda grpc: grpc.get_model_config("vector"),
    "statistics": lambda grpc: grpc.get_inference_statistics(),
}


def status(url: str, method: str, headers: dict[str, str]) -> int:
    body = b"{}" if method == "POST" else None
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def server(one_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    log = tmp_path_factory.mktemp("restricted") / "log"
    with Server(one_model, ServerOptions(free_ports=True, log=log)) as server:
        yield server


@pytest.mark.parametrize(("method", "path"), RESTRICTED)
def test_http_refuses_without_the_key_and_answers_with_it(server: Server, method: str, path: str) -> None:
    url = f"http://{server.urls['http']}{path}"
    name, key = server.admin_header
    assert status(url, method, {}) == 403
    assert status(url, method, {name: key[:-1]}) == 403
    assert status(url, method, {name: key}) in {200, 400, 404}


@pytest.mark.parametrize("path", OPEN)
def test_http_that_only_tells_is_open(server: Server, path: str) -> None:
    assert status(f"http://{server.urls['http']}{path}", "GET", {}) == 200


@pytest.mark.parametrize("what", RESTRICTED_CALLS)
def test_grpc_refuses_without_the_key_and_answers_with_it(server: Server, what: str) -> None:
    call, (name, key) = RESTRICTED_CALLS[what], server.admin_header
    with triton.InferenceServerClient(server.urls["grpc"]) as grpc:
        for headers in ({}, {name: "guessed"}):
            with pytest.raises(InferenceServerException, match="This protocol is restricted"):
                call(grpc, headers=headers)
        call(grpc, headers={name: key})


@pytest.mark.parametrize("what", OPEN_CALLS)
def test_grpc_that_only_tells_is_open(server: Server, what: str) -> None:
    with triton.InferenceServerClient(server.urls["grpc"]) as grpc:
        assert OPEN_CALLS[what](grpc)


def test_metrics_are_open(server: Server) -> None:
    assert status(f"http://{server.urls['metrics']}/metrics", "GET", {}) == 200


def test_the_running_server_is_found_beside_its_repository(one_model: Path, server: Server) -> None:
    found = read_running(one_model)
    assert (found.pid, found.urls, found.admin_header) == (server.pid, server.urls, server.admin_header)
    assert stat.S_IMODE(state_file(one_model).stat().st_mode) == 0o600
    assert found.key not in repr(found)
    assert found.key not in server.log.read_text()
