"""An LLM for TensorRT-LLM: what the stack file may say, what the plan counts, what the build records."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from small_stack import write_stack

from build_engines.cards import CARDS
from build_engines.cli import main
from build_engines.decoder_memory import cache_bytes_per_token, llm_cache_tokens, llm_memory
from build_engines.errors import ExportError, FetchError, OnecardError, PlanError, StackError
from build_engines.fetch import fetch_model
from build_engines.manifest import StageRun
from build_engines.measure import measured_models
from build_engines.modelopt import weight_files
from build_engines.pipeline import BuiltEngine, build_stack
from build_engines.pipeline.llm import LlmBuild
from build_engines.plan import plan_stack, require_fit
from build_engines.profiles import DecoderProfile
from build_engines.random_model import RandomLlama, write_random_llm
from build_engines.shapes import resolve_shape
from build_engines.stack import LLM_CAPABILITIES, DecoderShape, Stack, load_stack
from build_engines.targets import get_target
from triton_repo.runtime.session import check_files, read_manifest
from triton_repo.writer import not_judged, write_repository

SHAPE = RandomLlama(layers=2, hidden=256, ffn=512, heads=4, kv_heads=2, vocabulary=512, positions=256)
ALGORITHMS = {"fp16": None, "fp8": "FP8", "nvfp4": "NVFP4", "int4-awq": "W4A16_AWQ"}
SIZES = {
    "family": "llama",
    "layers": 32,
    "hidden": 4096,
    "ffn": 14336,
    "heads": 32,
    "kv_heads": 8,
    "vocabulary": 128256,
    "positions": 8192,
}


class Details:
    """A reporter that remembers what was done and said."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, bool]] = []
        self.said: list[str] = []
        self._stage = ""

    def start(self, model: str, stage: str) -> None:
        self._stage = stage

    def progress(self, phase: str, done: int, total: int) -> None: ...

    def finish(self, run: StageRun, detail: str) -> None:
        self.stages.append((self._stage, run.skipped))
        self.said.append(detail)


def stack_of(folder: Path, card: str = "rtx-5070-ti", targets: Any = ("onnxruntime",), **model: Any) -> Stack:
    table = {"task": "generate", "target": "tensorrt-llm", "source": "./checkpoint", **model}
    path = write_stack(folder / "stack.toml", {"llm": table}, card="CARD", targets=list(targets))
    written = card if card.startswith("{") else f'"{card}"'
    path.write_text(path.read_text().replace('"CARD"', written))
    return load_stack(path, build_dir=folder / "build")


def write_quantized(folder: Path, precision: str, **settings: Any) -> Path:
    """A Llama whose matrices lie in the shapes and types that ModelOpt exports; its numbers mean nothing."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    write_random_llm(folder, SHAPE)
    if precision == "fp16":
        return folder
    (path,) = folder.glob("*.safetensors")
    tensors: dict[str, Any] = {}
    with safe_open(path, framework="np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        if not name.endswith("_proj.weight"):
            tensors[name] = np.zeros(shape, np.float16)
            continue
        rows, columns = shape
        base = name.removesuffix("weight")
        packed = np.zeros((rows, columns if precision == "fp8" else columns // 2), np.uint8)
        tensors[name] = packed
        if precision == "fp8":
            tensors |= {f"{base}weight_scale": np.ones((), np.float32)}
            tensors |= {f"{base}input_scale": np.ones((), np.float32)}
        elif precision == "nvfp4":
            tensors |= {f"{base}weight_scale": np.zeros((rows, columns // 16), np.uint8)}
            tensors |= {f"{base}weight_scale_2": np.ones((), np.float32)}
            tensors |= {f"{base}input_scale": np.ones((), np.float32)}
        else:
            tensors |= {f"{base}weight_scale": np.ones((rows, columns // 128), np.float16)}
            tensors |= {f"{base}pre_quant_scale": np.ones(columns, np.float16)}
    save_file(tensors, path)
    quantization = {"quant_algo": ALGORITHMS[precision], "kv_cache_quant_algo": None, "group_size": 16}
    write_settings(folder, **(quantization | settings))
    return folder


def write_settings(folder: Path, **quantization: Any) -> None:
    written = {"producer": {"name": "modelopt", "version": "0.39.0"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(written))


# --- the stack file --------------------------------------------------------------------------------------


def test_what_is_left_out_has_defaults(tmp_path: Path) -> None:
    (model,) = stack_of(tmp_path).models.values()
    assert (model.target, model.precisions, model.prefill_chunk) == ("tensorrt-llm", ("fp16",), 512)
    assert model.variants == {"fp16": "llm"}
    (model,) = stack_of(tmp_path, max_length=64).models.values()
    assert model.prefill_chunk == 64


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"precisions": ["int8"]}, "no INT8 W8A8"),
        ({"precisions": ["int8-weights"]}, "onecard compiles itself"),
        ({"precisions": ["fp8", "nvfp4"]}, "a checkpoint is stored in one"),
        ({"precisions": ["fp32"]}, "fp16, fp8, nvfp4, int4-awq"),
        ({"precisions": ["int4-awq"]}, "no kernels on compute capability 12.0"),
        ({"calibration": {"data": "x.txt"}}, "quantized by ModelOpt"),
        ({"gates": {"max_perplexity_increase": 0.1}}, "nothing to compare"),
        ({"head": "fp16"}, "how its tables are stored"),
        ({"embedding": "fp16"}, "how its tables are stored"),
        ({"target": "tensorrt"}, 'remove it, and name "tensorrt" in targets'),
        ({"target": "tensorrt", "task": "embed"}, 'remove it, and name "tensorrt" in targets'),
        ({"target": "tensorrt_llm"}, "allowed: tensorrt-llm"),
        ({"target": ["tensorrt"]}, "allowed: tensorrt-llm"),
        ({"task": "embed"}, "target has no meaning for task 'embed'"),
        ({"precisions": 3}, "must be an array"),
        ({"shape": {**SIZES, "stored_bytes": 3}}, "unknown key"),
    ],
)
def test_what_the_stack_file_may_not_say(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(StackError) as raised:
        stack_of(tmp_path, **model)
    assert message in str(raised.value)
    assert "models.llm" in str(raised.value)


def test_the_target_is_a_model_s_and_not_the_stack_s(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"the choice of one model[\s\S]*\[models.<name>\]"):
        stack_of(tmp_path, targets=["tensorrt-llm"])
    path = write_stack(tmp_path / "s.toml", {"llm": {"task": "generate"}}, targets=7)
    with pytest.raises(StackError, match="targets must be an array"):
        load_stack(path)


def test_a_card_must_have_kernels_for_the_precision(tmp_path: Path) -> None:
    capabilities = {card.compute_capability for card in CARDS.values()} | {"9.0", "10.0"}
    for capability in capabilities:
        card = f'{{ memory_mib = 24000, compute_capability = "{capability}" }}'
        for precision, supported in LLM_CAPABILITIES.items():
            if capability in supported:
                stack_of(tmp_path, card, precisions=[precision])
            else:
                with pytest.raises(StackError, match="no kernels"):
                    stack_of(tmp_path, card, precisions=[precision])
    with pytest.raises(StackError, match=r"a card with 8\.0, 8\.6"):
        stack_of(tmp_path, "t4")


def test_the_documentation_has_the_same_cards() -> None:
    page = (Path(__file__).parents[3] / "docs" / "targets.md").read_text("utf-8")
    for precision, supported in LLM_CAPABILITIES.items():
        (row,) = re.findall(rf"^\| `{precision}` \|.*\| (.*) \|$", page, re.MULTILINE)
        assert tuple(row.split(", ")) == supported


# --- the plan --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ALGORITHMS)
def test_the_arithmetic_is_what_a_checkpoint_weighs(tmp_path: Path, precision: str) -> None:
    card = "rtx-4080" if precision == "int4-awq" else "rtx-5070-ti"
    stack = stack_of(tmp_path, card, precisions=[precision], slots=2, max_length=100)
    write_quantized(tmp_path / "checkpoint", precision)
    shape = resolve_shape(stack, stack.models["llm"])
    assert isinstance(shape, DecoderShape)
    assert shape.stored_bytes == sum(path.stat().st_size for path in (tmp_path / "checkpoint").glob("*.saf*"))
    model = stack.models["llm"]
    read = llm_memory(model, shape, precision, 7)  # type: ignore[arg-type]
    computed = llm_memory(model, replace(shape, stored_bytes=0), precision, 7)  # type: ignore[arg-type]
    # Beside tensors a file has a header, and the small scales are not counted.
    assert computed.tensors == pytest.approx(read.tensors, rel=0.02)
    assert computed.tensors < read.tensors
    assert read.cache == (2 * 128 + 32) * cache_bytes_per_token(shape)
    assert read.context == 7


def test_a_model_of_eight_billion_parameters_by_precision(tmp_path: Path) -> None:
    weights = {}
    for precision in ("fp8", "nvfp4"):
        stack = stack_of(tmp_path, precisions=[precision], slots=4, max_length=2048, shape=SIZES)
        plan = plan_stack(stack)
        weights[precision] = plan.engines[0].memory.tensors / 1e9
        assert plan.fits
        assert plan.engines[0].variant == "llm"
    # The layers' 6.98e9 elements, and two tables of 128,256 x 4,096 in 16 bits.
    assert weights["fp8"] == pytest.approx(6.98 + 2.10, abs=0.01)
    assert weights["nvfp4"] == pytest.approx(6.98 * 0.5625 + 2.10, abs=0.01)
    # FP16 does not fit, and no proposal is another precision of a checkpoint.
    plan = plan_stack(stack_of(tmp_path, slots=1, max_length=64, shape=SIZES))
    with pytest.raises(PlanError):
        require_fit(plan)
    assert not any("precisions" in proposal.what for proposal in plan.proposals)


def test_an_open_model_gets_the_slots_that_fit(tmp_path: Path) -> None:
    plan = plan_stack(stack_of(tmp_path, precisions=["fp8"], shape=SIZES))
    assert plan.fits
    assert "the plan chose" in plan.chosen[0]
    assert llm_cache_tokens(DecoderProfile(slots=3, capacity=33, chunk=16)) == 3 * 64 + 32


def test_an_fp8_cache_takes_half(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, precisions=["fp8"], slots=2, max_length=96)
    write_quantized(tmp_path / "checkpoint", "fp8")
    whole = plan_stack(stack).engines[0].memory.cache
    write_settings(tmp_path / "checkpoint", quant_algo="FP8", kv_cache_quant_algo="FP8")
    assert plan_stack(stack).engines[0].memory.cache * 2 == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_algo": "NVFP4"},
            r'is fp8, but the checkpoint is nvfp4[\s\S]*write precisions = \["nvfp4"\]',
        ),
        ({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, r"no INT8 W8A8[\s\S]*int8-weights"),
        ({"quant_algo": "INT8_SQ"}, "no INT8 W8A8"),
        ({"quant_algo": "W4A8_AWQ"}, r"'W4A8_AWQ'[\s\S]*fp16, fp8, nvfp4, int4-awq"),
        ({"quant_algo": ["FP8"]}, "quant_algo is"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}, "kv_cache_quant_algo is 'INT8'"),
    ],
)
def test_checkpoints_that_are_not_what_was_said(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    stack = stack_of(tmp_path, precisions=["fp8"])
    write_quantized(tmp_path / "checkpoint", "fp8", **settings)
    with pytest.raises(PlanError, match=message):
        plan_stack(stack)


def test_other_ways_to_quantize_and_damaged_files(tmp_path: Path) -> None:
    stack = stack_of(tmp_path)
    folder = write_quantized(tmp_path / "checkpoint", "fp16")
    config = json.loads((folder / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "compressed-tensors"}}
    (folder / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(PlanError, match="quantized by 'compressed-tensors', without ModelOpt's"):
        plan_stack(stack)
    (folder / "hf_quant_config.json").write_text("{")
    with pytest.raises(PlanError, match=r"hf_quant_config.json: not valid JSON"):
        plan_stack(stack)
    for text in ("{}", "[1]", '{"quantization": "FP8"}', '{"quantization": null}'):
        (folder / "hf_quant_config.json").write_text(text)
        with pytest.raises(PlanError, match="has no 'quantization'"):
            plan_stack(stack)
    for text in ("[" * 100_000, '{"quantization": {"quant_algo": ' + "9" * 5000 + "}}"):
        (folder / "hf_quant_config.json").write_text(text)
        with pytest.raises(PlanError, match=r"hf_quant_config.json: not valid JSON"):
            plan_stack(stack)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": 1' + "0" * 400 + "}}")
    with pytest.raises(PlanError, match=r"quant_algo is 1000"):
        plan_stack(stack)
    (folder / "hf_quant_config.json").unlink()
    (folder / "hf_quant_config.json").mkdir()
    with pytest.raises(PlanError, match=r"hf_quant_config.json: cannot be read"):
        plan_stack(stack)


def test_only_the_shards_of_an_index_are_the_model_s(tmp_path: Path) -> None:
    for name in ("model-00001-of-00001.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    assert len(weight_files(tmp_path)) == 2
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert [path.name for path in weight_files(tmp_path)] == ["model-00001-of-00001.safetensors"]
    for shards, message in (
        ({"a": "gone.safetensors"}, "gone.safetensors missing"),
        ({"a": "../x.safetensors"}, "no weight_map"),
        ([], "no weight_map"),
        ({}, "no weight_map"),
        ({"a": "x\0.safetensors"}, "missing"),
    ):
        index.write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(PlanError, match=message):
            weight_files(tmp_path)


# --- the build -------------------------------------------------------------------------------------------


def build(stack: Stack) -> tuple[BuiltEngine, Details]:
    details = Details()
    (engine,) = build_stack(stack, details)
    return engine, details


def test_the_checkpoint_is_linked_and_recorded(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, precisions=["nvfp4"], slots=3, max_length=100)
    source = write_quantized(tmp_path / "checkpoint", "nvfp4")
    engine, details = build(stack)
    assert engine.folder == tmp_path / "build" / "engines" / "llm" / "nvfp4" / "tensorrt-llm"
    manifest = read_manifest(engine.folder)
    check_files(engine.folder, manifest)
    assert manifest["engine"]["file"] == "config.json"
    weights = next(iter(source.glob("*.safetensors")))
    assert os.path.samefile(weights, engine.folder / weights.name), "no second copy of the weights"
    assert {weights.name, "hf_quant_config.json", "tokenizer.json", "chat_template.jinja"} <= set(
        manifest["files"]
    )
    serving = manifest["serving"]
    assert (serving["slots"], serving["capacity"], serving["chunk"]) == (3, 100, 100)
    assert serving["cache_tokens"] == 3 * 128 + 32
    assert serving["chat"]["template"]
    assert serving["eos_ids"]
    memory = plan_stack(stack).engines[0].memory
    assert manifest["memory"]["cache"] == memory.cache
    assert sum(manifest["memory"].values()) == memory.total
    assert (manifest["portable"], manifest["compute_capability"], manifest["gates"]) == (False, "12.0", {})
    assert "not judged" in details.said[-1]
    # Again: nothing is done; without targets nothing is wanted; a change of the checkpoint is noticed.
    assert [skipped for _, skipped in build(stack)[1].stages] == [True, True]
    assert build_stack(stack, Details(), targets=[]) == []
    assert len(build_stack(stack, Details(), targets=["onnxruntime", "tensorrt-rtx"])) == 1
    # A target that has no engine of such a precision takes nothing away from this model.
    (found,) = LlmBuild(stack, stack.models["llm"], Details()).engines([get_target("onnxruntime-cuda")])
    assert found.manifest["target"] == "tensorrt-llm"
    write_settings(source, quant_algo="NVFP4", kv_cache_quant_algo="FP8")
    again, details = build(stack)
    assert [skipped for _, skipped in details.stages] == [False, False]
    assert again.manifest["memory"]["cache"] * 2 == memory.cache


def test_a_modelopt_checkpoint_that_repeats_itself_in_config_json(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, precisions=["fp8"], slots=1, max_length=64)
    source = write_quantized(tmp_path / "checkpoint", "fp8")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (source / "config.json").write_text(json.dumps(config))
    engine, _ = build(stack)
    assert json.loads((engine.folder / "config.json").read_text()) == config


def test_the_repository_has_it_whatever_the_target_of_the_others(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, precisions=["fp8"], slots=2, max_length=64)
    source = write_quantized(tmp_path / "checkpoint", "fp8")
    build(stack)
    for target in ("onnxruntime", "tensorrt"):
        write_repository(stack, tmp_path / "build" / "engines", tmp_path / "repository", target=target)
        version = tmp_path / "repository" / "llm" / "1"
        weights = next(iter(source.glob("*.safetensors")))
        assert os.path.samefile(weights, version / weights.name)
        assert (version / "triton_repo" / "runtime" / "tensorrt_llm.py").is_file()
        config = (version.parent / "config.pbtxt").read_text()
        assert "KIND_CPU" in config
        assert "decoupled: true" in config
        assert not_judged(tmp_path / "repository") == []
        summary = json.loads((tmp_path / "stack.json").read_text())
        assert summary["models"]["llm"]["target"] == "tensorrt-llm"
    changed = stack_of(tmp_path, precisions=["fp8"], slots=3, max_length=64)
    with pytest.raises(OnecardError, match="slots"):
        write_repository(changed, tmp_path / "build" / "engines", tmp_path / "repository")


def test_weights_may_be_a_link_within_the_folder_and_not_out_of_it(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, slots=2, max_length=64)
    (weights,) = write_quantized(tmp_path / "checkpoint", "fp16").glob("*.safetensors")
    (weights.parent / "blobs").mkdir()
    blob = weights.rename(weights.parent / "blobs" / "abc")
    weights.symlink_to(Path("blobs", "abc"))
    engine, _ = build(stack)
    assert not (engine.folder / weights.name).is_symlink(), "it would lead nowhere from there"
    assert os.path.samefile(engine.folder / weights.name, blob)
    settings = weights.parent / "hf_quant_config.json"
    settings.symlink_to(stack.path)
    with pytest.raises(FetchError, match=r"hf_quant_config\.json"):
        fetch_model(stack.models["llm"], tmp_path / "fetched", offline=True)
    settings.unlink()
    blob.rename(tmp_path / "abc")
    weights.unlink()
    weights.symlink_to(tmp_path / "abc")
    with pytest.raises(FetchError, match=weights.name):
        fetch_model(stack.models["llm"], tmp_path / "fetched", offline=True)


def test_commands_say_that_nothing_of_it_is_judged_or_timed_here(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, precisions=["fp8"], slots=2, max_length=64)
    write_quantized(tmp_path / "checkpoint", "fp8")
    engine, _ = build(stack)
    shown = CliRunner().invoke(main, ["inspect", str(engine.folder)])
    assert shown.exit_code == 0, shown.output
    assert "none: TensorRT-LLM serves the checkpoint as it is stored" in shown.output
    assert "judged on a GPU" not in shown.output
    options = ["measure", str(stack.path), "--build-dir", str(stack.build_dir)]
    timed = CliRunner().invoke(main, options)
    assert timed.exit_code == StackError.exit_code
    assert "no model has an engine of the target onnxruntime" in timed.output
    other = {"task": "embed", "source": "./nothing", "precisions": ["fp16"]}
    llm = {"task": "generate", "target": "tensorrt-llm", "source": "./checkpoint", "precisions": ["fp8"]}
    write_stack(stack.path, {"other": other, "llm": llm}, targets=["onnxruntime"])
    mixed = load_stack(stack.path)
    assert list(measured_models(mixed)) == ["other"]
    assert "llm is left out" in CliRunner().invoke(main, options).output


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="the checkpoint of model 'llm' is not at"):
        build(stack_of(tmp_path, slots=1, max_length=64))


@pytest.mark.parametrize("kept", [0, 5, -1])
def test_weights_that_were_cut_short_are_not_published(tmp_path: Path, kept: int) -> None:
    stack = stack_of(tmp_path, precisions=["fp8"], slots=2, max_length=64)
    (weights,) = write_quantized(tmp_path / "checkpoint", "fp8").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ExportError, match=f"{weights.name} is damaged"):
        build(stack)
    assert not (stack.build_dir / "engines" / "llm" / "fp8" / "tensorrt-llm").exists()
