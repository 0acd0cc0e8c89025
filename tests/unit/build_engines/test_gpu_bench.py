"""bench-gpu as it runs on a GPU, here on the CPU with small models and the CPU's engines; and its report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_gpu import FakeCudart

from build_engines import nvidia
from build_engines.cli import main
from build_engines.errors import ArtifactError
from build_engines.gpu import building, ceilings, command, encoders, machine, memory, served
from build_engines.gpu.building import build_engine, usable_targets
from build_engines.gpu.ceilings import Ceilings
from build_engines.gpu.command import run_bench
from build_engines.gpu.decoders import parameters
from build_engines.gpu.memory import measure_memory
from build_engines.gpu.models import EncoderSize, Sizes, one_billion, write_stack_file
from build_engines.gpu.report import document, render, write_files
from build_engines.gpu.results import Clock, Results, Row
from build_engines.gpu.settings import Race, Run, Settings
from build_engines.random_model import RandomLlama
from build_engines.stack import load_stack
from triton_repo.runtime.gpu import cuda

ROOT = Path(__file__).parents[3]
SIZES = Sizes(
    encoder=EncoderSize(layers=2, hidden=64, heads=4, ffn=128, vocabulary=2000, positions=64),
    llm=RandomLlama(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, vocabulary=1024, positions=128),
    shapes=((1, 8), (2, 16)),
    encoder_precisions=("fp16",),
    llm_precisions=("fp16",),
    slots=2,
    capacity=48,
    chunk=16,
    prompt=24,
    new=4,
    batches=(1, 2),
)
GPU = nvidia.Card(
    name="NVIDIA Test",
    compute_capability="9.0",
    total_bytes=24 << 30,
    bus="0000:01:00.0",
    driver="580.1",
    driver_cuda="13.0",
    processors=132,
    clock_mhz=1980,
    l2_bytes=60 << 20,
)


def settings(folder: Path) -> Settings:
    return Settings(
        folder=folder,
        minutes=3,
        device="cpu",
        targets=("onnxruntime", "tensorrt"),
        sizes=SIZES,
        ceilings=ceilings.Sizes(buffer=1 << 20, edge=64, transfer=1 << 18),
        block=0.01,
        rounds=1,
        compiled=False,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Results]:
    """A run of one encoder and the LLM; Triton is in tests/serving."""
    chosen = settings(tmp_path_factory.mktemp("bench"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "OMP_NUM_THREADS", "1"
        )  # threads that spin for one another take seconds on a busy machine
        patch.setattr(building, "_SIDE", ceilings.TORCH)  # one process less that loads PyTorch
        patch.setattr(encoders, "ENCODERS", {"reranker": "rerank"})
        patch.setattr(command, "measure_served", lambda run, targets, clock: None)
        return chosen, run_bench(chosen, lambda text: None)


@pytest.fixture
def again(small: tuple[Settings, Results]) -> Iterator[Run]:
    """Another run over what that one built."""
    folder = small[0].folder.absolute()
    with ExitStack() as sides:
        yield Run(
            settings=small[0],
            results=Results(lambda text: None),
            clock=Clock(60),
            card=None,
            sides=sides,
            stack=load_stack(folder / "stack.toml", build_dir=folder / "build"),
        )


def test_every_part_is_measured_and_what_is_missing_is_named(small: tuple[Settings, Results]) -> None:
    _, results = small
    assert not [row for row in results.rows if row.status == "failed"]
    measured = {(row.part, row.case, row.contender, row.way) for row in results.measured()}
    for name in ("copy", "fp16 product", "int8 product"):
        assert ("ceilings", name, "torch", "") in measured
    for shape in ("1 x 8", "2 x 16"):
        assert ("encoders", shape, "onnxruntime fp16", "host") in measured
        for way in ("device", "host"):
            assert ("encoders", shape, "torch fp16", way) in measured
    for contender in ("torch fp16", "onnxruntime fp16"):
        for case in ("first token", "prompt of 24", "decode, 1 at once", "decode, 2 at once"):
            assert ("decoders", case, contender, "host") in measured
    skipped = {(row.part, row.contender): row.reason for row in results.rows if row.status == "skipped"}
    assert "tensorrt" in skipped["machine", "tensorrt"]
    assert skipped["encoders", "onnxruntime fp16"] == "this engine runs from host memory only"


def test_figures_have_their_limit_and_the_number_of_runs(small: tuple[Settings, Results]) -> None:
    _, results = small
    figures = [
        row for row in results.measured() if row.part in {"encoders", "decoders"} and row.case != "open"
    ]
    assert all(row.limit and row.value and row.runs >= 4 and row.spread for row in figures)
    assert {row.model for row in figures} == {"reranker", "assistant"}


def test_the_files_hold_everything(small: tuple[Settings, Results]) -> None:
    chosen, results = small
    found = json.loads((chosen.folder / "bench.json").read_text("utf-8"))
    assert len(found["rows"]) == len(results.rows)
    assert found["packages"]["torch"]
    text = (chosen.folder / "bench.txt").read_text("utf-8")
    assert "Not measured" in text
    assert "decode, 2 at once" in text


def test_another_run_keeps_the_engines(again: Run) -> None:
    folder = build_engine(again, again.clock, "reranker", "fp16", "onnxruntime")
    assert folder is not None
    (row,) = again.results.rows
    assert "kept from the run before" in row.note
    assert "judged on this machine" in row.note


def test_an_engine_that_cannot_be_built_is_a_row(again: Run) -> None:
    assert build_engine(again, again.clock, "reranker", "fp16", "tensorrt") is None
    (row,) = again.results.rows
    assert row.status == "failed"
    assert "tensorrt" in row.reason


def test_an_order_of_work_in_which_what_tells_most_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[Any, ...]] = []
    for name in ("decoders", "encoders", "memory", "served"):
        monkeypatch.setattr(
            command,
            f"measure_{name}",
            lambda run, targets, clock, *race, name=name: (
                done.append((name, clock.left > 0, *race)),
                run.results.add(Row(part="encoders", case="1 x 8", contender="torch fp16", value=1.0)),
            ),
        )
    monkeypatch.setattr(command, "usable_targets", lambda run: ["tensorrt-rtx", "onnxruntime-cuda"])
    monkeypatch.setattr(command, "measure_ceilings", lambda *_: Ceilings())
    run_bench(replace(settings(tmp_path), compiled=True), lambda text: None)
    engines, compiled, every = Race(), Race(compiled=True), Race(every=True)
    assert [(name, *race) for name, _, *race in done] == [
        ("decoders", engines),
        ("encoders", engines),
        ("decoders", compiled),
        ("encoders", compiled),
        ("memory",),
        ("served",),
        ("decoders", every),
        ("encoders", every),
    ]
    assert all(has_time for _, has_time, *_ in done)


def test_a_figure_that_is_measured_again_replaces_the_first() -> None:
    results = Results(lambda text: None)
    row = Row(part="encoders", case="1 x 8", contender="torch fp16", way="host", value=2.0)
    results.add(row)
    results.add(replace(row, way="device"))
    results.add(replace(row, value=3.0))
    assert [(found.way, found.value) for found in results.rows] == [("host", 3.0), ("device", 2.0)]


@pytest.mark.parametrize("target", ["tensorrt-rtx", "onnxruntime-cuda"])
def test_a_machine_with_one_target_has_a_stack_of_all_precisions(tmp_path: Path, target: str) -> None:
    """Not each target runs each precision, and a stack file must name one that does."""
    stack = load_stack(write_stack_file(tmp_path, Sizes(), [target], "12.0", portable=False))
    assert target in stack.targets
    assert stack.models["assistant"].precisions == ("int8-weights", "fp16")


class Here:
    """A side in this process."""

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
        assert seconds > 0
        return function(*arguments)

    def close(self) -> None:
        pass


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="a GPU is here")
def test_a_target_that_refuses_this_card_is_quoted_and_the_next_one_asked(
    again: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real TensorRT-RTX on the portable engine that it made; of ONNX Runtime the one for CPUs is here."""
    api = FakeCudart(compute_capability="9.0")
    monkeypatch.setattr(cuda, "cudart", lambda: api)
    again.settings = replace(
        again.settings, folder=tmp_path, device="cuda", targets=("tensorrt-rtx", "onnxruntime-cuda")
    )
    again.card = GPU
    again._sides["build"] = Here()  # type: ignore[assignment]
    assert usable_targets(again) == []
    refused, missing = again.results.rows
    assert (refused.case, refused.contender, refused.status) == (
        "a small portable engine",
        "tensorrt-rtx",
        "failed",
    )
    assert "cannot run here: Error reading CUDA GPU properties" in refused.reason
    assert (missing.contender, missing.status) == ("onnxruntime-cuda", "skipped")
    assert "the one for CPUs" in missing.reason


def test_memory_of_each_engine_and_of_the_whole_stack(again: Run) -> None:
    """With the resident memory of the engines' processes as what a card counts."""

    def used() -> int:
        return sum(resident(side.pid) for side in tuple(again._sides.values()) if side.pid)

    measure_memory(again, ["onnxruntime"], again.clock, used=used)
    found = again.results
    assert not [row for row in found.rows if row.status != "measured"]
    rows = {(row.model, row.case): row.value or 0.0 for row in found.rows}
    assert rows["assistant", "weights, activations, buffers, cache"] > 1
    assert rows["", "whole stack"] > max(value for (model, _), value in rows.items() if model)
    assert abs(found.facts["memory left behind, MiB"]) < 1


def test_the_parts_of_an_engine_stand_beside_what_was_planned_of_each(again: Run) -> None:
    """What it allocated itself is known by purpose; the rest of what the driver counts are its weights."""
    plan = {"weights": 500, "activations": 100, "buffers": 10, "cache": 50, "context": 300}
    plan = {part: size << 20 for part, size in plan.items()}
    side = again.side("parts")
    one = memory._Opened("assistant", "tensorrt int8-weights", Path("x"), side, plan)
    one.measured = {part: size << 20 for part, size in (("context", 280), ("engine", 670), ("peak", 960))}
    one.taken = {part: size << 20 for part, size in (("activations", 100), ("buffers", 12), ("cache", 50))}
    memory._report(again, one)
    rows = {row.case: (row.value, row.limit) for row in again.results.rows}
    assert rows == {
        "CUDA context": (280, 300),
        "weights, and what the library keeps": (508, 500),
        "activations": (100, 100),
        "buffers": (12, 10),
        "KV cache": (50, 50),
        "weights, activations, buffers, cache": (670, 660),
        "most at any time": (960, 960),
    }


def test_a_larger_card_is_filled_up_to_what_the_smaller_one_leaves(
    again: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = FakeCudart(64 << 20)
    monkeypatch.setattr(cuda, "cudart", lambda: api)
    assert again.stack is not None
    again.stack = replace(again.stack, reserve_mib=8)
    again.card = replace(GPU, total_bytes=api.total_bytes)
    again._sides["ballast"] = Here()  # type: ignore[assignment]
    for size, leaves in ((64, 64), (40, 32)):  # a card of 64 MiB gets no ballast
        again.settings = replace(again.settings, memory_mib=size)
        memory._hold_ballast(again, again.clock)
        assert api.cudaMemGetInfo()[1] == leaves << 20
    (row,) = again.results.rows
    assert (row.contender, row.value, row.note) == ("all but 40 MiB", 32, "leaves 32 MiB to the stack")
    memory._kept.pop("ballast")
    memory._kept.pop("device").close()
    assert api.leaks() == []


def resident(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="a GPU is here")
def test_a_gpu_that_nothing_installed_can_use_gives_reasons_and_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "find_card", lambda index=0: GPU)
    built = Row(part="build", case="fp16", value=1.0, unit="s")  # that alone is no measurement
    monkeypatch.setattr(command, "_write_stack", lambda run, targets: run.results.add(built))
    for part in ("decoders", "encoders", "memory", "served"):
        monkeypatch.setattr(command, f"measure_{part}", lambda *_: None)
    broken = replace(settings(tmp_path), device="cuda", targets=("tensorrt",))
    with pytest.raises(ArtifactError, match="nothing could be measured"):
        run_bench(broken, lambda text: None)
    rows = json.loads((broken.folder / "bench.json").read_text("utf-8"))["rows"]
    assert {row["status"] for row in rows if row["part"] != "build"} == {"skipped"}
    assert "sees no GPU" in next(row["reason"] for row in rows if row["part"] == "ceilings")


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="a GPU is here")
def test_without_a_gpu_the_command_says_so_and_leaves_its_files(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench-gpu", str(tmp_path)])
    assert done.exit_code == ArtifactError.exit_code
    assert "nothing could be measured" in done.output
    assert json.loads((tmp_path / "bench.json").read_text("utf-8"))["gpu"] is None
    assert "no NVIDIA driver" in (tmp_path / "bench.txt").read_text("utf-8")


def test_the_least_time_is_the_longer_of_computing_and_reading() -> None:
    card = Ceilings(bandwidth=1e12, fp16=1e14, int8=2e14)
    assert card.seconds(operations=1e12, moved=1e9) == pytest.approx(0.01)
    assert card.seconds(operations=1e12, moved=1e9, integer=True) == pytest.approx(0.005)
    assert card.seconds(operations=1e9, moved=1e10) == pytest.approx(0.01)
    assert Ceilings(bandwidth=1e12).seconds(operations=1, moved=1) is None


def test_the_default_models_are_of_the_sizes_that_they_claim() -> None:
    linear, head = parameters(Sizes())
    assert linear + head + one_billion().vocabulary * one_billion().hidden == pytest.approx(1.1e9, rel=0.02)
    # BERT-base: 85 million weights in the layers' Linears, two operations each for every token.
    assert EncoderSize().products(8, 64) == pytest.approx(2 * 85e6 * 512, rel=0.02)
    assert EncoderSize().weight_bytes(2) == pytest.approx(170e6, rel=0.01)


def test_the_report_compares_like_with_like(tmp_path: Path) -> None:
    results = Results(lambda text: None, facts=machine.describe(GPU))
    for contender, way, value in (
        ("torch fp16", "device", 8.0),
        ("torch fp16 compiled", "device", 6.0),
        ("tensorrt-rtx int8", "device", 2.0),
        ("torch fp16", "host", 9.0),
        ("tensorrt-rtx int8", "host", 3.0),
    ):
        row = Row(part="encoders", case="8 x 64", model="classifier", contender=contender, way=way)
        results.add(replace(row, value=value, unit="ms", limit=1.0))
    results.add(Row(part="memory", case="whole stack", value=12_000, unit="MiB", limit=15_000))
    for case in ("1 x 8", "2 x 8"):
        failed = Row(part="encoders", case=case, contender="tensorrt", status="failed", reason="no kernel")
        results.add(failed)
    lines = {
        tuple(line.split()[-6:-1])
        for line in write_files(results, tmp_path)[1].read_text("utf-8").splitlines()
    }
    text = " ".join((tmp_path / "bench.txt").read_text("utf-8").split())
    assert lines
    assert "tensorrt-rtx int8 device 2 ms 4.00 3.00 50%" in text
    assert "tensorrt-rtx int8 host 3 ms 3.00 33%" in text
    assert "whole stack 12,000 15,000 80%" in text
    assert "tensorrt 1 x 8, 2 x 8 failed no kernel" in text
    assert document(results)["gpu"]["name"] == "NVIDIA Test"
    assert render(results) is not None


def test_what_a_server_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(np, "__version__", "1.26.4")
        assert served.cannot_serve() == ""
        patch.setattr(np, "__version__", "2.5.5")
        assert "numpy 2.5.5" in served.cannot_serve()
    monkeypatch.setattr(served, "_installed", lambda name: name != "tritonclient")
    assert served.cannot_serve().startswith("tritonclient is not installed")


def test_the_gpu_tests_run_on_a_stand_in(tmp_path: Path) -> None:
    """So that they do not end at the first GPU for a misspelt name: they run, and that is all this shows."""
    report = tmp_path / "test.json"
    chosen = "device or contenders or fp16-reranker or (neighbours and fp16)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-k", chosen, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "ONECARD_STAND_IN": "1", "ONECARD_GPU_REPORT": str(report)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    rows = json.loads(report.read_text("utf-8"))["tests"]
    passed = {row["case"] for row in rows if row["status"] == "measured"}
    assert len(passed) >= 14
    assert any("no_neighbours" in name for name in passed)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"ONECARD_STAND_IN": "1", "ONECARD_GPU_MINUTES": "0"}, "the 0 minutes are over"),
    ],
)
def test_the_gpu_tests_name_what_is_missing_and_still_write_their_table(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    report = tmp_path / "test.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu/test_gpu_device.py", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "ONECARD_GPU_REPORT": str(report), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    rows = json.loads(report.read_text("utf-8"))["tests"]
    assert {row["status"] for row in rows} == {"skipped"}
    assert all(row["reason"] and reason in row["reason"] for row in rows)
    assert "GPU tests" in done.stdout
