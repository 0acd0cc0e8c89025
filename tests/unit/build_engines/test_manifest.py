"""Stage records and engine manifests: what is skipped, what is made again, what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from build_engines.errors import ArtifactError, BusyError, QuantizeError
from build_engines.manifest import (
    MANIFEST,
    RECORD,
    code_digest,
    digest_of,
    folder_files,
    read_engine_manifest,
    run_stage,
    write_manifest,
)
from triton_repo.runtime.session import EngineRefused, manifest_digest, open_engine, read_manifest

INPUTS = {"source": "abc", "settings": [1, 2.5, None], "code": "x"}


class Stage:
    """Writes two files; counts how often it was asked to."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, out: Path) -> dict[str, Any]:
        self.made += 1
        (out / "model.onnx").write_bytes(b"graph" * 100)
        (out / "tokenizer.json").write_text("{}")
        return {"made": self.made, "figure": 0.25}


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_what_did_not_change_is_not_made_again(tmp_path: Path, stage: Stage) -> None:
    folder = tmp_path / "work" / "export"
    first = run_stage(folder, INPUTS, stage)
    assert (first.skipped, first.result) == (False, {"made": 1, "figure": 0.25})
    # The order of keys says nothing.
    second = run_stage(folder, dict(reversed(INPUTS.items())), stage)
    assert (second.skipped, second.result, second.seconds) == (True, first.result, first.seconds)
    assert stage.made == 1
    assert second.digests() == first.digests()
    assert set(first.digests()) == {"model.onnx", "tokenizer.json"}


@pytest.mark.parametrize(
    "inputs",
    [
        {**INPUTS, "source": "abd"},
        {**INPUTS, "settings": [1, 2.5, False]},
        {**INPUTS, "more": 1},
        {"source": "abc"},
    ],
)
def test_another_input_makes_it_again(tmp_path: Path, stage: Stage, inputs: dict[str, Any]) -> None:
    run_stage(tmp_path / "s", INPUTS, stage)
    assert not run_stage(tmp_path / "s", inputs, stage).skipped
    assert run_stage(tmp_path / "s", inputs, stage).skipped
    assert stage.made == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "file truncated": lambda folder: truncate(folder / "model.onnx"),
    "file altered": lambda folder: alter(folder / "model.onnx"),
    "file missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "file added": lambda folder: (folder / "model.onnx.data").write_bytes(b"old weights"),
    "record truncated": lambda folder: truncate(folder / RECORD),
    "record empty": lambda folder: (folder / RECORD).write_text(""),
    "record is another JSON value": lambda folder: (folder / RECORD).write_text("[]"),
    "record without a key": lambda folder: (folder / RECORD).write_text('{"outputs": {}, "result": {}}'),
    "record with other types": lambda folder: (folder / RECORD).write_text(
        json.dumps({**json.loads((folder / RECORD).read_text()), "outputs": {"model.onnx": 3}})
    ),
    "record missing": lambda folder: (folder / RECORD).unlink(),
    "folder is a file": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_made_again(tmp_path: Path, stage: Stage, kind: str) -> None:
    folder = tmp_path / "s"
    first = run_stage(folder, INPUTS, stage)
    DAMAGE[kind](folder)
    again = run_stage(folder, INPUTS, stage)
    assert not again.skipped
    assert again.digests() == first.digests()
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", RECORD, "tokenizer.json"]


def test_a_failed_stage_leaves_the_old_one(tmp_path: Path, stage: Stage) -> None:
    folder = tmp_path / "s"
    before = run_stage(folder, INPUTS, stage).digests()

    def fails(out: Path) -> dict[str, Any]:
        (out / "model.onnx").write_bytes(b"half")
        raise QuantizeError("no range")

    with pytest.raises(QuantizeError, match="no range"):
        run_stage(folder, {**INPUTS, "source": "new"}, fails)
    assert run_stage(folder, INPUTS, stage).digests() == before
    assert stage.made == 1
    assert not list(tmp_path.glob(".*aside*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_leaves_the_old_one(tmp_path: Path, stage: Stage, code: int) -> None:
    folder = tmp_path / "s"
    run_stage(folder, INPUTS, stage)

    def full(out: Path) -> dict[str, Any]:
        (out / "model.onnx").write_bytes(b"half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(ArtifactError, match=os.strerror(code)) as caught:
        run_stage(folder, {**INPUTS, "source": "new"}, full)
    assert "finished stages are kept" in str(caught.value)
    assert run_stage(folder, INPUTS, stage).skipped


def test_another_error_of_the_system_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    def missing(out: Path) -> dict[str, Any]:
        del out
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "checkpoint/model.safetensors")

    with pytest.raises(ArtifactError, match=r"checkpoint/model\.safetensors") as caught:
        run_stage(tmp_path / "s", INPUTS, missing)
    assert "disk is full" not in str(caught.value)


KILLED = """
import os, signal, sys
from pathlib import Path
from build_engines.manifest import run_stage

def build(out):
    (out / "model.onnx").write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)

run_stage(Path(sys.argv[1]), {"source": sys.argv[2]}, build)
"""


@pytest.mark.parametrize("finished_before", [False, True])
def test_a_killed_stage_is_recovered_from(tmp_path: Path, stage: Stage, finished_before: bool) -> None:
    folder = tmp_path / "s"
    if finished_before:
        run_stage(folder, {"source": "old"}, stage)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), "new"], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".s.aside-*"))  # half-written, under a name that nothing reads
    assert folder.exists() is finished_before
    if finished_before:
        assert run_stage(folder, {"source": "old"}, stage).skipped
    assert not run_stage(folder, {"source": "new"}, stage).skipped
    assert run_stage(folder, {"source": "new"}, stage).skipped
    assert not list(tmp_path.glob(".s.aside-*"))


SLOW = """
import sys, time
from pathlib import Path
from build_engines.manifest import run_stage

def build(out):
    print("building", flush=True)
    sys.stdin.readline()
    (out / "model.onnx").write_bytes(b"theirs")
    return {}

run_stage(Path(sys.argv[1]), {"source": "theirs"}, build)
"""


def test_two_builds_at_once(tmp_path: Path, stage: Stage) -> None:
    folder = tmp_path / "s"
    other = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "building\n"
        with pytest.raises(BusyError, match="being written by another process"):
            run_stage(folder, INPUTS, stage)
        assert stage.made == 0
        other.communicate("\n", timeout=60)
    finally:
        other.kill()
        other.wait()
    assert (folder / "model.onnx").read_bytes() == b"theirs"
    assert not run_stage(folder, INPUTS, stage).skipped


# --- engine manifests ---


def engine(folder: Path, **extra: Any) -> dict[str, Any]:
    folder.mkdir(parents=True)
    (folder / "engine.onnx").write_bytes(b"not a graph, but nobody looks before the digest is right")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    serving = {"labels": ["긍정", "부정"], "max_batch": 8}
    manifest = {"target": "onnxruntime", "serving": serving, "x": 0.1 + 0.2, **extra}
    return write_manifest(folder, manifest, "engine.onnx")


def test_a_manifest_names_every_file_and_itself(tmp_path: Path) -> None:
    written = engine(tmp_path / "e", profile=(1, 8, 64))
    assert written["engine"]["file"] == "engine.onnx"
    assert written["engine"]["bytes"] == (tmp_path / "e" / "engine.onnx").stat().st_size
    assert set(written["files"]) == {"tokenizer.json"}
    assert written["profile"] == [1, 8, 64]
    assert read_manifest(tmp_path / "e") == written
    assert written["digest"] == manifest_digest(written)
    for named in (tmp_path / "e", tmp_path / "e" / "engine.onnx", tmp_path / "e" / MANIFEST):
        assert read_engine_manifest(named) == (tmp_path / "e", written)


MANIFEST_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gate loosened": (lambda f: replace_in(f / MANIFEST, '"x": 0.3', '"x": 0.4'), "altered after the build"),
    "digest removed": (lambda f: edit(f / MANIFEST, lambda m: m.pop("digest")), "has no digest"),
    "file delisted": (lambda f: edit(f / MANIFEST, lambda m: m["files"].clear()), "altered after the build"),
    "other format": (lambda f: edit(f / MANIFEST, lambda m: m.update(format=2)), "not a manifest of format"),
    "cut short": (lambda f: truncate(f / MANIFEST), "unreadable manifest"),
    "not JSON": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "unreadable manifest"),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), "not a manifest of format 1"),
    "missing": (lambda f: (f / MANIFEST).unlink(), "no manifest, so this is not a finished engine"),
    "engine truncated": (lambda f: truncate(f / "engine.onnx"), "truncated"),
    "engine altered": (lambda f: alter(f / "engine.onnx"), "SHA-256 differs"),
    "engine missing": (lambda f: (f / "engine.onnx").unlink(), "missing, though the manifest lists it"),
    "tokenizer altered": (lambda f: alter(f / "tokenizer.json"), "SHA-256 differs"),
}


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize("kind", MANIFEST_DAMAGE)
def test_an_engine_that_is_not_as_it_was_built_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "e"
    engine(folder)
    change, reason = MANIFEST_DAMAGE[kind]
    change(folder)
    with pytest.raises(ArtifactError, match=reason):
        read_engine_manifest(folder)
    with pytest.raises(EngineRefused, match=reason):
        open_engine(folder)


def test_an_engine_of_another_target_is_refused_by_name(tmp_path: Path) -> None:
    engine(tmp_path / "e", target="tensorrt-rtx")
    with pytest.raises(EngineRefused, match="built for target 'tensorrt-rtx'"):
        open_engine(tmp_path / "e")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "", ".."])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "e"
    written = engine(folder)
    written["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    written["digest"] = manifest_digest(written)
    (folder / MANIFEST).write_text(json.dumps(written))
    with pytest.raises(EngineRefused, match="outside its folder"):
        open_engine(folder)


# --- digests ---


def test_the_files_that_decide_a_model(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "stage.json").write_text("{}")
    found = folder_files(tmp_path, (".json", ".safetensors"), without=tmp_path / "build")
    assert found == [tmp_path / "1_Pooling" / "config.json", tmp_path / "config.json"]


def test_canonical_digests() -> None:
    assert digest_of({"a": 1, "b": [1]}) == digest_of({"b": [1], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": "1"})
    assert digest_of({"a": 1}) != digest_of({"a": 1.5})


def test_our_own_code_is_an_input() -> None:
    one = code_digest("build_engines/quantize")
    assert one == code_digest("build_engines/quantize")
    assert one != code_digest("build_engines/quantize", "build_engines/gates.py")
    with pytest.raises(OSError, match="nowhere"):
        code_digest("build_engines/nowhere.py")


def test_seconds_are_those_of_the_run_that_made_it(tmp_path: Path) -> None:
    def slow(out: Path) -> dict[str, Any]:
        del out
        time.sleep(0.05)
        return {}

    assert run_stage(tmp_path / "s", {}, slow).seconds >= 0.05
    assert run_stage(tmp_path / "s", {}, slow).seconds >= 0.05
