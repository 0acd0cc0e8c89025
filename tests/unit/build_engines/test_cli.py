"""The command line: examples, exit codes, no traceback for a user's mistake, answers without a wait."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from small_stack import write_lines, write_stack

from build_engines import errors
from build_engines.cli import main
from build_engines.console import CleanErrors
from triton_repo.runtime.session import manifest_digest

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "stacks" / "demo.toml"
GATES = {"min_mean_cosine": 0.95, "min_cosine": 0.9, "min_spearman": 0.9}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def all_errors(base: type[errors.OnecardError] = errors.OnecardError) -> Iterator[type[errors.OnecardError]]:
    yield base
    for found in base.__subclasses__():
        yield from all_errors(found)


# --- the commands ---


@pytest.mark.parametrize("name", [None, *main.commands])
def test_every_command_has_an_example(name: str | None) -> None:
    result = run(*([name] if name else []), "--help")
    assert result.exit_code == 0
    assert "Example:\n" in result.output
    example = result.output.split("Example:\n")[1].split("\n")[0]
    assert f"build-engines {name or 'plan'} " in example


def test_the_commands_of_the_readme_exist() -> None:
    assert {"plan", "fetch", "build", "inspect", "demo-models"} <= set(main.commands)


# --- errors ---


def test_every_error_has_an_exit_code_of_its_own() -> None:
    ours = [found for found in all_errors() if found.__module__ == errors.__name__]
    codes = [found.exit_code for found in ours]
    assert len(set(codes)) == len(codes)
    assert not {0, 2, 130} & set(codes)  # success, Click's wrong usage, an interrupt
    for found in ours:
        assert f"{found.__name__} ({found.exit_code})" in str(errors.__doc__), "the tree in the docstring"


def test_no_other_module_adds_an_error_with_a_code_in_use() -> None:
    import build_engines.fetch
    import build_engines.pipeline
    import build_engines.plan  # noqa: F401

    codes: dict[int, type[errors.OnecardError]] = {}
    for found in all_errors():
        assert codes.setdefault(found.exit_code, found) is found


def failing(error: BaseException) -> Result:
    """A command that ends so."""
    group = CleanErrors()

    @group.command()
    def command() -> None:
        raise error

    return CliRunner().invoke(group, ["command"])


@pytest.mark.parametrize("error", list(all_errors()))
def test_a_users_mistake_is_a_message_and_a_code(error: type[errors.OnecardError]) -> None:
    result = failing(error("what happened", cause="why", next_step="what to do"))
    assert result.exit_code == error.exit_code
    assert result.output == "error: what happened\n  cause: why\n  next:  what to do\n"


def test_an_interrupt_is_no_fault() -> None:
    result = failing(KeyboardInterrupt())
    assert result.exit_code == 130
    assert "finished stages are kept" in result.output


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    assert isinstance(failing(ZeroDivisionError()).exception, ZeroDivisionError)


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "build_engines.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("plan", "nowhere.toml"), 10, "the stack file does not exist"),
        (("build", "nowhere.toml"), 10, "the stack file does not exist"),
        (("build", DEMO, "--model", "sentimnet"), 10, "no model called 'sentimnet'"),
        (("build", DEMO, "--target", "tensorrt"), 10, "no target called 'tensorrt'"),
        (("inspect", "nowhere/engine"), 18, "does not exist"),
        (("inspect", ROOT), 18, "not a finished engine"),
        (("measure", "nowhere.toml"), 10, "the stack file does not exist"),
        (("plan",), 2, "Missing argument 'STACK'"),
        (("bild", DEMO), 2, "No such command 'bild'"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], code: int, words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_what_a_shell_sees_of_a_mistake() -> None:
    done = shell("build", "nowhere.toml")
    assert done.returncode == 10
    assert done.stdout == ""
    assert done.stderr.startswith("error: nowhere.toml: the stack file does not exist\n")
    assert "Traceback" not in done.stderr


def test_a_plan_that_does_not_fit_says_so_and_prints_it_all_the_same(tmp_path: Path) -> None:
    shape = {"family": "bert", "layers": 24, "hidden": 1024, "ffn": 4096, "heads": 16, "vocabulary": 250_000}
    model = {"task": "embed", "source": "owner/large", "max_batch": 64, "max_length": 512, "shape": shape}
    path = write_stack(tmp_path / "large.toml", {"large": model}, targets=["tensorrt-rtx"])
    card = '{memory_mib = 1024, compute_capability = "12.0"}'
    path.write_text(path.read_text().replace('"rtx-5070-ti"', card))
    result = run("plan", path, "--json")
    assert result.exit_code == errors.PlanError.exit_code
    assert json.loads(result.stdout)["fits"] is False
    assert "error:" in result.stderr


def test_the_plan_answers_at_once() -> None:
    """Processor seconds, so that a busy machine does not decide."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = shell("plan", DEMO.parent / "korean-reviews.toml", "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert done.stderr == ""
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.0


def test_fetch_offline_what_was_never_fetched(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "s.toml", {"tiny": {"task": "embed", "source": "owner/never-fetched"}})
    result = run("fetch", path, "--offline", "--build-dir", tmp_path / "build")
    assert result.exit_code == errors.FetchError.exit_code
    assert "offline" in result.output


# --- a build and what is left of it ---


@pytest.fixture(scope="module")
def stack(checkpoint: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    model = {
        "task": "embed",
        "source": str(checkpoint("embed")),
        "precisions": ["fp16"],
        "max_batch": 8,
        "max_length": 64,
        "evaluation": str(data / "texts.jsonl"),
        "calibration": {"data": str(data / "other.jsonl"), "samples": 32},
        "gates": GATES,
    }
    return write_stack(folder / "s.toml", {"tiny": model}, targets=["onnxruntime", "tensorrt-rtx"])


@pytest.fixture(scope="module")
def build(stack: Path) -> tuple[Path, Result]:
    folder = stack.parent / "build"
    return folder, run("build", stack, "--build-dir", folder, "--json")


def engine_of(build: tuple[Path, Result], target: str) -> Path:
    return build[0] / "engines" / "tiny" / "fp16" / target


def test_build_prints_its_stages_and_one_json(build: tuple[Path, Result], stack: Path) -> None:
    folder, result = build
    assert result.exit_code == 0, result.output
    engines = json.loads(result.stdout)
    assert [(engine["target"], engine["skipped"]) for engine in engines] == [
        ("onnxruntime", False),
        ("tensorrt-rtx", False),
    ]
    for stage in ("fetch", "export", "reference", "fp16 onnxruntime", "fp16 tensorrt-rtx"):
        assert f"tiny         {stage}" in result.stderr
    assert "equal to PyTorch within" in result.stderr
    again = run("build", stack, "--build-dir", folder)
    assert again.exit_code == 0
    assert again.stdout == ""
    assert again.stderr.count("unchanged") == 5
    assert again.stderr.splitlines()[-1] == f"2 engines in {folder / 'engines'}, 0 of them made now"
    assert "" not in again.stderr.splitlines()


def test_a_model_alone_asks_nothing_of_the_others(stack: Path, tmp_path: Path) -> None:
    """Neither their checkpoints nor, to plan, their sizes."""
    other = '\n[models.other]\ntask = "embed"\nsource = "owner/never-fetched"\n'
    (tmp_path / "s.toml").write_text(stack.read_text() + other)
    options = ("--build-dir", tmp_path / "build", "--target", "onnxruntime", "--offline")
    result = run("build", tmp_path / "s.toml", *options, "--model", "tiny", "--json")
    assert result.exit_code == 0, result.output
    assert [engine["model"] for engine in json.loads(result.stdout)] == ["tiny"]
    assert run("build", tmp_path / "s.toml", *options).exit_code == errors.FetchError.exit_code


def test_build_of_data_that_does_not_fit(build: tuple[Path, Result], stack: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "texts.jsonl", [{"text": "w5"}, {"txt": "w6"}])
    text = stack.read_text().splitlines()
    text = [f'evaluation = "{tmp_path}/texts.jsonl"' if x.startswith("evaluation") else x for x in text]
    (tmp_path / "s.toml").write_text("\n".join(text))
    result = run("build", tmp_path / "s.toml", "--build-dir", tmp_path / "build")
    assert result.exit_code == errors.DataError.exit_code
    assert "texts.jsonl, line 2: key 1 is unknown (did you mean 'text'?)" in result.output


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_inspect_prints_what_an_engine_is(build: tuple[Path, Result], target: str) -> None:
    folder = engine_of(build, target)
    found = json.loads(run("inspect", folder, "--json").stdout)
    assert found["folder"] == str(folder)
    assert found["engine"]["sha256"]
    result = run("inspect", folder / found["engine"]["file"])
    assert result.exit_code == 0, result.output
    words = ["tiny (embed, fp16)", target, found["versions"][target], "mean cosine", "[ok]", "1, 8, 8"]
    words += [next(iter(found["layers"])), "minimum cosine"]
    on_card = ["12.0", "not judged on a GPU yet", "planned memory, MiB", "context 300.0"]
    words += on_card if target == "tensorrt-rtx" else ["gate (engine)"]
    for word in words:
        assert word in result.output


def with_manifest(folder: Path, **changes: Any) -> Path:
    """Another manifest that is consistent in itself."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    manifest["digest"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))
    return folder


def cut(folder: Path) -> Path:
    file = folder / "engine.trt"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def flip(folder: Path) -> Path:
    file = folder / "engine.trt"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    return folder


def bare(folder: Path) -> Path:
    (folder / "manifest.json").unlink()
    return folder / "engine.trt"


def nested(folder: Path) -> Path:
    (folder / "manifest.json").write_text("[" * 100_000)
    return folder


def foreign(folder: Path) -> Path:
    (folder / "manifest.json").unlink()
    (folder / "engine.trt").write_bytes(b"ftrt" + bytes(200))
    return folder / "engine.trt"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (cut, "truncated"),
    "altered": (flip, "SHA-256 differs"),
    "another card": (
        lambda folder: with_manifest(folder, compute_capability="8.9"),
        "compiled for compute capability 12.0",
    ),
    "no settings": (lambda folder: with_manifest(folder, gates=3), "does not say what it should"),
    "another manifest": (lambda folder: with_manifest(folder, profile=None), "does not say what it should"),
    "nested": (nested, "unreadable manifest"),
    "no manifest": (bare, "a whole TensorRT-RTX"),
    "no engine": (foreign, "is no TensorRT-RTX engine"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_inspect_refuses_another_engine(build: tuple[Path, Result], tmp_path: Path, kind: str) -> None:
    change, reason = REFUSED[kind]
    shutil.copytree(engine_of(build, "tensorrt-rtx"), tmp_path / "engine")
    result = run("inspect", change(tmp_path / "engine"))
    assert result.exit_code == errors.ArtifactError.exit_code
    assert reason in result.output
    assert "  next:" in result.output


def test_inspect_refuses_an_engine_of_another_library_version(
    build: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9.9.9.9" if name == "tensorrt-rtx" else real(name)
    )
    result = run("inspect", engine_of(build, "tensorrt-rtx"))
    assert result.exit_code == errors.ArtifactError.exit_code
    assert "9.9.9.9 is installed" in result.output


def test_an_engine_can_be_looked_at_where_the_library_is_not(
    build: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert run("inspect", engine_of(build, "tensorrt-rtx")).exit_code == 0
