"""The command line without a server: help, usage errors, exit codes, one line per error."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from client.cli import main

REFUSED = "127.0.0.1:1"


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    for name, command in group.commands.items():
        found += commands(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


@pytest.mark.parametrize("path", commands(main), ids=" ".join)
def test_every_command_has_an_example(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*path, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"  client {' '.join(path)}".rstrip() in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["query", "classify", "a", "--url", REFUSED], 34, "cannot reach"),
        (["query", "classify", "a", "--url", f"http://{REFUSED}"], 34, "cannot reach"),
        (["query", "embed", "a", "--url", "nowhere"], 31, "write host:port"),
        (["query", "embed", "", "--url", REFUSED], 31, "text 0 is empty"),
        (["query", "embed", "a\udcff", "--url", REFUSED], 31, "lone surrogate"),
        (["query", "rerank", "", "a", "--url", REFUSED], 31, "query is empty"),
        (["query", "embed", "a", "--timeout", "0"], 31, "timeout must be"),
        (["status", "--url", REFUSED], 34, "cannot reach"),
        (["bench", "/nowhere/stack.json"], 38, "no such file"),
    ],
)
def test_errors_are_one_line_with_their_own_exit_code(arguments: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_standard_input_must_hold_utf8_lines() -> None:
    result = CliRunner().invoke(main, ["query", "embed"], input=b"good\nbad \xff\n")
    assert result.exit_code == 2
    assert "line 2 of standard input is not UTF-8" in result.stderr
    result = CliRunner().invoke(main, ["query", "embed"], input=b"\n \n")
    assert result.exit_code == 2
    assert "holds no text" in result.stderr


def test_bench_says_when_the_server_is_not_there_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "e.jsonl").write_text('{"text": "a"}\n', "utf-8")
    summary = tmp_path / "stack.json"
    model = {
        "task": "embed",
        "source": str(tmp_path),
        "variants": {"int8": "m"},
        "max_length": 8,
        "evaluation": str(tmp_path / "e.jsonl"),
    }
    summary.write_text(json.dumps({"models": {"m": model}}), "utf-8")
    monkeypatch.setattr("client.bench.command.check_installed", lambda packages: None)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"127.0.0.1:{unused.getsockname()[1]}"
        result = CliRunner().invoke(main, ["bench", str(summary), "--url", url, "--quick"])
    assert result.exit_code == 34, result.output
    assert result.stderr.count("\n") == 1
