"""verify-digests names every file that is not as it was written; a served model refuses to load with one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import bounded
from click.testing import CliRunner
from repo_fakes import reseal

from build_engines.cli import main
from build_engines.digests import Checked, Problem, require_whole, verify_digests
from build_engines.errors import ArtifactError
from build_engines.fetch import RECORD as FETCHED
from build_engines.manifest import RECORD, file_record, run_stage
from build_engines.stack import load_stack
from triton_repo.runtime import fingerprint
from triton_repo.runtime.seal import MAX_RECORD_BYTES, check_served, read_record
from triton_repo.runtime.seal import RECORD as SEAL
from triton_repo.runtime.session import MAX_MANIFEST_BYTES, EngineRefused, read_manifest
from triton_repo.writer import seal, write_repository

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
"""
VERSION = "repository/sentiment/1"


@pytest.fixture
def build(tmp_path: Path, engine_folder: Callable[..., Path]) -> Path:
    """A build folder: a fetched checkpoint, a stage, two engines (one with its stage), a repository."""
    (tmp_path / "stack.toml").write_text(STACK)
    (tmp_path / "reviews.csv").write_text("text,label\ngood,positive\nbad,negative\n")
    folder = tmp_path / "build"
    engine_folder(folder / "engines", "sentiment", "int8", "classify")
    plain = engine_folder(tmp_path / "plain", "sentiment", "fp16", "classify")

    def compiled(out: Path) -> dict[str, Any]:
        shutil.copytree(plain, out, dirs_exist_ok=True)
        (out / "golden.json").write_text("{}")
        reseal(out, engine="engine.onnx")
        return {}

    run_stage(folder / "engines" / "sentiment" / "fp16" / "onnxruntime", {}, compiled)
    run_stage(folder / "work" / "sentiment" / "export", {}, lambda out: _fill(out, "model.onnx"))
    source = folder / "sources" / "sentiment"
    (source / "1_Pooling").mkdir(parents=True)
    names = ["config.json", "1_Pooling/config.json"]
    for name in names:
        (source / name).write_text(name)
    files = {name: file_record(source / name) for name in names}
    (source / FETCHED).write_text(json.dumps({"format": 1, "files": files}))
    write_repository(
        load_stack(tmp_path / "stack.toml", build_dir=folder), folder / "engines", folder / "repository"
    )
    (folder / "tritonserver.log").write_text("no artefact")
    (folder / "repository" / "sentiment" / "1" / "__pycache__").mkdir()
    (folder / "repository" / "sentiment" / "1" / "__pycache__" / "model.pyc").write_text("compiled")
    return folder


def _fill(out: Path, name: str) -> dict[str, Any]:
    (out / name).write_text("a graph")
    return {}


def _altered(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()  # a hard link may lead to another artefact
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])


def _linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def found(folder: Path) -> set[tuple[str, str]]:
    return {
        (str(Path(problem.path).relative_to(folder)), problem.what)
        for problem in verify_digests(folder).problems
    }


def test_what_was_just_written_is_whole(build: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    checked = verify_digests(build, lambda *step: seen.append(step))
    assert checked.problems == []
    require_whole(checked)
    # The repository's two models and their versions, what the client reads, the stages, the checkpoint.
    assert checked.units == 9
    assert seen[-1][1:] == (checked.bytes, checked.bytes)
    assert checked.files > 2 * len(list(Path(build / VERSION / "triton_repo").rglob("*.py")))


EVERY = [
    "sources/sentiment/config.json",
    "sources/sentiment/1_Pooling/config.json",
    "work/sentiment/export/model.onnx",
    "engines/sentiment/int8/onnxruntime/engine.onnx",
    "engines/sentiment/int8/onnxruntime/tokenizer.json",
    "engines/sentiment/fp16/onnxruntime/engine.onnx",
    "engines/sentiment/fp16/onnxruntime/golden.json",
    "engines/sentiment/fp16/onnxruntime/manifest.json",
    "repository/sentiment/config.pbtxt",
    "repository/sentiment/warmup/text",
    f"{VERSION}/model.py",
    f"{VERSION}/manifest.json",
    f"{VERSION}/engine.onnx",
    f"{VERSION}/triton_repo/__init__.py",
    f"{VERSION}/triton_repo/runtime/texts.py",
    "repository/sentiment-fp16/1/golden.json",
    "stack.json",
    "evaluation/sentiment.jsonl",
]


@pytest.mark.parametrize("name", EVERY)
def test_every_file_counts(build: Path, name: str) -> None:
    _altered(build / name)
    assert found(build) == {(name, "altered")}
    (build / name).unlink()
    assert found(build) == {(name, "missing")}


def test_all_that_is_wrong_is_named_at_once(build: Path) -> None:
    _cut(build / EVERY[0])
    _linked(build / EVERY[2])
    (build / VERSION / "numpy.py").write_text("evil")
    (build / VERSION / "triton_repo" / "runtime" / "texts.abi3.so").write_text("evil")
    (build / "work/sentiment/export/model.onnx.data").write_text("old weights")
    (build / "repository/sentiment/config.txt").write_text("x")
    assert found(build) == {
        (EVERY[0], "altered"),
        (EVERY[2], "altered"),
        ("work/sentiment/export/elsewhere", "extra"),
        (f"{VERSION}/numpy.py", "extra"),
        (f"{VERSION}/triton_repo/runtime/texts.abi3.so", "extra"),
        ("work/sentiment/export/model.onnx.data", "extra"),
        ("repository/sentiment/config.txt", "extra"),
    }


@pytest.mark.parametrize(
    ("record", "content", "what"),
    [
        (f"work/sentiment/export/{RECORD}", "{", "unreadable"),
        (f"work/sentiment/export/{RECORD}", '{"outputs": {"a": 5}}', "unreadable"),
        (f"sources/sentiment/{FETCHED}", "[" * 100_000, "unreadable"),
        (f"{VERSION}/{SEAL}", "null", "unreadable"),
        (f"{VERSION}/{SEAL}", None, "missing"),
        ("engines/sentiment/int8/onnxruntime/manifest.json", '{"format": 1}', "unreadable"),
    ],
)
def test_a_record_that_cannot_be_believed(build: Path, record: str, content: str | None, what: str) -> None:
    (build / record).unlink()
    if content is not None:
        (build / record).write_text(content)
    assert found(build) == {(record, what)}


@pytest.mark.parametrize(
    ("name", "read", "most"),
    [
        ("manifest.json", read_manifest, MAX_MANIFEST_BYTES),
        (SEAL, read_record, MAX_RECORD_BYTES),
    ],
)
def test_a_record_larger_than_any_is_not_read(
    tmp_path: Path, name: str, read: Callable[[Path], Any], most: int
) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(EngineRefused, match=rf"(larger|more) than {most:,} bytes"):
        bounded(read, tmp_path)


def test_a_manifest_of_another_engine(build: Path) -> None:
    """Altered together with the record beside it, but not with the engine's."""
    version = build / VERSION
    shutil.copyfile(build / "repository/sentiment-fp16/1/engine.onnx", version / "engine.new")
    (version / "engine.new").replace(version / "engine.onnx")
    seal(version)
    assert found(build) == {(f"{VERSION}/manifest.json", "unreadable")}
    with pytest.raises(ArtifactError, match=r"says otherwise of engine\.onnx than the record beside it"):
        require_whole(verify_digests(build))


def test_parts_of_a_build_folder_can_be_checked_alone(build: Path, tmp_path: Path) -> None:
    for part in ("repository", "repository/sentiment", VERSION, "engines/sentiment/int8/onnxruntime"):
        assert verify_digests(build / part).problems == []
    shutil.copytree(build / "repository", tmp_path / "copied")
    _altered(tmp_path / "copied" / "sentiment" / "1" / "model.py")
    assert found(tmp_path / "copied") == {("sentiment/1/model.py", "altered")}


@pytest.mark.parametrize("part", ["", "repository/sentiment", VERSION])
def test_the_folder_that_one_is_in_can_be_checked(
    build: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A folder's name tells what it is, and `.` has none."""
    monkeypatch.chdir(build / part)
    assert verify_digests(Path()).problems == []
    _altered(build / VERSION / "model.py")
    name = os.path.relpath(build / VERSION / "model.py")
    assert [(p.path, p.what) for p in verify_digests(Path()).problems] == [(name, "altered")]
    assert CliRunner().invoke(main, ["verify-digests", "."]).exit_code == 18


def _fails(real: Callable[..., Any], path: Path, number: int) -> Callable[..., Any]:
    """`real`, but for one path, which gives an error: permissions would not stop root."""

    def call(of: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(of) == path:
            raise OSError(number, os.strerror(number), str(of))
        return real(of, *args, **kwargs)

    return call


@pytest.mark.parametrize("name", [EVERY[2], EVERY[0], f"{VERSION}/model.py"])
def test_a_file_that_cannot_be_read_is_named(build: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(Path, "open", _fails(Path.open, build / name, errno.EIO))
    checked = verify_digests(build)
    assert checked.problems == [Problem(str(build / name), "unreadable", "Input/output error")]
    damaged = CliRunner().invoke(main, ["verify-digests", str(build)])
    assert damaged.exit_code == 18
    assert f"{build / name}: unreadable (Input/output error)" in damaged.stderr


@pytest.mark.parametrize("name", ["", "work/sentiment", "sources/sentiment/1_Pooling", VERSION, "repository"])
def test_a_folder_that_cannot_be_read_is_named(
    build: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "scandir", _fails(os.scandir, build / name, errno.EACCES))
    problem = Problem(str(build / name), "unreadable", "Permission denied")
    assert verify_digests(build).problems == [problem]


def test_a_second_version_is_checked_too(build: Path) -> None:
    shutil.copytree(build / VERSION, build / "repository/sentiment/2")
    assert found(build) == set()
    _altered(build / "repository/sentiment/2/tokenizer.json")
    (build / "repository/sentiment/3").mkdir()
    (build / "repository/sentiment/3/model.py").write_text("no record")
    assert found(build) == {
        ("repository/sentiment/2/tokenizer.json", "altered"),
        (f"repository/sentiment/3/{SEAL}", "missing"),
    }


def test_a_version_can_be_added_while_another_is_served(build: Path) -> None:
    """As a rollout does it: the new one is loaded before config.pbtxt names it, and may be left again."""
    model = build / "repository/sentiment"
    shutil.copytree(model / "1", model / "2")
    (model / "2" / "config.pbtxt").write_text((model / "config.pbtxt").read_text() + "# version 2\n")
    seal(model / "2")
    first, second = model.joinpath("config.pbtxt").read_text(), (model / "2" / "config.pbtxt").read_text()
    for config in (first, second, first):
        (model / "config.pbtxt").write_text(config)
        check_served(model / "1")
        check_served(model / "2")
        assert found(build) == set()
    (model / "config.pbtxt").write_text("of neither")
    with pytest.raises(EngineRefused, match=r"config\.pbtxt: altered"):
        check_served(model / "2")
    assert found(build) == {("repository/sentiment/config.pbtxt", "altered")}


def test_the_command_line(build: Path) -> None:
    runner, stack = CliRunner(), build.parent / "stack.toml"
    whole = runner.invoke(main, ["verify-digests", str(stack), "--build-dir", str(build)])
    assert whole.exit_code == 0, whole.output
    assert "as written" in whole.stderr
    _altered(build / EVERY[0])
    damaged = runner.invoke(main, ["verify-digests", str(build), "--json"])
    assert damaged.exit_code == 18
    expected = {"path": str(build / EVERY[0]), "what": "altered", "detail": ""}
    assert json.loads(damaged.stdout)["problems"] == [expected]
    assert f"{build / EVERY[0]}: altered" in damaged.stderr
    nothing = runner.invoke(main, ["verify-digests", str(build.parent / "build" / "evaluation")])
    assert nothing.exit_code == 18
    assert "holds nothing that was built" in nothing.stderr


def test_what_is_found_is_json() -> None:
    problem = Problem("a", "altered", "3 bytes instead of 4")
    assert Checked("f", 1, 1, 3, [problem]).as_dict()["problems"] == [
        {"path": "a", "what": "altered", "detail": "3 bytes instead of 4"}
    ]
    with pytest.raises(ArtifactError, match=r"a: altered \(3 bytes instead of 4\)"):
        require_whole(Checked("f", 1, 1, 3, [problem]))


# --- at load ----------------------------------------------------------------------------------------------


def loaded(version: Path) -> str | None:
    """What a model file asks before anything else, in a process that imports the copy beside it."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from triton_repo.runtime import mismatch"
    code += "; print(mismatch(sys.argv[2]))"
    command = [sys.executable, "-Ic", code, str(version), fingerprint(version / "triton_repo" / "runtime")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None if answer == "None" else answer


def test_a_served_model_checks_what_is_around_it(build: Path) -> None:
    version = build / VERSION
    assert loaded(version) is None
    _altered(version / "model.py")
    said = loaded(version)
    assert said is not None
    assert "model.py: altered after the repository was written" in said
    assert said.endswith("write the repository again")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: _altered(model / "config.pbtxt"), r"config\.pbtxt: altered"),
        (lambda model: _altered(model / "warmup" / "text"), r"warmup/text: altered"),
        (lambda model: (model / "warmup" / "more").write_text("x"), "warmup/more: was not there"),
        (lambda model: _altered(model / "1" / "triton_repo" / "__init__.py"), r"__init__\.py: altered"),
        (lambda model: (model / "1" / "json.py").write_text("evil"), r"1/json\.py: was not there"),
        (lambda model: shutil.copytree(model / "warmup", model / "1" / "numpy"), "numpy/text: was not there"),
        (lambda model: (model / "1" / "tokenizer.json").unlink(), r"tokenizer\.json: missing"),
        (lambda model: (model / "1" / SEAL).unlink(), r"1/digests\.json: missing"),
        (lambda model: (model / "1" / SEAL).write_text("{}"), r"digests\.json: unreadable record"),
        (lambda model: _altered(model / "1" / "manifest.json"), "unreadable manifest|altered"),
    ],
)
def test_what_a_served_model_reads_is_checked(
    build: Path, change: Callable[[Path], object], reason: str
) -> None:
    check_served(build / VERSION)
    change(build / "repository" / "sentiment")
    with pytest.raises(EngineRefused, match=reason):
        check_served(build / VERSION)


def test_what_the_manifest_lists_is_left_to_whoever_opens_it(build: Path) -> None:
    """An engine of gigabytes is not read twice."""
    _altered(build / VERSION / "engine.onnx")
    check_served(build / VERSION)
