"""Precisions behind their gates: a good graph is written, a sabotaged one never is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from build_engines.errors import DataError, GateError, QuantizeError
from build_engines.graphs import open_session, read_graph, save_graph
from build_engines.precision import Material, build_precision
from build_engines.stack import DEFAULT_GATES, Calibration, DataRef, Gates, Model
from build_engines.verify import answers, graph_encoder, load_calibration, load_evaluation
from triton_repo.runtime.tokenization import TextTokenizer

FILES = {"embed": "texts.jsonl", "classify": "texts.jsonl", "rerank": "groups.jsonl"}
CALIBRATION = {"embed": "other.jsonl", "classify": "other.jsonl", "rerank": "groups.jsonl"}
LOOSE = {
    "min_mean_cosine": 0.9,
    "min_cosine": 0.8,
    "min_spearman": 0.8,
    "min_agreement": 0.9,
    "max_accuracy_loss": 0.1,
}


def model_of(task: str, data: Path, **limits: float) -> Model:
    file, calibration = data / FILES[task], data / CALIBRATION[task]
    wanted = {**DEFAULT_GATES[task], **LOOSE, **limits}
    gates = {name: wanted[name] for name in DEFAULT_GATES[task]}
    return Model(
        name="tiny",
        task=task,  # type: ignore[arg-type]
        source="./tiny",
        max_length=64,
        calibration=Calibration(data=DataRef(spec=calibration.name, path=calibration), samples=48),
        evaluation=DataRef(spec=file.name, path=file),
        gates=Gates(**gates),
    )


def material_of(graph: Any, model: Model) -> Material:
    """The reference is the FP32 graph, whose parity with PyTorch other tests hold."""
    serving = {**graph.serving, "max_length": 64, "max_batch": 16, "overflow": "truncate"}
    tokenizer = TextTokenizer(graph.path.parent / "tokenizer.json", max_length=64)
    evaluation = load_evaluation(model, serving["labels"])
    encoder = graph_encoder(open_session(graph.path), serving, tokenizer)
    reference = answers(encoder, evaluation.rows(tokenizer))
    return Material(model, serving, tokenizer, evaluation, reference, lambda: load_calibration(model))


def quiet(phase: str, done: int, total: int) -> None:
    del phase
    assert 0 <= done <= total


def altered(source: Path, target: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    model = read_graph(source)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            values = np.asarray(change(numpy_helper.to_array(tensor)), np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, name))
            break
    else:
        raise AssertionError(f"no initializer {name}")
    save_graph(model, target)
    return target


@pytest.mark.parametrize("task", ["embed", "classify", "rerank"])
@pytest.mark.parametrize("precision", ["int8", "int8-weights", "fp16", "fp32"])
def test_a_good_graph_is_written_with_its_figures(
    export: Any, data: Path, tmp_path: Path, task: str, precision: str
) -> None:
    graph = export(task)
    out = tmp_path / "model.onnx"
    result = build_precision(graph.path, precision, out, material_of(graph, model_of(task, data)), quiet)
    assert result["gate"]["passed"] is True
    assert result["gate"]["samples"] == {"embed": 48, "classify": 48, "rerank": 12}[task]
    kinds = {tensor.data_type for tensor in onnx.load(str(out)).graph.initializer}
    assert (onnx.TensorProto.INT8 in kinds) is precision.startswith("int8")
    assert (onnx.TensorProto.FLOAT16 in kinds) is (precision != "fp32")
    if precision == "int8":
        assert result["scales"]["layers.0.ffn.up"]["error"] < 0.01


@pytest.mark.parametrize("precision", ["int8", "int8-weights", "fp16", "fp32"])
def test_a_graph_with_one_foreign_layer_fails(
    export: Any, data: Path, tmp_path: Path, precision: str
) -> None:
    """No layer that returns to float makes up for weights that are not the model's."""
    graph = export("embed")
    material = material_of(graph, model_of("embed", data))
    generator = np.random.default_rng(0)
    sabotaged = altered(
        graph.path,
        tmp_path / "sabotaged.onnx",
        "layers.1.ffn.down.weight",
        lambda weight: generator.permutation(weight.reshape(-1)).reshape(weight.shape) * 3,
    )
    out = tmp_path / "out" / "model.onnx"
    with pytest.raises(GateError, match="no engine was published") as caught:
        build_precision(sabotaged, precision, out, material, quiet)
    assert "FAILED" in str(caught.value)
    assert not out.exists()


def test_broken_scales_fail_or_are_given_back(
    export: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer's input scale is 200 times too large: the gate sees it and the fallback finds it."""
    from build_engines.quantize import quantizer

    real = quantizer.search_scales
    graph = export("embed")
    weights = read_graph(graph.path).graph.initializer
    shape = next(tuple(t.dims) for t in weights if t.name == "layers.0.attention.qkv.weight")
    calls: list[int] = []

    def broken(weight: Any, *args: Any, **kwargs: Any) -> Any:
        found = real(weight, *args, **kwargs)
        if weight.shape == shape and not calls:
            calls.append(1)
            return dataclasses.replace(found, scale=np.float32(found.scale * 200))
        return found

    monkeypatch.setattr(quantizer, "search_scales", broken)
    material = material_of(graph, model_of("embed", data, min_mean_cosine=0.995, min_cosine=0.98))
    result = build_precision(graph.path, "int8", tmp_path / "model.onnx", material, quiet)
    assert calls == [1]
    assert result["steps"][0]["passed"] is False
    assert result["returned"][0]["layer"] == "layers.0.attention.qkv"
    assert result["gate"]["passed"] is True


def test_layers_return_until_the_gate_passes(export: Any, data: Path, tmp_path: Path) -> None:
    graph = export("embed")

    def mean_cosine(result: dict[str, Any]) -> float:
        return float(next(c["value"] for c in result["gate"]["checks"] if c["name"] == "mean cosine"))

    loose = material_of(graph, model_of("embed", data))
    at_once = mean_cosine(build_precision(graph.path, "int8", tmp_path / "a.onnx", loose, quiet))
    weights = mean_cosine(build_precision(graph.path, "int8-weights", tmp_path / "b.onnx", loose, quiet))
    assert at_once < weights
    limit = (at_once + weights) / 2
    strict = material_of(graph, model_of("embed", data, min_mean_cosine=limit))
    result = build_precision(graph.path, "int8", tmp_path / "c.onnx", strict, quiet)
    assert mean_cosine(result) >= limit
    returned = {item["layer"]: item for item in result["returned"]}
    assert returned
    stored = onnx.load(str(tmp_path / "c.onnx")).graph
    quantized = {n.name.removesuffix(".input.quantize") for n in stored.node if n.op_type == "QuantizeLinear"}
    assert quantized.isdisjoint(returned)
    linears = {n.name for n in stored.node if n.op_type == "MatMul" and n.name.startswith("layers.")}
    assert quantized | set(returned) == linears
    # What each cost: INT8 weights cost nothing more, a layer in float another byte per weight.
    for item in returned.values():
        weight = next(t for t in stored.initializer if t.name == f"{item['layer']}.weight")
        elements = int(np.prod(weight.dims))
        assert item["extra_bytes"] == (elements if item["mode"] == "float" else 0)
        assert (weight.data_type == onnx.TensorProto.INT8) is (item["mode"] == "int8-weights")
    sensitivities = [item["sensitivity"] for item in result["returned"]]
    assert sensitivities == sorted(sensitivities, reverse=True)
    # Recorded are the figures of every step tried; the last one that failed is one short of what was taken.
    taken = next(step["steps_back"] for step in result["steps"] if step["passed"])
    assert next(step for step in result["steps"] if step["steps_back"] == taken - 1)["passed"] is False


def test_half_precision_that_overflows_fails(export: Any, data: Path, tmp_path: Path) -> None:
    """Activations beyond 65504: finite in FP32, and where ONNX Runtime runs an FP16 graph in float32."""
    graph = export("embed")
    loud = altered(graph.path, tmp_path / "loud.onnx", "layers.0.ffn.up.weight", lambda w: w * 1e5)
    exported = dataclasses.replace(graph, path=tmp_path / "loud.onnx")
    (tmp_path / "tokenizer.json").write_bytes((graph.path.parent / "tokenizer.json").read_bytes())
    material = material_of(exported, model_of("embed", data))
    assert np.isfinite(material.reference).all()
    with pytest.raises(GateError, match=r"NaN or infinity on \d+ of 48 calibration texts"):
        build_precision(loud, "fp16", tmp_path / "half.onnx", material, quiet)
    assert not (tmp_path / "half.onnx").exists()


@pytest.mark.parametrize("precision", ["int8", "int8-weights", "fp16"])
def test_no_calibration_data_is_an_error(export: Any, data: Path, tmp_path: Path, precision: str) -> None:
    graph = export("embed")
    model = dataclasses.replace(model_of("embed", data), calibration=Calibration())
    material = material_of(graph, model)
    with pytest.raises(DataError, match="'tiny' has no calibration data"):
        build_precision(graph.path, precision, tmp_path / "model.onnx", material, quiet)
    assert list(tmp_path.iterdir()) == []


def test_no_evaluation_data_is_an_error(data: Path) -> None:
    model = dataclasses.replace(model_of("embed", data), evaluation=None)
    with pytest.raises(DataError, match="no evaluation data") as caught:
        load_evaluation(model, None)
    assert "[models.tiny] evaluation =" in str(caught.value)


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("embed", ['{"text": "w5"}', '{"text": "w6"}'], "at least 3"),
        ("rerank", ['{"query": "w5", "passages": ["w6"], "relevance": [1]}'], "at least 2"),
    ],
)
def test_too_little_evaluation_data_is_known_before_the_work(
    data: Path, tmp_path: Path, task: str, lines: list[str], message: str
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(lines))
    model = dataclasses.replace(model_of(task, data), evaluation=DataRef(spec="few.jsonl", path=few))
    with pytest.raises(DataError, match=message) as caught:
        load_evaluation(model, None)
    assert str(few) in str(caught.value)


def test_activations_without_a_range_are_an_error(export: Any, data: Path, tmp_path: Path) -> None:
    graph = export("embed")
    material = material_of(graph, model_of("embed", data))
    broken = altered(graph.path, tmp_path / "x.onnx", "layers.0.ffn.up.weight", lambda w: w * np.inf)
    with pytest.raises(QuantizeError, match="not finite on the calibration texts"):
        build_precision(broken, "int8", tmp_path / "model.onnx", material, quiet)
