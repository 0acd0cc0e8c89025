"""Addresses, and what importing the client costs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import client
from client import InvalidInput
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
    ],
)
def test_bad_addresses_are_named(url: str, protocol: str | None) -> None:
    with pytest.raises(InvalidInput, match=r"cannot use|contradicts|must be grpc or http"):
        Endpoint.parse(url, protocol, {})


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
