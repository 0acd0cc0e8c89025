"""Whatever a causal LM's graph would not reproduce is refused by name, before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_decoders import write_hollow
from tiny_models import write_word_tokenizer

from build_engines.errors import ExportError
from build_engines.export import copy_chat_tokenizer, decoder_serving, open_decoder, write_decoder

Copy = Callable[..., Path]


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hollow") / "checkpoint"
    write_hollow(folder)
    return folder


@pytest.fixture
def copy(hollow: Path, tmp_path: Path) -> Copy:
    """`copy(**settings)`: the checkpoint with other settings in config.json; the value ... removes one."""

    def make(**settings: Any) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(hollow, folder)
        config = json.loads((folder / "config.json").read_text()) | settings
        config = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported for generation; .* exaone4"),
        ({"model_type": None}, "model_type 'None' is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "does not generate text"),
        ({"quantization_config": {"bits": 4}}, "quantized checkpoints"),
        ({"num_local_experts": 8}, "mixtures of experts"),
        ({"hidden_act": "relu2"}, "activation 'relu2' is not supported; supported are silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "rope factor must be a positive number"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' without factor"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, not 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 1024, not 10000"),
        ({"num_hidden_layers": 3}, r"the weights lack model\.layers\.2\.self_attn\.q_proj\.weight"),
        ({"num_hidden_layers": 1}, r"would leave out the tensors model\.layers\.1\..* and 5 more"),
        ({"hidden_size": "32"}, "hidden_size must be an integer .*, not '32'"),
        ({"hidden_size": ...}, "hidden_size must be an integer .*, not None"),
        ({"hidden_size": -4}, "hidden_size must be an integer .*, not -4"),
        ({"vocab_size": 65}, r"embed_tokens\.weight has shape \[64, 32\], config.json implies \[65, 32\]"),
        ({"intermediate_size": 49}, r"gate_proj\.weight has shape \[48, 32\], .* \[49, 32\]"),
        ({"num_key_value_heads": 2}, r"k_proj\.weight has shape \[16, 32\], .* \[32, 32\]"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 heads of 10 over 2 key/value heads"),
        ({"head_dim": 15}, "2 heads of 15 over 1 key/value heads"),
        ({"rms_norm_eps": float("nan")}, "epsilon must be a positive number, not nan"),
        ({"rms_norm_eps": "tiny"}, "a value of the wrong type or size: could not convert"),
        ({"max_position_embeddings": 10**40}, "max_position_embeddings must be an integer"),
        ({"rope_scaling": [1]}, "config.json holds a value of the wrong type"),
        ({"eos_token_id": 64}, "eos_token_id 64 is outside the vocabulary of 64 tokens"),
        ({"eos_token_id": ["</s>"]}, "a special token id is '</s>', not an integer"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive integer"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 2},
            r"layer_types names \['chunked_attention'\]",
        ),
        ({"model_type": "qwen2"}, r"the weights lack model\.layers\.0\.self_attn\.q_proj\.bias"),
        ({"attention_bias": True}, r"the weights lack model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
)
def test_settings_are_refused_by_name(copy: Copy, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        open_decoder(copy(**settings))


def test_window_as_long_as_the_positions_is_none(copy: Copy) -> None:
    folder = copy(model_type="mistral", sliding_window=4096, max_position_embeddings=4096)
    assert decoder_serving(open_decoder(folder))["windows"] == [None, None]


def test_damaged_weights_are_refused_by_name(copy: Copy) -> None:
    folder = copy()
    weights = folder / "model.safetensors"
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    weights.rename(folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"model-00001-of-00002\.safetensors is named by .* does not exist"):
        open_decoder(folder)
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    index["weight_map"]["lm_tail.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"promises tensors that no shard holds: lm_tail\.weight"):
        open_decoder(folder)
    (folder / "model-00002-of-00002.safetensors").rename(weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ExportError, match=r"model\.safetensors is damaged: it is shorter"):
        open_decoder(folder)


def test_weights_stored_as_integers_are_refused(copy: Copy) -> None:
    folder = copy()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content.replace(b'"BF16"', b'"I16" ', 1))
    with pytest.raises(
        ExportError, match=r"tensor model\.embed_tokens\.weight is stored as I16, not as floats"
    ):
        open_decoder(folder)


def test_codes_of_another_shape_are_refused(copy: Copy, tmp_path: Path) -> None:
    import numpy as np

    decoder = open_decoder(copy())
    one = (np.zeros((32, 63), np.int8), np.ones(63, np.float32))
    with pytest.raises(ExportError, match=r"head: the codes are int8 \(32, 63\), the graph needs int8"):
        write_decoder(decoder, tmp_path / "m.onnx", precision="int8-weights", quantized={"head": lambda: one})
    with pytest.raises(ExportError, match=r"unknown Linears: layers\.9\.ffn\.up"):
        write_decoder(
            decoder, tmp_path / "m.onnx", precision="fp16", quantized={"layers.9.ffn.up": lambda: one}
        )
    assert not (tmp_path / "m.onnx").exists()


def test_serving_says_what_a_server_needs(copy: Copy) -> None:
    folder = copy(model_type="qwen2", architectures=..., bos_token_id=None, eos_token_id=5, pad_token_id=2)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9], "temperature": 0.6}))
    tokens = {"bos_token": None, "eos_token": {"content": "</s>"}, "chat_template": "ignored"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert decoder_serving(open_decoder(folder)) == {
        "task": "generate",
        "family": "llama",
        "vocabulary": 64,
        "positions": 128,
        "layers": 2,
        "kv_heads": 1,
        "head_dim": 16,
        "cache_type": "float16",
        "windows": [None, None],
        "eos_ids": [5, 9],
        "bos_id": None,
        "pad_id": 2,
        "chat": {
            "template": "{{ messages }}",
            "bos_token": None,
            "eos_token": "</s>",
            "pad_token": None,
            "unk_token": None,
        },
    }
    assert decoder_serving(open_decoder(folder), "fp32")["cache_type"] == "float32"


def test_chat_tokenizer_comes_with_its_template(copy: Copy, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder, out = copy(), tmp_path / "out"
    write_word_tokenizer(folder, words=60)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    copy_chat_tokenizer(folder, out)
    assert not (out / "chat_template.jinja").exists()
    written = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert len(written.encode("w1 w2 w3").ids) == 3
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "truncation_side": "left",
        "chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "{{ 1 }}"},
        ],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    copy_chat_tokenizer(folder, out)
    assert (out / "chat_template.jinja").read_text() == "{{ 1 }}"
    write_word_tokenizer(folder, words=80)
    with pytest.raises(ExportError, match="knows ids up to 79, the embedding table has 64 rows"):
        copy_chat_tokenizer(folder, out)
    settings["chat_template"] = 7
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ExportError, match="chat_template is a int, not a Jinja template"):
        decoder_serving(open_decoder(folder))
