"""Causal LM graphs answer what transformers answers, over prefill and decoding, whatever the family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_decoders import DECODERS, POSITIONS, VOCABULARY, Reference, Runner, save_decoder

from build_engines.errors import ArtifactError, ExportError
from build_engines.export import layer_graph, open_decoder, write_decoder
from build_engines.graphs import fix_dimension

Made = Callable[[str], tuple[Path, Reference]]
LENGTHS, CHUNK, STEPS, CAPACITY = (20, 13, 1), 8, 64, 96


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`tiny(name)`: a checkpoint folder, not to be written to, and its reference."""
    made: dict[str, tuple[Path, Reference]] = {}

    def make(name: str) -> tuple[Path, Reference]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "checkpoint"
            made[name] = folder, save_decoder(folder, name)
        return made[name]

    return make


def answers(runner: Runner, ids: Any, lengths: tuple[int, ...] = LENGTHS, steps: int = STEPS) -> Any:
    """Prefill rows of different lengths in padded chunks, then decode them together.

    Returns:
        Logits [rows, 1 + steps, vocabulary]: after each row's prompt, then after each further token.
    """
    rows = len(lengths)
    after_prompt = np.zeros((rows, VOCABULARY), np.float32)
    for start in range(0, max(lengths), CHUNK):
        past = np.minimum(start, lengths)
        counts = np.clip(np.array(lengths) - start, 0, CHUNK)
        chunk = np.full((rows, CHUNK), 7)  # what pads must not matter
        for row, count in enumerate(counts):
            chunk[row, :count] = ids[row, start : start + count]
        logits = runner.step(chunk, past, np.maximum(counts - 1, 0)[:, None])[:, 0]
        after_prompt[counts > 0] = logits[counts > 0]
    found = [after_prompt]
    for step in range(steps):
        past = np.array(lengths) + step
        found.append(runner.step(ids[np.arange(rows), past][:, None], past, np.zeros((rows, 1)))[:, 0])
    return np.stack(found, axis=1)


def tokens() -> Any:
    return np.random.default_rng(0).integers(3, VOCABULARY, (len(LENGTHS), CAPACITY))


def expected(reference: Reference, ids: Any) -> Any:
    return np.stack(
        [
            reference(row[: length + STEPS])[length - 1 : length + STEPS]
            for row, length in zip(ids, LENGTHS, strict=True)
        ]
    )


@pytest.mark.parametrize("name", [*DECODERS, "exaone"])
def test_logits_equal_transformers(tiny: Made, tmp_path: Path, name: str) -> None:
    folder, reference = tiny(name)
    write_decoder(open_decoder(folder), tmp_path / "model.onnx", precision="fp32")
    ids = tokens()
    wanted = expected(reference, ids)
    found = answers(Runner(tmp_path / "model.onnx", len(LENGTHS), CAPACITY), ids)
    assert np.abs(wanted).max() > 1  # a model that answers nothing would agree with anything
    assert np.abs(found - wanted).max() < 2e-5


def test_logits_of_several_positions_and_none_beyond_them(tiny: Made, tmp_path: Path) -> None:
    folder, reference = tiny("llama")
    write_decoder(open_decoder(folder), tmp_path / "model.onnx", precision="fp32")
    ids = tokens()[:1, :12]
    logits = Runner(tmp_path / "model.onnx", 1, 16).step(ids, [0], [[11, 0, 5]])
    assert logits.shape == (1, 3, VOCABULARY)
    np.testing.assert_allclose(logits[0], reference(ids[0])[[11, 0, 5]], atol=2e-5)


def test_padding_may_lie_beyond_the_last_position(tiny: Made, tmp_path: Path) -> None:
    folder, reference = tiny("llama")
    write_decoder(open_decoder(folder), tmp_path / "model.onnx", precision="fp32")
    ids = np.random.default_rng(1).integers(3, VOCABULARY, POSITIONS)
    runner = Runner(tmp_path / "model.onnx", 1, POSITIONS + CHUNK)
    runner.step(ids[None, :-2], [0], [[0]])
    chunk = np.concatenate([ids[-2:], np.full(CHUNK - 2, 7)])
    logits = runner.step(chunk[None], [POSITIONS - 2], [[0, 1]])
    np.testing.assert_allclose(logits[0], reference(ids)[-2:], atol=2e-5)


@pytest.mark.parametrize("name", ["llama3-rope", "linear-rope", "gemma3"])
def test_rope_settings_in_the_spelling_before_transformers_5(tiny: Made, tmp_path: Path, name: str) -> None:
    folder, _ = tiny(name)
    config = json.loads((folder / "config.json").read_text())
    old = tmp_path / "old"
    old.mkdir()
    for file in folder.glob("*.safetensors*"):
        (old / file.name).symlink_to(file)
    parameters = config.pop("rope_parameters")
    if name == "gemma3":
        config["rope_theta"] = parameters["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = 6
        del config["layer_types"]
    else:
        config["rope_theta"] = parameters.pop("rope_theta")
        # Older still: "type".
        config["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    (old / "config.json").write_text(json.dumps(config))
    assert open_decoder(old).architecture == open_decoder(folder).architecture


@pytest.mark.parametrize("name", ["llama-biases-tied", "exaone4", "gemma3"])
def test_one_layer_graph_serves_every_layer_of_its_kind(tiny: Made, name: str) -> None:
    import onnxruntime

    folder, reference = tiny(name)
    decoder = open_decoder(folder)
    architecture = decoder.architecture
    sessions = {
        kind: onnxruntime.InferenceSession(layer_graph(architecture, architecture.kinds.index(kind)))
        for kind in set(architecture.kinds)
    }
    ids = tokens()[:2, :30]
    x = decoder.embed(ids)
    for layer, kind in enumerate(architecture.kinds):
        weights = {name: weight.load() for name, weight in decoder.layer_parameters(layer).items()}
        names = [output.name for output in sessions[kind].get_outputs()]
        results = dict(zip(names, sessions[kind].run(None, {"hidden": x, **weights}), strict=True))
        up = results["ffn.up.input"] @ weights["ffn.up.weight"] + weights.get("ffn.up.bias_value", 0)
        assert results["ffn.down.input"].shape[-1] * 2 == up.shape[-1]
        x = results["hidden_out"]
    share = 1 / np.sqrt(
        np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + architecture.norm_epsilon
    )
    logits = (x * share * decoder.norm("norm")) @ decoder.weight("head")
    np.testing.assert_allclose(logits, [reference(row) for row in ids], atol=5e-5)


def test_weights_in_parts_are_the_whole(tiny: Made) -> None:
    decoder = open_decoder(tiny("qwen3")[0])
    for name in ("layers.1.attention.qkv", "layers.0.ffn.up", "head"):
        whole = decoder.weight(name)
        assert whole.shape == decoder.architecture.linear_shape(name)
        parts = [decoder.weight(name, slice(start, start + 50)) for start in range(0, whole.shape[1], 50)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    np.testing.assert_array_equal(decoder.embedding(slice(7, 9)), decoder.embedding()[7:9])


def quantize(weight: Any, axis: int) -> tuple[Any, Any]:
    scale = np.abs(weight).max(axis=axis, keepdims=True) / 127
    return np.rint(weight / scale).astype(np.int8), scale.ravel().astype(np.float32)


def test_int8_weights_multiply_as_codes_times_scale(tiny: Made, tmp_path: Path) -> None:
    """Against the FP32 graph of a checkpoint that holds the dequantized weights."""
    import onnx

    decoder = open_decoder(tiny("qwen2")[0])
    kept = "layers.0.ffn.down"
    sources: dict[str, Any] = {
        name: lambda name=name: quantize(decoder.weight(name), 0)
        for name in decoder.linears()
        if name != kept
    }
    sources["embedding"] = lambda: quantize(decoder.embedding(), 1)
    path = tmp_path / "int8" / "model.onnx"
    write_decoder(decoder, path, precision="fp32", quantized=sources)
    plain = tmp_path / "model.onnx"
    write_decoder(decoder, plain, precision="fp32")
    model = onnx.load(str(plain))
    for tensor in model.graph.initializer:
        name = tensor.name.removesuffix(".weight")
        if name in sources:
            codes, scale = sources[name]()
            dequantized = codes * (scale[:, None] if name == "embedding" else scale)
            tensor.CopyFrom(onnx.numpy_helper.from_array(dequantized.astype(np.float32), tensor.name))
    onnx.save(model, str(plain))
    ids = tokens()
    found, wanted = (answers(Runner(p, 3, CAPACITY), ids, steps=4) for p in (path, plain))
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    types = {t.name: t.data_type for t in onnx.load(str(path)).graph.initializer}
    assert types["layers.0.ffn.up.weight"] == onnx.TensorProto.INT8
    assert types[f"{kept}.weight"] == onnx.TensorProto.FLOAT


def test_scale_of_an_empty_channel_stays_above_zero(tmp_path: Path) -> None:
    """TensorRT refuses a scale of 0, and FP16 rounds small ones to it."""
    import onnx
    from tiny_decoders import write_hollow

    write_hollow(tmp_path / "checkpoint")
    empty = np.zeros((32, 64), np.int8), np.array([0.0, 1e-9, *[0.5] * 62], np.float32)
    path = tmp_path / "model.onnx"
    decoder = open_decoder(tmp_path / "checkpoint")
    write_decoder(decoder, path, precision="int8-weights", quantized={"head": lambda: empty})
    scale = next(t for t in onnx.load(str(path)).graph.initializer if t.name == "head.scale")
    values = onnx.numpy_helper.to_array(scale)
    assert values.dtype == np.float16
    assert (values > 0).all()


def test_half_precision_graph_keeps_its_caches_and_weights_in_half(tiny: Made, tmp_path: Path) -> None:
    import onnx

    folder, reference = tiny("qwen3")
    decoder = open_decoder(folder)
    path = tmp_path / "model.onnx"
    write_decoder(decoder, path, precision="fp16")
    ids = tokens()
    found = answers(Runner(path, 3, CAPACITY), ids, steps=8)
    wanted = expected(reference, ids)[:, :9]
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 0.03
    model = onnx.load(str(path), load_external_data=False)
    assert not [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    write_decoder(
        decoder,
        path,
        precision="int8-weights",
        quantized={"head": lambda: quantize(decoder.weight("head"), 0)},
    )
    model = onnx.load(str(path), load_external_data=False)
    assert [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8] == [
        "head.weight"
    ]


def test_capacity_becomes_fixed(tiny: Made, tmp_path: Path) -> None:
    import onnx

    write_decoder(open_decoder(tiny("llama")[0]), tmp_path / "model.onnx", precision="fp32")
    model = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    fix_dimension(model, "capacity", 40)
    shapes = [value.type.tensor_type.shape.dim[2] for value in model.graph.output[1:]]
    assert [(dim.dim_value, dim.dim_param) for dim in shapes] == [(40, "")] * 4
    with pytest.raises(ArtifactError, match="no dimension called 'capacity'"):
        fix_dimension(model, "capacity", 40)


@pytest.mark.parametrize("precision", ["fp16", "int8-weights"])
def test_tensorrt_fuses_attention_and_writes_the_cache_in_place(
    tiny: Made, tmp_path: Path, precision: str
) -> None:
    """Decode and prefill profiles of one graph, for a card that is not here."""
    import onnx

    trt = pytest.importorskip("tensorrt_rtx")
    decoder = open_decoder(tiny("qwen3")[0])
    sources: Any = {name: lambda name=name: quantize(decoder.weight(name), 0) for name in decoder.linears()}
    sources["embedding"] = lambda: quantize(decoder.embedding(), 1)
    path = tmp_path / "model.onnx"
    write_decoder(decoder, path, precision=precision, quantized=sources if precision != "fp16" else None)  # type: ignore[arg-type]
    model = onnx.load(str(path), load_external_data=False)
    fix_dimension(model, "capacity", 64)
    path.write_bytes(model.SerializeToString())
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(path)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    kinds = [network.get_layer(index).type.name for index in range(network.num_layers)]
    assert kinds.count("KV_CACHE_UPDATE") == 4
    assert kinds.count("ATTENTION_INPUT") == 2
    assert kinds.count("ROTARY_EMBEDDING") == 4
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM120, 0)
    for sizes in ({"batch": (1, 2, 4), "sequence": (1, 1, 1)}, {"batch": (1, 1, 2), "sequence": (1, 16, 16)}):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            ranges = [
                (size,) * 3 if size >= 0 else sizes.get(tensor.get_dimension_name(axis), (1, 1, 1))
                for axis, size in enumerate(tensor.shape)
            ]
            profile.set_shape(tensor.name, *(tuple(r[pick] for r in ranges) for pick in range(3)))
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


_WRITE_WITHIN = """
import resource, sys
from pathlib import Path
import onnx, onnx.checker, onnx.shape_inference
from build_engines.export import open_decoder, write_decoder
decoder = open_decoder(Path(sys.argv[1]))
def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
limit = private() + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # an allocation beyond it fails
write_decoder(decoder, Path(sys.argv[2]), precision="fp16")
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A 350 MB checkpoint, whose largest tensors are 67 MB as float32, passes through 80 MB."""
    from tiny_decoders import write_hollow

    size = write_hollow(tmp_path / "checkpoint", layers=5, hidden=1024, ffn=8192, vocabulary=16_384)
    assert size > 340e6
    command = [sys.executable, "-c", _WRITE_WITHIN, str(tmp_path / "checkpoint"), str(tmp_path / "m.onnx")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(80_000_000)], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "m.onnx.data").stat().st_size > 340e6


def test_value_beyond_half_precision_names_its_tensor(tiny: Made, tmp_path: Path) -> None:
    from tiny_decoders import write_hollow

    name = "model.layers.1.mlp.up_proj.weight"
    write_hollow(tmp_path / "checkpoint", bad={name: 70_000.0})
    decoder = open_decoder(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=rf"tensor {name} holds 70144, beyond FP16's largest value 65504"):
        write_decoder(decoder, tmp_path / "model.onnx", precision="fp16")
    assert not list(tmp_path.glob("*model.onnx*"))
    write_decoder(decoder, tmp_path / "model.onnx", precision="fp32")
    write_hollow(tmp_path / "nan", bad={"model.norm.weight": float("nan")})
    with pytest.raises(ExportError, match=r"norm\.weight holds NaN or infinity"):
        write_decoder(open_decoder(tmp_path / "nan"), tmp_path / "model.onnx", precision="fp32")
