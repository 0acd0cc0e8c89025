"""Command line `client`: arguments in, one library call, answers out."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from . import display
from .options import (
    OneLineErrors,
    generation_options,
    json_option,
    model_options,
    open_client,
    read_lines,
    server_options,
    variant_options,
)
from .transport import Endpoint

SERVER = ("url", "protocol", "timeout", "token_file", "ca", "log_json")


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onecard")
def main() -> None:
    """Query and measure the models of a running onecard server.

    \b
    Example:
      client query classify "The noodles were excellent."
    """
    # gRPC prints what becomes one of our errors all the same.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@main.group()
def query() -> None:
    """Send texts to a model.

    \b
    Example:
      client query embed "한 문장" "another sentence" --json
    """


@query.command()
@click.argument("texts", nargs=-1)
@variant_options
@server_options
@json_option
def classify(texts: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """A label with its score for each text (arguments, or lines of standard input).

    \b
    Examples:
      client query classify "The noodles were excellent."
      client query classify --model sentiment --precision fp16 --json < reviews.txt
    """
    given = list(texts) or read_lines()
    server, variant = _split(options)
    with open_client(**server) as client:
        answers = client.classify(given, **variant)
    if as_json:
        _print_json([{"text": text, **asdict(a)} for text, a in zip(given, answers, strict=True)])
    else:
        display.print_classifications(given, answers)


@query.command()
@click.argument("texts", nargs=-1)
@variant_options
@server_options
@json_option
def embed(texts: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """A vector for each text (arguments, or lines of standard input).

    \b
    Examples:
      client query embed "The noodles were excellent."
      client query embed --json < sentences.txt > vectors.json
    """
    given = list(texts) or read_lines()
    server, variant = _split(options)
    with open_client(**server) as client:
        answers = client.embed(given, **variant)
    if as_json:
        _print_json(
            [
                {"text": text, "vector": answer.vector.tolist(), "truncated": answer.truncated}
                for text, answer in zip(given, answers, strict=True)
            ]
        )
    else:
        display.print_embeddings(given, answers)


@query.command()
@click.argument("question", metavar="QUERY")
@click.argument("passages", nargs=-1)
@variant_options
@server_options
@json_option
def rerank(question: str, passages: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Passages (arguments, or lines of standard input) by their score for QUERY, best first.

    \b
    Examples:
      client query rerank "quick delivery" "It arrived overnight." "The soup was cold."
      client query rerank "quick delivery" --json < passages.txt
    """
    given = list(passages) or read_lines()
    server, variant = _split(options)
    with open_client(**server) as client:
        answers = client.rerank(question, given, **variant)
    if as_json:
        _print_json([asdict(answer) for answer in answers])
    else:
        display.print_ranking(answers)


@query.command()
@click.argument("prompts", nargs=-1)
@click.option("--chat", "as_chat", is_flag=True, help="Each prompt is a user's message in the chat template.")
@click.option("-n", "--samples", "n", type=int, metavar="N", help="Answers to each prompt.")
@click.option("--logprobs", is_flag=True, help="Log probabilities of the tokens, in --json.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's own end.")
@generation_options
@model_options
@server_options
@json_option
def generate(prompts: tuple[str, ...], as_chat: bool, as_json: bool, **options: Any) -> None:
    """The continuation of each prompt (arguments, or lines of standard input).

    A prompt goes to the model as it is; with --chat or --system it becomes a user's message.

    \b
    Examples:
      client query generate "The soup was" --max-tokens 20
      client query generate --chat "Summarise: the noodles were cold." --system "Answer in one sentence."
      client query generate --json --temperature 0.8 --seed 1 -n 3 < prompts.txt
    """
    given = list(prompts) or read_lines()
    server, chosen = _split(options)
    with open_client(**server) as client:
        answers = client.generate(given, chat=as_chat, **chosen)
    if as_json:
        _print_json([{"prompt": text, **asdict(a)} for text, a in zip(given, answers, strict=True)])
    else:
        display.print_generations(given, answers)


@main.command()
@generation_options
@model_options
@server_options
def chat(**options: Any) -> None:
    """Talk with a model: answers come as they are generated, with their rate after each.

    /reset forgets the conversation, /system TEXT sets the system prompt, /quit or the end of input leaves;
    Ctrl-C stops an answer. Messages also come as lines of standard input; then only answers go to standard
    output.

    \b
    Examples:
      client chat
      client chat --system "Answer in Korean." --temperature 0.7
      printf 'Summarise: cold soup.\\nShorter.\\n' | client chat --max-tokens 60
    """
    from .conversation import talk

    server, chosen = _split(options)
    with open_client(**server) as client:
        talk(client, chosen)


@main.command()
@click.option("--watch", "watching", is_flag=True, help="Show rates, and again and again, until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.2),
    default=1.0,
    show_default=True,
    help="Seconds between two looks of --watch.",
)
@server_options
@json_option
def status(watching: bool, interval: float, as_json: bool, **server: Any) -> None:
    """The server's loaded models: requests, rejections, batches, times, cache hits, memory against the plan.

    Models that generate also show slots, tokens per second and cache use. Most of it comes from the models'
    metrics (ONECARD_URL_METRICS, else the usual port). --watch reads nothing else, so of the options below it
    takes --url, --protocol and --json; with --json it prints a line for each look.

    \b
    Examples:
      client status
      client status --url 127.0.0.1:8000 --protocol http --json
      client status --watch --interval 2
    """
    if watching:
        if not (as_json or sys.stdout.isatty()):
            raise click.UsageError("--watch needs a terminal; --watch --json prints lines")
        _refuse_unheeded(click.get_current_context())
        from .live import watch

        watch(Endpoint.parse(server["url"], server["protocol"]), interval, as_json)
        return
    with open_client(**server) as client:
        report = client.status()
    if as_json:
        _print_json(asdict(report))
    else:
        display.print_status(report)


@main.command()
@click.argument("summary", metavar="STACK_JSON", envvar="ONECARD_STACK_JSON", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Short points: the whole table in under two minutes.")
@click.option("--model", "models", multiple=True, metavar="NAME", help="Only this model (repeatable).")
@click.option("--seconds", type=click.FloatRange(min=0.2), help="Duration of each point [default: 5].")
@click.option(
    "--rate",
    "rates",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    metavar="PER_CENT",
    help="Open-loop rate in per cent of the measured peak (repeatable) [default: 50 and 80].",
)
@click.option(
    "--ceiling",
    "ceilings",
    multiple=True,
    metavar="MODEL:PRECISION=PER_S",
    help="What the engine alone reaches, to show beside the served rate (repeatable).",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=4),
    metavar="N",
    help="Generating models: synthetic prompts of N tokens [default: the evaluation conversations].",
)
@click.option(
    "--new-tokens", type=click.IntRange(min=4), metavar="N", help="Tokens per answer [default: 48; quick 32]."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for bench.json and report.html.",
)
@click.option(
    "--url", metavar="HOST:PORT", help="The server's gRPC address; else ONECARD_URL_GRPC, else this machine."
)
def bench(summary: Path, **settings: Any) -> None:
    """Measure the served models against Transformers in process, on the same texts, in the same run.

    STACK_JSON is the summary that `triton-repo write` leaves beside the repository; a command that
    `triton-repo serve` runs may leave it out. The last line on standard output is one JSON object, the same
    as bench.json.

    \b
    Examples:
      client bench build/demo/stack.json --quick
      client bench build/demo/stack.json --model embedder --output build/demo
      triton-repo serve stacks/demo.toml --free-ports -- client bench --quick
    """
    # Imported here: `query` and `status` need nothing of it.
    from .bench.command import run

    run(summary, settings)


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """How to reach the server, and the call's own options: those that were given."""
    server = {name: options.pop(name) for name in SERVER}
    return server, {name: value for name, value in options.items() if value is not None and value != ()}


def _refuse_unheeded(context: click.Context) -> None:
    """--watch reads the metrics alone: in plain text, so without a token, and no request that is logged."""
    names = ("timeout", "token_file", "ca", "log_json")
    given = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(
            f"--watch reads the metrics alone, in plain text and within --interval: leave out {options}"
        )


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, ensure_ascii=False))
