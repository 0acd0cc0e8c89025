"""Addresses, and what importing the client costs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

import client
from client import InvalidInput, metrics
from client.cli import main
from client.transport import Endpoint

HEAVY = ["torch", "transformers", "onnxruntime", "matplotlib", "pandas", "sentence_transformers"]


@pytest.mark.parametrize(
    ("url", "protocol", "expected"),
    [
        ("host:1", None, "grpc://host:1"),
        ("host:1", "http", "http://host:1"),
        ("http://host:1/", None, "http://host:1"),
        ("https://host:1/triton", "http", "https://host:1/triton"),
        ("grpcs://host:1", "grpc", "grpcs://host:1"),
        ("[::1]:8001", None, "grpc://[::1]:8001"),
        (None, None, "grpc://from-environment:1"),
        (None, "http", "http://127.0.0.1:8000"),
    ],
)
def test_addresses(url: str | None, protocol: str | None, expected: str) -> None:
    environment = {"ONECARD_URL_GRPC": "from-environment:1"}
    assert Endpoint.parse(url, protocol, environment).url == expected


@pytest.mark.parametrize(
    ("url", "protocol"),
    [
        ("host", None),
        ("host:port", None),
        ("host:0", None),
        ("host:99999", None),
        (":80", None),
        ("ftp://host:1", None),
        ("http://host:1", "grpc"),
        ("grpc://host:1", "http"),
        ("host:1", "carrier pigeon"),
        ("[::1:8001", None),
        ("::1:8001", None),
        ("[host]:8001", None),
        ("host:8001:8002", None),
        ("host:²", None),
        ("host: 8001", None),
        ("my host:8001", None),
        ("host\r\n:8001", None),
        ("http://user@127.0.0.1:80", None),
        ("http://host:1/a b", None),
        ("http://host:1/?a", None),
        ("http://[::1", None),
        ("host:" + "1" * 5000, None),
        ("host:1/path", None),
    ],
)
def test_bad_addresses_are_named(url: str, protocol: str | None) -> None:
    with pytest.raises(InvalidInput, match=r"cannot use|contradicts|must be grpc or http"):
        Endpoint.parse(url, protocol, {})


@pytest.mark.parametrize("command", [["status"], ["query", "embed", "good"], ["status", "--watch", "--json"]])
@pytest.mark.parametrize("url", ["[::1", "host:8001:8002", "http://host:1/a b", "host:²"])
def test_a_bad_address_is_one_line(command: list[str], url: str) -> None:
    for result in (
        CliRunner().invoke(main, [*command, "--url", url]),
        CliRunner(env={"ONECARD_URL_GRPC": url}).invoke(main, command),
    ):
        assert result.exit_code == InvalidInput.exit_code
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: cannot use {url!r}")
        assert "host:port" in line


BAD_METRICS = [
    "http://[::1",
    "my host:8002",
    "host:8002:8003",
    "host:port",
    "host",
    "https://host:1",
    "http://host:1/x",
]


@pytest.mark.parametrize("address", BAD_METRICS)
def test_a_bad_address_of_the_metrics_is_named_with_its_variable(address: str) -> None:
    with pytest.raises(InvalidInput, match=r"cannot use ONECARD_URL_METRICS=.*; set it to host:port"):
        metrics.address_for(Endpoint.parse("host:8001"), {"ONECARD_URL_METRICS": address})
    assert metrics.read(address).error
    watched = CliRunner(env={"ONECARD_URL_METRICS": address}).invoke(main, ["status", "--watch", "--json"])
    assert watched.exit_code == InvalidInput.exit_code
    assert len(watched.stderr.splitlines()) == 1


def test_the_metrics_address_may_have_a_scheme() -> None:
    found = metrics.address_for(Endpoint.parse("host:1"), {"ONECARD_URL_METRICS": "http://[::1]:8002/"})
    assert found == "[::1]:8002"


def test_importing_the_client_and_its_cli_loads_no_model_library() -> None:
    code = "import sys, json, client, client.cli; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not set(HEAVY) & set(loaded)
    assert "tritonclient" not in loaded  # opened with the first connection
    ours = {name.partition(".")[0] for name in loaded}
    assert not ours & {"build_engines", "calibration", "triton_repo"}


def test_a_transport_loads_no_model_library_either() -> None:
    code = (
        "import sys, json; from client import Client, AsyncClient\n"
        "Client('h:1'); Client('http://h:1'); AsyncClient('h:1')\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not set(HEAVY) & set(loaded)


def test_exported_names_are_sorted_and_exist() -> None:
    assert client.__all__ == sorted(client.__all__)
    assert all(hasattr(client, name) for name in client.__all__)
