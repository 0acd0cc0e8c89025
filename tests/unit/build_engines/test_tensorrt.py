"""The TensorRT targets with the real builder: engines for cards that are not here, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_models import batch, save_tiny, with_small_scales

from build_engines.errors import ArtifactError, CompileError
from build_engines.export import export_encoder, to_fp16
from build_engines.graphs import read_graph, save_graph
from build_engines.plan import Profile
from build_engines.quantize import Quantizer
from build_engines.targets.engine_file import check_engine, read_header
from build_engines.targets.tensorrt import TensorRTTarget

pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")

PROFILE = Profile(batch=(1, 4, 8), sequence=(1, 32, 64))
CARDS = ("7.5", "8.6", "8.9", "12.0")


def quiet(phase: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def quantized(model: Any) -> Any:
    """Static INT8 in the form the quantizer writes: Q and DQ before every Linear, a DQ on its INT8 weight."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        stored = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if stored is not None:
            base, values = node.name, numpy_helper.to_array(stored)
            scale = np.abs(values).max(0) / 127
            stored.CopyFrom(numpy_helper.from_array(np.round(values / scale).astype(np.int8), stored.name))
            for name, array in {
                f"{base}.scale": scale.astype(np.float32),
                f"{base}.x.scale": np.float32(0.05),
                f"{base}.x.zero": np.int8(0),
            }.items():
                model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
            steps = [f"{base}.x.scale", f"{base}.x.zero"]
            nodes += [
                helper.make_node("QuantizeLinear", [node.input[0], *steps], [f"{base}.q"], name=f"{base}.q"),
                helper.make_node(
                    "DequantizeLinear", [f"{base}.q", *steps], [f"{base}.dq"], name=f"{base}.dq"
                ),
                helper.make_node(
                    "DequantizeLinear",
                    [stored.name, f"{base}.scale"],
                    [f"{base}.w"],
                    name=f"{base}.w",
                    axis=1,
                ),
            ]
            node.input[0], node.input[1] = f"{base}.dq", f"{base}.w"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP32 graph of a small embedder with heads of 32."""
    folder = tmp_path_factory.mktemp("exported")
    save_tiny(folder / "wide", "bert", "embed", hidden_size=128)
    return export_encoder(folder / "wide", "embed", folder / "out").path


@pytest.fixture(scope="session")
def graphs(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small embedder with heads of 32 as fp16 and int8, and one with heads of 8: no kernel fuses those.

    "usual-*" and "small-*" are the quantizer's own, the latter of tiny weights and activations.
    """
    folder = tmp_path_factory.mktemp("graphs")
    quantizers = {"usual": read_graph(exported), "small": with_small_scales(read_graph(exported))}
    made = {"fp16": read_graph(exported), "int8": quantized(read_graph(exported))}
    for kind, model in quantizers.items():
        quantizer = Quantizer(model)
        calibration = [batch((8, 24), 0, False)]
        quantizer.calibrate(calibration, method="minmax", percentile=99.9, smoothing="auto")
        for mode in ("int8", "int8-weights"):
            modes: dict[str, Any] = dict.fromkeys((linear.name for linear in quantizer.linears), mode)
            made[f"{kind}-{mode}"] = quantizer.assemble(modes)
    save_tiny(folder / "thin", "bert", "embed")
    made["narrow"] = read_graph(export_encoder(folder / "thin", "embed", folder / "thin" / "out").path)
    paths = {name: folder / f"{name}.onnx" for name in made}
    for name, model in made.items():
        save_graph(to_fp16(model), paths[name])
    return paths


def compile_to(out: Path, graph: Path, card: str | None = "12.0", progress: Any = quiet) -> dict[str, Any]:
    target = TensorRTTarget("tensorrt-rtx")
    return target.compile(graph, out, profile=PROFILE, compute_capability=card, progress=progress)


@pytest.fixture(scope="session")
def engine(graphs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine")
    compile_to(out, graphs["fp16"])
    return out / "engine.trt"


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_engines_compile_for_every_card_without_a_gpu(
    precision: str, card: str, graphs: dict[str, Path], tmp_path: Path
) -> None:
    result = compile_to(tmp_path, graphs[precision], card)
    header = read_header(tmp_path / "engine.trt")
    assert header.compute_capabilities == (card,)
    assert header.version == result["versions"]["tensorrt-rtx"]
    assert [path.name for path in tmp_path.iterdir()] == ["engine.trt"]
    assert result["attention"] == "fused"
    assert result["warnings"] == []
    assert result["layers"]["ATTENTION"] == 3
    assert ("QUANTIZE" in result["layers"]) == (precision == "int8")


@pytest.mark.parametrize("precision", ["int8", "int8-weights"])
def test_tiny_weights_and_activations_cost_no_casts_and_no_memory(
    precision: str, graphs: dict[str, Path], tmp_path: Path
) -> None:
    """Scales in float would compile, but with casts, and with more activations than are planned."""
    tensors = read_graph(graphs[f"small-{precision}"]).graph.initializer
    scales = [tensor for tensor in tensors if ".scale" in tensor.name]
    assert min(numpy_helper.to_array(tensor).min() for tensor in scales) < np.finfo(np.float16).tiny
    assert {tensor.data_type for tensor in scales} == {TensorProto.FLOAT16}
    found, usual = (compile_to(tmp_path, graphs[f"{kind}-{precision}"]) for kind in ("small", "usual"))
    assert found["layers"]["CAST"] == usual["layers"]["CAST"]
    assert found["activation_bytes"] == usual["activation_bytes"]


@pytest.mark.parametrize("card", ["7.5", "12.0"])
@pytest.mark.parametrize("small", ["x.scale", "scale"])
def test_a_scale_that_half_precision_cannot_hold_compiles(
    small: str, card: str, exported: Path, tmp_path: Path
) -> None:
    """The compiler refuses an INT8 product whose operands have scales of two types."""
    model = quantized(read_graph(exported))
    name = f"layers.0.ffn.down.{small}"
    for tensor in model.graph.initializer:
        if tensor.name == name:
            values = np.minimum(numpy_helper.to_array(tensor), np.float32(1.23e-6))
            tensor.CopyFrom(numpy_helper.from_array(values, name))
    model = to_fp16(model)
    assert f"{name}.fp32" in {tensor.name for tensor in model.graph.initializer}
    save_graph(model, tmp_path / "model.onnx")
    compile_to(tmp_path, tmp_path / "model.onnx", card)
    assert read_header(tmp_path / "engine.trt").compute_capabilities == (card,)


def test_portable_engines_are_for_all_cards_from_8_0_on(graphs: dict[str, Path], tmp_path: Path) -> None:
    """The library's default set, whatever the stack's card; at the size and activations of one card's."""
    single = compile_to(tmp_path, graphs["int8"], "12.0")
    size = read_header(tmp_path / "engine.trt").size
    target = TensorRTTarget("tensorrt-rtx", portable=True)
    found = target.compile(
        graphs["int8"], tmp_path, profile=PROFILE, compute_capability="9.0", progress=quiet
    )
    header = read_header(tmp_path / "engine.trt")
    assert header.compute_capabilities[:4] == ("8.0", "8.6", "8.9", "12.0")
    assert abs(header.size - size) < 0.02 * size
    assert found["activation_bytes"] == single["activation_bytes"]


def test_the_builder_states_its_memory(graphs: dict[str, Path], tmp_path: Path) -> None:
    """Weights are the graph's; activations grow with the profile, so the plan can be held to them."""
    small = compile_to(tmp_path, graphs["fp16"])
    weights = sum(len(tensor.raw_data) for tensor in read_graph(graphs["fp16"]).graph.initializer)
    assert small["weights_bytes"] == pytest.approx(weights, rel=0.05)
    target, wide = TensorRTTarget("tensorrt-rtx"), Profile(batch=(1, 8, 64), sequence=(1, 64, 200))
    large = target.compile(
        graphs["fp16"],
        tmp_path,
        profile=wide,
        compute_capability="12.0",
        progress=quiet,
    )
    assert 0 < small["activation_bytes"] < large["activation_bytes"]


def test_an_engine_takes_no_memory_of_its_own(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TensorRT-RTX allocated at run time no plan would count, and no CUDA graph could record."""
    import tensorrt_rtx as trt

    made: list[Any] = []
    create = trt.Builder.create_builder_config

    def kept(builder: Any) -> Any:
        made.append(create(builder))
        return made[-1]

    monkeypatch.setattr(trt.Builder, "create_builder_config", kept)
    compile_to(tmp_path, graphs["fp16"])
    assert made[0].get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_progress_is_the_builders_own(graphs: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    compile_to(tmp_path, graphs["fp16"], progress=lambda *step: seen.append(step))
    totals = {phase: total for phase, _, total in seen}
    assert "Building engine" in totals
    assert max(totals.values()) > 20
    for phase, total in totals.items():
        done = [step for name, step, _ in seen if name == phase]
        assert done[0] == 0
        assert done[-1] == total
    assert all(0 <= done <= total for _, done, total in seen)


def test_an_interrupt_during_the_build_surfaces_and_leaves_nothing(
    graphs: dict[str, Path], tmp_path: Path
) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_to(tmp_path, graphs["fp16"], progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_leaves_nothing(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from build_engines.targets import tensorrt

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    writer = tensorrt._writer
    monkeypatch.setattr(tensorrt, "_writer", lambda trt, file: writer(trt, Full()))
    with pytest.raises(CompileError, match="No space left on device"):
        compile_to(tmp_path, graphs["fp16"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("foreseen", [True, False])
def test_attention_without_a_fused_kernel_compiles_and_says_so(
    foreseen: bool, graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known cases are marked at once; any other is met by a second attempt."""
    from build_engines.targets import tensorrt

    if not foreseen:
        allow = tensorrt._allow_decomposition
        monkeypatch.setattr(tensorrt, "_allow_decomposition", lambda *args: allow(*args) if args[2] else 0)
    result = compile_to(tmp_path, graphs["narrow"])
    assert result["attention"] == "decomposed"
    assert any("no fused kernel" in warning for warning in result["warnings"])
    assert read_header(tmp_path / "engine.trt").compute_capabilities == ("12.0",)


def test_an_unknown_operator_is_named_with_its_node(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    node = helper.make_node("Bernoulli", ["x"], ["y"], name="dice")
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CompileError, match=r"dice \(Bernoulli\)"):
        compile_to(tmp_path / "out", tmp_path / "in.onnx")


def test_cards_that_cannot_be_compiled_for_are_refused(graphs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"does not compile for compute capability 9\.0\n.*offers 7\.5"):
        compile_to(tmp_path, graphs["fp16"], "9.0")


def test_full_tensorrt_elsewhere_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from build_engines.targets import tensorrt

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(CompileError, match=r"(?s)needs the Python module tensorrt.*pip install tensorrt"):
        TensorRTTarget("tensorrt").check()
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(tensorrt, "gpu_compute_capability", lambda: None)
    with pytest.raises(CompileError, match="this machine has none"):
        TensorRTTarget("tensorrt").check()


def test_full_tensorrt_compiles_only_for_the_gpu_that_is_here(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from build_engines.targets import tensorrt

    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(tensorrt, "gpu_compute_capability", lambda: "8.9")
    with pytest.raises(CompileError, match=r"capability 12\.0, the GPU here has 8\.9"):
        TensorRTTarget("tensorrt").compile(
            graphs["fp16"], tmp_path, profile=PROFILE, compute_capability="12.0", progress=quiet
        )


# Engines of others


def test_an_engine_for_this_card_and_version_passes(engine: Path) -> None:
    assert check_engine(engine, version=read_header(engine).version, compute_capability="12.0").size > 0


def test_an_engine_for_another_card_is_refused(engine: Path) -> None:
    with pytest.raises(ArtifactError, match=r"compiled for compute capability 12\.0, this card has 8\.9"):
        check_engine(engine, version=None, compute_capability="8.9")


def test_an_engine_of_another_version_is_refused(engine: Path) -> None:
    with pytest.raises(ArtifactError, match=r"compiled by TensorRT-RTX .*, 1\.2\.3\.4 is installed"):
        check_engine(engine, version="1.2.3.4", compute_capability=None)


@pytest.mark.parametrize("kept", [0, 20, 5000, -1])
def test_a_truncated_engine_is_refused(kept: int, engine: Path, tmp_path: Path) -> None:
    short = tmp_path / "engine.trt"
    short.write_bytes(engine.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match="truncated"):
        read_header(short)


def test_a_file_that_is_no_engine_is_refused(engine: Path, tmp_path: Path) -> None:
    other = tmp_path / "engine.trt"
    other.write_bytes(b"PK\x03\x04" + engine.read_bytes()[4:])
    with pytest.raises(ArtifactError, match="no TensorRT-RTX engine"):
        read_header(other)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_header(tmp_path / "missing.trt")
