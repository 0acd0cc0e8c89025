"""The lowered graph answers as the typed one does: any family, any chunks, whatever rows run beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from build_engines.export.decoder import open_decoder, write_decoder
from build_engines.targets.decoder_lowering import int8_linears, lower_decoder, widen_decoder
from triton_repo.runtime.decoder import DecoderEngine, kernel_settings
from triton_repo.runtime.session import onnx_session

VOCABULARY = 96
CAPACITY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": False},  # biases of query, key and value
    "qwen3": {},  # norms of query and key
    "exaone4": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


def checkpoint(family: str, folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | FAMILIES[family]))
    model.float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(FAMILIES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the FP32 graph of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    decoder = open_decoder(checkpoint(request.param, folder / "checkpoint"))
    write_decoder(decoder, folder / "model.onnx", precision="fp32")
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama in int8-weights, its embedding table too."""
    folder = tmp_path_factory.mktemp("int8")
    decoder = open_decoder(checkpoint("llama", folder / "checkpoint"))

    def codes(name: str) -> Any:
        weight = decoder.weight(name)
        scale = (np.abs(weight).max(axis=0) / 127).astype(np.float16).astype(np.float32)
        return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale

    def table() -> Any:
        rows, scale = decoder.embedding(), np.float16(0.01)
        return np.clip(np.rint(rows / scale), -127, 127).astype(np.int8), np.full(
            VOCABULARY, scale, np.float32
        )

    sources = {name: lambda name=name: codes(name) for name in decoder.linears()} | {"embedding": table}
    write_decoder(decoder, folder / "model.onnx", precision="int8-weights", quantized=sources)
    return folder


def engine(folder: Path, modes: dict[str, Any] | None = None, accuracy: int = 4) -> DecoderEngine:
    typed = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    model = lower_decoder(widen_decoder(typed, folder), modes or {})
    path = folder / f"lowered{len(modes or {})}.onnx"
    onnx.save(model, str(path))
    settings = kernel_settings({"block": 32, "accuracy": accuracy}, prefill=bool(modes))
    session = onnx_session(path, 1, settings=settings)
    serving = {
        "slots": 4,
        "capacity": CAPACITY,
        "chunk": 16,
        "vocabulary": VOCABULARY,
        "layers": 2,
        "kv_heads": 2,
        "head_dim": 16,
    }
    return DecoderEngine({"serving": serving}, session, session)


def typed_logits(folder: Path, tokens: list[int]) -> Any:
    """Logits after every token, by the typed graph, read in one run."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    session = onnx_session(folder / "model.onnx", 1, optimize=False)
    half = model.graph.input[3].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    cache = np.zeros((1, 2, CAPACITY, 16), np.float16 if half else np.float32)
    feeds = {value.name: cache for value in model.graph.input if value.name.startswith("past_")}
    feeds["input_ids"] = np.array([tokens], np.int64)
    feeds["past_lengths"] = np.zeros(1, np.int64)
    feeds["logit_indices"] = np.arange(len(tokens), dtype=np.int64)[None]
    return session.run(["logits"], feeds)[0][0]


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


def test_chunked_prefill_equals_one_run_of_the_typed_graph(source: Path) -> None:
    prompt = tokens(45, 0)
    expected = typed_logits(source, prompt)
    lowered = engine(source)
    np.testing.assert_allclose(lowered.logits(prompt, slot=2), expected, atol=1e-4)
    for start in range(0, 45, 16):
        last = lowered.prefill(1, prompt[start : start + 16], start)
    np.testing.assert_allclose(last, expected[-1], atol=1e-4)


def test_rows_of_different_lengths_decode_together_and_swap_places(source: Path) -> None:
    lowered = engine(source)
    texts = {0: tokens(30, 1), 2: tokens(5, 2), 3: tokens(17, 3)}
    for slot, text in texts.items():
        for start in range(0, len(text), 16):
            lowered.prefill(slot, text[start : start + 16], start)
    # Sets that are not neighbours, in orders that are not those of the rows.
    for step, slots in enumerate([[0, 2, 3], [3, 0], [0, 3], [2], [3, 2, 0], [0], [2, 0], [3, 0, 2]]):
        new = tokens(len(slots), 10 + step)
        found = lowered.decode(slots, new, [len(texts[slot]) for slot in slots])
        for row, (slot, token) in enumerate(zip(slots, new, strict=True)):
            texts[slot].append(token)
            np.testing.assert_allclose(found[row], typed_logits(source, texts[slot])[-1], atol=1e-4)


def test_every_step_answers_into_one_array(source: Path) -> None:
    lowered = engine(source)
    for slot in range(4):
        lowered.prefill(slot, tokens(3, slot), 0)
    sets = [list(range(first, last)) for last in range(1, 5) for first in range(last)]
    whole = lowered.decode(range(4), [5] * 4, [3] * 4)
    for slots in sets:
        found = lowered.decode(slots, [5] * len(slots), [3] * len(slots))
        assert np.shares_memory(found, whole), slots


def test_a_copied_prefix_continues_as_the_original_and_leaves_it_alone(source: Path) -> None:
    lowered = engine(source)
    text = tokens(24, 4)
    lowered.prefill(0, text[:16], 0)
    lowered.prefill(0, text[16:], 16)
    lowered.copy(0, 3, 20)
    other = text[:20] + tokens(3, 5)
    found = lowered.prefill(3, other[20:], 20)
    np.testing.assert_allclose(found, typed_logits(source, other)[-1], atol=1e-4)
    found = lowered.decode([0], [7], [24])[0]
    np.testing.assert_allclose(found, typed_logits(source, [*text, 7])[-1], atol=1e-4)


def test_every_attention_becomes_one_operator_that_appends_in_place(source: Path) -> None:
    lowered = engine(source)
    graph = onnx.load(str(source / "lowered0.onnx"), load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GroupQueryAttention") == 2
    assert not {"Attention", "TensorScatter", "RotaryEmbedding"} & set(kinds)
    # A step changes its own position of its own row and not one byte more.
    lowered.prefill(1, tokens(9, 6), 0)
    before = {name: array.copy() for name, array in lowered._cache.items()}
    lowered.decode([1], [5], [9])
    for name, array in lowered._cache.items():
        changed = np.argwhere((array != before[name]).any(axis=(1, 3)))
        np.testing.assert_array_equal(changed, [[1, 9]], err_msg=name)


def test_positions_beyond_the_slot_are_refused_before_a_kernel_sees_them(source: Path) -> None:
    lowered = engine(source)
    with pytest.raises(ValueError, match=f"do not fit {CAPACITY}"):
        lowered.prefill(0, [1] * 10, CAPACITY - 5)
    with pytest.raises(ValueError, match=f"do not fit {CAPACITY}"):
        lowered.decode([0], [1], [CAPACITY])


def test_beside_integer_products_each_matrix_has_zero_points_of_its_own(quantized: Path) -> None:
    """Without VNNI ONNX Runtime moves them to u8, and makes a wrong one where there is none."""
    typed = onnx.load(str(quantized / "model.onnx"), load_external_data=False)
    first, *others = int8_linears(typed)
    model = lower_decoder(widen_decoder(typed, quantized), {first: "int8"})
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {n.name: list(n.input) for n in model.graph.node if n.op_type == "DequantizeLinear"}
    assert set(found) == {f"{name}.dequantize" for name in others}
    for _, scale, zeros in found.values():
        assert not onnx.numpy_helper.to_array(values[zeros]).any()
        assert values[zeros].dims == values[scale].dims
    assert len({inputs[2] for inputs in found.values()}) == len(others)


def test_int8_weights_keep_their_values_and_float_weights_their_bytes(quantized: Path) -> None:
    prompt = tokens(40, 7)
    expected = typed_logits(quantized, prompt)
    spread = np.abs(expected).max()
    names = int8_linears(onnx.load(str(quantized / "model.onnx"), load_external_data=False))
    assert len(names) == 9
    exact = engine(quantized, accuracy=1).logits(prompt)
    assert np.abs(exact - expected).max() < 5e-3 * spread
    for modes in ({}, dict.fromkeys(names, "int8")):
        found = engine(quantized, modes).logits(prompt)
        assert 0 < np.abs(found - exact).max() < 0.1 * spread
    lowered = onnx.load(str(quantized / "lowered9.onnx"), load_external_data=False).graph
    kinds = [node.op_type for node in lowered.node]
    assert kinds.count("DynamicQuantizeMatMul") == 9
    assert "MatMul" not in kinds
    assert {
        entry.value
        for tensor in lowered.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    } == {"model.onnx.data"}
