"""Graphs for ONNX Runtime's CUDA kernels: what they become, what they compute, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_decoder_lowering import CAPACITY, FAMILIES, SIZES, checkpoint, tokens, typed_logits

from build_engines.errors import CompileError
from build_engines.export.decoder import open_decoder, write_decoder
from build_engines.graphs import save_graph
from build_engines.profiles import DecoderProfile, Profile
from build_engines.targets import get_target, onnxruntime_cuda
from triton_repo.runtime import engines
from triton_repo.runtime.session import onnx_session

PROFILE = DecoderProfile(slots=4, capacity=CAPACITY, chunk=16)
ENCODER = Profile(batch=(1, 2, 4), sequence=(1, 8, 16))


@pytest.fixture(scope="module", params=list(FAMILIES))
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the FP16 graph of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    decoder = open_decoder(checkpoint(request.param, folder / "checkpoint"))
    write_decoder(decoder, folder / "model.onnx", precision="fp16")
    return folder


def compiled(graph: Path, out: Path, profile: Any = PROFILE) -> dict[str, Any]:
    out.mkdir()
    target = get_target("onnxruntime-cuda")
    return target.compile(graph, out, profile=profile, compute_capability=None, progress=lambda *_: None)


def logits(engine: Path, text: list[int], chunk: int) -> Any:
    """After every token, in chunks, the cache handed on from run to run as arrays."""
    session = onnx_session(engine, 1)
    cache = {
        tensor.name: np.zeros((1, *tensor.shape[1:]), np.float16)
        for tensor in session.get_inputs()
        if tensor.name.startswith("past_") and tensor.name != "past_lengths"
    }
    names = [tensor.name for tensor in session.get_outputs()]
    found = []
    for start in range(0, len(text), chunk):
        part = text[start : start + chunk]
        feeds = cache | {
            "input_ids": np.array([part], np.int64),
            "past_lengths": np.array([start], np.int64),
            "logit_indices": np.arange(len(part), dtype=np.int64)[None],
            "last_offset": np.array([len(part) - 1], np.int32),
        }
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        found.append(outputs["logits"][0])
        cache = {name: outputs[name.replace("past", "present")] for name in cache}
    return np.concatenate(found)


def test_an_llm_answers_as_its_typed_graph_in_chunks_and_token_by_token(half: Path, tmp_path: Path) -> None:
    text = tokens(45, 0)
    expected = typed_logits(half, text)
    compiled(half / "model.onnx", tmp_path / "out")
    for chunk in (16, 1):
        found = logits(tmp_path / "out/engine.onnx", text, chunk)
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_an_llm_stays_in_fp16_and_nothing_of_it_is_for_the_host(half: Path, tmp_path: Path) -> None:
    made = compiled(half / "model.onnx", tmp_path / "out")
    assert made["layers"]["GroupQueryAttention"] == SIZES["num_hidden_layers"]
    assert not made["layers"].keys() & {"Attention", "TensorScatter", "RotaryEmbedding", "Shape", "Range"}
    assert list(made["versions"]) == ["onnxruntime-gpu"]
    model = onnx.load(str(tmp_path / "out/engine.onnx"), load_external_data=False)
    values = (*model.graph.input, *model.graph.output)
    caches = [v for v in values if v.name.startswith(("past_key", "past_value", "present_"))]
    assert len(caches) == 4 * SIZES["num_hidden_layers"]
    for value in caches:
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
        assert value.type.tensor_type.shape.dim[2].dim_value == CAPACITY
    weights = [t for t in model.graph.initializer if t.name.endswith(".weight")]
    assert {t.data_type for t in weights} == {onnx.TensorProto.FLOAT16}
    data = tmp_path / "out/engine.onnx.data"
    if data.exists():
        assert data.samefile(half / "model.onnx.data")


def test_an_encoder_is_its_graph(tmp_path: Path) -> None:
    graph = small_graph(onnx.TensorProto.FLOAT16)
    save_graph(graph, tmp_path / "model.onnx")
    made = compiled(tmp_path / "model.onnx", tmp_path / "out", ENCODER)
    assert made["layers"] == {"MatMul": 1}
    assert (tmp_path / "out/engine.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()


def test_the_length_of_a_vector_needs_no_cudnn(tmp_path: Path) -> None:
    """ONNX Runtime has no ReduceL2 of its own on the GPU."""
    from onnx import helper, numpy_helper

    graph = small_graph(onnx.TensorProto.FLOAT)
    length = helper.make_node("ReduceL2", ["product", "axis"], ["y"], name="length", keepdims=1)
    graph.graph.node[0].output[0] = "product"
    graph.graph.node.append(length)
    graph.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "axis"))
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    save_graph(graph, tmp_path / "model.onnx")
    made = compiled(tmp_path / "model.onnx", tmp_path / "out", ENCODER)
    assert made["layers"] == {"MatMul": 1, "Mul": 1, "ReduceSum": 1, "Sqrt": 1}
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}
    found = onnx_session(tmp_path / "out/engine.onnx", 1).run(None, feeds)[0]
    np.testing.assert_allclose(found, np.linalg.norm(feeds["x"], axis=1, keepdims=True), rtol=1e-6)


def small_graph(kind: int, *, quantized: bool = False) -> Any:
    from onnx import helper, numpy_helper

    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")]
    initializers = [numpy_helper.from_array(np.eye(4, dtype=dtype), "w")]
    if quantized:
        nodes.insert(0, helper.make_node("DequantizeLinear", ["q", "s"], ["w"], name="w.dequantize"))
        codes, scale = np.eye(4, dtype=np.int8), np.array(1, dtype)
        initializers = [numpy_helper.from_array(codes, "q"), numpy_helper.from_array(scale, "s")]
    ends = [helper.make_tensor_value_info(name, kind, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def test_int8_is_refused_with_the_targets_that_have_it(tmp_path: Path) -> None:
    save_graph(small_graph(onnx.TensorProto.FLOAT16, quantized=True), tmp_path / "model.onnx")
    with pytest.raises(CompileError) as caught:
        compiled(tmp_path / "model.onnx", tmp_path / "out", ENCODER)
    assert "model.onnx is quantized" in str(caught.value)
    assert "tensorrt-rtx" in str(caught.value.next_step)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("head_dim", "precision", "words"),
    [(16, "fp32", "no CUDA kernel for an LLM's attention in FP32"), (8, "fp16", "heads of 8 elements")],
)
def test_an_llm_without_kernels_is_refused(
    head_dim: int, precision: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "head_dim", head_dim)
    decoder = open_decoder(checkpoint("llama", tmp_path / "checkpoint"))
    write_decoder(decoder, tmp_path / "model.onnx", precision=precision)
    with pytest.raises(CompileError, match=words):
        compiled(tmp_path / "model.onnx", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_package_for_gpus_is_asked_for_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package installed for the tests is the one for CPUs."""
    target = get_target("onnxruntime-cuda")
    target.check()
    monkeypatch.setattr(onnxruntime_cuda, "gpu_compute_capability", lambda: "12.0")
    with pytest.raises(CompileError, match="computes on the CPU only") as caught:
        target.check()
    assert "pip install 'onnxruntime-gpu" in str(caught.value.next_step)


def test_slots_that_no_tensor_may_begin_at_are_refused(half: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="a slot of 33 tokens takes 2112 bytes"):
        compiled(half / "model.onnx", tmp_path / "out", DecoderProfile(slots=2, capacity=33, chunk=16))
    assert not list((tmp_path / "out").iterdir())


def test_a_run_gives_as_many_positions_logits_as_the_plan_counts() -> None:
    """The served runtime may not import the plan, so it has the number a second time."""
    manifest = {"task": "generate", "serving": {"slots": 4, "chunk": 64}}
    assert engines._profiles(manifest)[1]["logits"][-1] == DecoderProfile(4, 256, 64).ranges[1]["logits"][-1]
