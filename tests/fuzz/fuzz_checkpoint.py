"""What a checkpoint says of itself: the header of its weights, config.json, modules.json."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import draw

from build_engines.errors import ExportError, PlanError
from build_engines.export.architecture import read_encoder
from build_engines.export.checkpoint import Checkpoint, TensorEntry, read_header, read_json, well_formed
from build_engines.export.decoder_config import read_architecture
from build_engines.export.sentence import read_sentence
from build_engines.shapes import read_decoder_shape, read_shape


def _weights(header: Any, data: bytes = bytes(16)) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


_BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT |= {"intermediate_size": 64, "vocab_size": 99, "hidden_act": "gelu", "id2label": {"0": "a", "1": "b"}}
_MODERN = {**_BERT, "model_type": "modernbert", "layer_types": ["full_attention", "sliding_attention"]}
_MODERN |= {
    "rope_parameters": {"full_attention": {"rope_theta": 1e4}},
    "local_attention": 16,
    "pad_token_id": 0,
}
_LLAMA = {**_BERT, "model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
_LLAMA |= {"num_key_value_heads": 2, "eos_token_id": [2], "sliding_window": 8, "layer_types": None}
_GEMMA = {**_LLAMA, "model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window_pattern": "LG"}
_MODULES = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
_MODULES += [{"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
SEEDS = [b"\x00" + _weights({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}})]
SEEDS += [
    b"\x00" + _weights({"__metadata__": {}, "a": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}})
]
SEEDS += [b"\x01" + json.dumps(config).encode() for config in (_BERT, _MODERN, _LLAMA, _GEMMA)]
SEEDS += [b"\x02" + json.dumps(_MODULES).encode()]
WORDS = [
    *(
        b'"dtype"',
        b'"shape"',
        b'"data_offsets"',
        b'"F32"',
        b'"BF16"',
        b"[",
        b"]",
        b"{",
        b"}",
        b"null",
        b"-1",
        b"1e999",
    ),
    *(b"4294967296", b"9" * 25, b"NaN", b"true", b'""', b"0.5", b'"model_type"', b'"llama"', b'"modernbert"'),
    *(
        b'"rope_parameters"',
        b'"rope_scaling"',
        b'"llama3"',
        b'"factor"',
        b'"sliding_window"',
        b'"eos_token_id"',
    ),
    *(
        b'"hidden_size"',
        b'"num_hidden_layers"',
        b'"num_attention_heads"',
        b'"head_dim"',
        b'"vocab_size"',
        b'".."',
    ),
]


def target(data: bytes) -> None:
    found = draw.Draw(data)
    kind, content = found.byte() % 3, found.rest()
    with draw.folder() as folder:
        [_header, _config, _modules][kind](folder, content)


def _header(folder: Path, content: bytes) -> None:
    """Whatever the library accepts is read as the library reads it."""
    import safetensors

    path = folder / "model.safetensors"
    path.write_bytes(content)
    try:
        theirs = dict(safetensors.deserialize(content))
    except Exception:
        theirs = None
    try:
        ours = read_header(path)
    except ExportError as error:
        assert str(path) in str(error)
        assert theirs is None or any(len(found["shape"]) > 8 for found in theirs.values())
        return
    for name, entry in (theirs or {}).items():
        assert ours[name].dtype == entry["dtype"]
        assert ours[name].shape == tuple(entry["shape"])


def _config(folder: Path, content: bytes) -> None:
    path = folder / "config.json"
    path.write_bytes(content)
    for read in (lambda: read_shape(path, "classify"), lambda: read_decoder_shape(path)):
        try:
            read()
        except PlanError as error:
            assert str(path) in str(error)
    for architecture in (_encoder, _decoder):
        try:
            with well_formed(path):
                architecture(folder)
        except ExportError as error:
            assert str(folder) in str(error)


def _encoder(folder: Path) -> None:
    entry = TensorEntry(folder, "F32", (99, 32), 0, 0)
    names = ("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight")
    read_encoder(Checkpoint(folder, read_json(folder / "config.json"), dict.fromkeys(names, entry)))


def _decoder(folder: Path) -> None:
    read_architecture(read_json(folder / "config.json"), folder)


def _modules(folder: Path, content: bytes) -> None:
    (folder / "modules.json").write_bytes(content)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    try:
        with well_formed(folder):
            read_sentence(folder, None, True)
    except ExportError as error:
        assert str(folder) in str(error)
