"""Click options that several commands share, each defined once, and how a failure leaves the CLI."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

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


def server_options(command: F) -> F:
    """--url, --protocol and --timeout."""
    for option in (
        click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds for the call."),
        click.option(
            "--protocol", type=click.Choice(["grpc", "http"]), help="What is spoken there [default: grpc]."
        ),
        click.option(
            "--url",
            metavar="HOST:PORT",
            help="The server; else ONECARD_URL_GRPC or ONECARD_URL_HTTP, else this machine.",
        ),
    ):
        command = option(command)
    return command


def variant_options(command: F) -> F:
    """--model, --precision and --priority."""
    for option in (
        click.option("--priority", type=click.IntRange(min=0), default=0, help="1 is the most urgent."),
        click.option("--precision", metavar="NAME", help="Which variant of the model, such as int8 or fp16."),
        click.option("--model", metavar="NAME", help="Needed only when several models do this task."),
    ):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


def open_client(url: str | None, protocol: str | None, timeout: float) -> Client:
    return Client(url, protocol, timeout=timeout)


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
