"""Writing a repository: complete, from untouched engines only, and whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from repo_fakes import seal

from build_engines import atomic
from build_engines.errors import ArtifactError, BusyError, RepositoryError
from build_engines.stack import Stack, load_stack
from triton_repo import writer
from triton_repo.cli import main
from triton_repo.runtime import fingerprint
from triton_repo.runtime.session import check_files, read_manifest
from triton_repo.writer import write_repository

STACK = """
name = "small"
card = "rtx-5070-ti"

[models.sentiment]
task = "classify"
source = "./sentiment"
precisions = ["int8", "fp16"]
evaluation = "reviews.csv"
max_batch = 4
max_length = 16

[models.order]
task = "rerank"
source = "./order"
precisions = ["fp16"]
evaluation = "groups.jsonl"
cache = true
max_batch = 4
max_length = 16
"""


@pytest.fixture
def stack(tmp_path: Path, engine_folder: Callable[..., Path]) -> Stack:
    (tmp_path / "stack.toml").write_text(STACK)
    (tmp_path / "reviews.csv").write_text('text,label\n"good, really",positive\nbad,negative\n')
    group = {"query": "q", "passages": ["a", "b"], "relevance": [1, 0]}
    (tmp_path / "groups.jsonl").write_text(json.dumps(group) + "\n")
    engines = tmp_path / "engines"
    engine_folder(engines, "sentiment", "int8", "classify")
    engine_folder(engines, "sentiment", "fp16", "classify")
    engine_folder(engines, "order", "fp16", "rerank")
    return load_stack(tmp_path / "stack.toml", build_dir=tmp_path)


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "engines", tmp_path / "out" / "repository"


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def leftovers(repository: Path) -> list[str]:
    return sorted(path.name for path in repository.parent.iterdir() if ".aside" in path.name)


def test_every_variant_is_complete(stack: Stack, paths: tuple[Path, Path]) -> None:
    engines, out = paths
    assert write_repository(stack, engines, out) == out
    assert {path.name for path in out.iterdir()} == {"sentiment", "sentiment-fp16", "order"}
    files = tree(out / "sentiment")
    assert {"config.pbtxt", "warmup/text", "1/model.py", "1/engine.onnx", "1/tokenizer.json"} <= files
    assert {"1/triton_repo/__init__.py", "1/triton_repo/runtime/session.py"} <= files
    assert "1/triton_repo/runtime/gpu/cuda.py" in files
    version = out / "sentiment" / "1"
    check_files(version, read_manifest(version))
    assert fingerprint(version / "triton_repo" / "runtime") == fingerprint()
    assert fingerprint() in (out / "sentiment" / "config.pbtxt").read_text()
    own = Path(writer.__file__).parent / "models" / "encoder.py"
    assert (version / "model.py").read_bytes() == own.read_bytes()
    engine = engines / "sentiment" / "int8" / "onnxruntime" / "engine.onnx"
    assert (version / "engine.onnx").samefile(engine)


def test_the_summary_tells_the_client_what_is_served(stack: Stack, paths: tuple[Path, Path]) -> None:
    engines, out = paths
    write_repository(stack, engines, out)
    summary = json.loads((out.parent / "stack.json").read_text())
    assert summary["stack"] == "small"
    sentiment, order = summary["models"]["sentiment"], summary["models"]["order"]
    assert sentiment["variants"] == {"int8": "sentiment", "fp16": "sentiment-fp16"}
    assert order["variants"] == {"fp16": "order"}
    assert (sentiment["target"], order["target"]) == ("onnxruntime", "onnxruntime")
    assert sentiment["source"] == str(stack.path.parent / "sentiment")
    assert (sentiment["max_length"], sentiment["labels"]) == (16, ["negative", "positive"])
    lines = [json.loads(line) for line in Path(sentiment["evaluation"]).read_text().splitlines()]
    assert lines == [{"text": "good, really", "label": "positive"}, {"text": "bad", "label": "negative"}]
    groups = [json.loads(line) for line in Path(order["evaluation"]).read_text().splitlines()]
    assert groups == [{"query": "q", "passages": ["a", "b"], "relevance": [1.0, 0.0]}]


def test_the_target_is_one_that_the_stack_names(stack: Stack, paths: tuple[Path, Path]) -> None:
    engines, out = paths
    with pytest.raises(RepositoryError, match="targets names onnxruntime, not tensorrt-rtx") as refused:
        write_repository(stack, engines, out, target="tensorrt-rtx")
    assert "--target onnxruntime" in str(refused.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [(["tensorrt-rtx"], "tensorrt-rtx"), (["tensorrt-rtx", "onnxruntime"], "onnxruntime")],
)
def test_without_a_target_the_cpu_s_engines_are_served_else_the_first_s(
    stack: Stack, paths: tuple[Path, Path], targets: list[str], chosen: str
) -> None:
    """None is built for the GPU here, so the folder that is missed tells which was looked for."""
    engines, out = paths
    text = stack.path.read_text()
    stack.path.write_text(f"targets = {json.dumps(targets)}\n{text}")
    if chosen == "onnxruntime":
        shutil.rmtree(engines / "sentiment" / "int8" / "onnxruntime")
    options = ["write", str(stack.path), "--build-dir", str(engines.parent), "--out", str(out)]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == ArtifactError.exit_code, result.output
    assert f"engines/sentiment/int8/{chosen}/manifest.json" in result.output


def test_what_is_no_repository_is_not_replaced(stack: Stack, paths: tuple[Path, Path]) -> None:
    """`--out` may be a slip of the keyboard: a home folder, or the stack file itself."""
    engines, out = paths
    (out / "letters").mkdir(parents=True)
    (out / "letters" / "one.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="holds other files"):
        write_repository(stack, engines, out)
    with pytest.raises(ArtifactError, match="is a file"):
        write_repository(stack, engines, stack.path)
    assert stack.path.read_text() == STACK
    assert tree(out) == {"letters/one.txt"}
    shutil.rmtree(out / "letters")
    assert write_repository(stack, engines, out) == out


def test_an_existing_repository_is_replaced_as_a_whole(stack: Stack, paths: tuple[Path, Path]) -> None:
    engines, out = paths
    (out / "old").mkdir(parents=True)
    (out / "old" / "config.pbtxt").write_text("old")
    write_repository(stack, engines, out)
    assert {path.name for path in out.iterdir()} == {"sentiment", "sentiment-fp16", "order"}
    assert leftovers(out) == []


def test_the_exchange_works_without_the_system_call(
    stack: Stack, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, out = paths
    (out / "old").mkdir(parents=True)
    (out / "old" / "config.pbtxt").touch()
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    write_repository(stack, engines, out)
    assert not (out / "old").exists()
    assert (out / "order").exists()
    assert leftovers(out) == []


def damage_engine(folder: Path) -> None:
    path = folder / "engine.onnx"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)


def truncate_engine(folder: Path) -> None:
    path = folder / "engine.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"max_length": 16', '"max_length": 17'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_engine, r"engine\.onnx: altered after the build"),
        (truncate_engine, r"engine\.onnx: \d+ bytes, the manifest says"),
        (edit_manifest, "manifest was altered"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest"),
        (lambda folder: seal(folder, "other", "fp16", "classify"), "was built for"),
    ],
)
def test_a_damaged_engine_is_refused_and_the_old_repository_stays(
    stack: Stack, paths: tuple[Path, Path], damage: Callable[[Path], Any], message: str
) -> None:
    engines, out = paths
    write_repository(stack, engines, out)
    before = tree(out)
    damage(engines / "sentiment" / "fp16" / "onnxruntime")
    with pytest.raises(ArtifactError, match=message):
        write_repository(stack, engines, out)
    assert tree(out) == before
    assert leftovers(out) == []


def test_a_full_disk_leaves_the_old_repository(
    stack: Stack, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, out = paths
    write_repository(stack, engines, out)
    before = tree(out)

    def full(source: Path, destination: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "link_or_copy", full)
    with pytest.raises(RepositoryError, match="No space left on device"):
        write_repository(stack, engines, out)
    assert tree(out) == before
    assert leftovers(out) == []


def test_engines_are_copied_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, destination: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"engine")
    atomic.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"engine"
    assert not (tmp_path / "b").samefile(tmp_path / "a")


def test_a_killed_run_is_cleaned_by_the_next(stack: Stack, paths: tuple[Path, Path]) -> None:
    engines, out = paths
    write_repository(stack, engines, out)
    before = tree(out)
    program = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from build_engines.stack import load_stack
        from triton_repo import writer
        whole, seen = writer.link_or_copy, []
        def killed_midway(source, destination):
            whole(source, destination)
            seen.append(source)
            if len(seen) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        writer.link_or_copy = killed_midway
        stack = load_stack(Path({str(stack.path)!r}))
        writer.write_repository(stack, Path({str(engines)!r}), Path({str(out)!r}))
        """
    )
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(leftovers(out)) == 1
    assert tree(out) == before
    write_repository(stack, engines, out)
    assert leftovers(out) == []
    assert tree(out) == before


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with (
        atomic.replaced_folder(tmp_path / "out"),
        pytest.raises(BusyError, match="is being written by another process"),
        atomic.replaced_folder(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ('task = "rerank"', 'task = "rerank"\noverflow = "refuse"', "overflow = 'truncate'.* says 'refuse'"),
        ("max_length = 16", "max_length = 32", "max_length = 16 where the stack file says 32"),
        ("max_batch = 4", "max_batch = 8", "max_batch = 4 where the stack file says 8"),
    ],
)
def test_engines_of_another_stack_file_are_refused(
    stack: Stack, tmp_path: Path, was: str, now: str, message: str
) -> None:
    path = tmp_path / "stack.toml"
    path.write_text(STACK.replace(was, now))
    changed = load_stack(path, build_dir=tmp_path)
    with pytest.raises(ArtifactError, match=f"{message}(.|\n)*build it again"):
        write_repository(changed, tmp_path / "engines", tmp_path / "repository")


def test_a_length_is_bounded_by_what_the_checkpoint_has(
    stack: Stack, tmp_path: Path, engine_folder: Callable[..., Path]
) -> None:
    path = tmp_path / "stack.toml"
    path.write_text(STACK.replace("max_length = 16", "max_length = 512"))
    for variant in ("sentiment/int8", "sentiment/fp16", "order/fp16"):
        model, precision = variant.split("/")
        task = "rerank" if model == "order" else "classify"
        seal(tmp_path / "engines" / variant / "onnxruntime", model, precision, task, max_positions=16)
    write_repository(load_stack(path, build_dir=tmp_path), tmp_path / "engines", tmp_path / "repository")


def test_the_command_line_finds_engines_that_were_built_elsewhere(stack: Stack, tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["write", str(stack.path), "--build-dir", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "repository" / "sentiment" / "config.pbtxt").is_file()
