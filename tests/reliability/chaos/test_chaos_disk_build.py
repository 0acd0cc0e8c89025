"""A disk that fills up while a stack is built: an exact error, nothing half-written; the next run goes on.

    make chaos                                   # or this file alone:
    python -m pytest tests/reliability/chaos/test_chaos_disk_build.py

The disk is a tmpfs of some megabytes whose free space a file of ballast decides. It needs the right to mount;
without it only the second form runs, where the kernel ends every file at a length (RLIMIT_FSIZE).
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from click.testing import CliRunner, Result

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "tests" / "serving"), str(ROOT / "tests" / "unit" / "build_engines")]

import small_models  # noqa: E402
from small_stack import write_lines, write_stack  # noqa: E402

from build_engines.atomic import replaced_folder  # noqa: E402
from build_engines.cli import main  # noqa: E402
from build_engines.digests import verify_digests  # noqa: E402
from build_engines.errors import ArtifactError  # noqa: E402
from build_engines.random_model import RandomLlama, write_random_llm  # noqa: E402
from triton_repo.cli import main as triton_repo  # noqa: E402

MIB = 1 << 20
SHAPE = RandomLlama(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, vocabulary=512, positions=256)
GATES = {
    "classify": {"min_agreement": 0.5, "max_accuracy_loss": 0.5},
    "generate": {"max_perplexity_increase": 1},
}
STEP, LARGEST = 1.35, 32 * MIB


class Room(Protocol):
    """Where is built, and how many bytes there is room for."""

    folder: Path

    def leave(self, size: int) -> None: ...


class SmallDisk:
    """A file system of its own: bytes that are free."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def leave(self, size: int) -> None:
        self._ballast.unlink(missing_ok=True)
        found = os.statvfs(self.folder)
        ballast = max(0, found.f_bavail * found.f_frsize - size)
        with self._ballast.open("wb") as file:
            if ballast:
                os.posix_fallocate(file.fileno(), 0, ballast)


class ShortFiles:
    """No file can be longer: what is written beyond fails, as on a disk that is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def leave(self, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture(params=["disk", "files"])
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Room]:
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "files":
        yield ShortFiles(folder)
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={2 * LARGEST},mode=700", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier in two precisions and an LLM, small and random."""
    folder = tmp_path_factory.mktemp("stack")
    small_models.write_checkpoint(folder / "sentiment", "classify", seed=1)
    write_random_llm(folder / "assistant", SHAPE)
    words, labels = small_models.WORDS, small_models.LABELS
    texts = [" ".join(words[(n + k) % len(words)] for k in range(3 + n % 9)) for n in range(48)]
    for place, name in enumerate(("evaluation", "calibration")):
        lines = [{"text": text, "label": labels[n % 3]} for n, text in enumerate(texts[place:])]
        write_lines(folder / f"{name}.jsonl", lines)
    common = {
        "evaluation": "evaluation.jsonl",
        "calibration": {"data": "calibration.jsonl"},
        "max_length": 64,
    }
    models: dict[str, dict[str, Any]] = {
        "sentiment": {"task": "classify", "precisions": ["int8", "fp16"], "max_batch": 4},
        "assistant": {"task": "generate", "precisions": ["int8-weights"], "slots": 2, "prefill_chunk": 16},
    }
    for name, table in models.items():
        table |= {"source": f"./{name}", **common, "gates": GATES[table["task"]]}
    return write_stack(folder / "stack.toml", models, targets=["onnxruntime"])


def build(stack: Path, folder: Path) -> Result:
    return CliRunner().invoke(main, ["build", str(stack), "--build-dir", str(folder), "--offline"])


def leftovers(folder: Path) -> list[str]:
    """Anything that a run put aside and did not take away, but for its locks: the kernel frees those."""
    return [str(path) for path in folder.rglob(".*") if not path.name.endswith("lock")]


def digests(folder: Path) -> dict[str, str]:
    found = sorted(folder.glob("engines/*/*/*/manifest.json"))
    return {
        str(path.relative_to(folder)): json.loads(path.read_bytes())["engine"]["sha256"] for path in found
    }


def test_a_build_on_a_disk_that_fills_up(room: Room, stack: Path, tmp_path: Path) -> None:
    whole = build(stack, tmp_path / "elsewhere")
    assert whole.exit_code == 0, whole.output
    folder, size, failed = room.folder / "build", 4096.0, []
    while True:
        room.leave(int(size))
        result = build(stack, folder)
        if result.exit_code == 0:
            break
        assert result.exit_code == 18, (size, result.output, result.exception)
        assert "Traceback" not in result.output
        assert "--build-dir" in result.output or "another build folder" in result.output
        failed.append(_stage(result))
        assert leftovers(room.folder) == []
        _require_what_is_there_to_be_whole(folder)
        size *= STEP
        assert size < LARGEST
    # It stopped in stages of both models. What is written first of a model is its longest file.
    assert len(set(failed)) >= (4 if isinstance(room, SmallDisk) else 2), failed
    assert {name.split("/")[1] for name in failed} == {"sentiment", "assistant"}
    assert verify_digests(folder).problems == []
    assert digests(folder) == digests(tmp_path / "elsewhere")
    again = build(stack, folder)
    assert again.exit_code == 0
    assert "0 of them made now" in again.output


def _stage(result: Result) -> str:
    """work/<model>/<stage> or engines/<model>/<precision>, of the path that the error names."""
    found = re.search(r"error: .*?/build/(\w+/\w+)/\.?([\w-]+)", result.output)
    assert found is not None, result.output
    return f"{found[1]}/{found[2]}"


def _require_what_is_there_to_be_whole(folder: Path) -> None:
    if any(folder.rglob("stage.json")):
        assert verify_digests(folder).problems == []
    else:
        with pytest.raises(ArtifactError, match="holds nothing that was built"):
            verify_digests(folder)


def test_an_engine_is_not_lost_to_the_one_that_has_no_room(room: Room, stack: Path, tmp_path: Path) -> None:
    """Made again with other settings while the disk is full: the one from before is still there, whole."""
    room.leave(LARGEST)
    folder = room.folder / "build"
    assert build(stack, folder).exit_code == 0
    before = digests(folder)
    changed = Path(shutil.copytree(stack.parent, tmp_path / "changed")) / "stack.toml"
    changed.write_text(stack.read_text().replace("max_batch = 4", "max_batch = 3"))
    room.leave(8192)
    result = build(changed, folder)
    assert result.exit_code == 18, result.output
    assert digests(folder) == before
    assert leftovers(room.folder) == []
    assert verify_digests(folder).problems == []
    room.leave(LARGEST)
    assert build(changed, folder).exit_code == 0


def test_a_repository_on_a_disk_that_fills_up(room: Room, stack: Path) -> None:
    room.leave(LARGEST)
    folder = room.folder / "build"
    assert build(stack, folder).exit_code == 0
    write = ["write", str(stack), "--build-dir", str(folder)]
    for size in (0, 2048, 4096):
        room.leave(size)
        result = CliRunner().invoke(triton_repo, write)
        assert result.exit_code == 19, (size, result.output)
        assert "cannot be written" in result.output
        assert leftovers(room.folder) == []
        assert not (folder / "repository").exists()
    room.leave(LARGEST)
    assert CliRunner().invoke(triton_repo, write).exit_code == 0
    assert verify_digests(folder).problems == []
    # And over one that is there: the old one stays.
    before = (folder / "repository" / "sentiment" / "1" / "digests.json").read_bytes()
    room.leave(4096)
    assert CliRunner().invoke(triton_repo, write).exit_code == 19
    assert (folder / "repository" / "sentiment" / "1" / "digests.json").read_bytes() == before
    assert leftovers(room.folder) == []


def test_a_folder_aside_is_gone_when_even_its_removal_is_the_first_that_fits(room: Room) -> None:
    """Nothing is needed to clean up: not a byte."""
    room.leave(1 << 20)
    out = room.folder / "out"
    with pytest.raises(OSError, match=r"No space left|File too large"), replaced_folder(out) as aside:
        (aside / "large").write_bytes(bytes(4 << 20))
    assert leftovers(room.folder) == []
    assert not out.exists()
