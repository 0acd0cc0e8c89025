"""Lowering for the CPU: exact in value, and fused by the session that will serve it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_models import batch, with_small_scales

from build_engines.export import half_tensors, to_fp16
from build_engines.graphs import read_graph
from build_engines.quantize import Quantizer
from build_engines.targets.onnxruntime import (
    OnnxRuntimeTarget,
    lower,
    lower_static_linears,
    rounded,
    widen,
)
from triton_repo.runtime.session import _SLOW_FUSIONS, onnx_session

Model = onnx.ModelProto
SHAPES = ((1, 1), (1, 7), (3, 19), (8, 40))


def quantizer_of(export: Any, task: str, family: str) -> Quantizer:
    quantizer = Quantizer(read_graph(export(task, family).path))
    calibration = [batch((8, 24), 0, task == "rerank", seed=seed) for seed in range(3)]
    quantizer.calibrate(calibration, method="minmax", percentile=99.9, smoothing="auto")
    return quantizer


def assembled(quantizer: Quantizer, mode: Any) -> Model:
    return quantizer.assemble({linear.name: mode for linear in quantizer.linears})


def outputs(model: Model, arrays: dict[str, Any], *, optimize: bool) -> list[np.ndarray]:
    session = onnx_session(model.SerializeToString(), threads=1, optimize=optimize)
    return list(session.run(None, arrays))


def assert_same(first: Model, second: Model, *, token_types: bool, tolerance: float = 1e-5) -> None:
    """`first` without any optimization of the runtime's, `second` as it is served.

    The signed graph multiplies in float32, the lowered one in integers: an activation halfway between two
    codes may round the other way in the next layer. That is one code in one row, now and then; a wrong zero
    point or scale is every row.
    """
    rows: list[float] = []
    for shape in SHAPES:
        arrays = batch(shape, 0, token_types, seed=11)
        for expected, found in zip(
            outputs(first, arrays, optimize=False), outputs(second, arrays, optimize=True), strict=True
        ):
            apart = np.abs(found - expected) / np.abs(expected).max()
            rows += apart.reshape(len(apart), -1).max(axis=1).tolist()
    assert max(rows) < max(tolerance, 5e-3)
    assert np.mean(np.array(rows) < tolerance) > 0.75


def served_ops(model: Model, tmp_path: Path) -> Counter[str]:
    """Operators after the runtime's own optimizations, with the settings of the served session."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=_SLOW_FUSIONS,
    )
    return Counter(node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node)


CASES = [("embed", "bert"), ("classify", "bert"), ("rerank", "bert"), ("embed", "modernbert")]


@pytest.mark.parametrize(("task", "family"), CASES)
def test_unsigned_codes_give_the_signed_graphs_answers(export: Any, task: str, family: str) -> None:
    """u8 with zero point 128 is s8 with zero point 0; ModernBERT's Linears have no bias of their own."""
    quantizer = quantizer_of(export, task, family)
    signed = assembled(quantizer, "int8")
    lowered = lower_static_linears(signed)
    assert_same(signed, lowered, token_types=task == "rerank")
    ops = Counter(node.op_type for node in lowered.graph.node)
    assert ops["MatMulIntegerToFloat"] == len(quantizer.linears)
    assert ops["DequantizeLinear"] == 0


def test_exact_where_codes_are_clipped(export: Any) -> None:
    """Every input scale is cut to a sixteenth, so that most codes lie at -128 or 127."""
    signed = assembled(quantizer_of(export, "embed", "bert"), "int8")
    for tensor in signed.graph.initializer:
        if tensor.name.endswith(".input.scale"):
            cut = np.asarray(numpy_helper.to_array(tensor) / 16, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(cut, tensor.name))
    lowered = lower_static_linears(signed)
    arrays = batch((4, 12), 0, False)
    codes = codes_of(lowered, "layers.0.attention.qkv", arrays)
    assert np.isin(codes, (0, 255)).mean() > 0.3
    assert {codes.min(), codes.max()} == {0, 255}
    assert_same(signed, lowered, token_types=False)


def codes_of(lowered: Model, linear: str, arrays: dict[str, Any]) -> np.ndarray:
    watched = Model()
    watched.CopyFrom(lowered)
    name = f"{linear}.input.u8"
    watched.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    return np.asarray(onnx_session(watched.SerializeToString()).run([name], arrays)[0])


@pytest.mark.parametrize("mode", ["int8", "float"])
def test_the_half_precision_graph_keeps_its_values(export: Any, mode: str) -> None:
    """What TensorRT compiles and what the CPU serves: the same FP16 weights and scales, run in float32."""
    typed = to_fp16(assembled(quantizer_of(export, "embed", "bert"), mode))
    wide = widen(typed)
    halves = {t.name: t for t in typed.graph.initializer if t.data_type == TensorProto.FLOAT16}
    assert halves
    for tensor in wide.graph.initializer:
        assert tensor.data_type != TensorProto.FLOAT16
        if tensor.name in halves:
            expected = numpy_helper.to_array(halves[tensor.name]).astype(np.float32)
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected)
    onnx.checker.check_model(wide, full_check=True)
    assert_same(wide, lower(typed), token_types=False)


@pytest.mark.parametrize(
    ("mode", "kernel"), [("int8", "MatMulIntegerToFloat"), ("int8-weights", "MatMulNBits")]
)
def test_linears_whose_scales_stay_in_float_are_served_like_the_others(
    export: Any, tmp_path: Path, mode: str, kernel: str
) -> None:
    """The casts around them change nothing on the CPU, neither values nor kernels."""
    quantizer = quantizer_of(export, "embed", "bert")
    quantized = with_small_scales(assembled(quantizer, mode), 0.002)  # not rounded to FP16 again
    typed = to_fp16(quantized)
    kept = {tensor.name for tensor in typed.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    assert "layers.0.ffn.up.weight.scale.fp32" in kept
    assert ("layers.0.ffn.down.input.scale.fp32" in kept) == (mode == "int8")
    lowered = lower(typed)
    ops = served_ops(lowered, tmp_path)
    assert ops[kernel] == len(quantizer.linears)
    assert ops["DequantizeLinear"] == 0
    # What is not quantized was rounded to FP16.
    arrays = batch((8, 24), 0, False, seed=11)
    found, expected = (
        outputs(lowered, arrays, optimize=True)[0],
        outputs(quantized, arrays, optimize=False)[0],
    )
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    if mode == "int8":
        assert Counter(node.op_type for node in lowered.graph.node)[kernel] == len(quantizer.linears)
        assert_same(widen(typed), lowered, token_types=False)


def linear_pair(first: float, second: float) -> Model:
    """x [1, 4] through two FP16 MatMuls by constants."""
    nodes = [
        helper.make_node("Cast", ["x"], ["x.fp16"], name="in", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["x.fp16", "a"], ["middle"], name="first"),
        helper.make_node("MatMul", ["middle", "b"], ["product"], name="second"),
        helper.make_node("Cast", ["product"], ["y"], name="out", to=TensorProto.FLOAT),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    weights = [
        numpy_helper.from_array(np.full((4, 4), number, np.float16), name)
        for name, number in (("a", first), ("b", second))
    ]
    graph = helper.make_graph(nodes, "pair", value[:1], value[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize("value", [100.0, 0.1, 1e-4])
def test_rounding_shows_what_half_precision_would_answer(value: float) -> None:
    """120000 in the middle is infinity in FP16; given the FP16 graph, ONNX Runtime would not notice."""
    typed = linear_pair(300, 0.001)
    assert half_tensors(typed) == {"x.fp16", "middle", "product"}
    x = np.full((1, 4), value, np.float32)
    with np.errstate(over="ignore"):
        half = (np.float32(np.float16(value)) * 4 * 300).astype(np.float16)
        half = (half.astype(np.float32) * 4 * np.float32(np.float16(0.001))).astype(np.float16)
    found = outputs(rounded(widen(typed), half_tensors(typed)), {"x": x}, optimize=True)[0]
    np.testing.assert_array_equal(found, np.full((1, 4), half, np.float32))
    assert np.isinf(found).all() == (value == 100)


def test_rounding_a_whole_graph_stays_close(export: Any) -> None:
    typed = to_fp16(read_graph(export("embed").path))
    model = rounded(widen(typed), half_tensors(typed))
    onnx.checker.check_model(model, full_check=True)
    arrays = batch((4, 20), 0, False)
    expected = outputs(read_graph(export("embed").path), arrays, optimize=True)[0]
    found = outputs(model, arrays, optimize=True)[0]
    error = np.abs(found - expected).max()
    assert 1e-6 < error < 3e-3  # rounding happened, and nothing else


@pytest.mark.parametrize(("task", "family"), CASES)
def test_every_static_linear_is_fused(export: Any, tmp_path: Path, task: str, family: str) -> None:
    quantizer = quantizer_of(export, task, family)
    ops = served_ops(lower(to_fp16(assembled(quantizer, "int8"))), tmp_path)
    assert ops["MatMulIntegerToFloat"] == len(quantizer.linears)
    assert ops["QuantizeLinear"] <= len(quantizer.linears)
    assert ops["DequantizeLinear"] == 0
    assert ops["MatMulInteger"] == 0
    assert ops["SkipLayerNormalization"] == 0


def test_every_linear_with_int8_weights_is_fused(export: Any, tmp_path: Path) -> None:
    quantizer = Quantizer(read_graph(export("embed").path))
    ops = served_ops(lower(to_fp16(assembled(quantizer, "int8-weights"))), tmp_path)
    assert ops["MatMulNBits"] == len(quantizer.linears)
    assert ops["DequantizeLinear"] == 0


def test_modes_may_be_mixed(export: Any, tmp_path: Path) -> None:
    quantizer = quantizer_of(export, "embed", "bert")
    modes: dict[str, Any] = {linear.name: "int8" for linear in quantizer.linears}
    modes["layers.0.ffn.down"], modes["layers.1.ffn.down"] = "int8-weights", "float"
    lowered = lower(to_fp16(quantizer.assemble(modes)))
    ops = served_ops(lowered, tmp_path)
    assert ops["MatMulIntegerToFloat"] == len(quantizer.linears) - 2
    assert ops["MatMulNBits"] == 1


def test_only_linears_are_rewritten(export: Any) -> None:
    """A graph without Q/DQ stays as it is, its MatMul of two activations included; the source always does."""
    model = read_graph(export("embed").path)
    assert [n.name for n in lower_static_linears(model).graph.node] == [n.name for n in model.graph.node]
    before = model.SerializeToString()
    lower(model)
    assert model.SerializeToString() == before


def test_the_target_writes_one_checked_file(export: Any, tmp_path: Path) -> None:
    quantizer = quantizer_of(export, "embed", "bert")
    typed = to_fp16(assembled(quantizer, "int8"))
    onnx.save(typed, str(tmp_path / "model.onnx"))
    out = tmp_path / "engine"
    out.mkdir()
    steps: list[tuple[str, int, int]] = []
    target = OnnxRuntimeTarget()
    target.check()
    made = target.compile(
        tmp_path / "model.onnx",
        out,
        profile=None,  # type: ignore[arg-type]
        compute_capability=None,
        progress=lambda *step: steps.append(step),
    )
    assert [path.name for path in out.iterdir()] == [target.engine_file]
    assert made["layers"]["MatMulIntegerToFloat"] == len(quantizer.linears)
    assert set(made["versions"]) == {"onnxruntime"}
    assert steps[-1][1] == steps[-1][2]
    arrays = batch((2, 9), 0, False)
    found = onnx_session(out / "engine.onnx").run(None, arrays)[0]
    np.testing.assert_allclose(found, outputs(widen(typed), arrays, optimize=False)[0], atol=1e-5)
