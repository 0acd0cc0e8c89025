"""What the command line shows: one line per stage, a live bar while it runs, errors without a traceback."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from build_engines.errors import OnecardError
from build_engines.manifest import StageRun

# Tables keep their columns where nobody gives a width: a pipe, a log, a narrow window.
_TABLE_WIDTH = 120

# Progress and errors go to stderr: stdout is for results, so that --json can be piped.
console = Console(stderr=True, highlight=False)


class CleanErrors(click.Group):
    """Prints a user's mistake as a message and exits with its code; a fault of ours keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnecardError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; finished stages are kept", err=True)
            ctx.exit(130)


def wide_console() -> Console:
    """stdout for tables."""
    found = Console(highlight=False)
    return found if found.is_terminal and found.width >= _TABLE_WIDTH else Console(width=_TABLE_WIDTH)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


class StageLines:
    """Draws a build: a bar for the stage that runs, a line for each that is done. A context manager."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
        )
        # Where nobody watches, a bar would only leave empty lines in the log.
        self._progress = Progress(
            *columns,
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._name = ""

    def __enter__(self) -> StageLines:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, model: str, stage: str) -> None:
        self._name = f"{model:12} {stage}"
        self._task = self._progress.add_task(self._name, total=None)

    def progress(self, phase: str, done: int, total: int) -> None:
        if self._task is not None:
            description = f"{self._name}: {phase}"
            self._progress.update(self._task, description=description, completed=done, total=max(total, 1))

    def finish(self, run: StageRun, detail: str) -> None:
        self.done("unchanged" if run.skipped else f"{run.seconds:.1f} s", detail)

    def done(self, state: str, detail: str) -> None:
        """Replace the bar by a line: what was done, in which state it is, and what came of it."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        console.print(f"  {self._name:36} {state:>9}  {detail}", markup=False, soft_wrap=True)
