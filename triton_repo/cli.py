"""Command line `triton-repo`: write a model repository, serve it, say how to serve it in a container."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from build_engines import __version__
from build_engines.errors import OnecardError, ServerError
from triton_repo.cli_deploy import deploy, ready_timeout_option, repository_of, rollback
from triton_repo.container import IMAGE, docker_command
from triton_repo.ports import Ports
from triton_repo.server import Server, ServerOptions

if TYPE_CHECKING:
    from triton_repo.supervisor import Supervisor

_POLL_S = 0.1


class _Group(click.Group):
    """Prints an OnecardError as text, without a traceback, and exits with its class's code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnecardError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(130)


class _Terminated(Exception):
    """SIGTERM arrived: stop in order."""


def _port_option(service: str, default: int, words: str) -> Callable[..., Any]:
    kind = click.IntRange(1, 65535)
    return click.option(f"--{service}-port", type=kind, default=default, show_default=True, help=words)


def _server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options shared by every command that is about a server."""
    defaults = Ports()
    for option in (
        click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
        _port_option("http", defaults.http, "Port for HTTP, health too."),
        _port_option("grpc", defaults.grpc, "Port for gRPC."),
        _port_option("metrics", defaults.metrics, "Port for Prometheus."),
    ):
        command = option(command)
    return command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Engines into a Triton model repository, and a running Triton server.

    \b
    Example:
      triton-repo write stacks/demo.toml
      triton-repo serve stacks/demo.toml --free-ports -- client status
    """


@main.command()
@click.argument("stack", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--build-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the engines are [default: build/<stack name>].",
)
@click.option(
    "--target",
    help="Which engines to serve [default: onnxruntime if the stack names it, else its first].",
)
@click.option("--native", is_flag=True, help="Triton's TensorRT backend runs the encoders (target tensorrt).")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Replaced as a whole [default: <build dir>/repository].",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def write(stack: Path, target: str | None, as_json: bool, **options: Any) -> None:
    """Write the model repository of a stack whose engines are built.

    \b
    Examples:
      triton-repo write stacks/demo.toml --target tensorrt-rtx
      triton-repo write stacks/demo.toml --target tensorrt --native
    """
    from build_engines.stack import TARGETS, load_stack
    from triton_repo.writer import not_judged, write_repository

    if target not in (None, *TARGETS):
        raise click.BadParameter(f"{target!r} is not one of {', '.join(TARGETS)}", param_hint="--target")
    resolved = load_stack(stack, build_dir=options["build_dir"])
    if target is None:
        target = "onnxruntime" if "onnxruntime" in resolved.targets else resolved.targets[0]
    engines = resolved.build_dir / "engines"
    out = options["out"] or resolved.build_dir / "repository"
    repository = write_repository(resolved, engines, out, target=target, native=options["native"])
    models = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if as_json:
        click.echo(json.dumps({"repository": str(repository.absolute()), "models": models}))
    else:
        click.echo(f"{repository}: {', '.join(models)}")
    if names := not_judged(repository):
        click.echo(
            f"not judged on a GPU yet: {', '.join(names)} (their graphs were; build again where the card is)",
            err=True,
        )


@main.command(context_settings={"ignore_unknown_options": False})
@click.argument("repository", type=click.Path(exists=True, path_type=Path))
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@_server_options
@click.option("--free-ports", is_flag=True, help="Take any free ports instead.")
@ready_timeout_option
@click.option(
    "--log",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file [default: tritonserver.log beside the repository].",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: one object a line, with request ids.",
)
@click.option(
    "--exit-timeout",
    type=click.FloatRange(min=0),
    default=10,
    show_default=True,
    help="Seconds that requests in flight get when the server is told to stop.",
)
@click.option("--supervise", is_flag=True, help="Bring a dead server back, up to 4 times in 10 minutes.")
@click.option(
    "--tritonserver",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The binary to run [default: the one on PATH, else that of nvidia-pytriton].",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object once ready, and at each restart.")
def serve(repository: Path, command: tuple[str, ...], supervise: bool, as_json: bool, **options: Any) -> None:
    """Serve REPOSITORY (a folder, or a stack file whose repository is written) until interrupted.

    With a COMMAND after `--`, run it once the server is ready, with ONECARD_URL_HTTP, ONECARD_URL_GRPC,
    ONECARD_URL_METRICS (host:port), ONECARD_SERVER_PID and ONECARD_STACK_JSON (what is served) in its
    environment; then stop the server and exit with the command's code.

    \b
    Examples:
      triton-repo serve build/demo/repository --supervise --log-format json
      triton-repo serve stacks/demo.toml --free-ports -- client bench --quick
    """
    server_options = ServerOptions(
        host=options["host"],
        ports=Ports(options["http_port"], options["grpc_port"], options["metrics_port"]),
        free_ports=options["free_ports"],
        ready_timeout_s=options["ready_timeout"],
        exit_timeout_s=options["exit_timeout"],
        log=options["log"],
        log_format=options["log_format"],
        binary=options["tritonserver"],
    )
    server = Server(repository_of(repository), server_options)
    keeper = _supervisor(server, as_json=as_json) if supervise else None
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        started = time.monotonic()
        _start(server)
        _announce(server, time.monotonic() - started, as_json=as_json)
        code = _run_command(server, command, keeper) if command else _wait(server, keeper)
    except _Terminated:
        code = 0
    finally:
        # A second SIGTERM must not interrupt the stop.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        server.stop()
        signal.signal(signal.SIGTERM, previous)
    sys.exit(code)


@main.command()
@click.argument("repository", type=click.Path(exists=True, path_type=Path))
@_server_options
@click.option("--image", help=f"NVIDIA's tritonserver image [default: {IMAGE}].")
def container(repository: Path, image: str | None, **options: Any) -> None:
    """Print the docker command that serves REPOSITORY on a GPU machine.

    \b
    Example:
      triton-repo container build/demo/repository
    """
    ports = Ports(options["http_port"], options["grpc_port"], options["metrics_port"])
    chosen = ServerOptions(host=options["host"], ports=ports)
    click.echo(shlex.join(docker_command(repository_of(repository), chosen, image)))


def _start(server: Server) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading models", total=len(server.models))
        server.start(lambda ready, total: progress.update(task, completed=ready, total=total))


def _announce(server: Server, seconds: float, *, as_json: bool) -> None:
    """Where it listens. For people on stderr, so that a COMMAND's output stays alone on stdout."""
    words = shlex.join(docker_command(server.repository, server.options))
    if as_json:
        click.echo(json.dumps(_ready(server, seconds) | {"container": words}))
        return
    click.echo(f"ready after {seconds:.1f} s: {', '.join(sorted(server.models))}", err=True)
    click.echo("  ".join(f"{name} {url}" for name, url in server.urls.items()), err=True)
    click.echo(f"log {server.log}", err=True)
    click.echo(f"in NVIDIA's container: {words}", err=True)


def _ready(server: Server, seconds: float) -> dict[str, Any]:
    return {
        "event": "ready",
        "pid": server.pid,
        "urls": server.urls,
        "models": sorted(server.models),
        "log": str(server.log),
        "ready_s": round(seconds, 2),
    }


def _supervisor(server: Server, *, as_json: bool) -> Supervisor:
    from triton_repo.supervisor import Restart, Supervisor

    def announce(restart: Restart) -> None:
        if restart.ready_s is None:
            click.echo(f"{restart.fault.message}: starting again in {restart.delay_s:.1f} s", err=True)
            record = {"event": "restart", "number": restart.number, "reason": restart.fault.message}
            record |= {"delay_s": restart.delay_s}
        else:
            click.echo(f"ready again {restart.down_s:.1f} s after that was noticed", err=True)
            record = _ready(server, restart.ready_s) | {"down_s": round(restart.down_s, 2)}
        if as_json:
            click.echo(json.dumps(record))

    return Supervisor(server, announce)


def _watch(server: Server, keeper: Supervisor | None) -> None:
    """Have a server that no longer serves brought back, or raise why it does not."""
    fault = keeper.fault() if keeper else server.fault()
    if fault and keeper:
        keeper.recover(fault)
    elif fault:
        raise fault


def _wait(server: Server, keeper: Supervisor | None) -> NoReturn:
    while True:
        time.sleep(_POLL_S)
        _watch(server, keeper)


def _run_command(server: Server, command: tuple[str, ...], keeper: Supervisor | None) -> int:
    environment = dict(os.environ)
    environment |= {f"ONECARD_URL_{name.upper()}": url for name, url in server.urls.items()}
    environment["ONECARD_SERVER_PID"] = str(server.pid)
    environment["ONECARD_STACK_JSON"] = str(server.repository.absolute().parent / "stack.json")
    # As if the virtual environment were activated: `client` is found there.
    scripts = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([scripts, environment.get("PATH", os.defpath)])
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        raise ServerError(f"cannot run {command[0]}: {error.strerror}") from None
    try:
        while True:
            try:
                code = process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                _watch(server, keeper)
                continue
            return code if code >= 0 else 128 - code
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _terminate(signum: int, frame: object) -> None:
    raise _Terminated


main.add_command(deploy)
main.add_command(rollback)

if __name__ == "__main__":
    main()
