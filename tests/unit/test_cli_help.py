"""Every command of the three command lines explains itself."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from build_engines.cli import main as build_engines
from client.cli import main as client
from triton_repo.cli import main as triton_repo

ROOTS = {"build-engines": build_engines, "client": client, "triton-repo": triton_repo}


def _commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from _commands(below, (*path, name))


@pytest.mark.parametrize(
    "path", [path for name, root in ROOTS.items() for path in _commands(root, (name,))], ids=" ".join
)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    root, *names = path
    command: click.Command = ROOTS[root]
    for name in names:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    long, short = (
        CliRunner().invoke(ROOTS[root], [*names, flag], prog_name=root, terminal_width=200)
        for flag in ("--help", "-h")
    )
    assert (long.exit_code, short.exit_code) == (0, 0), short.output
    assert long.output == short.output
    # Click folds what is not marked to be kept: an example is a line of its own, from its first word on.
    lines = [line.strip() for line in long.output.splitlines()]
    examples = lines[next(i for i, line in enumerate(lines) if line in {"Example:", "Examples:"}) :]
    assert any(" ".join(path) in line for line in examples)
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


@pytest.mark.parametrize("name", ROOTS)
def test_every_command_line_tells_its_version(name: str) -> None:
    told = CliRunner().invoke(ROOTS[name], ["--version"], prog_name=name)
    assert told.output == f"{name}, version {importlib.metadata.version('onecard')}\n"


def test_what_is_typed_is_shown_as_it_is_typed() -> None:
    told = CliRunner().invoke(client, ["chat", "--help"], terminal_width=200).output
    assert r"printf 'Summarise: cold soup.\nShorter.\n' | client chat --max-tokens 60" in told
    assert "\n  /reset forgets" in told
