"""Options and arguments that several commands of `build-engines` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from build_engines.stack import Stack

stack_argument = click.argument("stack", type=click.Path(path_type=Path))
build_dir_option = click.option(
    "--build-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where everything is written [default: build/<stack name>].",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
offline_option = click.option("--offline", is_flag=True, help="Use only what is on this disk already.")


def load(path: Path, build_dir: Path | None) -> Stack:
    from build_engines.stack import load_stack

    return load_stack(path, build_dir=build_dir)
