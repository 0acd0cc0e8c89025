"""The commands of `build-engines` that look and change nothing: inspect, doctor, verify-digests."""

from __future__ import annotations

from pathlib import Path

import click

from build_engines.console import StageLines, console, print_json, wide_console
from build_engines.options import build_dir_option, json_option, load


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@json_option
def inspect(engine: Path, as_json: bool) -> None:
    """Show what an engine is made of: versions, card, profiles, digests, gates and layer types.

    \b
    Example:
      build-engines inspect build/demo/engines/sentiment/int8/tensorrt-rtx
    """
    from build_engines.inspection import describe_engine, render_engine

    found = describe_engine(engine)
    if as_json:
        print_json(found)
    else:
        wide_console().print(render_engine(found))


@click.command()
@click.argument("stack", type=click.Path(path_type=Path), required=False)
@build_dir_option
@click.option("--online", is_flag=True, help="Ask the hub for checkpoints that are not fetched yet.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where a server would listen.")
@click.option(
    "--ports",
    type=(click.IntRange(1, 65535), click.IntRange(1, 65535), click.IntRange(1, 65535)),
    default=(8000, 8001, 8002),
    show_default=True,
    metavar="HTTP GRPC METRICS",
    help="On which ports.",
)
@json_option
def doctor(
    stack: Path | None,
    build_dir: Path | None,
    online: bool,
    host: str,
    ports: tuple[int, int, int],
    as_json: bool,
) -> None:
    """Is everything here that building and serving need, and if not, what to do? Changes nothing.

    With STACK also its file, checkpoints, plan, engines, repository and server. Files are looked at by size
    and record, not read whole. Ends with 0 unless there is a problem, then with the exit code of its kind.

    \b
    Example:
      build-engines doctor stacks/demo.toml
      build-engines doctor --json --ports 9000 9001 9002
    """
    from build_engines import findings
    from build_engines.doctor import examine_machine
    from build_engines.doctor_stack import Examined, examine_stack
    from triton_repo.doctor import examine_server

    known = examine_stack(stack, build_dir, online=online) if stack else Examined([])
    folder = known.stack.build_dir if known.stack else build_dir or Path("build")
    found = examine_machine(folder, known.needs, known.stack, known.plan)
    found += examine_server(host, ports, known.stack) + known.findings
    if as_json:
        print_json(findings.as_dict(found))
    else:
        wide_console().print(findings.render(found))
    findings.require_no_problem(found)


@click.command("verify-digests")
@click.argument("path", metavar="STACK_OR_FOLDER", type=click.Path(exists=True, path_type=Path))
@build_dir_option
@json_option
def verify_digests(path: Path, build_dir: Path | None, as_json: bool) -> None:
    """Compare every file that was built or fetched with the digest that was recorded when it was written.

    STACK_OR_FOLDER: a stack file, whose build folder is read, or any folder that holds what was built: a
    build folder, a repository, an engine. Exit code 18 where a file is altered, missing, extra or unreadable.

    \b
    Example:
      build-engines verify-digests stacks/demo.toml
      build-engines verify-digests build/demo/repository --json
    """
    from build_engines import digests

    folder = path if path.is_dir() else load(path, build_dir).build_dir
    with StageLines() as lines:
        lines.start(folder.resolve().name, "digests")
        found = digests.verify_digests(folder, lines.progress)
    if as_json:
        print_json(found.as_dict())
    digests.require_whole(found)
    if not as_json:
        shown = f"{found.files:,} files, {found.bytes / 2**20:,.1f} MiB in {found.units} places: as written"
        console.print(f"{folder}: {shown}", markup=False, soft_wrap=True)
