"""All stages of a causal LM, with the real compilers: what is built, what is skipped, what is refused."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_stack import write_lines, write_stack

from build_engines.errors import DataError, ExportError, GateError, StackError
from build_engines.inspection import describe_engine, render_engine
from build_engines.manifest import StageRun
from build_engines.pipeline import BuiltEngine, build_stack, decoder, encoder
from build_engines.random_model import RandomLlama, write_random_llm
from build_engines.stack import Stack, load_stack
from triton_repo.runtime.decoder import DecoderEngine
from triton_repo.runtime.generation import GenerationService
from triton_repo.runtime.probe import probe_generator

SHAPE = RandomLlama(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, vocabulary=512, positions=256)


class Lines:
    """A reporter that remembers the stages: (stage, skipped)."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, bool]] = []
        self._stage = ""

    def start(self, model: str, stage: str) -> None:
        self._stage = stage

    def progress(self, phase: str, done: int, total: int) -> None:
        assert 0 <= done <= total

    def finish(self, run: StageRun, detail: str) -> None:
        assert detail
        self.stages.append((self._stage, run.skipped))

    @property
    def run(self) -> list[str]:
        return [stage for stage, skipped in self.stages if not skipped]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm") / "checkpoint"
    write_random_llm(folder, SHAPE)
    return folder


def stack_of(folder: Path, source: Path, **model: Any) -> Stack:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("calibration", "evaluation"):
        texts = [
            {"text": f"{name}: the parcel number {n} came {n} days late, 포장은 좋았어요."} for n in range(12)
        ]
        write_lines(folder / f"{name}.jsonl", texts)
    table = {
        "task": "generate",
        "source": str(source),
        "precisions": ["int8-weights"],
        "slots": 3,
        "max_length": 96,
        "prefill_chunk": 16,
        "evaluation": str(folder / "evaluation.jsonl"),
        "calibration": {"data": str(folder / "calibration.jsonl")},
        "gates": {"max_perplexity_increase": 0.2},
        **model,
    }
    path = write_stack(folder / "stack.toml", {"llm": table}, targets=["onnxruntime"])
    return load_stack(path, build_dir=folder / "build")


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stack, list[BuiltEngine]]:
    precisions = ["int8-weights", "fp16", "fp32"]
    stack = stack_of(tmp_path_factory.mktemp("stack"), checkpoint, precisions=precisions)
    return stack, build_stack(stack, Lines(), targets=["onnxruntime", "tensorrt-rtx"])


@pytest.fixture
def small(checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A stack's folder and its own copy of the checkpoint, built once in INT8 for the CPU."""
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    build_stack(stack_of(tmp_path, source), Lines())
    return tmp_path, source


def test_every_engine_is_there_and_says_all_of_itself(built: tuple[Stack, list[BuiltEngine]]) -> None:
    _, engines = built
    found = {(engine.manifest["precision"], engine.manifest["target"]) for engine in engines}
    assert found == {
        ("int8-weights", "onnxruntime"),
        ("int8-weights", "tensorrt-rtx"),
        ("fp16", "onnxruntime"),
        ("fp16", "tensorrt-rtx"),
        ("fp32", "onnxruntime"),
    }
    for engine in engines:
        manifest = engine.manifest
        serving = manifest["serving"]
        assert (serving["slots"], serving["capacity"], serving["chunk"]) == (3, 96, 16)
        assert serving["eos_ids"]
        assert serving["chat"]["template"]
        assert {"tokenizer.json", "chat_template.jinja"} <= manifest["files"].keys()
        assert manifest["gates"]["graph"]["gate"]["passed"] is True
        if manifest["target"] == "onnxruntime":
            assert "golden.json" in manifest["files"]
            assert manifest["gates"]["engine"]["passed"] is True
            assert "gate" not in manifest
            assert manifest["memory"] == {}
            assert manifest["layers"]["GroupQueryAttention"] == 2
            service = GenerationService.open(engine.folder, threads=1)
            probe_generator(service, engine.folder)
            service.close()
        else:
            assert "golden.json" not in manifest["files"]
            assert manifest["compute_capability"] == "12.0"
            assert "engine" not in manifest["gates"]  # no GPU is here to run it
            assert manifest["portable"] is False
            assert manifest["memory"]["cache"] == 3 * 96 * 2 * 2 * 2 * 16 * 2
            assert set(manifest["memory"]) == {"weights", "activations", "buffers", "cache", "context"}
            assert (engine.folder / "engine.trt").stat().st_size == manifest["engine"]["bytes"]


def test_an_llms_engine_is_described(built: tuple[Stack, list[BuiltEngine]]) -> None:
    from rich.console import Console

    for engine in built[1]:
        console = Console(width=120)
        with console.capture() as captured:
            console.print(render_engine(describe_engine(engine.folder)))
        shown = captured.get()
        assert "3 slots of 96 tokens, prompts by 16" in shown
        assert "perplexity increase" in shown
        assert ("not judged on a GPU yet" in shown) == (engine.manifest["target"] != "onnxruntime")


def test_the_engines_answer_as_fp32_does(built: tuple[Stack, list[BuiltEngine]]) -> None:
    prompt = np.random.default_rng(0).integers(0, SHAPE.vocabulary, 40).tolist()
    logits = {
        engine.manifest["precision"]: DecoderEngine.open(engine.folder).logits(prompt)
        for engine in built[1]
        if engine.manifest["target"] == "onnxruntime"
    }
    size = np.abs(logits["fp32"]).max()
    assert np.abs(logits["fp16"] - logits["fp32"]).max() < 0.01 * size
    assert 0 < np.abs(logits["int8-weights"] - logits["fp32"]).max() < 0.15 * size


def test_what_did_not_change_is_not_made_again(small: tuple[Path, Path]) -> None:
    folder, source = small
    lines = Lines()
    build_stack(stack_of(folder, source), lines)
    assert [stage for stage, _ in lines.stages] == ["export", "int8-weights", "int8-weights onnxruntime"]
    assert lines.run == []


def test_another_number_of_slots_compiles_and_nothing_else(small: tuple[Path, Path]) -> None:
    folder, source = small
    lines = Lines()
    (engine,) = build_stack(stack_of(folder, source, slots=5), lines)
    assert lines.run == ["int8-weights onnxruntime"]
    assert DecoderEngine.open(engine.folder).slots == 5


def test_another_head_precision_quantizes_again(small: tuple[Path, Path]) -> None:
    folder, source = small
    lines = Lines()
    (engine,) = build_stack(stack_of(folder, source, head="fp16", embedding="int8"), lines)
    assert lines.run == ["int8-weights", "int8-weights onnxruntime"]
    assert len(engine.manifest["prefill"]["returned"]) + engine.manifest["prefill"]["one_scale"] == 8
    assert np.isfinite(DecoderEngine.open(engine.folder).logits([1, 2, 3])).all()


def test_an_altered_engine_is_made_again(small: tuple[Path, Path]) -> None:
    folder, source = small
    data = folder / "build" / "engines" / "llm" / "int8-weights" / "onnxruntime" / "prefill.onnx"
    data.write_bytes(data.read_bytes()[:-1])
    lines = Lines()
    build_stack(stack_of(folder, source), lines)
    assert lines.run == ["int8-weights onnxruntime"]


def test_a_gate_that_nothing_passes_publishes_no_engine(checkpoint: Path, tmp_path: Path) -> None:
    # A perplexity that would have to fall: no quantization can do that.
    stack = stack_of(tmp_path, checkpoint, precisions=["fp16"], gates={"max_perplexity_increase": 0.0})
    with pytest.raises(GateError, match="perplexity increase"):
        build_stack(_never(stack), Lines())
    assert not (stack.build_dir / "engines").exists() or not list(stack.build_dir.rglob("engine.onnx"))


def _never(stack: Stack) -> Stack:
    from dataclasses import replace

    model = stack.models["llm"]
    gates = replace(model.gates, max_perplexity_increase=-0.5)
    return replace(stack, models={"llm": replace(model, gates=gates)})


def test_a_slot_longer_than_the_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="256"):
        build_stack(stack_of(tmp_path, checkpoint, max_length=300), Lines())


def test_bad_checkpoints_are_named(checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(ExportError, match=r"gate_proj|up_proj|down_proj"):
        build_stack(stack_of(tmp_path / "a", source), Lines())
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"model\.safetensors"):
        build_stack(stack_of(tmp_path / "b", source), Lines())


def test_data_that_is_missing_stops_the_build_before_the_work(checkpoint: Path, tmp_path: Path) -> None:
    stack = stack_of(tmp_path, checkpoint)
    (tmp_path / "evaluation.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"evaluation\.jsonl"):
        build_stack(stack, Lines())


# Their values are inputs of the stages by themselves, or no file and no figure of an LLM comes from them.
SETTLED = {"errors", "stack", "profiles", "atomic", "metrics", "quantize", "quantizer", "untrusted", "nvidia"}


def imported(code: Sequence[str]) -> Iterator[Path]:
    """The build tool's own modules that the source files in `code` import."""
    root = Path(decoder.__file__).parents[2]
    for name in code:
        for path in sorted((root / name).rglob("*.py")) or [root / name]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("build_", "calib")):
                    yield Path(str(node.module).replace(".", "/"))


@pytest.mark.parametrize("code", [decoder._PRECISION_CODE, decoder._COMPILE_CODE])
def test_a_stage_names_the_code_that_decides_its_result(code: Sequence[str]) -> None:
    known = {Path(name.removesuffix(".py")) for name in code}
    used = {path for path in imported(code) if path.name not in SETTLED}
    assert {path for path in used if not known & {path, *path.parents}} == set()


def test_texts_are_read_again_by_other_code() -> None:
    for code in (decoder._PRECISION_CODE, encoder._DATA_CODE):
        assert {path for path in imported(code) if path.parts[0] == "calibration"} <= {
            Path(name.removesuffix(".py")) for name in code
        }
