"""Causal LMs through the real TensorRT-RTX builder: two profiles, in-place caches, and the sizes planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_checkpoint import Llama, normal
from tiny_decoders import save_decoder

from build_engines.decoder_memory import decoder_engine_memory
from build_engines.errors import ArtifactError, CompileError
from build_engines.export import open_decoder, write_decoder
from build_engines.profiles import DecoderProfile, decoder_profile
from build_engines.shapes import read_decoder_shape
from build_engines.stack import Model
from build_engines.targets.decoder_network import DecoderNetwork, read_decoder
from build_engines.targets.engine_file import check_engine, read_header
from build_engines.targets.tensorrt import TensorRTTarget

pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")

SIZES: dict[str, dict[str, int]] = {
    "small": {"layers": 2, "hidden": 64, "ffn": 96, "vocabulary": 211, "kv_heads": 2},
    # Wide enough that weights stored twice would show beside the kernels.
    "wide": {"layers": 2, "hidden": 512, "ffn": 1408, "vocabulary": 4000, "kv_heads": 2},
    # So many words that the logits of a prompt would be the most of a step.
    "words": {"layers": 1, "hidden": 128, "ffn": 256, "vocabulary": 60_000, "kv_heads": 2},
    "equal": {"layers": 2, "hidden": 1024, "ffn": 1024, "vocabulary": 500, "kv_heads": 4},
}
Made = Callable[[str, str], Path]


def _write(checkpoint: Path, out: Path, precision: Any) -> Path:
    decoder, random = open_decoder(checkpoint), np.random.default_rng(1)

    def codes(name: str) -> Callable[[], tuple[Any, Any]]:
        shape = decoder.architecture.linear_shape(name)
        values = random.integers(-127, 128, shape, dtype=np.int8)
        return lambda: (values, np.full(shape[1], 0.001, np.float32))

    quantized = {name: codes(name) for name in decoder.linears()} if precision == "int8-weights" else None
    write_decoder(decoder, out, precision=precision, quantized=quantized)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The graph of a random Llama by size and precision."""
    folder = tmp_path_factory.mktemp("llms")

    def make(size: str, precision: str) -> Path:
        checkpoint, graph = folder / size, folder / size / precision / "model.onnx"
        if not checkpoint.exists():
            # Equal weights would be stored once, whatever the plan says.
            llama = Llama(**SIZES[size], positions=1024)
            llama.write(checkpoint, normal(0, 0.02, np.float16))
        if not graph.exists():
            graph.parent.mkdir()
            _write(checkpoint, graph, precision)
        return graph

    return make


def _compile(graph: Path, out: Path, profile: DecoderProfile) -> dict[str, Any]:
    return TensorRTTarget("tensorrt-rtx").compile(
        graph, out, profile=profile, compute_capability="12.0", progress=lambda *_: None
    )


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_graph_becomes_one_engine_for_both_steps(made: Made, tmp_path: Path) -> None:
    graph = made("small", "int8-weights")
    before = _bytes(graph.parent)
    found = _compile(graph, tmp_path, DecoderProfile(slots=3, capacity=64, chunk=16))
    assert (found["layers"]["KV_CACHE_UPDATE"], found["layers"]["ATTENTION"]) == (4, 2)
    assert found["attention"] == "fused"
    assert len(found["profile_activation_bytes"]) == 2
    assert found["activation_bytes"] == max(found["profile_activation_bytes"])
    assert found["warnings"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["engine.trt"]
    check_engine(tmp_path / "engine.trt", version=None, compute_capability="12.0")
    # The graph is compiled from where it lies, and stays what was judged.
    assert _bytes(graph.parent) == before


@pytest.mark.parametrize("precision", ["fp16", "int8-weights"])
@pytest.mark.parametrize(("size", "slots"), [("wide", 1), ("wide", 6), ("words", 4)])
def test_the_engine_takes_what_the_plan_says(
    made: Made, tmp_path: Path, precision: Any, size: str, slots: int
) -> None:
    """Nothing is stored twice and no weight is widened ahead of its use; one slot is no exception."""
    graph = made(size, precision)
    model = Model(
        name="m", task="generate", source="a/b", precisions=(precision,), slots=slots, max_length=512
    )
    found = _compile(graph, tmp_path, decoder_profile(model))
    memory = decoder_engine_memory(model, read_decoder_shape(graph.parents[1] / "config.json"), precision, 0)
    stored = (tmp_path / "engine.trt").stat().st_size
    assert abs(memory.weights - stored) <= max(0.01 * stored, 1 << 20), (memory.weights, stored)
    measured = found["activation_bytes"]
    assert measured <= memory.activations <= 1.2 * measured + (10 << 20), (memory.activations, measured)


def test_a_portable_engine_takes_what_one_for_a_single_card_does(made: Made, tmp_path: Path) -> None:
    """The caches in place and the fused attention are there for every card of the default set."""
    graph, profile = made("small", "int8-weights"), DecoderProfile(slots=3, capacity=64, chunk=16)
    single = _compile(graph, tmp_path, profile)
    size = (tmp_path / "engine.trt").stat().st_size
    target = TensorRTTarget("tensorrt-rtx", portable=True)
    found = target.compile(
        graph, tmp_path, profile=profile, compute_capability="9.0", progress=lambda *_: None
    )
    same = ("layers", "attention", "profile_activation_bytes", "warnings")
    assert {name: found[name] for name in same} == {name: single[name] for name in same}
    header = read_header(tmp_path / "engine.trt")
    assert abs(header.size - size) < 0.02 * size
    assert header.compute_capabilities[:4] == ("8.0", "8.6", "8.9", "12.0")


def test_equal_heads_are_split_so_that_no_weight_is_widened(made: Made, tmp_path: Path) -> None:
    graph = made("equal", "int8-weights")
    found = _compile(graph, tmp_path, DecoderProfile(slots=4, capacity=64, chunk=16))
    # In FP16 the two q/k/v weights are 12.6 MB, beside a workspace of 8 MiB.
    assert found["profile_activation_bytes"][0] < (8 << 20) + 2 * 3 * 1024 * 1024


def test_an_equal_split_keeps_its_values(tmp_path: Path) -> None:
    """The rewritten graph, run on the CPU, gives what the exported one does."""
    import onnx
    import onnxruntime

    sizes, third = "sizes", 5
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Split", ["x", sizes], ["q", "k", "v"], name="split", axis=-1)],
        "split",
        [onnx.helper.make_tensor_value_info("x", 1, ["batch", "capacity", 3 * third])],
        [onnx.helper.make_tensor_value_info(name, 1, None) for name in "qkv"],
        [onnx.numpy_helper.from_array(np.array([third] * 3), sizes)],
    )
    path = tmp_path / "split.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=11), path
    )
    lowered = read_decoder(path, 2).model
    assert [node.op_type for node in onnx.load_from_string(lowered).graph.node] == ["Split", "Split"]
    x = np.arange(1 * 2 * 15, dtype=np.float32).reshape(1, 2, 15)
    found = onnxruntime.InferenceSession(lowered).run(["q", "k", "v"], {"x": x})
    for part, expected in zip(found, np.split(x, 3, axis=-1), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_what_cannot_be_compiled_is_refused_by_name(made: Made, tmp_path: Path) -> None:
    profile = DecoderProfile(slots=2, capacity=32, chunk=16)
    with pytest.raises(CompileError, match="is FP32") as caught:
        _compile(made("small", "fp32"), tmp_path, profile)
    assert "onnxruntime" in str(caught.value)
    save_decoder(tmp_path / "narrow", "llama")
    narrow = _write(tmp_path / "narrow", tmp_path / "narrow" / "model.onnx", "fp16")
    with pytest.raises(CompileError, match="no fused attention for heads of 12 elements"):
        _compile(narrow, tmp_path, profile)
    # Two heads of 16 elements: 64 bytes a token, and a row of the cache must begin where a tensor may.
    with pytest.raises(CompileError, match="a slot of 33 tokens takes 2112 bytes") as caught:
        read_decoder(made("small", "fp16"), 33)
    assert "multiple of 8" in str(caught.value)
    assert read_decoder(made("small", "fp16"), 36).layers == 2
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_decoder(tmp_path / "none.onnx", 32)
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match="not an ONNX graph"):
        read_decoder(tmp_path / "broken.onnx", 32)
    assert not list(tmp_path.glob("*engine*"))


def test_the_weights_file_must_be_there(made: Made, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(made("small", "fp16").read_bytes())
    with pytest.raises((ArtifactError, CompileError), match=r"model\.onnx"):
        _compile(tmp_path / "model.onnx", tmp_path, DecoderProfile(slots=2, capacity=32, chunk=16))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_layers_and_size_that_the_plan_did_not_count() -> None:
    network = DecoderNetwork(model=b"", layers=2, head_size=64, weight_bytes=2_000_000_000)
    network.check_layers({"KV_CACHE_UPDATE": 4, "ATTENTION": 2}, "model.onnx")
    with pytest.raises(CompileError, match="has 0 KV_CACHE_UPDATE layers, 4 are needed"):
        network.check_layers({"ATTENTION": 2}, "model.onnx")
    with pytest.raises(CompileError, match="has 1 ATTENTION layers, 2 are needed"):
        network.check_layers({"KV_CACHE_UPDATE": 4, "ATTENTION": 1}, "model.onnx")
    network.check_size(2_060_000_000, "model.onnx")
    with pytest.raises(CompileError, match=r"2,060,000,001 bytes for 2,000,000,000 of weights"):
        network.check_size(2_060_000_001, "model.onnx")
    # Of a small model the kernels are the larger part.
    DecoderNetwork(model=b"", layers=2, head_size=64, weight_bytes=1_000_000).check_size(9_000_000, "m")
