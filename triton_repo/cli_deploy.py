"""`triton-repo deploy` and `rollback`: replace models of a running server, and go back."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from build_engines.errors import StackError

if TYPE_CHECKING:
    from build_engines.stack import Precision, Stack
    from triton_repo.deploy import Outcome, Rollout
    from triton_repo.engine_entries import Entry

ready_timeout_option = click.option(
    "--ready-timeout",
    type=click.FloatRange(min=1),
    default=300,
    show_default=True,
    help="Seconds that a model may take to be ready.",
)
_STOPS = (signal.SIGTERM, signal.SIGHUP)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")


@click.command()
@click.argument("stack", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", help="Only this model of the stack.")
@click.option("--precision", help="Serve this precision under the model's own name; needs --model.")
@click.option(
    "--build-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the engines are [default: build/<stack name>].",
)
@click.option(
    "--repository",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="What the server serves [default: <build dir>/repository].",
)
@ready_timeout_option
@json_option
def deploy(stack: Path, model: str | None, precision: str | None, as_json: bool, **options: Any) -> None:
    """Replace the models of a running server by the engines that are built now, without losing a request.

    A model that has not changed stays as it is. A new version takes over when it is loaded, has answered its
    golden requests as it did where it was built, and is warmed up; if anything of that fails the old one
    serves on. Then the old one answers what it has begun and is unloaded.

    \b
    Examples:
      triton-repo deploy stacks/demo.toml
      triton-repo deploy stacks/demo.toml --model sentiment --precision fp16
    """
    from build_engines.stack import load_stack

    if precision and not model:
        raise click.UsageError("--precision needs --model: it is about one model")
    loaded = load_stack(stack, build_dir=options["build_dir"])
    repository = options["repository"] or loaded.build_dir / "repository"
    chosen = _chosen(loaded, model, precision)

    def outcomes(rollout: Rollout) -> Iterator[Outcome]:
        entries = _entries(chosen, repository)
        # With a precision nothing but the model's own name changes hands.
        return rollout.deploy(chosen, entries, lambda name: not precision and model in (None, name))

    _run(repository, options["ready_timeout"], outcomes, as_json=as_json)


@click.command()
@click.argument("repository", type=click.Path(exists=True, path_type=Path))
@click.option("--model", help="Only this model [default: all that were deployed together last].")
@ready_timeout_option
@json_option
def rollback(repository: Path, model: str | None, ready_timeout: float, as_json: bool) -> None:
    """Go back to the versions before the last deploy of REPOSITORY (a folder, or a stack file).

    No request is lost. The version before is kept on disk, one for each model. It is probed like any other.

    \b
    Examples:
      triton-repo rollback stacks/demo.toml
      triton-repo rollback build/demo/repository --model sentiment
    """
    _run(repository_of(repository), ready_timeout, lambda rollout: rollout.rollback(model), as_json=as_json)


def repository_of(path: Path) -> Path:
    """A repository's folder, given as such or by its stack file."""
    if path.is_dir():
        return path
    from build_engines.stack import load_stack

    return load_stack(path).build_dir / "repository"


def _chosen(stack: Stack, model: str | None, precision: str | None) -> Stack:
    """The part of the stack that is deployed. Raises StackError for a model or precision that it has not."""
    if model is None:
        return stack
    if model not in stack.models:
        raise StackError(
            f"the stack has no model called {model!r}", next_step=f"one of: {', '.join(stack.models)}"
        )
    chosen = stack.models[model]
    if precision:
        built = sorted(path.name for path in (stack.build_dir / "engines" / model).glob("*/"))
        if precision not in built:
            raise StackError(
                f"no engine of {model!r} was built in {precision!r}, only in: {', '.join(built) or 'none'}",
                next_step=f"add it to precisions in [models.{model}], then: build-engines build {stack.path}",
            )
        chosen = replace(chosen, precisions=(cast("Precision", precision),))
    return replace(stack, models={model: chosen})


def _entries(stack: Stack, repository: Path) -> list[Entry]:
    """The engines of the target that is served already."""
    from triton_repo.engine_entries import find_entries
    from triton_repo.versions import served_versions

    served = {
        str(model.manifest(model.version)["target"])
        for model in served_versions(repository)
        if (model.path(model.version) / "manifest.json").exists()
    }
    own = {model.target for model in stack.models.values() if model.target}
    targets = [target for target in stack.targets if target in served - own]
    return find_entries(stack, stack.build_dir / "engines", targets[0] if targets else stack.targets[0])


def _run(
    repository: Path,
    ready_timeout: float,
    outcomes: Callable[[Rollout], Iterator[Outcome]],
    *,
    as_json: bool,
) -> None:
    from rich.console import Console

    from triton_repo.control import Control
    from triton_repo.deploy import Rollout
    from triton_repo.running import read_running

    control = Control(read_running(repository))
    console = Console(stderr=True, highlight=False, markup=False)
    found = []
    try:
        with _stopped_in_order(), console.status("looking at the server") as status:
            rollout = Rollout(repository, control, status.update, ready_timeout_s=ready_timeout)
            for outcome in outcomes(rollout):
                found.append(outcome)
                console.print(_line(outcome), soft_wrap=True)
    finally:
        control.close()
    if as_json:
        click.echo(
            json.dumps(
                {"repository": str(repository.absolute()), "models": [outcome.as_dict() for outcome in found]}
            )
        )


@contextlib.contextmanager
def _stopped_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP as an interrupt: what was begun is taken back."""
    # One that is ignored stays so (nohup).
    previous = {number: signal.getsignal(number) for number in _STOPS}
    heard = [number for number in _STOPS if previous[number] is not signal.SIG_IGN]

    def stop(signum: int, frame: object) -> None:
        # A second one must not interrupt that.
        for number in heard:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, previous[number])


def _line(outcome: Outcome) -> str:
    name, old, new = outcome.name, outcome.old, outcome.new
    if outcome.action == "keep":
        return f"{name}: version {old} is what is built"
    left = f"version {old} still answers what it has begun"
    if outcome.drain_s is not None:
        left = f"version {old} drained in {outcome.drain_s:.1f} s"
    if outcome.action == "remove":
        return f"{name}: unloaded; {left}"
    asked = (
        f"{outcome.probed} of {outcome.golden} golden requests over the network in {outcome.probe_s:.1f} s"
    )
    if not outcome.golden:
        asked = "no golden requests were recorded where it was built"
    elif outcome.probed < outcome.golden:
        asked += " (the server had no room for more)"
    taken = f"ready after {outcome.load_s:.1f} s, {asked}"
    if old is None:
        return f"{name}: version {new}; {taken}"
    return f"{name}: version {old} -> {new}; {taken}; {left}"
