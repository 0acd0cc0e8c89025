"""`make flagship`: an LLM of 10.8 billion parameters through the pipeline, at full size, on a small machine.

The checkpoint has EEVE-Korean-10.8B's shape and random BF16 weights, so nothing is fetched. It then goes the
way of every stack, by the pipeline's own stages: INT8 with its gate in one streamed pass, the graph, the
engine for compute capability 12.0. Every step is a process of its own, so that its memory peak is its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from build_engines.errors import ArtifactError, OnecardError
from build_engines.random_model import RandomLlama, write_random_llm

if TYPE_CHECKING:
    from rich.console import RenderableType

EEVE: Final = RandomLlama(
    layers=48,
    hidden=4096,
    ffn=14336,
    heads=32,
    kv_heads=8,
    vocabulary=40960,
    positions=4096,
    tied=False,
)
SLOTS: Final = 6
CAPACITY: Final = 2048
MOST_SECONDS: Final = 15 * 60
_GB: Final = 1_000_000_000
_SHARD: Final = 5 * _GB
_MODEL: Final = "assistant"
_STEPS: Final = {
    "checkpoint": "write the checkpoint",
    "graph": "INT8, its gate, the graph",
    "engine": "compile for 12.0",
}


@dataclass(frozen=True, slots=True)
class Step:
    """What one process took: bytes it wrote, and the peaks of its anonymous memory (sampled) and of all
    that was resident, mapped files too (the kernel's own count).
    """

    name: str
    seconds: float
    anonymous: int
    resident: int
    written: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.name,
            "seconds": round(self.seconds, 1),
            "peak_anonymous_bytes": self.anonymous,
            "peak_resident_bytes": self.resident,
            "written_bytes": self.written,
        }


def run_flagship(folder: Path, shape: RandomLlama = EEVE) -> list[Step]:
    """Checkpoint, graph and engine in `folder`; what is there already, and made from the same, is kept.

    Raises:
        ArtifactError: too little disk, before anything is written; or a step failed or was killed.
    """
    check_disk(folder, shape)
    folder.mkdir(parents=True, exist_ok=True)
    return [_run_step(step, folder, shape) for step in _STEPS]


def needed_bytes(shape: RandomLlama) -> int:
    """Disk for all of it: BF16 checkpoint, INT8 codes beside the graph that is written from them, engine.

    The codes go when the graph is written, so the engine takes no more than their place.
    """
    width, narrow = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    layer = 2 * width * width + 2 * width * narrow + 3 * width * shape.ffn
    table = shape.vocabulary * width
    checkpoint = 2 * (shape.layers * layer + 2 * table)
    graph = shape.layers * layer + 3 * table
    return int(checkpoint + 2 * 1.02 * graph) + _GB


def check_disk(folder: Path, shape: RandomLlama) -> None:
    """Raise ArtifactError unless there is room for what is not in `folder` yet."""
    needed = needed_bytes(shape)
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    present = _size(folder)
    if free + present < needed:
        raise ArtifactError(
            f"{folder} needs {needed / _GB:.0f} GB of disk, and {(free + present) / _GB:.1f} GB are free",
            cause="the checkpoint takes half of it; graph and engine take a quarter each",
            next_step="free some, or name a folder on another disk: build-engines flagship FOLDER",
        )


def _run_step(step: str, folder: Path, shape: RandomLlama) -> Step:
    before, started = _size(folder), time.monotonic()
    command = [sys.executable, "-m", "build_engines.flagship", step, str(folder), json.dumps(asdict(shape))]
    process = subprocess.Popen(command)
    anonymous = resident = 0
    try:
        while process.poll() is None:
            now, peak = _memory(process.pid)
            anonymous, resident = max(anonymous, now), max(resident, peak)
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        killed = process.returncode == -9
        raise ArtifactError(
            f"the step {_STEPS[step]!r} {'was killed' if killed else 'failed'} after "
            f"{time.monotonic() - started:.0f} s, with {resident / _GB:.1f} GB resident",
            cause="the machine ran out of memory" if killed else "its own message is above",
            next_step="run the same command again: finished steps are kept",
        )
    return Step(step, time.monotonic() - started, anonymous, resident, max(0, _size(folder) - before))


def _memory(process: int) -> tuple[int, int]:
    """Anonymous bytes now and the largest resident set so far (Linux); zeros once the process is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return found.get("RssAnon", 0), found.get("VmHWM", 0)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


# --- the steps, each in its process ---


def _write_checkpoint(folder: Path, shape: RandomLlama) -> None:
    from build_engines.console import StageLines

    started = time.monotonic()
    with StageLines() as lines:
        lines.start(_MODEL, "checkpoint")
        write_random_llm(
            folder / "checkpoint",
            shape,
            shard_bytes=_SHARD,
            progress=lambda share: lines.progress("write", round(1000 * share), 1000),
        )
        lines.done(f"{time.monotonic() - started:.1f} s", f"{_size(folder / 'checkpoint') / _GB:.2f} GB")


def _build(folder: Path, targets: tuple[str, ...]) -> None:
    """The stack in `folder` through the pipeline, up to the typed graph or to the engines of `targets`."""
    from build_engines.console import StageLines
    from build_engines.pipeline import build_stack
    from build_engines.stack import load_stack

    stack = load_stack(write_stack(folder), build_dir=folder / "build")
    with StageLines() as lines:
        build_stack(stack, lines, targets=targets)


def write_stack(folder: Path) -> Path:
    """The stack file of the checkpoint in `folder`."""
    path = folder / "flagship.toml"
    path.write_text(
        f"""card = "rtx-5070-ti"
targets = ["tensorrt-rtx"]

[models.{_MODEL}]
task = "generate"
source = "./checkpoint"
precisions = ["int8-weights"]
slots = {SLOTS}
max_length = {CAPACITY}
evaluation = "bundled:conversations:evaluation"
calibration = {{ data = "bundled:conversations:calibration" }}
""",
        encoding="utf-8",
    )
    return path


_RUN: Final[dict[str, Callable[[Path, RandomLlama], None]]] = {
    "checkpoint": _write_checkpoint,
    "graph": lambda folder, _shape: _build(folder, ()),
    "engine": lambda folder, _shape: _build(folder, ("tensorrt-rtx",)),
}


def render_steps(steps: list[Step], folder: Path) -> RenderableType:
    """The table that `build-engines flagship` prints, and how long export, INT8 and compile took."""
    from rich.console import Group
    from rich.table import Table

    table = Table()
    table.add_column("step")
    for heading in ("seconds", "peak anonymous GB", "peak resident GB", "written GB"):
        table.add_column(heading, justify="right")
    for step in steps:
        sizes = (f"{size / _GB:.2f}" for size in (step.anonymous, step.resident, step.written))
        table.add_row(_STEPS[step.name], f"{step.seconds:.1f}", *sizes)
    seconds = build_seconds(steps)
    return Group(
        table,
        f"export, INT8 and compile: {seconds / 60:.1f} minutes (at most {MOST_SECONDS // 60}: "
        f"{'yes' if seconds <= MOST_SECONDS else 'NO'})",
        f"resident counts mapped files; {_size(folder) / _GB:.1f} GB are in {folder}",
    )


def build_seconds(steps: list[Step]) -> float:
    """Export, INT8 and compile: all but the writing of the checkpoint, which a real one does not need."""
    return sum(step.seconds for step in steps if step.name != "checkpoint")


def _main(arguments: list[str]) -> int:
    step, folder, shape = arguments
    try:
        _RUN[step](Path(folder), RandomLlama(**json.loads(shape)))
    except OnecardError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(_main(sys.argv[1:]))
