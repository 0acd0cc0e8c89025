"""The last stage where a GPU is, over the emulator: engines are judged on it before they are published."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_gpu import FakeCudart
from fake_onnxruntime import FakeSession
from fake_tensorrt import VERSION, FakeTensorRT, write_engine
from small_stack import write_lines, write_stack

from build_engines.errors import CompileError, GateError
from build_engines.graphs import fix_dimension
from build_engines.pipeline import BuiltEngine, build_stack
from build_engines.pipeline import engine as last_stage
from build_engines.profiles import DecoderProfile
from build_engines.random_model import RandomLlama, write_random_llm
from build_engines.stack import Stack, load_stack
from build_engines.targets.tensorrt import TensorRTTarget
from triton_repo.runtime.gpu import cuda, onnxruntime

LLAMA = RandomLlama(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, vocabulary=512, positions=256)
GATES = {"min_mean_cosine": 0.99, "min_cosine": 0.99, "min_spearman": 0.9, "min_fp16_cosine": 0.99}


class Lines:
    """A reporter that remembers which stages ran, and what their lines said."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.details: list[str] = []
        self._stage = ""

    def start(self, model: str, stage: str) -> None:
        self._stage = stage

    def progress(self, phase: str, done: int, total: int) -> None:
        assert 0 <= done <= total

    def finish(self, run: Any, detail: str) -> None:
        self.details.append(detail)
        if not run.skipped:
            self.made.append(self._stage)


@dataclass
class Machine:
    """What the build meets. `api` None: there is no GPU; `spoil` changes what the target compiles."""

    api: FakeCudart | None = None
    spoil: Callable[[onnx.ModelProto], None] | None = None
    compiled: int = 0
    trts: list[FakeTensorRT] = field(default_factory=list)

    def cudart(self) -> Any:
        return self.api if self.api is not None else FakeCudart(devices=0)

    def compiled_by(self, target: TensorRTTarget, graph: Path, out: Path, **settings: Any) -> dict[str, Any]:
        """In place of TensorRT's builder: the graph itself, as an engine that the fake runtime loads."""
        self.compiled += 1
        model, profile = onnx.load(str(graph)), settings["profile"]
        ranges = [{"batch": getattr(profile, "batch", None), "sequence": getattr(profile, "sequence", None)}]
        if isinstance(profile, DecoderProfile):
            fix_dimension(model, "capacity", profile.capacity)
            ranges = list(profile.ranges)
        if self.spoil is not None:
            self.spoil(model)
        cards = ("8.0", "8.6", "8.9", "12.0") if target.portable else (settings["compute_capability"],)
        write_engine(out / "engine.trt", model, ranges, cards=cards)
        return {"versions": {target.name: VERSION}, "layers": {}, "activation_bytes": 4096}

    def plug_in(self, monkeypatch: pytest.MonkeyPatch, capability: str = "12.0") -> FakeTensorRT:
        self.api = FakeCudart(compute_capability=capability)
        self.trts.append(FakeTensorRT(self.api))
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", self.trts[-1])  # type: ignore[arg-type]
        return self.trts[-1]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """One without a GPU until `plug_in`."""
    machine = Machine()
    monkeypatch.setattr(cuda, "cudart", machine.cudart)

    def compile(target: TensorRTTarget, graph: Path, out: Path, **settings: Any) -> dict[str, Any]:
        return machine.compiled_by(target, graph, out, **settings)

    monkeypatch.setattr(TensorRTTarget, "compile", compile)
    monkeypatch.setenv("ONECARD_CACHE_DIR", str(tmp_path / "kernels"))
    yield machine
    for trt in machine.trts:
        trt.engines.clear()
        gc.collect()
        assert trt.api.misuses == []
        assert trt.api.leaks() == []


def _typed(folder: Path, table: dict[str, Any]) -> Stack:
    """A stack whose graph has passed its gate, nothing compiled."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_stack(folder / "stack.toml", {"tiny": table}, targets=["tensorrt-rtx"])
    stack = load_stack(path, build_dir=folder / "build")
    build_stack(stack, Lines(), targets=[])
    return stack


@pytest.fixture(scope="module")
def embedder(checkpoint: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    table = {
        "task": "embed",
        "source": str(checkpoint("embed")),
        "precisions": ["fp16"],
        "max_batch": 8,
        "max_length": 64,
        "evaluation": str(data / "texts.jsonl"),
        "calibration": {"data": str(data / "other.jsonl"), "samples": 16},
        "gates": GATES,
    }
    return _typed(tmp_path_factory.mktemp("embedder"), table)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    folder = tmp_path_factory.mktemp("llm")
    write_random_llm(folder / "checkpoint", LLAMA)
    for name in ("calibration", "evaluation"):
        texts = [{"text": f"{name}: the parcel number {n} came {n} days late."} for n in range(6)]
        write_lines(folder / f"{name}.jsonl", texts)
    table = {
        "task": "generate",
        "source": str(folder / "checkpoint"),
        "precisions": ["fp16"],
        "slots": 2,
        "max_length": 96,
        "prefill_chunk": 16,
        "evaluation": str(folder / "evaluation.jsonl"),
        "calibration": {"data": str(folder / "calibration.jsonl")},
    }
    return _typed(folder, table)


@pytest.fixture(params=["embedder", "llm"])
def either(request: pytest.FixtureRequest) -> Stack:
    stack: Stack = request.getfixturevalue(request.param)
    return stack


def copied(stack: Stack, folder: Path) -> Stack:
    return dataclasses.replace(stack, build_dir=Path(shutil.copytree(stack.build_dir, folder / "build")))


def built(stack: Stack) -> tuple[BuiltEngine, Lines]:
    lines = Lines()
    (engine,) = build_stack(stack, lines)
    return engine, lines


def spoiled(model: onnx.ModelProto) -> None:
    """What a wrong kernel would do: the graph with other weights."""
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weight") and len(tensor.dims) == 2:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 1, axis=0), tensor.name))


def test_an_engine_is_judged_on_the_gpu_that_is_here(
    either: Stack,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine.plug_in(monkeypatch)
    engine, lines = built(copied(either, tmp_path))
    gates = engine.manifest["gates"]
    assert gates["engine"]["passed"] is True
    # The same data and the same limits as the graph's gate.
    graph = gates["graph"]["gate"]
    assert gates["engine"]["samples"] == graph["samples"]
    limits = {check["name"]: check["limit"] for check in graph["checks"]}
    assert {check["name"]: check["limit"] for check in gates["engine"]["checks"]} == limits
    assert engine.manifest["judged_on"]["name"] == "Fake GPU 16 GB"
    assert engine.manifest["judged_on"]["compute_capability"] == "12.0"
    assert lines.details[-1].endswith("verified")
    assert machine.trts[0].runs > 0


def test_engines_of_onnx_runtime_are_judged_too(
    either: Stack, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are for no card by name: any GPU judges them, and one that does not open is an error."""
    stack = dataclasses.replace(copied(either, tmp_path), targets=("onnxruntime-cuda",))
    machine.plug_in(monkeypatch, "7.5")
    with pytest.raises(CompileError, match="does not open on the Fake GPU 16 GB"):
        build_stack(stack, Lines())  # the package for the CPU is what is installed here
    assert not list(stack.build_dir.rglob("engine.onnx"))

    def on_the_fake_device(path: Path, device: Any, **_: Any) -> FakeSession:
        return FakeSession(path, device)

    monkeypatch.setattr(onnxruntime, "open_session", on_the_fake_device)
    engine, _ = built(stack)
    assert engine.manifest["gates"]["engine"]["passed"] is True
    assert engine.manifest["compute_capability"] is None
    assert engine.manifest["judged_on"]["compute_capability"] == "7.5"


def test_what_was_built_without_a_gpu_is_judged_on_the_first_machine_that_has_one(
    machine: Machine, embedder: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = copied(embedder, tmp_path)
    engine, lines = built(stack)
    assert "engine" not in engine.manifest["gates"]
    assert "judged_on" not in engine.manifest
    assert lines.details[-1].endswith("not judged on a GPU yet")
    before = engine.manifest["engine"]["sha256"]
    assert built(stack)[1].made == []
    machine.plug_in(monkeypatch)
    engine, lines = built(stack)
    assert lines.made == ["fp16 tensorrt-rtx"]
    assert engine.manifest["gates"]["engine"]["passed"] is True
    assert engine.manifest["activation_bytes"] == 4096  # what its compilation had said is kept
    assert (machine.compiled, engine.manifest["engine"]["sha256"]) == (1, before)
    assert built(stack)[1].made == []
    # Back on the machine without: the verdict stays.
    machine.api = None
    again, lines = built(stack)
    assert lines.made == []
    assert again.manifest == engine.manifest
    # Another GPU of the kind judges for itself.
    machine.plug_in(monkeypatch).api.name = "Another GPU"
    engine, lines = built(stack)
    assert lines.made == ["fp16 tensorrt-rtx"]
    assert engine.manifest["judged_on"]["name"] == "Another GPU"
    assert machine.compiled == 1
    # Altered since: made again, and nobody has judged what was made.
    machine.api = None
    (engine.folder / "engine.trt").write_bytes(b"other")
    engine, lines = built(stack)
    assert machine.compiled == 2
    assert "engine" not in engine.manifest["gates"]
    machine.plug_in(monkeypatch).api.name = "Another GPU"
    engine, lines = built(stack)
    assert engine.manifest["gates"]["engine"]["passed"] is True


def test_an_engine_that_answers_otherwise_is_not_published(
    either: Stack,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = copied(either, tmp_path)
    machine.spoil = spoiled
    machine.plug_in(monkeypatch)
    with pytest.raises(GateError, match="fails the gate that its graph passed") as caught:
        build_stack(stack, Lines())
    assert "tensorrt-rtx on Fake GPU 16 GB" in str(caught.value)
    assert not list(stack.build_dir.rglob("engine.trt"))


def test_an_engine_published_unjudged_is_taken_back_when_it_fails(
    machine: Machine, embedder: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = copied(embedder, tmp_path)
    machine.spoil = spoiled
    engine, _ = built(stack)
    assert (engine.folder / "engine.trt").is_file()
    machine.plug_in(monkeypatch)
    with pytest.raises(GateError):
        build_stack(stack, Lines())
    assert not engine.folder.exists()


def test_a_gpu_that_cannot_run_the_engine_does_not_judge_it(
    machine: Machine, embedder: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = machine.plug_in(monkeypatch, "8.9")
    engine, _ = built(copied(embedder, tmp_path / "one"))
    assert "engine" not in engine.manifest["gates"]
    assert trt.enqueued == 0
    portable = dataclasses.replace(copied(embedder, tmp_path / "many"), portable=True)
    engine, _ = built(portable)
    assert engine.manifest["portable"] is True
    assert engine.manifest["gates"]["engine"]["passed"] is True
    assert engine.manifest["judged_on"]["compute_capability"] == "8.9"


def test_a_portable_engine_that_the_library_refuses_here(
    machine: Machine, embedder: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card that was not asked for that is no verdict on the engine; on the stack's own card it is."""
    stack = dataclasses.replace(copied(embedder, tmp_path), portable=True)
    trt = machine.plug_in(monkeypatch, "9.0")
    trt.diagnostics = int(trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC)
    engine, _ = built(stack)
    assert "engine" not in engine.manifest["gates"]
    own = dataclasses.replace(stack, card=dataclasses.replace(stack.card, compute_capability="9.0"))
    with pytest.raises(CompileError, match=r"does not open on the Fake GPU 16 GB: .*unsupported cc"):
        build_stack(own, Lines())


def test_a_gpu_that_is_full_publishes_nothing(
    machine: Machine, embedder: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = copied(embedder, tmp_path)
    api = machine.plug_in(monkeypatch).api
    api.used_by_others = api.total_bytes - 4096
    with pytest.raises(CompileError, match=r"the GPU is full.*the plan promised"):
        build_stack(stack, Lines())
    assert not list(stack.build_dir.rglob("engine.trt"))
    api.used_by_others = 0
    engine, _ = built(stack)
    assert engine.manifest["gates"]["engine"]["passed"] is True


def test_the_stacks_card_that_cannot_be_used_is_known_before_the_work(
    machine: Machine, embedder: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver has it, the CUDA runtime does not: without this its engines would be published unjudged."""
    stack = copied(embedder, tmp_path)
    monkeypatch.setattr(last_stage, "gpu_compute_capability", lambda: "12.0")
    lines = Lines()
    with pytest.raises(CompileError, match=r"cannot be judged on it\n  cause: .*the driver sees no GPU"):
        build_stack(stack, lines)
    assert lines.details == []
    # Another card than the stack's is of no use here in any case.
    monkeypatch.setattr(last_stage, "gpu_compute_capability", lambda: "8.9")
    assert "engine" not in built(stack)[0].manifest["gates"]


def test_the_record_names_the_device(
    machine: Machine, embedder: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.plug_in(monkeypatch)
    engine, _ = built(copied(embedder, tmp_path))
    record = json.loads((engine.folder / "stage.json").read_text())
    assert record["inputs"]["device"] == {"name": "Fake GPU 16 GB", "compute_capability": "12.0"}
