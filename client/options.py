"""Click options that several commands share, each defined once, and how a failure leaves the CLI."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from . import records
from .access import read_token
from .client import Client
from .errors import ClientError

F = TypeVar("F", bound=Callable[..., Any])


class OneLineErrors(click.Group):
    """A group whose commands end with one line on standard error and the error's own exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ClientError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


_priority = click.option(
    "--priority", type=click.IntRange(min=0), default=0, help="1 is the most urgent, 0 the model's default."
)


def server_options(command: F) -> F:
    """How the server is reached, and where requests are logged."""
    for option in (
        click.option(
            "--log-json",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Append a line of JSON for each request: id, model, time, outcome; no text.",
        ),
        click.option(
            "--ca",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="PEM file of the authorities to trust [default: ONECARD_CA, else the system's].",
        ),
        click.option(
            "--token-file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A file that holds a bearer token [default: ONECARD_TOKEN, ONECARD_TOKEN_FILE].",
        ),
        click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds for the call."),
        click.option(
            "--protocol", type=click.Choice(["grpc", "http"]), help="What is spoken there [default: grpc]."
        ),
        click.option(
            "--url",
            metavar="HOST:PORT",
            help="The server, with grpcs:// or https:// for TLS; else ONECARD_URL_GRPC or ONECARD_URL_HTTP, "
            "else this machine.",
        ),
    ):
        command = option(command)
    return command


def variant_options(command: F) -> F:
    """--model, --precision and --priority."""
    for option in (
        _priority,
        click.option("--precision", metavar="NAME", help="Which variant of the model, such as int8 or fp16."),
        click.option("--model", metavar="NAME", help="Needed only when several models do this task."),
    ):
        command = option(command)
    return command


def generation_options(command: F) -> F:
    """What shapes an answer; each left out is the server's default."""
    for option in (
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text (repeatable)."),
        click.option("--seed", type=int, metavar="N", help="Makes a sampled answer repeatable."),
        click.option("--repetition-penalty", type=float, metavar="X", help="Above 1 discourages repeating."),
        click.option("--min-p", type=float, metavar="X", help="Drop tokens below this share of the best."),
        click.option("--top-p", type=float, metavar="X", help="Keep the likeliest tokens up to this share."),
        click.option("--top-k", type=int, metavar="N", help="Keep the N likeliest tokens; 0 keeps all."),
        click.option("--temperature", type=float, metavar="X", help="0 is greedy."),
        click.option("--max-tokens", type=int, metavar="N", help="Length of the answer at most."),
        click.option("--system", metavar="TEXT", help="A system prompt."),
    ):
        command = option(command)
    return command


def model_options(command: F) -> F:
    """--model, --precision and --priority for models that generate."""
    for option in (
        _priority,
        click.option("--precision", metavar="NAME", help="Which variant of the model, such as int8-weights."),
        click.option("--model", metavar="NAME", help="Needed only when several models generate."),
    ):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


def open_client(
    url: str | None,
    protocol: str | None,
    timeout: float,
    token_file: Path | None,
    ca: Path | None,
    log_json: Path | None,
) -> Client:
    token = read_token(token_file) if token_file else None
    client = Client(url, protocol, timeout=timeout, token=token, ca=ca)
    if log_json is not None:
        log_to(log_json)
    return client


def log_to(path: Path) -> None:
    """Every request of this process, also those that succeed."""
    try:
        handler = records.JsonLines(path)
    except OSError as error:
        raise click.UsageError(f"--log-json {path}: {error.strerror}") from None
    records.LOGGER.addHandler(handler)
    records.LOGGER.setLevel(logging.DEBUG)


def read_lines() -> list[str]:
    """The lines of standard input that are not blank; one that is not UTF-8 is an error with its number."""
    stream = sys.stdin.buffer
    if stream.isatty():
        raise click.UsageError("give the texts as arguments, or one per line on standard input")
    lines = []
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise click.UsageError(f"line {number} of standard input is not UTF-8: {error.reason}") from None
        if text.strip():
            lines.append(text)
    if not lines:
        raise click.UsageError("standard input holds no text")
    return lines
