"""The plan's arithmetic, held to what TensorRT-RTX really compiles, and its proposals to their own plans."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny

from build_engines.cards import CARDS, MIB, custom_card
from build_engines.errors import PlanError
from build_engines.memory import activation_bytes, engine_memory, tensor_bytes
from build_engines.plan import (
    Plan,
    engine_profile,
    plan_shapes,
    plan_stack,
    promised_memory,
    render_plan,
    require_fit,
)
from build_engines.shapes import Shape, read_shape
from build_engines.stack import DECODER_FAMILIES, FAMILIES, DecoderShape, Model, ModelShape, Stack, load_stack

REPOSITORY = Path(__file__).parents[3]


def _shape(**changes: Any) -> ModelShape:
    sizes = {
        "family": "bert",
        "layers": 12,
        "hidden": 768,
        "ffn": 3072,
        "heads": 12,
        "vocabulary": 30522,
        "embedding": 768,
        "positions": 512,
        "token_types": 2,
        "labels": 2,
    }
    return ModelShape(**sizes | changes)


def _model(name: str = "m", **changes: Any) -> Model:
    return Model(**{"name": name, "task": "embed", "source": "owner/name", "shape": _shape()} | changes)


def _stack(*models: Model, **changes: Any) -> Stack:
    values = {
        "name": "s",
        "path": Path("s.toml"),
        "card": CARDS["rtx-5070-ti"],
        "targets": ("tensorrt-rtx",),
        "models": {model.name: model for model in models},
        "reserve_mib": 768,
        "build_dir": Path("build/s"),
    }
    return Stack(**values | changes)


# What the formulas give, from published sizes.


def test_parameters_of_known_checkpoints() -> None:
    # bert-base-uncased with its pooler has 109,482,240 parameters; the head of 2 labels adds 1,538, and the
    # token-type table's 2 x 768 disappear into the positions at export.
    assert tensor_bytes(_shape(), "classify", "fp16") == 2 * (109_482_240 + 1_538 - 2 * 768)
    # roberta-base without a pooler: 124,055,040; two position rows and the token type are never stored.
    roberta = _shape(family="roberta", vocabulary=50265, token_types=1)
    assert tensor_bytes(roberta, "embed", "fp16") == 2 * (124_055_040 - 3 * 768)
    # all-MiniLM-L6-v2's encoder.
    mini = _shape(layers=6, hidden=384, ffn=1536, embedding=384)
    assert tensor_bytes(mini, "embed", "fp16") == 2 * (22_565_376 - 2 * 384)
    # A pair has two token types: the table is stored.
    pair, single = (tensor_bytes(_shape(labels=1), task, "fp16") for task in ("rerank", "classify"))
    assert pair - single == 2 * 2 * 768


def test_int8_halves_the_layers_matrices_and_adds_their_scales() -> None:
    matrices, outputs = 12 * (4 * 768 * 768 + 2 * 768 * 3072), 12 * (3 * 768 + 768 + 3072 + 768)
    half = tensor_bytes(_shape(), "embed", "fp16")
    for precision in ("int8", "int8-weights"):
        assert half - tensor_bytes(_shape(), "embed", precision) == matrices - 2 * outputs


def test_activations_grow_with_batch_length_and_width() -> None:
    base = activation_bytes(_shape(), "fp16", 64, 256)
    # Eight tensors of 64 x 256 x 768 at two bytes, and the mask.
    assert base == 8 * 64 * 256 * 768 * 2 + 2 * 64 * 256 * 256 + 65536
    assert activation_bytes(_shape(), "fp16", 32, 256) < base
    assert activation_bytes(_shape(), "fp16", 64, 128) < base
    assert activation_bytes(_shape(ffn=6144), "fp16", 64, 256) > base
    assert activation_bytes(_shape(layers=24), "fp16", 64, 256) == base


def test_the_profile_spans_one_token_to_the_models_limits() -> None:
    profile = engine_profile(_model(max_batch=4, max_length=512))
    assert (profile.batch, profile.sequence) == ((1, 4, 4), (1, 64, 512))
    assert profile.as_dict() == {"batch": [1, 4, 4], "sequence": [1, 64, 512]}


# What is compiled, for the card, without one.


def _quantized(model: Any, *, activations: bool) -> Any:
    """The layers' Linears in the form the quantizer writes: a DQ on the INT8 weight, Q/DQ before a `static`
    one.
    """
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[Any] = []
    for name, value in (("x.scale", np.float32(0.05)), ("x.zero", np.int8(0))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.name.startswith("layers."):
            stored, base = weights[node.input[1]], node.name
            values = numpy_helper.to_array(stored)
            scale = (np.abs(values).max(0) / 127).astype(np.float32)
            stored.CopyFrom(numpy_helper.from_array(np.round(values / scale).astype(np.int8), stored.name))
            model.graph.initializer.append(numpy_helper.from_array(scale, f"{base}.scale"))
            inputs = [stored.name, f"{base}.scale"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{base}.w"], axis=1))
            if activations:
                pair = ["x.scale", "x.zero"]
                nodes.append(helper.make_node("QuantizeLinear", [node.input[0], *pair], [f"{base}.q"]))
                nodes.append(helper.make_node("DequantizeLinear", [f"{base}.q", *pair], [f"{base}.dq"]))
                node.input[0] = f"{base}.dq"
            node.input[1] = f"{base}.w"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier of four BERT layers and a reranker of ModernBERT's, exported."""
    from build_engines.export import export_encoder

    sizes = {
        "hidden_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "vocab_size": 20000,
        "max_position_embeddings": 512,
    }
    found = {}
    for family, task in (("bert", "classify"), ("bert", "embed"), ("modernbert", "rerank")):
        folder = tmp_path_factory.mktemp(f"{family}-{task}")
        extra = {} if family == "bert" else {"intermediate_size": 576, "num_hidden_layers": 3}
        save_tiny(folder, family, task, **sizes | extra)
        export_encoder(folder, task, folder / "graph", pooling="mean")
        found[f"{family}-{task}"] = folder
    return found


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-weights"])
@pytest.mark.parametrize("kind", ["bert-classify", "bert-embed", "modernbert-rerank"])
def test_the_plan_states_what_the_compiled_engine_takes(
    exported: dict[str, Path], tmp_path: Path, kind: str, precision: Any
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    from build_engines.export import to_fp16
    from build_engines.graphs import read_graph, save_graph
    from build_engines.targets import get_target

    task: Any = kind.split("-")[1]
    model = _model(task=task, max_batch=32, max_length=256)
    graph = read_graph(exported[kind] / "graph" / "model.onnx")
    if precision != "fp16":
        graph = _quantized(graph, activations=precision == "int8")
    save_graph(to_fp16(graph), tmp_path / "model.onnx")
    compiled = get_target("tensorrt-rtx").compile(
        tmp_path / "model.onnx",
        tmp_path,
        profile=engine_profile(model),
        compute_capability="12.0",
        progress=lambda *_: None,
    )
    memory = engine_memory(model, read_shape(exported[kind] / "config.json", task), precision, 0)
    size = (tmp_path / "engine.trt").stat().st_size
    # Half of what is promised, so that a change of the formula shows before the promise breaks.
    assert abs(memory.weights - size) <= max(0.01 * size, 3 << 20), (memory.weights, size)
    measured = compiled["activation_bytes"]
    assert measured <= memory.activations <= 1.2 * measured + (10 << 20), (memory.activations, measured)


# config.json


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_of_every_family_are_read_from_its_config(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path, family, "classify")
    shape = read_shape(tmp_path / "config.json", "classify")
    assert (shape.family, shape.hidden, shape.heads, shape.ffn, shape.vocabulary) == (family, 32, 4, 56, 99)
    assert shape.layers == (4 if family == "modernbert" else 3)
    assert shape.labels == 3
    assert shape.positions == (198 if "roberta" in family else 200)
    # Every number of the true checkpoint is counted, but for unused positions and token types, and biases.
    weights = (tmp_path / "model.safetensors").stat().st_size / 4
    assert tensor_bytes(shape, "classify", "fp16") / 2 == pytest.approx(weights, rel=0.15)


CONFIG = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must hold a JSON object"),
        (CONFIG | {"model_type": "berd"}, "'bert' is the nearest"),
        (CONFIG | {"model_type": "llama"}, "model_type is 'llama'"),
        ({}, "model_type is missing"),
        ({k: v for k, v in CONFIG.items() if k != "hidden_size"}, "hidden_size is missing"),
        (CONFIG | {"hidden_size": "768"}, "hidden_size is '768'"),
        (CONFIG | {"hidden_size": True}, "hidden_size is True"),
        (CONFIG | {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        (CONFIG | {"vocab_size": 10**12}, "vocab_size is"),
        (CONFIG | {"num_attention_heads": 5}, "does not divide 32"),
        (CONFIG | {"id2label": []}, "id2label is []"),
        (CONFIG | {"model_type": "roberta", "pad_token_id": 9999}, "pad_token_id is 9999"),
    ],
)
def test_a_malformed_config_names_the_file_and_the_key(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(PlanError) as caught:
        read_shape(path, "classify")
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_checkpoint_replaces_the_stack_files_shape(tmp_path: Path) -> None:
    stack = _stack(_model(), build_dir=tmp_path)
    before = plan_stack(stack).engines[0].memory.tensors
    folder = tmp_path / "sources" / "m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert plan_stack(stack).engines[0].memory.tensors < before / 10


def test_sizes_that_nobody_states_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="build-engines fetch") as caught:
        plan_stack(_stack(_model(shape=None), build_dir=tmp_path))
    assert "[models.m.shape]" in str(caught.value)


def test_a_length_beyond_the_positions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="set max_length = 512 or less"):
        plan_stack(_stack(_model(max_length=513), build_dir=tmp_path))


# The whole stack.


def test_every_engine_and_instance_is_counted(tmp_path: Path) -> None:
    model = _model(precisions=("int8", "fp16", "fp32"), instances=2)
    plan = plan_stack(_stack(model, _model("other"), context_mib=100, build_dir=tmp_path))
    assert [engine.variant for engine in plan.engines] == ["m", "m-fp16", "other", "other-fp16"]
    assert plan.cpu_only == ("m-fp32",)
    assert plan.context == (2 + 2 + 1 + 1) * 100 * MIB
    assert plan.used == plan.weights + plan.activations + plan.context
    assert plan.engines[0].total == 2 * plan.engines[0].memory.total
    assert plan.free == 16_303 * MIB - 768 * MIB - plan.used
    report = json.loads(json.dumps(plan.as_dict()))
    assert report["fits"] is True
    assert report["total"]["used_bytes"] + report["total"]["free_bytes"] == report["card"]["memory_bytes"]
    require_fit(plan)


def test_an_fp32_encoder_is_counted_where_a_target_runs_it_on_the_card(tmp_path: Path) -> None:
    model = _model(precisions=("fp16", "fp32"))
    here = plan_stack(_stack(model, targets=("onnxruntime", "onnxruntime-cuda"), build_dir=tmp_path))
    assert not here.cpu_only
    half, single = here.engines
    assert single.precision == "fp32"
    assert single.memory.tensors == 2 * half.memory.tensors
    # Eight tensors of 64 x 256 x 768, each of two bytes more a number.
    assert single.memory.activations - half.memory.activations == 8 * 64 * 256 * 768 * 2
    assert promised_memory(_stack(model, targets=("onnxruntime-cuda",)), model, "fp32")["weights"]
    elsewhere = plan_stack(_stack(model, targets=("onnxruntime", "tensorrt-rtx"), build_dir=tmp_path))
    assert elsewhere.cpu_only == ("m-fp32",)
    assert elsewhere.engines == here.engines[:1]


def test_what_is_proposed_is_what_a_target_compiles(tmp_path: Path) -> None:
    big = _shape(layers=48, hidden=2048, embedding=2048, ffn=8192, heads=32)
    model = _model("large", shape=big, precisions=("fp16", "fp32"))
    stack = _stack(model, targets=("onnxruntime-cuda",), card=custom_card(12_000, "8.9"), build_dir=tmp_path)
    proposals = plan_stack(stack).proposals
    assert [found.what for found in proposals if found.kind == "precision"] == [
        'models.large.precisions = ["fp16"]'
    ]


def test_the_table_shows_every_engine_and_the_rest_of_the_card(tmp_path: Path) -> None:
    from rich.console import Console

    plan = plan_stack(_stack(_model(precisions=("int8", "fp32")), build_dir=tmp_path))
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(render_plan(plan))
    text = console.export_text()
    for words in (
        "GeForce RTX 5070 Ti",
        "64 x 256",
        "reserve",
        "16,303",
        f"{plan.free / MIB:,.0f}",
        "CPU only",
    ):
        assert words in text


def test_a_stack_that_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    big = _shape(layers=48, hidden=4096, embedding=4096, ffn=16384, heads=32)
    stack = _stack(_model("large", shape=big, precisions=("fp16",)), _model("small"), build_dir=tmp_path)
    plan = plan_stack(stack)
    assert not plan.fits
    with pytest.raises(PlanError) as caught:
        require_fit(plan)
    message = str(caught.value)
    assert "does not fit GeForce RTX 5070 Ti" in message
    assert 'models.large.precisions = ["int8"]' in message
    assert "drop models.large" in message
    assert f"{-plan.free / MIB:,.0f} MiB too few" in message


def test_nothing_is_proposed_where_nothing_helps(tmp_path: Path) -> None:
    plan = plan_stack(_stack(_model(), card=custom_card(1024, "8.9"), reserve_mib=1000, build_dir=tmp_path))
    assert plan.proposals == ()
    with pytest.raises(PlanError, match="nothing smaller of this stack fits"):
        require_fit(plan)


@st.composite
def _encoders(draw: st.DrawFn, name: str) -> Model:
    hidden = 64 * draw(st.integers(4, 32))
    shape = _shape(
        family=draw(st.sampled_from(FAMILIES)),
        layers=draw(st.integers(1, 48)),
        hidden=hidden,
        embedding=hidden,
        ffn=draw(st.integers(1, 6)) * hidden,
        heads=hidden // 64,
        vocabulary=draw(st.integers(1000, 250_000)),
        positions=8192,
    )
    precisions = draw(
        st.lists(st.sampled_from(["int8", "int8-weights", "fp16", "fp32"]), min_size=1, unique=True)
    )
    return _model(
        name,
        shape=shape,
        task=draw(st.sampled_from(["classify", "embed", "rerank"])),
        precisions=tuple(precisions),
        max_batch=draw(st.integers(1, 1024)),
        max_length=draw(st.integers(8, 4096)),
        instances=draw(st.integers(1, 4)),
    )


@st.composite
def _llms(draw: st.DrawFn, name: str) -> Model:
    groups = draw(st.integers(1, 4))
    kv_heads = draw(st.integers(1, 8))
    shape = DecoderShape(
        family=draw(st.sampled_from(DECODER_FAMILIES)),
        layers=draw(st.integers(1, 48)),
        hidden=64 * kv_heads * groups,
        ffn=draw(st.integers(64, 16_000)),
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 128])),
        vocabulary=draw(st.integers(1000, 250_000)),
        positions=draw(st.integers(512, 100_000)),
    )
    length = draw(st.sampled_from([0, 16, 500, 512]))
    return Model(
        name=name,
        task="generate",
        source="owner/name",
        shape=shape,
        precisions=draw(st.sampled_from([("int8-weights",), ("fp16",), ("fp16", "int8-weights", "fp32")])),
        max_batch=0,
        max_length=length,
        slots=draw(st.integers(0, 40)),
        prefill_chunk=min(length or 128, 128),
        embedding=draw(st.sampled_from(["fp16", "int8"])),
        head=draw(st.sampled_from(["fp16", "int8"])),
    )


@st.composite
def _stacks(draw: st.DrawFn) -> Stack:
    models = [
        draw(_llms(f"m{index}") if draw(st.booleans()) else _encoders(f"m{index}"))
        for index in range(draw(st.integers(1, 4)))
    ]
    return _stack(*models, card=custom_card(draw(st.integers(2000, 24_000)), "8.9"))


def _shapes(stack: Stack) -> dict[str, Shape]:
    return {name: model.shape for name, model in stack.models.items() if model.shape is not None}


@settings(max_examples=150, deadline=None)
@given(stack=_stacks())
def test_every_proposal_really_fits_and_one_is_made_where_one_exists(stack: Stack) -> None:
    from build_engines.proposals import propose

    plan = plan_shapes(stack, _shapes(stack))
    if plan.fits:
        require_fit(plan)
        return
    proposals = propose(stack, _shapes(stack))
    for proposal in proposals:
        again = plan_shapes(proposal.stack, _shapes(stack))
        assert again.fits, proposal.what
        assert again.used == proposal.used < plan.used
        assert proposal.stack.models
        assert proposal.stack.card == stack.card
        for name, model in proposal.stack.models.items():
            assert model.max_batch <= stack.models[name].max_batch
            assert model.max_length <= stack.models[name].max_length
            assert model.slots <= stack.models[name].slots
            if model.task == "generate":
                assert model.prefill_chunk <= (model.max_length or model.prefill_chunk)
            # Nothing that is open is closed, and no LLM gets a precision that it cannot have.
            assert (model.slots == 0) == (stack.models[name].slots == 0)
            assert (model.max_length == 0) == (stack.models[name].max_length == 0)
            assert model.precisions
            assert model.task != "generate" or "int8" not in model.precisions
    smallest = [_smallest(model) for model in stack.models.values()]
    if _fits(stack, smallest) or any(_fits(stack, [m]) for m in stack.models.values()):
        assert proposals


def test_of_two_eight_bit_precisions_the_smaller_is_proposed() -> None:
    """They differ by kilobytes, and these may be what does not fit."""
    from build_engines.proposals import propose

    shape = ModelShape(family="bert", layers=44, hidden=640, ffn=2560, heads=10, vocabulary=44714,
                       embedding=640, positions=8192, token_types=2, labels=2)  # fmt: skip
    model = Model(name="m", task="classify", source="owner/name", shape=shape, max_batch=1, max_length=8,
                  precisions=("int8-weights", "int8"))  # fmt: skip
    stack = _stack(model, card=custom_card(24_000, "8.9"))
    assert propose(stack, _shapes(stack))[0].stack.models["m"].precisions == ("int8",)


def _smallest(model: Model) -> Model:
    if model.task != "generate":
        return replace(model, precisions=("int8",), max_batch=1, max_length=8, instances=1)
    return replace(
        model, precisions=("int8-weights",), slots=min(1, model.slots), max_length=min(16, model.max_length),
        prefill_chunk=min(16, model.prefill_chunk) if model.max_length else model.prefill_chunk,
    )  # fmt: skip


def _fits(stack: Stack, models: list[Model]) -> bool:
    small = replace(stack, models={model.name: model for model in models})
    plan: Plan = plan_shapes(small, _shapes(small))
    return plan.fits


def test_the_smallest_change_comes_first(tmp_path: Path) -> None:
    stack = _stack(_model(), card=custom_card(4000, "8.9"), build_dir=tmp_path)
    need = plan_stack(stack).used
    tight = replace(stack, card=custom_card(need // MIB + 767, "8.9"))
    batch = [p for p in plan_stack(tight).proposals if p.kind == "batch"]
    assert [p.what for p in batch] == ["max_batch = 32 for m"]


def test_planning_is_fast_and_needs_no_model_library(tmp_path: Path) -> None:
    stack = REPOSITORY / "stacks" / "korean-reviews.toml"
    code = f"""
import sys, time
start = time.perf_counter()
from pathlib import Path
from rich.console import Console
from build_engines.plan import plan_stack, render_plan
from build_engines.stack import load_stack
plan = plan_stack(load_stack(Path({str(stack)!r}), build_dir=Path("b")))
Console().print(render_plan(plan))
heavy = {{"numpy", "torch", "onnx", "onnxruntime", "transformers", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
print(time.perf_counter() - start)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1.0


def test_the_repositorys_stacks_fit_their_card() -> None:
    stack = load_stack(REPOSITORY / "stacks" / "korean-reviews.toml", build_dir=Path("nowhere"))
    plan = plan_stack(stack)
    assert plan.fits
    assert len(plan.engines) == sum(len(model.precisions) for model in stack.models.values())
