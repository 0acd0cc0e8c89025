"""The plan of LLMs: what they take, what it chooses where the stack file is silent, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engines.cards import CARDS, MIB, custom_card
from build_engines.decoder_memory import (
    cache_bytes_per_token,
    decoder_activation_bytes,
    decoder_engine_memory,
    decoder_tensor_bytes,
)
from build_engines.errors import PlanError
from build_engines.plan import plan_shapes, plan_stack, render_plan, require_fit, resolve_open
from build_engines.profiles import DecoderProfile, decoder_profile
from build_engines.shapes import read_decoder_shape
from build_engines.stack import DecoderShape, Model, ModelShape, Stack, load_stack

REPOSITORY = Path(__file__).parents[3]
EEVE = DecoderShape(
    family="llama",
    layers=48,
    hidden=4096,
    ffn=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=40960,
    positions=4096,
)
BERT = ModelShape(
    family="bert",
    layers=12,
    hidden=768,
    ffn=3072,
    heads=12,
    vocabulary=32000,
    embedding=768,
    positions=512,
    token_types=2,
    labels=2,
)


def _llm(name: str = "llm", **changes: Any) -> Model:
    values = {
        "name": name,
        "task": "generate",
        "source": "owner/name",
        "shape": EEVE,
        "precisions": ("int8-weights",),
        "max_batch": 0,
        "max_length": 2048,
        "slots": 6,
    }
    return Model(**values | changes)


def _stack(*models: Model, **changes: Any) -> Stack:
    values = {
        "name": "s",
        "path": Path("s.toml"),
        "card": CARDS["rtx-5070-ti"],
        "targets": ("tensorrt-rtx",),
        "models": {model.name: model for model in models},
        "reserve_mib": 768,
        "build_dir": Path("nowhere"),
    }
    return Stack(**values | changes)


def test_the_parameters_of_eeve() -> None:
    parameters = 10_804_924_416
    tables = 2 * 4096 * 64  # cosines and sines, half a head wide
    assert decoder_tensor_bytes(EEVE, _llm(), "fp16") == 2 * (parameters + tables)
    # INT8: one byte a weight and an FP16 scale per output channel, of the layers and the head.
    weights = 48 * (4096 * 6144 + 4096 * 4096 + 4096 * 28672 + 14336 * 4096) + 40960 * 4096
    outputs = 48 * (6144 + 4096 + 28672 + 4096) + 40960
    quantized = decoder_tensor_bytes(EEVE, _llm(), "int8-weights")
    assert quantized == 2 * (parameters + tables) - weights + 2 * outputs
    assert quantized == pytest.approx(10.98e9, rel=0.001)


def test_embedding_and_head_are_stored_as_the_stack_file_says() -> None:
    table = 40960 * 4096
    usual = decoder_tensor_bytes(EEVE, _llm(), "int8-weights")
    assert usual - decoder_tensor_bytes(EEVE, _llm(embedding="int8"), "int8-weights") == table - 2 * 40960
    assert decoder_tensor_bytes(EEVE, _llm(head="fp16"), "int8-weights") - usual == table - 2 * 40960
    # FP16 has one type only, and a tied table is stored for both uses.
    assert decoder_tensor_bytes(EEVE, _llm(embedding="int8"), "fp16") == decoder_tensor_bytes(
        replace(EEVE, tied=True), _llm(), "fp16"
    )


def test_the_cache_of_eeve() -> None:
    assert cache_bytes_per_token(EEVE) == 192 * 1024
    memory = decoder_engine_memory(_llm(), EEVE, "int8-weights", 0)
    assert memory.cache == 6 * 2048 * 192 * 1024
    assert memory.total == memory.weights + memory.cache + memory.activations + memory.buffers


def test_activations_count_both_steps() -> None:
    base = decoder_activation_bytes(EEVE, "fp16", DecoderProfile(6, 2048, 128))
    assert decoder_activation_bytes(EEVE, "fp16", DecoderProfile(6, 4096, 128)) > base
    assert decoder_activation_bytes(EEVE, "fp16", DecoderProfile(6, 2048, 512)) > base
    assert decoder_activation_bytes(replace(EEVE, layers=4), "fp16", DecoderProfile(6, 2048, 128)) == base
    # So many slots that decoding needs more than a prefill step.
    many = decoder_activation_bytes(EEVE, "fp16", DecoderProfile(256, 64, 16))
    assert many > decoder_activation_bytes(EEVE, "fp16", DecoderProfile(64, 64, 16))


def test_the_korean_stack_serves_six_conversations_beside_its_encoders() -> None:
    stack = load_stack(REPOSITORY / "stacks" / "korean-reviews.toml", build_dir=Path("nowhere"))
    plan = plan_stack(stack)
    require_fit(plan)
    assert [engine.task for engine in plan.engines] == ["classify", "embed", "rerank", "generate"]
    llm = plan.engines[-1]
    assert isinstance(llm.profile, DecoderProfile)
    assert llm.profile.slots >= 6
    assert llm.profile.capacity == 2048
    assert llm.memory.weights == pytest.approx(11.04e9, rel=0.002)
    assert plan.cache == llm.memory.cache == 2304 * MIB


def test_a_large_llm_in_fp16_is_refused_with_the_number_and_the_way_out() -> None:
    plan = plan_stack(_stack(_llm(precisions=("fp16",))))
    with pytest.raises(PlanError) as caught:
        require_fit(plan)
    message = str(caught.value)
    needed = f"{plan.used / MIB:,.0f} MiB"
    assert plan.used == pytest.approx(21.6e9 + 2.4e9, rel=0.03)
    assert f"needs {needed}" in message
    assert 'models.llm.precisions = ["int8-weights"]' in message


def test_fewer_slots_are_proposed_before_shorter_ones() -> None:
    plan = plan_stack(_stack(_llm(slots=20)))
    proposals = [p for p in plan.proposals if p.kind == "slots"]
    assert len(proposals) == 1
    slots = next(iter(proposals[0].stack.models.values())).slots
    assert proposals[0].what == f"slots = {slots} for llm"
    assert plan_stack(_stack(_llm(slots=slots))).fits
    assert not plan_stack(_stack(_llm(slots=slots + 1))).fits


# What the stack file leaves open.


def test_open_slots_fill_the_card_beside_the_other_models() -> None:
    encoder = Model(name="e", task="embed", source="a/b", shape=BERT, precisions=("int8",))
    stack = resolve_open(_stack(_llm(slots=0, max_length=0), encoder))
    chosen = stack.models["llm"]
    assert chosen.max_length == 2048
    assert plan_stack(stack).fits
    assert not plan_stack(_stack(replace(chosen, slots=chosen.slots + 1), encoder)).fits
    assert stack.models["e"] == encoder
    alone = resolve_open(_stack(_llm(slots=0))).models["llm"]
    assert alone.slots > chosen.slots


def test_open_fields_have_bounds() -> None:
    small = replace(EEVE, layers=2, hidden=256, ffn=512, heads=4, kv_heads=2, positions=100)
    chosen = resolve_open(_stack(_llm(shape=small, slots=0, max_length=0))).models["llm"]
    assert (chosen.slots, chosen.max_length, chosen.prefill_chunk) == (16, 100, 100)
    assert decoder_profile(chosen).as_dict() == {"slots": 16, "capacity": 100, "chunk": 100}
    # Given ones are kept.
    assert resolve_open(_stack(_llm(shape=small, slots=3, max_length=0))).models["llm"].slots == 3
    assert resolve_open(_stack(_llm(shape=small, slots=0, max_length=64))).models["llm"].max_length == 64
    # The rotary tables end somewhere, whatever the checkpoint says.
    long = replace(small, positions=1 << 20)
    assert resolve_open(_stack(_llm(shape=long, slots=1, max_length=0))).models["llm"].max_length == 2048


def test_an_open_length_gets_shorter_where_not_one_slot_fits() -> None:
    tight = custom_card(11_900, "12.0")
    chosen = resolve_open(_stack(_llm(slots=0, max_length=0), card=tight)).models["llm"]
    assert chosen.max_length in {256, 512, 1024}
    assert plan_stack(_stack(chosen, card=tight)).fits
    # Where nothing fits it stays, and the refusal speaks of it.
    hopeless = _stack(_llm(slots=0, max_length=0, precisions=("fp16",)), card=tight)
    assert resolve_open(hopeless).models["llm"].max_length == 2048
    assert not plan_stack(hopeless).fits


def test_a_stack_with_nothing_open_needs_no_sizes() -> None:
    stack = _stack(_llm(shape=None))
    assert resolve_open(stack) is stack
    with pytest.raises(PlanError, match="sizes are not known"):
        resolve_open(_stack(_llm(shape=None, slots=0)))
    with pytest.raises(ValueError, match="still open"):
        decoder_profile(_llm(slots=0))


@settings(max_examples=60, deadline=None)
@given(
    memory=st.integers(2000, 24_000),
    layers=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    slots=st.integers(0, 3),
    length=st.sampled_from([0, 300]),
)
def test_what_the_plan_chooses_fits_wherever_a_single_slot_does(
    memory: int, layers: list[int], slots: int, length: int
) -> None:
    models = [
        _llm(f"m{i}", shape=replace(EEVE, layers=count), slots=slots, max_length=length)
        for i, count in enumerate(layers)
    ]
    stack = _stack(*models, card=custom_card(memory, "8.9"))
    shapes: dict[str, Any] = {model.name: model.shape for model in models}
    chosen = resolve_open(stack)
    for name, model in chosen.models.items():
        assert 1 <= model.slots <= 16
        assert 16 <= model.max_length <= 2048
        assert model.prefill_chunk <= model.max_length
        assert stack.models[name].slots in (0, model.slots)
        assert stack.models[name].max_length in (0, model.max_length)
    least = _stack(
        *(replace(m, slots=m.slots or 1, max_length=m.max_length or 256) for m in models), card=stack.card
    )
    assert plan_shapes(chosen, shapes).fits == plan_shapes(least, shapes).fits
    assert resolve_open(chosen) is chosen


# config.json


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
_EXAONE = {
    key: value for key, value in CONFIG.items() if key not in {"num_hidden_layers", "intermediate_size"}
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, {"layers": 2, "kv_heads": 2, "head_dim": 8, "positions": 256, "tied": False}),
        (CONFIG | {"num_key_value_heads": None, "head_dim": None}, {"kv_heads": 4, "head_dim": 8}),
        (CONFIG | {"head_dim": 24, "attention_bias": True}, {"head_dim": 24, "qkv_bias": True}),
        (CONFIG | {"model_type": "qwen2", "tie_word_embeddings": True}, {"qkv_bias": True, "tied": True}),
        (CONFIG | {"model_type": "qwen3"}, {"head_dim": 128, "qkv_bias": False}),
        (_EXAONE | {"model_type": "exaone", "num_layers": 5}, {"layers": 5, "ffn": 128, "tied": True}),
        (CONFIG | {"model_type": "gemma2"}, {"head_dim": 256, "tied": True}),
    ],
)
def test_sizes_from_config_json(tmp_path: Path, config: Any, expected: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    shape = read_decoder_shape(path)
    assert {key: getattr(shape, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CONFIG | {"model_type": "lama"}, "'llama' is the nearest"),
        (CONFIG | {"model_type": "bert"}, "LLMs of these families are supported"),
        (CONFIG | {"model_type": ["llama"]}, "model_type is ['llama']"),
        (CONFIG | {"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide 4"),
        (CONFIG | {"intermediate_size": 0}, "intermediate_size is 0"),
        ({k: v for k, v in CONFIG.items() if k != "hidden_size"}, "hidden_size is missing"),
    ],
)
def test_a_malformed_config_names_the_key(tmp_path: Path, config: Any, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(PlanError) as caught:
        read_decoder_shape(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_slot_longer_than_the_checkpoints_positions_is_refused() -> None:
    with pytest.raises(PlanError, match="set max_length = 4096 or less"):
        plan_stack(_stack(_llm(max_length=4097)))


# What is shown.


def test_the_table_and_the_json_show_the_cache(tmp_path: Path) -> None:
    from rich.console import Console

    plan = plan_stack(_stack(_llm(slots=0)))
    console = Console(width=140, record=True, file=(tmp_path / "out").open("w"))
    console.print(render_plan(plan))
    text = console.export_text()
    profile = plan.engines[0].profile
    assert isinstance(profile, DecoderProfile)
    for words in (
        "KV cache",
        f"{profile.slots} slots x 2048",
        f"{plan.cache / MIB:,.0f}",
        "llm: 192 KiB of KV cache for each token",
        f"llm: the plan chose {profile.slots} slots of 2,048 tokens",
    ):
        assert words in text
    report = json.loads(json.dumps(plan.as_dict()))
    engine = report["engines"][0]
    assert engine["profile"] == {"slots": profile.slots, "capacity": 2048, "chunk": 128}
    assert engine["kv_cache_bytes"] == report["total"]["kv_cache_bytes"] == plan.cache
    assert engine["kv_cache_bytes_per_token"] == 196_608
    assert report["total"]["used_bytes"] + report["total"]["free_bytes"] == report["card"]["memory_bytes"]
    assert report["chosen"] == [f"llm: the plan chose {profile.slots} slots of 2,048 tokens"]
