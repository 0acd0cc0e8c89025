"""to_fp16 on graphs with Q/DQ: INT8 stays INT8, small scales and large constants survive, types meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_models import session

from build_engines.errors import ExportError
from build_engines.export import half_tensors, to_fp16
from build_engines.graphs import save_graph

FLOAT_INPUT = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])


def model_of(nodes: list[Any], initializers: dict[str, Any], output: str = "y", rank: int = 2) -> Any:
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", *[None] * (rank - 1)])]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()]
    graph = helper.make_graph(nodes, "test", [FLOAT_INPUT], outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def quantized_linear(activation_scale: float, weight_scale: Any) -> Any:
    """x -> Q -> DQ -> MatMul(DQ(int8 weight)) -> y, as the quantizer writes it."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["x.q"], name="q"),
        helper.make_node("DequantizeLinear", ["x.q", "x.scale", "x.zero"], ["x.dq"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "w.scale", "w.zero"], ["w.dq"], name="wdq", axis=1),
        helper.make_node("MatMul", ["x.dq", "w.dq"], ["y"], name="linear"),
    ]
    weights = {
        "x.scale": np.float32(activation_scale),
        "x.zero": np.int8(0),
        "w": rng.integers(-127, 128, (4, 3)).astype(np.int8),
        "w.scale": np.asarray(weight_scale, np.float32),
        "w.zero": np.zeros(3, np.int8),
    }
    return model_of(nodes, weights)


def run(model: Any, tmp_path: Path, x: Any) -> Any:
    save_graph(model, tmp_path / "model.onnx")
    return session(tmp_path / "model.onnx").run(None, {"x": x})[0]


def types(model: Any) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def test_int8_stays_int8_and_scales_become_half(tmp_path: Path) -> None:
    full = quantized_linear(0.02, [0.001, 0.01, 0.1])
    half = to_fp16(full)
    found = types(half)
    assert found["w"] == found["w.zero"] == found["x.zero"] == TensorProto.INT8
    assert found["w.scale"] == found["x.scale"] == TensorProto.FLOAT16
    assert types(full)["w.scale"] == TensorProto.FLOAT, "the given graph must not change"
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_allclose(run(half, tmp_path, x), run(full, tmp_path, x), rtol=0.01, atol=0.01)


def test_scales_below_half_precision_are_kept_in_float(tmp_path: Path) -> None:
    """A scale of 3e-8 would round to half its value; its products fit again once they are summed."""
    full = quantized_linear(2.0, [3e-8, 1e-3, 1e-3])
    half = to_fp16(full)
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32) * 100
    expected = run(full, tmp_path, x)
    np.testing.assert_allclose(run(half, tmp_path, x)[:, 0], expected[:, 0], rtol=0.05)


def test_subnormal_scales_that_half_precision_holds_become_half() -> None:
    """The quantizer chooses such scales for weights. Activations are divided by theirs: 2^20 is too much."""
    half = to_fp16(quantized_linear(2.0, [3 * 2.0**-24, 1e-3, 1e-3]))
    assert types(half)["w.scale"] == types(half)["x.scale"] == TensorProto.FLOAT16
    half = to_fp16(quantized_linear(2.0**-20, [1e-3, 1e-3, 1e-3]))
    assert types(half)["w.scale.fp32"] == types(half)["x.scale.fp32"] == TensorProto.FLOAT


@pytest.mark.parametrize(("activation", "weight"), [(2.0, 3e-8), (9.5e-6, 1e-3), (9.5e-6, 3e-8)])
def test_both_scales_of_a_product_have_one_type(activation: float, weight: float, tmp_path: Path) -> None:
    """TensorRT refuses an INT8 product with one scale in FP16 and one in float; its output stays FP16."""
    full = quantized_linear(activation, [weight, 1e-3, 1e-3])
    half = to_fp16(full)
    scales = {name: kind for name, kind in types(half).items() if "scale" in name}
    assert scales == dict.fromkeys(("x.scale.fp32", "w.scale.fp32"), TensorProto.FLOAT)
    onnx.checker.check_model(half, full_check=True)
    assert half_tensors(half) >= {"x.dq.fp16", "w.dq.fp16"}
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32) * 50 * np.float32(activation)
    expected = run(full, tmp_path, x)
    np.testing.assert_allclose(
        run(half, tmp_path, x), expected, rtol=0.05, atol=0.02 * np.abs(expected).max()
    )


def test_a_mask_constant_does_not_become_infinite(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["masked"], name="masked"),
        helper.make_node("Softmax", ["masked"], ["y"], name="softmax"),
    ]
    mask = np.array([0, 0, np.finfo(np.float32).min, -1e9], np.float32)
    half = to_fp16(model_of(nodes, {"mask": mask}))
    found = run(half, tmp_path, np.ones((2, 4), np.float32))
    np.testing.assert_allclose(found, [[0.5, 0.5, 0, 0]] * 2, atol=1e-3)
    (stored,) = (numpy_helper.to_array(t) for t in half.graph.initializer if t.name == "mask")
    assert stored.dtype == np.float16
    assert np.isfinite(stored).all()


def test_constants_casts_and_shapes_are_followed(tmp_path: Path) -> None:
    """Constant, Cast to float, ConstantOfShape, comparisons: each output has the type the checker expects."""
    ones = numpy_helper.from_array(np.array([1.0], np.float32))
    nodes = [
        helper.make_node("Constant", [], ["half"], name="half", value_float=0.5),
        helper.make_node("Greater", ["x", "half"], ["larger"], name="larger"),
        helper.make_node("Cast", ["larger"], ["counted"], name="counted", to=TensorProto.FLOAT),
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], name="ones", value=ones),
        helper.make_node("Add", ["counted", "ones"], ["sum"], name="sum"),
        helper.make_node("Where", ["larger", "sum", "x"], ["y"], name="where"),
    ]
    x = np.array([[0, 0.25, 0.75, 2]], np.float32)
    np.testing.assert_array_equal(run(to_fp16(model_of(nodes, {})), tmp_path, x), [[0, 0.25, 2, 2]])


def test_the_tail_is_computed_in_float(tmp_path: Path) -> None:
    """A squared length of 90,000 is beyond FP16; a node called output.* must not see FP16's infinity."""
    nodes = [
        helper.make_node("Mul", ["x", "one"], ["inner"], name="inner"),
        helper.make_node("ReduceL2", ["inner", "axis"], ["length"], name="output.length", keepdims=1),
        helper.make_node("Div", ["inner", "length"], ["y"], name="output.normalize"),
    ]
    model = model_of(nodes, {"one": np.float32(1), "axis": np.array([1])})
    found = run(to_fp16(model), tmp_path, np.full((1, 4), 300, np.float32))
    np.testing.assert_allclose(found, 0.5)


def test_an_output_that_is_also_read_keeps_one_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["y"], name="double"),
        helper.make_node("Softmax", ["y"], ["z"], name="output.z"),
        helper.make_node("Exp", ["y"], ["w"], name="exp"),
    ]
    model = model_of(nodes, {"two": np.float32(2)})
    for name in ("z", "w"):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]))
    half = to_fp16(model)
    assert [output.name for output in half.graph.output] == ["y", "z", "w"]
    assert sum(node.op_type == "Cast" for node in half.graph.node) == 3, "input, y and w: z reads y itself"
    save_graph(half, tmp_path / "model.onnx")
    x = np.arange(4, dtype=np.float32)[None]
    y, _, w = session(tmp_path / "model.onnx").run(None, {"x": x})
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_allclose(w, np.exp(2 * x), rtol=2e-3)


def test_a_lowered_graph_is_refused() -> None:
    node = helper.make_node("QuickGelu", ["x"], ["y"], name="gelu", domain="com.microsoft")
    model = model_of([node], {})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ExportError, match=r"gelu \(com.microsoft::QuickGelu\) cannot be turned into FP16"):
        to_fp16(model)
