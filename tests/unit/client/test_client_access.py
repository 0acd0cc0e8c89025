"""Tokens and authorities: where they come from, where they never go."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from client import AsyncClient, Client, ClientError, InvalidInput
from client.access import Access, is_loopback, read_token
from client.cli import main
from client.transport import Endpoint

SECRET = "s3cret-" + "x" * 40
HERE, FAR, TLS = (Endpoint.parse(url) for url in ("127.0.0.1:8001", "card:8001", "grpcs://card:8443"))


def test_a_token_is_given_or_comes_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"  {SECRET}\n")
    variables = {"ONECARD_TOKEN": SECRET, "ONECARD_TOKEN_FILE": str(tmp_path / "missing")}
    assert Access.of(TLS, {"token": "given"}, variables).token == "given"
    assert Access.of(TLS, {}, variables).token == SECRET
    assert Access.of(TLS, {}, {"ONECARD_TOKEN_FILE": str(file)}).token == SECRET
    assert Access.of(TLS, {}, {"ONECARD_TOKEN": "", "ONECARD_TOKEN_FILE": ""}).token is None
    assert Access.of(TLS, {}, {}).headers() == {}
    assert Access.of(TLS, {"token": SECRET}, {}).headers("r/1") == {
        "authorization": f"Bearer {SECRET}",
        "x-request-id": "r/1",
    }


@pytest.mark.parametrize(
    ("url", "refused"),
    [
        ("127.0.0.1:8001", False),
        ("http://127.9.9.9:8000", False),
        ("[::1]:8001", False),
        ("localhost:8001", False),
        ("grpcs://card:8443", False),
        ("https://card:8443", False),
        ("card:8001", True),
        ("http://192.168.0.2:8000", True),
        ("0.0.0.0:8001", True),
        ("localhost.example.com:8001", True),
        ("http://127.0.0.1.example.com:80", True),
        ("[::ffff:10.0.0.1]:8001", True),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_over_plain_text_a_token_goes_to_this_machine_alone(url: str, refused: bool, kind: Any) -> None:
    if not refused:
        kind(url, token=SECRET)
        return
    with pytest.raises(InvalidInput, match="over plain text") as caught:
        kind(url, token=SECRET)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_one_from_the_environment_is_refused_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_TOKEN", SECRET)
    with pytest.raises(InvalidInput, match="over plain text"):
        Client("card:8001")
    monkeypatch.delenv("ONECARD_TOKEN")
    Client("card:8001")


@pytest.mark.parametrize(
    "text", ["", "two words", "line\nbreak", "über", "a:b", "x" * 5000, "-----BEGIN KEY-----\nabc\n", "a=b"]
)
def test_what_is_no_token_is_refused_without_being_shown(text: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(InvalidInput, match="does not hold one bearer token") as caught:
        read_token(file)
    assert not text or text not in str(caught.value)
    if text:
        with pytest.raises(InvalidInput, match="not a bearer token") as caught:
            Access.of(TLS, {"token": text}, {})
        assert text not in str(caught.value)
        assert caught.value.__cause__ is None


def test_a_token_file_must_be_readable_and_small(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read the token file"):
        read_token(tmp_path / "missing")
    (tmp_path / "large").write_text("a" * 10**6)
    with pytest.raises(InvalidInput, match="does not hold"):
        read_token(tmp_path / "large")


def test_a_ca_file_must_hold_certificates_and_needs_tls(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    with pytest.raises(InvalidInput, match="cannot use the CA file"):
        Access.of(TLS, {"ca": file}, {})
    file.write_text("no certificate")
    with pytest.raises(InvalidInput, match="holds no PEM certificate"):
        Access.of(TLS, {}, {"ONECARD_CA": str(file)})
    with pytest.raises(InvalidInput, match="is plain text"):
        Access.of(HERE, {"ca": file}, {})
    assert Access.of(HERE, {}, {"ONECARD_CA": str(file)}).ca is None  # nothing to check there


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="unknown option tokn"):
        Client("grpcs://card:1", tokn="a")  # type: ignore[call-arg]


def test_the_token_is_in_no_repr_error_or_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    shown = [repr(Access.of(HERE, {"token": SECRET}, {}))]
    for url in ("127.0.0.1:1", "http://127.0.0.1:1"):
        client = Client(url, token=SECRET, timeout=1)
        shown += [repr(client), str(vars(client))]
        for call in (lambda c=client: c.embed("a", model="m"), lambda c=client: c.stream("a", model="m")):
            with pytest.raises(ClientError) as caught:
                call()
            shown += traceback.format_exception(caught.value)
    shown += [caplog.text, *capfd.readouterr()]
    assert SECRET not in "".join(shown)


def test_the_command_line_takes_a_file_and_never_the_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET)
    far = ["status", "--url", "card:8001", "--token-file", str(file)]
    result = CliRunner().invoke(main, far)
    assert (result.exit_code, SECRET in result.output) == (31, False)
    assert "over plain text" in result.stderr
    refused = CliRunner().invoke(main, ["status", "--url", "127.0.0.1:1", "--token-file", str(file)])
    assert refused.exit_code == 34  # taken, and nobody there
    assert CliRunner().invoke(main, ["status", "--token", SECRET]).exit_code == 2
    missing = CliRunner().invoke(main, ["status", "--token-file", str(tmp_path / "missing")])
    assert missing.exit_code == 31
    assert missing.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("127.1", False), ("", False)]
)
def test_loopback_addresses(host: str, local: bool) -> None:
    assert is_loopback(host) is local
