"""Calibration and INT8 Q/DQ: calibrators on known distributions, rewrites that change only the rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_models import batch

from build_engines.errors import QuantizeError
from build_engines.graphs import open_session, read_graph
from build_engines.quantize import CALIBRATORS, Quantizer, collect_statistics, find_linears
from build_engines.quantize.linears import read_weight
from build_engines.quantize.scales import quantize_weight, search_scales
from build_engines.quantize.statistics import MAX_ROWS, InputStatistics
from triton_repo.runtime.session import onnx_session

Model = onnx.ModelProto


def batches(count: int = 4, seed: int = 0, shape: tuple[int, int] = (8, 24)) -> list[dict[str, Any]]:
    return [batch(shape, 0, False, seed=seed + index) for index in range(count)]


@pytest.fixture(scope="module")
def model(export: Any) -> Model:
    return read_graph(export("embed").path)


@pytest.fixture(scope="module")
def quantizer(model: Model) -> Quantizer:
    found = Quantizer(model)
    found.calibrate(batches(), method="minmax", percentile=99.9, smoothing="auto")
    return found


def run(model: Model, arrays: dict[str, Any], *, optimize: bool = True) -> np.ndarray:
    session = onnx_session(model.SerializeToString(), optimize=optimize)
    return np.asarray(session.run([session.get_outputs()[0].name], arrays)[0])


def arrays_of(model: Model) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def everywhere(quantizer: Quantizer, mode: Any) -> Any:
    return {linear.name: mode for linear in quantizer.linears}


# --- calibrators ---


def test_minmax_clips_nothing() -> None:
    assert CALIBRATORS["minmax"](np.ones((4, 4), np.float32), 7.5, 99.0) == 7.5


def test_percentile_of_a_uniform_distribution() -> None:
    rows = np.linspace(-1, 1, 200_001, dtype=np.float32).reshape(-1, 3)
    assert CALIBRATORS["percentile"](rows, 1.0, 99.0) == pytest.approx(0.99, abs=1e-4)
    assert CALIBRATORS["percentile"](rows, 1.0, 100.0) == pytest.approx(1.0)
    # Never beyond what was seen, and never 0, which would divide by nothing.
    assert CALIBRATORS["percentile"](2 * rows, 1.0, 100.0) == 1.0
    assert CALIBRATORS["percentile"](np.zeros((4, 4), np.float32), 3.0, 99.0) == 3.0


def naive_entropy(values: np.ndarray, maximum: float) -> float:
    """The method as its author describes it, one loop per step (Migacz, GTC 2017)."""
    counts, edges = np.histogram(np.abs(values), bins=2048, range=(0.0, maximum))
    counts = counts.astype(float)
    counts[0] = counts[1]
    best, threshold = float("inf"), maximum
    for cut in range(192, 2049, 16):
        reference = list(counts[:cut])
        reference[-1] += sum(counts[cut:])
        groups: dict[int, list[int]] = {}
        for index in range(cut):
            groups.setdefault(index * 128 // cut, []).append(index)
        quantized = [0.0] * cut
        for members in groups.values():
            filled = [index for index in members if reference[index] > 0]
            for index in filled:
                quantized[index] = sum(counts[member] for member in members) / len(filled)
        total_p, total_q = sum(reference), sum(quantized)
        loss = 0.0
        for p, q in zip(reference, quantized, strict=True):
            if p > 0:
                loss += p / total_p * np.log(p / total_p / max(q / total_q, 1e-12))
        if loss < best:
            best, threshold = loss, float(edges[cut])
    return threshold


@pytest.mark.parametrize("shape", ["normal", "laplace", "uniform", "outlier", "sparse"])
def test_entropy_is_the_published_method(shape: str) -> None:
    generator = np.random.default_rng(0)
    count = 400 if shape == "sparse" else 20_000
    values = {
        "normal": generator.normal(size=count),
        "laplace": generator.laplace(size=count),
        "uniform": generator.uniform(-1, 1, count),
        "outlier": np.append(generator.normal(size=count), 40.0),
        "sparse": generator.laplace(size=count),
    }[shape].astype(np.float32)
    maximum = float(np.abs(values).max())
    found = CALIBRATORS["entropy"](values.reshape(-1, 1), maximum, 0.0)
    assert found == pytest.approx(naive_entropy(values, maximum))
    if shape == "outlier":
        assert found < 0.3 * maximum
    if shape == "uniform":
        assert found > 0.9 * maximum


# --- statistics ---


@pytest.mark.parametrize("task", ["embed", "classify"])
def test_padding_counts_for_nothing(export: Any, task: str) -> None:
    """The pad token's embedding is made enormous: ranges and samples must not notice.

    BERT's classifier reads the first token alone, so its last layer computes no other.
    """
    loud = read_graph(export(task).path)
    for tensor in loud.graph.initializer:
        if tensor.name == "embeddings.word.weight":
            values = numpy_helper.to_array(tensor).copy()
            values[0] = 50 * np.sign(np.random.default_rng(0).normal(size=values.shape[1]))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    linears = find_linears(loud)
    padded = batches(2)
    expected = collect_statistics(loud, linears, [row for one in padded for row in unpadded(one)])
    found = collect_statistics(loud, linears, padded)
    assert any(x.name.endswith("first_query") for x in linears) is (task == "classify")
    for linear in linears:
        np.testing.assert_allclose(found[linear.name].low, expected[linear.name].low, atol=1e-4)
        np.testing.assert_allclose(found[linear.name].high, expected[linear.name].high, atol=1e-4)
        rows = found[linear.name].rows
        assert (rows >= expected[linear.name].low - 1e-4).all()
        assert (rows <= expected[linear.name].high + 1e-4).all()


def unpadded(arrays: dict[str, Any]) -> list[dict[str, Any]]:
    lengths = arrays["attention_mask"].sum(axis=1)
    return [
        {name: value[row : row + 1, :length] for name, value in arrays.items()}
        for row, length in enumerate(lengths)
    ]


def collect_first_tokens(export: Any, many: list[dict[str, Any]]) -> np.ndarray:
    model = read_graph(export("classify").path)
    return collect_statistics(model, find_linears(model), many)["layers.1.ffn.up"].rows


def test_a_bounded_sample_of_every_batch(model: Model, export: Any) -> None:
    linears = find_linears(model)
    many = batches(12, shape=(8, 40))
    tokens = sum(int(one["attention_mask"].sum()) for one in many)
    assert tokens > 2 * MAX_ROWS
    for found in collect_statistics(model, linears, many).values():
        assert len(found.rows) <= MAX_ROWS
        assert len(found.rows) > 0.95 * MAX_ROWS
    first = collect_first_tokens(export, many)
    assert len(first) == 12 * 8  # one row per text
    few = collect_statistics(model, linears, batches(1, shape=(2, 8)))
    assert len(few["layers.0.attention.qkv"].rows) == int(batches(1, shape=(2, 8))[0]["attention_mask"].sum())


def test_nothing_to_calibrate_with(model: Model) -> None:
    with pytest.raises(QuantizeError, match="nothing to calibrate with"):
        collect_statistics(model, find_linears(model), [])
    empty = {"input_ids": np.zeros((1, 4), np.int64), "attention_mask": np.zeros((1, 4), np.int64)}
    with pytest.raises(QuantizeError, match="nothing to calibrate with"):
        collect_statistics(model, find_linears(model), [empty])


def test_activations_without_a_range(model: Model) -> None:
    broken = Model()
    broken.CopyFrom(model)
    for tensor in broken.graph.initializer:
        if tensor.name == "layers.0.ffn.up.weight":
            values = np.full(tuple(tensor.dims), np.inf, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(QuantizeError, match="not finite"):
        collect_statistics(broken, find_linears(broken), batches(1))


# --- scales ---


def one_sided(outlier: float = 1.0) -> tuple[np.ndarray, InputStatistics]:
    """A weight [24, 16] and GELU-like inputs, almost all positive, one channel `outlier` times as large."""
    generator = np.random.default_rng(0)
    rows = np.abs(generator.normal(size=(400, 24))).astype(np.float32)
    rows[:, 5] *= outlier
    weight = generator.normal(size=(24, 16)).astype(np.float32)
    return weight, InputStatistics(rows.min(axis=0), rows.max(axis=0), rows)


def is_half(values: Any) -> bool:
    values = np.asarray(values, np.float32)
    return bool((values.astype(np.float16).astype(np.float32) == values).all())


@pytest.mark.parametrize("shifted", [True, False])
def test_smoothing_and_shifting_are_exact(shifted: bool) -> None:
    """x W = (x m + o) (W / m) - o (W / m), whatever m and o are."""
    from build_engines.quantize.scales import _Search

    weight, statistics = one_sided(30)
    for alpha in (0.5, 1.0):
        rewrite = _Search(weight, statistics, "minmax", 99.9)._rewrite(alpha, shifted)
        assert is_half(rewrite.multiplier)
        migrated = weight / rewrite.multiplier[:, None]
        result = rewrite.apply(statistics.rows) @ migrated
        if shifted:
            assert rewrite.offset is not None
            assert is_half(rewrite.offset)
            result -= rewrite.offset @ migrated
            centred = rewrite.apply(statistics.rows)
            middle = (centred.min(axis=0) + centred.max(axis=0)) / 2
            assert np.abs(middle).max() < 0.02 * np.abs(centred).max()
        np.testing.assert_allclose(result, statistics.rows @ weight, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_the_bias_takes_the_mean_error(method: str) -> None:
    weight, statistics = one_sided(8)
    found = search_scales(weight, statistics, method=method, percentile=99.0, smoothing="auto")
    restored = found.weight.values * found.weight.scale
    inputs = statistics.rows if found.rewrite is None else found.rewrite.apply(statistics.rows)
    output = np.clip(np.rint(inputs / found.scale), -128, 127) * found.scale @ restored + found.bias_shift
    exact = statistics.rows @ weight
    # Tokens count by their relative error: a large one is divided by its own size in the norm that follows.
    power = np.square(exact).mean(axis=1, keepdims=True)
    share = 1 / (power + np.median(power))
    share /= share.sum()
    np.testing.assert_allclose((share * output).sum(axis=0), (share * exact).sum(axis=0), atol=1e-3)
    relative = (share * np.square(output - exact)).sum() / (share * np.square(exact)).sum()
    assert relative == pytest.approx(found.error, rel=0.01)


def test_rewrites_only_where_they_help() -> None:
    weight, statistics = one_sided(30)
    off = search_scales(weight, statistics, method="minmax", percentile=99.9, smoothing="off")
    on = search_scales(weight, statistics, method="minmax", percentile=99.9, smoothing="auto")
    assert off.rewrite is None
    assert on.rewrite is not None
    assert on.error < 0.2 * off.error
    even = np.random.default_rng(0).uniform(-1, 1, (400, 24)).astype(np.float32)
    plain = InputStatistics(even.min(axis=0), even.max(axis=0), even)
    weight = np.random.default_rng(1).choice([-1.0, 1.0], (24, 16)).astype(np.float32)
    nothing = search_scales(weight, plain, method="minmax", percentile=99.9, smoothing="auto")
    assert nothing.rewrite is None


def test_weights_are_rounded_per_output_channel() -> None:
    weight = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32) * 10.0 ** np.arange(-2, 6)
    found = quantize_weight(weight)
    assert found.values.dtype == np.int8
    assert found.values.min() >= -127  # symmetric: -128 has no opposite
    assert is_half(found.scale)
    error = np.abs(found.values * found.scale - weight).max(axis=0) / np.abs(weight).max(axis=0)
    assert error.max() < 0.5 / 127 * 1.1


def test_dead_channels_do_not_spoil_the_others() -> None:
    """A scale below FP16's normal range would keep all of a weight's scales, and so its DQ, in float32."""
    weight = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    weight[:, 1] = 0
    weight[:, 2] = 1e-7
    found = quantize_weight(weight)
    assert found.scale.min() >= np.finfo(np.float16).tiny
    assert (found.values[:, 1:3] == 0).all()


@pytest.mark.parametrize("smoothing", ["auto", "off"])
@pytest.mark.parametrize(("exponent", "lift"), [(-8, 2), (-11, 16), (-30, 64)])
def test_tiny_activations_are_multiplied_by_a_power_of_two(smoothing: str, exponent: int, lift: int) -> None:
    """Their scale is then a normal FP16 number, and nothing else changes until FP16 has no more room."""
    even = np.random.default_rng(0).uniform(-1, 1, (400, 24)).astype(np.float32)
    even[0, 0] = 1
    weight = np.random.default_rng(1).choice([-0.1, 0.1], (24, 16)).astype(np.float32)
    usual, tiny = (
        search_scales(
            weight,
            InputStatistics(rows.min(axis=0), rows.max(axis=0), rows),
            method="minmax",
            percentile=99.9,
            smoothing=smoothing,
        )
        for rows in (even, even * np.float32(2.0**exponent))
    )
    assert usual.rewrite is None
    assert tiny.rewrite is not None
    np.testing.assert_array_equal(tiny.rewrite.multiplier, lift)
    assert tiny.rewrite.offset is None
    assert tiny.scale >= np.finfo(np.float16).tiny
    assert is_half(tiny.weight.scale)
    if exponent > -20:
        assert tiny.error == pytest.approx(usual.error, rel=0.05)


# --- graphs ---


def test_float_everywhere_is_the_original(model: Model, quantizer: Quantizer) -> None:
    arrays = batch((3, 17), 0, False, seed=9)
    np.testing.assert_array_equal(
        run(quantizer.assemble(everywhere(quantizer, "float")), arrays), run(model, arrays)
    )


@pytest.mark.parametrize("mode", ["int8", "int8-weights"])
def test_the_form_that_tensorrt_takes(quantizer: Quantizer, mode: str) -> None:
    """INT8 weights as INT8 initializers behind a DequantizeLinear per output channel, no Q on any weight."""
    graph = quantizer.assemble(everywhere(quantizer, mode)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    quantizes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert not any(node.input[0] in stored for node in quantizes)
    assert len(quantizes) == (len(quantizer.linears) if mode == "int8" else 0)
    for linear in quantizer.linears:
        dequantize = nodes[f"{linear.name}.weight.dequantize"]
        values, scale = (stored[name] for name in dequantize.input)
        assert values.data_type == onnx.TensorProto.INT8
        assert tuple(values.dims) == (linear.inputs, linear.outputs)
        assert tuple(scale.dims) == (linear.outputs,)
        assert [(a.name, a.i) for a in dequantize.attribute] == [("axis", 1)]
        assert nodes[linear.name].input[1] == dequantize.output[0]
    for name, tensor in stored.items():
        if name.endswith((".scale", ".multiplier", ".offset")):
            assert is_half(numpy_helper.to_array(tensor)), name
        if name.endswith(".input.scale"):
            assert tuple(tensor.dims) == ()  # per tensor
        if name.endswith(".input.zero"):
            assert numpy_helper.to_array(tensor) == 0  # symmetric
    # Heads, embeddings and norms are left alone, and no float copy of a quantized weight stays behind.
    quantized = {name for name, tensor in stored.items() if tensor.data_type == onnx.TensorProto.INT8}
    zeros = {f"{linear.name}.input.zero" for linear in quantizer.linears} if mode == "int8" else set()
    assert quantized == {linear.weight for linear in quantizer.linears} | zeros


def without_rounding(model: Model, quantizer: Quantizer) -> Model:
    """The INT8 graph with its quantizers taken out: smoothing, shifting and their counterweights are left."""
    exact = Model()
    exact.CopyFrom(model)
    original = arrays_of(quantizer.model)
    names = {linear.name: linear for linear in quantizer.linears}
    replacement: dict[str, np.ndarray] = {}
    producers = {node.output[0]: node for node in exact.graph.node}
    for node in exact.graph.node:
        if node.name not in names:
            continue
        rewrite = quantizer.scales[node.name].rewrite
        dequantize = producers[node.input[0]]
        node.input[0] = producers[dequantize.input[0]].input[0]
        node.input[1] = f"{node.name}.weight"
        weight = original[f"{node.name}.weight"]
        bias = original.get(f"{node.name}.bias_value", np.zeros(weight.shape[1], np.float32))
        if rewrite is not None:
            weight = weight / rewrite.multiplier[:, None]
            if rewrite.offset is not None:
                bias = bias - rewrite.offset @ weight
        replacement[f"{node.name}.weight"] = weight
        replacement[f"{node.name}.bias_value"] = bias
    kept = [node for node in exact.graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    del exact.graph.node[:]
    exact.graph.node.extend(kept)
    for tensor in exact.graph.initializer:
        if tensor.name in replacement:
            tensor.CopyFrom(numpy_helper.from_array(replacement[tensor.name], tensor.name))
    return exact


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_rewritten_graph_without_rounding_is_the_original(export: Any, family: str) -> None:
    model = read_graph(export("embed", family).path)
    quantizer = Quantizer(model)
    quantizer.calibrate(batches(2), method="minmax", percentile=99.9, smoothing="auto")
    rewritten = [found.rewrite for found in quantizer.scales.values() if found.rewrite is not None]
    assert len(rewritten) >= 3
    assert any(rewrite.offset is not None for rewrite in rewritten)
    exact = without_rounding(quantizer.assemble(everywhere(quantizer, "int8")), quantizer)
    for shape in ((1, 3), (4, 30)):
        arrays = batch(shape, 0, False, seed=7)
        np.testing.assert_allclose(run(exact, arrays), run(model, arrays), atol=2e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("mode", ["int8", "int8-weights"])
def test_int8_is_close_to_float(export: Any, family: str, mode: str) -> None:
    """ModernBERT's Linears have no bias: correction and shifting give them one."""
    model = read_graph(export("embed", family).path)
    quantizer = Quantizer(model)
    if mode == "int8":
        quantizer.calibrate(batches(), method="minmax", percentile=99.9, smoothing="auto")
    quantized = quantizer.assemble(everywhere(quantizer, mode))
    onnx.checker.check_model(quantized, full_check=True)
    assert any(node.name == "layers.0.ffn.up.bias" for node in quantized.graph.node) is (
        family == "bert" or mode == "int8"
    )
    arrays = batch((8, 21), 0, False, seed=5)
    expected, found = run(model, arrays), run(quantized, arrays, optimize=False)
    assert (expected * found).sum(axis=1).min() > 0.98


def test_layers_keep_the_mode_they_are_given(quantizer: Quantizer) -> None:
    modes = {linear.name: "float" for linear in quantizer.linears}
    modes["layers.0.ffn.up"], modes["layers.1.ffn.down"] = "int8", "int8-weights"
    graph = quantizer.assemble(modes).graph  # type: ignore[arg-type]
    stored = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
    assert stored == {"layers.0.ffn.up.weight", "layers.0.ffn.up.input.zero", "layers.1.ffn.down.weight"}
    assert [n.name for n in graph.node if n.op_type == "QuantizeLinear"] == ["layers.0.ffn.up.input.quantize"]


def test_weights_only_asks_for_no_data(model: Model) -> None:
    untouched = Quantizer(model)
    assert open_session(untouched.assemble(everywhere(untouched, "int8-weights"))) is not None


def test_a_graph_without_linears_is_refused(model: Model) -> None:
    bare = Model()
    bare.CopyFrom(model)
    del bare.graph.node[:]
    with pytest.raises(QuantizeError, match="no Linear layer"):
        Quantizer(bare)


def test_progress_counts_batches_and_layers(model: Model) -> None:
    steps: list[tuple[int, int]] = []
    quantizer = Quantizer(model)
    quantizer.calibrate(
        batches(3),
        method="minmax",
        percentile=99.9,
        smoothing="off",
        advance=lambda done, total: steps.append((done, total)),
    )
    total = 3 + len(quantizer.linears)
    assert steps == [(index, total) for index in range(1, total + 1)]
    weights = [read_weight(quantizer._initializers, linear) for linear in quantizer.linears]
    assert all(weight.dtype == np.float32 for weight in weights)


def test_the_source_graph_is_left_alone(export: Any, tmp_path: Path) -> None:
    model = read_graph(export("embed").path)
    before = model.SerializeToString()
    quantizer = Quantizer(model)
    quantizer.calibrate(batches(1), method="minmax", percentile=99.9, smoothing="auto")
    quantizer.assemble(everywhere(quantizer, "int8"))
    assert model.SerializeToString() == before
