"""The doctor's checks of a stack: its file, checkpoints, plan, targets, and engines, each by its bad case."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_stack import write_stack

from build_engines import doctor_stack, errors
from build_engines.doctor_stack import Engine, check_engines, check_plan, check_source, check_target, needs_of
from build_engines.fetch_hub import RemoteFile, Repository
from build_engines.findings import Finding
from build_engines.manifest import write_manifest
from build_engines.plan import promised_memory
from build_engines.stack import Stack, load_stack

SHAPE = {"family": "bert", "layers": 12, "hidden": 768, "ffn": 3072, "heads": 12, "vocabulary": 30_000}
MODEL = {"task": "embed", "source": "owner/name", "precisions": ["int8", "fp16"], "shape": SHAPE}


def stack_of(
    folder: Path, targets: tuple[str, ...] = ("onnxruntime", "tensorrt-rtx"), **changes: Any
) -> Stack:
    model = {key: value for key, value in {**MODEL, **changes}.items() if value is not None}
    path = write_stack(folder / "s.toml", {"tiny": model}, targets=list(targets))
    return load_stack(path, build_dir=folder / "build")


def write_checkpoint(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(bytes(1 << 20))
    return folder


def source(stack: Stack, *, online: bool = False) -> Finding:
    return check_source(stack, stack.models["tiny"], online=online)


def publish(stack: Stack, precision: str, target: str, **manifest: Any) -> Path:
    folder = stack.build_dir / "engines" / "tiny" / precision / target
    folder.mkdir(parents=True)
    (folder / "engine.onnx").write_bytes(bytes(100))
    write_manifest(folder, {"target": target, "serving": {}, "gates": {}, **manifest}, "engine.onnx")
    return folder


def test_a_stack_file_that_is_wrong_is_all_there_is_to_say(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "s.toml", {"tiny": {**MODEL, "task": "embbed"}})
    found = doctor_stack.examine_stack(path, None, online=False)
    (finding,) = found.findings
    assert (finding.check, finding.state, finding.error) == ("stack", "problem", errors.StackError)
    assert "embbed" in finding.found
    assert (found.stack, found.plan) == (None, None)


def test_a_folder_that_is_not_there_or_is_no_checkpoint(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, source="./checkpoint")
    found = source(stack)
    assert (found.state, found.error) == ("problem", errors.FetchError)
    assert "there is no such folder" in found.found
    folder = write_checkpoint(tmp_path / "checkpoint", model_type="bert")
    assert source(stack).found == f"{folder}, 1 MiB"
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "code.Model"}}))
    assert "code of its own" in source(stack).found
    (folder / "config.json").unlink()
    assert "there is no config.json" in source(stack).found


def test_a_checkpoint_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network is used unless it is asked for."""
    asked = []

    def read_repository(name: str, revision: str | None) -> Repository:
        asked.append(name)
        files = [
            RemoteFile(file, size, None)
            for file, size in (("config.json", 10), ("model.safetensors", 5 << 20))
        ]
        return Repository(name, "abc", {file.name: file for file in files})

    monkeypatch.setattr(doctor_stack, "read_repository", read_repository)
    stack = stack_of(tmp_path)
    found = source(stack)
    assert (found.state, found.do, asked) == ("warning", f"build-engines fetch {stack.path}", [])
    assert source(stack, online=True).found == "owner/name is not fetched yet; the hub has 5 MiB"
    assert asked == ["owner/name"]

    def no_such(name: str, revision: str | None) -> Repository:
        raise errors.FetchError(f"{name}: the hub has no such repository")

    monkeypatch.setattr(doctor_stack, "read_repository", no_such)
    assert source(stack, online=True).state == "problem"
    folder = write_checkpoint(stack.fetched_dir("tiny"), model_type="bert")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": "0"} for path in folder.iterdir()}
    record = {"format": 1, "source": "owner/name", "revision": None, "commit": "abc", "files": files}
    (folder / "fetched.json").write_text(json.dumps(record))
    assert source(stack, online=True).found == "owner/name, fetched, 1 MiB"


def test_a_plan_that_does_not_fit_or_cannot_be_made(tmp_path: Path) -> None:
    stack = stack_of(tmp_path)
    assert check_plan(stack, [])[0].state == "ok"
    small = replace(stack, card=replace(stack.card, memory_mib=1024))
    found, plan = check_plan(small, [])
    assert (found.state, found.error, plan is None) == ("problem", errors.PlanError, False)
    assert "does not fit" in found.found
    assert found.do == f"build-engines plan {stack.path}"
    unknown = stack_of(tmp_path, shape=None)
    assert check_plan(unknown, [source(unknown)])[0].state == "skipped"
    found, plan = check_plan(unknown, [Finding("source tiny", "ok", "there")])
    assert (found.state, plan) == ("problem", None)


def test_a_target_that_cannot_compile_matters_while_engines_are_missing() -> None:
    refusal = errors.CompileError("tensorrt is not installed", next_step="pip install tensorrt")
    assert check_target("tensorrt", None, ["a int8"]).state == "ok"
    found = check_target("tensorrt", refusal, ["a int8"])
    assert (found.state, found.do, found.error) == ("problem", "pip install tensorrt", errors.CompileError)
    found = check_target("tensorrt", refusal, [])
    assert (found.state, "tensorrt is not installed" in found.found) == ("ok", True)


def test_engines_that_are_missing_unjudged_or_damaged() -> None:
    path = Path("s.toml")
    judged = Engine(name="a int8", target="onnxruntime", state="judged")
    missing = replace(judged, name="a fp16", state="missing")
    unjudged = replace(judged, target="tensorrt-rtx", state="not judged")
    damaged = replace(judged, state="damaged", reason="engine.onnx: 5 bytes, the manifest says 6")
    assert check_engines([judged], path).state == "ok"
    found = check_engines([judged, missing, unjudged], path)
    assert (found.state, found.do) == ("warning", "build-engines build s.toml")
    words = "2 of 3 built, 1 judged; missing: a fp16 onnxruntime; not judged: a int8 tensorrt-rtx"
    assert found.found == words
    assert (
        check_engines([judged, unjudged], path).do
        == "on the machine with the card: build-engines build s.toml"
    )
    found = check_engines([judged, missing, damaged], path)
    assert (found.state, found.error, found.found) == ("problem", errors.ArtifactError, damaged.reason)


def test_engines_are_read_by_manifest_and_size(tmp_path: Path) -> None:
    stack = stack_of(tmp_path)
    publish(stack, "int8", "onnxruntime", gates={"engine": {"passed": True}})
    publish(stack, "int8", "tensorrt-rtx")
    cut = publish(stack, "fp16", "onnxruntime", gates={"engine": {"passed": True}})
    (cut / "engine.onnx").write_bytes(bytes(99))
    found = {(engine.name, engine.target): engine for engine in doctor_stack.read_engines(stack)}
    assert {name: engine.state for name, engine in found.items()} == {
        ("tiny int8", "onnxruntime"): "judged",
        ("tiny int8", "tensorrt-rtx"): "not judged",
        ("tiny fp16", "onnxruntime"): "damaged",
        ("tiny fp16", "tensorrt-rtx"): "missing",
    }
    assert "99 bytes, the manifest says 100" in found["tiny fp16", "onnxruntime"].reason


def test_what_is_yet_to_be_written(tmp_path: Path) -> None:
    stack = stack_of(tmp_path)
    model = stack.models["tiny"]
    half, eight = (promised_memory(stack, model, p)["weights"] for p in ("fp16", "int8"))
    needs = needs_of(stack)
    tables = 2 * eight - half
    on_cpu = 2 * half + eight + tables
    # The checkpoint and its graph in FP32; each precision's graph, and its engines for the card and the CPU.
    assert needs.disk == 4 * half + 2 * (half + eight) + on_cpu
    assert needs.memory == on_cpu
    publish(stack, "int8", "tensorrt-rtx")
    (stack.build_dir / "work" / "tiny" / "int8").mkdir(parents=True)
    assert needs_of(stack).disk == needs.disk - 2 * eight
    assert needs_of(stack_of(tmp_path, targets=("tensorrt-rtx",))).memory == 0


def test_an_llm_shares_its_weights_with_the_cpus_engine(tmp_path: Path) -> None:
    shape = {"family": "llama", "layers": 2, "hidden": 256, "ffn": 512, "heads": 4, "vocabulary": 1000}
    llm = {"task": "generate", "precisions": ["int8-weights"], "shape": {**shape, "positions": 4096}}
    stack = stack_of(tmp_path, **llm, slots=2, max_length=256)
    model = stack.models["tiny"]
    half, eight = (promised_memory(stack, model, p)["weights"] for p in ("fp16", "int8-weights"))
    # The checkpoint; the graph, whose weights the CPU's engine shares; the card's engine.
    assert needs_of(stack).disk == half + 2 * eight
