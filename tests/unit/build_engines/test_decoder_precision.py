"""Decoders behind their gate: what is judged is what is written, and damage is found and undone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_decoders import VOCABULARY, Runner, save_decoder

from build_engines import decoder_precision
from build_engines.decoder_precision import REFERENCE_FILE, DecoderMaterial, build_decoder_precision
from build_engines.decoder_reference import check_decoder_parity
from build_engines.decoder_stream import Peak
from build_engines.errors import DataError, ExportError, GateError
from build_engines.export.decoder import open_decoder
from build_engines.perplexity import Reference, engine_nll, judge
from build_engines.stack import Gates, Model

Make = Callable[..., DecoderMaterial]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            save_decoder(made[name], name)
        return made[name]

    return make


@pytest.fixture(scope="module")
def rows(checkpoints: Callable[[str], Path]) -> list[Any]:
    """Texts that the llama wrote itself: on others a random model predicts no better whole than damaged."""
    return written_by(checkpoints("llama"))


def written_by(folder: Path) -> list[Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(1)
    start = torch.randint(3, VOCABULARY, (40, 1))
    ids = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        min_new_tokens=27,
        max_new_tokens=27,
        top_k=0,
        pad_token_id=0,
    )
    found = [row.astype(np.int64) for row in ids.numpy()]
    return [*found[:36], *(row[:9] for row in found[36:39]), found[39][:1]]


def material(rows: list[Any], *, reference: Reference | None = None, **settings: Any) -> DecoderMaterial:
    limit = settings.pop("limit", 0.01)
    model = Model(
        name="tiny", task="generate", source="./tiny", gates=Gates(max_perplexity_increase=limit), **settings
    )
    return DecoderMaterial(model, rows[:12], rows[12:], reference)


def quiet(phase: str, done: int, total: int) -> None:
    del phase
    assert 0 <= done <= total


def values(result: dict[str, Any]) -> dict[str, float]:
    return {check["name"]: check["value"] for check in result["gate"]["checks"]}


def types(path: Path) -> dict[str, int]:
    model = onnx.load(str(path), load_external_data=False)
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


class Written:
    """A written graph in the shape that `engine_nll` asks for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def logits(self, tokens: Any) -> Any:
        runner = Runner(self.path, 1, 64)
        (found,) = runner.step([list(tokens)], [0], [list(range(len(tokens)))])
        return found


def altered(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with other weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    target.mkdir()
    shutil.copyfile(folder / "config.json", target / "config.json")
    weights: dict[str, Any] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= load_file(shard)
    change(weights)
    save_file(weights, target / "model.safetensors")
    return target


# Families whose layers differ: biases and a tied head, norms on heads, after the blocks, softcaps, windows.
@pytest.mark.parametrize(
    "family", ["llama-biases-tied", "mistral-window", "qwen3", "exaone4", "gemma2", "gemma3"]
)
def test_the_streamed_decoder_is_the_checkpoint(checkpoints: Callable[[str], Path], family: str) -> None:
    decoder = open_decoder(checkpoints(family))
    rng = np.random.default_rng(0)
    found = check_decoder_parity(decoder, [rng.integers(0, VOCABULARY, n) for n in (30, 30, 12, 2)])
    assert found is not None
    assert found < 1e-4


def test_a_family_that_transformers_does_not_know_is_not_compared(tmp_path: Path) -> None:
    """EXAONE 3.5 runs by code of its checkpoint; without leave for that there is nothing to compare with."""
    save_decoder(tmp_path / "exaone", "exaone")
    decoder = open_decoder(tmp_path / "exaone")
    assert check_decoder_parity(decoder, [np.arange(20)]) is None
    with pytest.raises(ExportError, match="Transformers cannot load"):
        check_decoder_parity(decoder, [np.arange(20)], allow_remote_code=True)


def test_another_model_is_not_the_checkpoint(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from build_engines import decoder_reference

    def louder(weights: dict[str, Any]) -> None:
        weights["model.layers.1.self_attn.o_proj.weight"] *= 1.05

    other = open_decoder(altered(checkpoints("llama"), tmp_path / "other", louder))
    right = open_decoder(checkpoints("llama"))
    load = decoder_reference._load
    monkeypatch.setattr(decoder_reference, "_load", lambda decoder, remote: load(right, remote))
    with pytest.raises(ExportError, match="differs from Transformers by"):
        check_decoder_parity(other, [np.arange(20)])


@pytest.mark.parametrize(
    ("family", "precision", "settings"),
    [
        ("llama", "int8-weights", {}),
        ("llama", "fp16", {}),
        ("llama", "fp32", {}),
        # A scaled embedding, norms with an offset, softcaps.
        ("gemma2", "int8-weights", {"embedding": "int8"}),
        ("gemma2", "fp16", {}),
    ],
)
def test_what_is_judged_is_what_is_written(
    checkpoints: Callable[[str], Path],
    rows: list[Any],
    tmp_path: Path,
    family: str,
    precision: str,
    settings: dict[str, str],
) -> None:
    decoder, out = open_decoder(checkpoints(family)), tmp_path / "model.onnx"
    texts = material(rows, limit=1.0, **settings)
    result = build_decoder_precision(decoder, precision, out, texts, quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
        REFERENCE_FILE,
    ]
    assert result["gate"]["passed"] is True
    assert result["gate"]["samples"] == 24 * 27 + 3 * 8
    reference = Reference.load(tmp_path / REFERENCE_FILE)
    found = engine_nll(Written(out), reference.rows)
    if precision == "fp32":
        assert np.abs(found.losses - reference.scores.losses).max() < 1e-4
        return
    # FP16 within the layers is the graph's alone, INT8 is in both.
    served = values({"gate": judge(reference.scores, found, Gates()).as_dict()})
    assert served["perplexity increase"] == pytest.approx(values(result)["perplexity increase"], abs=3e-4)
    assert served["next-token agreement"] == pytest.approx(values(result)["next-token agreement"], abs=0.01)
    assert (values(result)["next-token agreement"] < 1) or precision == "fp16"
    assert 0 < result["largest_activation"]["value"] < 65504
    if precision == "int8-weights":
        assert result["returned"] == []
        assert {f"layers.{i}.{part}" for i in (0, 1) for part in ("attention.qkv", "ffn.down")} < set(
            result["clipping"]
        )


def test_the_reference_may_be_given(
    checkpoints: Callable[[str], Path], rows: list[Any], tmp_path: Path
) -> None:
    decoder = open_decoder(checkpoints("llama"))
    first = build_decoder_precision(decoder, "fp16", tmp_path / "a" / "m.onnx", material(rows), quiet)
    reference = Reference.load(tmp_path / "a" / REFERENCE_FILE)
    given = material(rows[:1], reference=reference)
    second = build_decoder_precision(decoder, "fp16", tmp_path / "b" / "m.onnx", given, quiet)
    assert second == first
    assert (tmp_path / "b" / REFERENCE_FILE).read_bytes() == (tmp_path / "a" / REFERENCE_FILE).read_bytes()


@pytest.mark.parametrize(
    ("settings", "head", "embedding"),
    [
        ({}, "INT8", "FLOAT16"),
        ({"head": "fp16"}, "FLOAT16", "FLOAT16"),
        ({"embedding": "int8"}, "INT8", "INT8"),
    ],
)
def test_head_and_embedding_as_the_stack_file_says(
    checkpoints: Callable[[str], Path],
    rows: list[Any],
    tmp_path: Path,
    settings: dict[str, str],
    head: str,
    embedding: str,
) -> None:
    decoder, out = open_decoder(checkpoints("llama-biases-tied")), tmp_path / "model.onnx"
    build_decoder_precision(decoder, "int8-weights", out, material(rows, **settings), quiet)
    found = types(out)
    assert found["head.weight"] == getattr(onnx.TensorProto, head)
    assert found["embedding.weight"] == getattr(onnx.TensorProto, embedding)
    assert found["layers.1.ffn.up.weight"] == onnx.TensorProto.INT8


def destroyed_by_int8(weights: dict[str, Any]) -> None:
    """Two inner channels of an FFN that cancel exactly, so large that INT8 keeps nothing else."""
    for part in ("gate_proj", "up_proj"):
        weight = weights[f"model.layers.1.mlp.{part}.weight"]
        weight[7] = weight[3]
    down = weights["model.layers.1.mlp.down_proj.weight"]
    down[:, 3] = 400.0
    down[:, 7] = -400.0


def head_destroyed_by_int8(weights: dict[str, Any]) -> None:
    """One input of the head is a 300th of what it was, and its weights 300 times as large."""
    weights["model.norm.weight"][5] /= 300
    weights["lm_head.weight"][:, 5] *= 300


def test_a_head_that_int8_destroys_returns_to_fp16(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = altered(checkpoints("llama"), tmp_path / "sabotaged", head_destroyed_by_int8)
    out = tmp_path / "out" / "model.onnx"
    texts = material(written_by(folder))
    result = build_decoder_precision(open_decoder(folder), "int8-weights", out, texts, quiet)
    assert [item["layer"] for item in result["returned"]] == ["head"]
    assert types(out)["head.weight"] == onnx.TensorProto.FLOAT16


def test_both_return_where_both_are_destroyed(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """One step back is judged with the other Linear still destroyed."""

    def both(weights: dict[str, Any]) -> None:
        destroyed_by_int8(weights)
        head_destroyed_by_int8(weights)

    folder = altered(checkpoints("llama"), tmp_path / "sabotaged", both)
    texts = material(written_by(folder))
    result = build_decoder_precision(open_decoder(folder), "int8-weights", tmp_path / "m.onnx", texts, quiet)
    assert [item["layer"] for item in result["returned"]] == ["layers.1.ffn.down", "head"]
    assert [step["passed"] for step in result["steps"]] == [False, False, True]


def test_weights_that_fp16_rounds_coarsely_show(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """What leaves FP16's normal range and comes back in the next Linear: the same function in FP32."""

    def small_and_large(weights: dict[str, Any]) -> None:
        for layer in (0, 1):
            base = f"model.layers.{layer}"
            for first, second in (("self_attn.v", "self_attn.o"), ("mlp.up", "mlp.down")):
                weights[f"{base}.{first}_proj.weight"] *= 1e-5
                weights[f"{base}.{second}_proj.weight"] /= 1e-5

    folder = altered(checkpoints("llama"), tmp_path / "coarse", small_and_large)
    out = tmp_path / "out" / "model.onnx"
    texts = material(written_by(folder), limit=9.0)
    found = values(build_decoder_precision(open_decoder(folder), "fp16", out, texts, quiet))
    assert abs(found["perplexity increase"]) > 1e-4


def test_weights_beyond_fp16_are_named(
    checkpoints: Callable[[str], Path], rows: list[Any], tmp_path: Path
) -> None:
    def large(weights: dict[str, Any]) -> None:
        weights["model.layers.0.input_layernorm.weight"] *= 1e5

    folder = altered(checkpoints("llama"), tmp_path / "large", large)
    out = tmp_path / "out" / "model.onnx"
    with pytest.raises(ExportError, match=r"layers\.0\.attention\.norm holds .* beyond FP16"):
        build_decoder_precision(open_decoder(folder), "int8-weights", out, material(rows), quiet)


def test_a_linear_that_int8_destroys_returns_to_fp16(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = altered(checkpoints("llama"), tmp_path / "sabotaged", destroyed_by_int8)
    decoder, out = open_decoder(folder), tmp_path / "out" / "model.onnx"
    result = build_decoder_precision(decoder, "int8-weights", out, material(written_by(folder)), quiet)
    assert [item["layer"] for item in result["returned"]] == ["layers.1.ffn.down"]
    assert result["returned"][0]["extra_bytes"] == 80 * 48
    assert [step["passed"] for step in result["steps"]] == [False, True]
    assert result["gate"] == {key: result["steps"][1][key] for key in ("passed", "samples", "checks")}
    stored = types(out)
    assert stored.pop("layers.1.ffn.down.weight") == onnx.TensorProto.FLOAT16
    others = [
        kind for name, kind in stored.items() if name.endswith(("qkv.weight", "up.weight", "down.weight"))
    ]
    assert set(others) == {onnx.TensorProto.INT8}
    # And the written graph is as good as the gate says.
    reference = Reference.load(out.parent / REFERENCE_FILE)
    assert judge(reference.scores, engine_nll(Written(out), reference.rows), Gates()).checks[0].value < 0.01


def test_sensitivity_names_the_culprit_among_all(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is the embedding, the head or a first layer; everything else hardly matters."""
    seen: list[dict[str, float]] = []
    measure = decoder_precision.measure_sensitivity

    def spy(*arguments: Any) -> dict[str, float]:
        seen.append(measure(*arguments))
        return seen[-1]

    monkeypatch.setattr(decoder_precision, "measure_sensitivity", spy)
    folder = altered(checkpoints("llama"), tmp_path / "sabotaged", destroyed_by_int8)
    texts = material(written_by(folder), embedding="int8")
    build_decoder_precision(open_decoder(folder), "int8-weights", tmp_path / "out" / "m.onnx", texts, quiet)
    (found,) = seen
    assert set(found) == {*open_decoder(folder).linears(), "embedding"}
    assert all(0 <= value < 1 for value in found.values())
    ordered = sorted(found, key=lambda name: -found[name])
    assert ordered[0] == "layers.1.ffn.down"
    assert found[ordered[0]] > 20 * found[ordered[1]]
    assert min(found["embedding"], found["head"], found["layers.0.attention.qkv"]) > 1e-7


def test_an_impossible_gate_publishes_nothing(
    checkpoints: Callable[[str], Path], rows: list[Any], tmp_path: Path
) -> None:
    decoder = open_decoder(checkpoints("llama"))
    with pytest.raises(GateError, match="no engine was published") as caught:
        build_decoder_precision(
            decoder, "int8-weights", tmp_path / "model.onnx", material(rows, limit=-0.5), quiet
        )
    assert "8 steps back" in str(caught.value)  # of nine: the last Linear stays
    with pytest.raises(GateError, match="the fp16 graph fails its accuracy gate"):
        build_decoder_precision(decoder, "fp16", tmp_path / "model.onnx", material(rows, limit=-0.5), quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["int8-weights", "fp16"])
def test_activations_beyond_fp16_are_named(
    checkpoints: Callable[[str], Path], rows: list[Any], tmp_path: Path, precision: str
) -> None:
    def loud(weights: dict[str, Any]) -> None:
        weights["model.layers.1.mlp.gate_proj.weight"] *= 400
        weights["model.layers.1.mlp.up_proj.weight"] *= 400
        weights["model.layers.1.mlp.down_proj.weight"] /= 400 * 400

    folder = altered(checkpoints("llama"), tmp_path / "loud", loud)
    out = tmp_path / "out" / "model.onnx"
    with pytest.raises(GateError, match=r"reaches [\d,]+ at layers\.1\.ffn\.gated .* FP16 ends at 65,504"):
        build_decoder_precision(open_decoder(folder), precision, out, material(rows), quiet)
    assert not out.exists()
    assert list(out.parent.iterdir()) == []
    build_decoder_precision(open_decoder(folder), "fp32", out, material(rows), quiet)


def test_what_is_no_number_stays_the_largest_activation() -> None:
    peak = Peak()
    for value, place in ((3.0, "a"), (float("nan"), "b"), (5.0, "c"), (float("nan"), "d")):
        peak.see(value, place)
    assert (peak.place, peak.fits) == ("b", False)


def test_no_text_is_an_error(checkpoints: Callable[[str], Path], rows: list[Any], tmp_path: Path) -> None:
    decoder, out = open_decoder(checkpoints("llama")), tmp_path / "model.onnx"
    model = material(rows).model
    with pytest.raises(DataError, match="'tiny' has no calibration text"):
        build_decoder_precision(decoder, "int8-weights", out, DecoderMaterial(model, [], rows), quiet)
    with pytest.raises(DataError, match="'tiny' has no evaluation text of at least two tokens"):
        build_decoder_precision(decoder, "fp16", out, DecoderMaterial(model, rows, rows[-1:]), quiet)
    assert list(tmp_path.iterdir()) == []


_MEASURE = """
import sys, threading, time
import numpy as np, onnxruntime
from pathlib import Path
from build_engines.decoder_precision import DecoderMaterial, build_decoder_precision
from build_engines.export.decoder import open_decoder
from build_engines.stack import Gates, Model

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

seen = [anonymous()]
def progress(phase, done, total):
    seen.append(anonymous())
rows = list(np.random.default_rng(0).integers(0, 64, (8, 16)))
model = Model(name="m", task="generate", source=".", gates=Gates(max_perplexity_increase=1e9))
texts = DecoderMaterial(model, rows, rows)
build_decoder_precision(open_decoder(Path(sys.argv[1])), "int8-weights", Path(sys.argv[2]), texts, progress)
print(max(seen) - seen[0])
"""


def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """16 layers of 12.6 MB each: the pass holds one at a time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    arguments = [sys.executable, "-c", _MEASURE, tmp_path / "model", tmp_path / "out" / "m.onnx"]
    found = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 120
