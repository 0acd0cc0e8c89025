"""`client chat`: reads messages, prints answers as they come, keeps the conversation."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from .client import Client
from .display import printable
from .errors import ClientError
from .streams import Stream
from .types import Message

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit leaves"
_COMMAND = re.compile(r"/[a-z]+")


def talk(client: Client, options: dict[str, Any]) -> None:
    """One conversation, until /quit or the end of standard input. What is no answer goes to standard error.

    A failure ends it when the messages come from a pipe; at a terminal it is said, and the message is
    forgotten.
    """
    terminal = sys.stdin.isatty()
    conversation = Conversation(client, options)
    if terminal:
        _say(f"{HELP}; Ctrl-C stops an answer")
    for line in _terminal_lines() if terminal else _piped_lines():
        if not line.strip():
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return
        try:
            if not conversation.command(word, rest.strip()):
                conversation.answer(line)
        except ClientError as error:
            if not terminal:
                raise
            _say(f"error: {' '.join(str(error).split())}")


class Conversation:
    def __init__(self, client: Client, options: dict[str, Any]) -> None:
        self._client = client
        self._options = options
        self._messages: list[Message] = []

    def command(self, word: str, rest: str) -> bool:
        """Whether `word` began a command; then it is done, or said to be none."""
        if word == "/reset":
            self._messages.clear()
            _say("the conversation is forgotten")
        elif word == "/system":
            self._options["system"] = rest or None
            _say("the system prompt is set" if rest else "there is no system prompt now")
        elif _COMMAND.fullmatch(word):
            _say(f"no command {word}: {HELP}")
        else:
            return False
        return True

    def answer(self, text: str) -> None:
        """Stream the answer to `text`; an interrupt keeps what has come. A failure leaves all as it was."""
        asked: Message = {"role": "user", "content": text}
        start = time.perf_counter()
        with self._client.chat_stream([*self._messages, asked], **self._options) as stream:
            first, rate, stopped = _print_pieces(stream)
        answer = stream.generation
        if answer.text.strip():  # what is blank could not be sent back with the next message
            self._messages += [asked, {"role": "assistant", "content": answer.text}]
        facts = [f"{len(answer.token_ids)} tokens"]
        if rate is not None:
            facts.append(f"{rate:.1f} tokens/s")
        if first:
            facts.append(f"first after {(first - start) * 1e3:.0f} ms")
        if answer.usage and answer.usage.cached_tokens:
            facts.append(f"{answer.usage.cached_tokens} of {answer.usage.prompt_tokens} prompt tokens cached")
        if stopped:
            facts.append("stopped")
        elif answer.finish_reason == "length":
            facts.append("cut off: --max-tokens or the model's room is used up")
        _say(f"[{', '.join(facts)}]")


def _print_pieces(stream: Stream) -> tuple[float, float | None, bool]:
    """When the first token came (0 for never), tokens per second after that piece, and whether an interrupt
    stopped the answer."""
    first = last = 0.0
    tokens, stopped = 0, False
    try:
        for delta in stream:
            if delta.token_ids:
                last = time.perf_counter()
                tokens += len(delta.token_ids) if first else 0
                first = first or last
            click.echo(printable(delta.text), nl=False)
    except KeyboardInterrupt:
        stopped = True
        stream.close()
    finally:
        click.echo()
    return first, tokens / (last - first) if tokens else None, stopped


def _terminal_lines() -> Iterator[str]:
    # Imported for its effect: arrow keys and history in input().
    import readline  # noqa: F401

    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo("\n/quit leaves", err=True)


def _piped_lines() -> Iterator[str]:
    """Line by line, so that another program may wait for an answer before it writes on."""
    for number, line in enumerate(iter(sys.stdin.buffer.readline, b""), start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise click.UsageError(f"line {number} of standard input is not UTF-8: {error.reason}") from None


def _say(text: str) -> None:
    click.echo(text, err=True)
