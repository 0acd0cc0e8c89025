"""Checkpoints that somebody hostile wrote: each ends as a precise error, soon, and without taking memory.

`bounded` runs what reads them in a process that may take 256 MiB and 5 s beyond what this one has.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import bounded
from conftest import Checkpoint

from build_engines.errors import ExportError, FetchError, OnecardError, PlanError
from build_engines.export import export_encoder
from build_engines.export.checkpoint import (
    MAX_DIMENSIONS,
    MAX_TENSORS,
    open_checkpoint,
    read_header,
)
from build_engines.export.decoder_config import read_architecture
from build_engines.export.sentence import MAX_MODULES, read_sentence
from build_engines.export.tokenizer import write_tokenizer
from build_engines.fetch import fetch_model
from build_engines.modelopt import weight_files
from build_engines.shapes import read_shape
from build_engines.stack import Model
from build_engines.untrusted import (
    MAX_FILES,
    MAX_JSON_BYTES,
    MAX_JSON_VALUES,
    MAX_VOCABULARY_BYTES,
    read_json,
)

GIB = 1 << 30


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A classifier to spoil."""
    target = tmp_path / "model"
    shutil.copytree(checkpoint("classify"), target)
    return target


def _model(folder: Path, **changes: Any) -> Model:
    return Model(name="m", task="classify", source=str(folder), source_dir=folder, **changes)


def _change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def _sparse(path: Path, size: int) -> None:
    """A file of that size which takes no disk."""
    with path.open("ab") as file:
        file.truncate(size)


def fetched(folder: Path) -> object:
    return fetch_model(_model(folder), folder.parent / "fetched")


def planned(folder: Path) -> object:
    return read_shape(folder / "config.json", "classify")


def exported(folder: Path) -> object:
    import onnx

    assert onnx
    return export_encoder(folder, "classify", folder.parent / "out").serving


# --- settings ---------------------------------------------------------------------------------------------

READERS: list[tuple[Callable[[Path], object], type[OnecardError]]] = [
    (fetched, FetchError),
    (planned, PlanError),
    (exported, ExportError),
]
readers = pytest.mark.parametrize(("read", "error"), READERS)


@readers
def test_a_config_of_a_gigabyte(folder: Path, read: Callable[[Path], object], error: type) -> None:
    _sparse(folder / "config.json", GIB)
    with pytest.raises(error, match=r"config\.json:? has 1,073,741,824 bytes, more than 16 MiB"):
        bounded(read, folder)


@readers
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[" + b"[]," * (MAX_JSON_VALUES // 2) + b"[]]", r"has 1,\d+,\d+ values, more than 1,048,576"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON: .*digits"),
        (b'{"a": "\xff"}', "not valid JSON"),
    ],
    ids=["deep objects", "deep lists", "many values", "a long number", "no UTF-8"],
)
def test_a_config_that_asks_for_more_than_it_holds(
    folder: Path, read: Callable[[Path], object], error: type, content: bytes, reason: str
) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(error, match=reason):
        bounded(read, folder)


@readers
def test_a_pipe_instead_of_a_config(folder: Path, read: Callable[[Path], object], error: type) -> None:
    """It would be waited on for ever."""
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(error, match=r"is no regular file|does not exist"):
        bounded(read, folder)


@pytest.mark.parametrize(
    ("settings", "planning"),
    [
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, not a positive integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": 10**30}, "vocab_size is 1000000000"),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings is 1000000000"),
        ({"pad_token_id": -(10**9)}, None),
        ({"num_attention_heads": 10**9}, "num_attention_heads is 1000000000"),
    ],
)
def test_sizes_that_no_model_has(folder: Path, settings: dict[str, int], planning: str | None) -> None:
    _change(folder, **settings)
    if planning:
        with pytest.raises(PlanError, match=planning):
            bounded(planned, folder)
    if "vocab_size" not in settings:  # the export takes it from the weights
        with pytest.raises(ExportError, match=r"model/config\.json|config\.json implies|no multiple|lack"):
            bounded(exported, folder)


@pytest.mark.parametrize("settings", [{"max_position_embeddings": 10**9}, {"num_hidden_layers": 10**9}])
def test_what_is_computed_from_a_size_is_bounded(
    checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, int]
) -> None:
    """ModernBERT's rotary tables and list of layers hang on no weight."""
    shutil.copytree(checkpoint("classify", "modernbert"), tmp_path / "model")
    _change(tmp_path / "model", **settings)
    with pytest.raises(ExportError, match=f"{next(iter(settings))} must be an integer from 1 to"):
        bounded(exported, tmp_path / "model")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "num_key_value_heads"])
def test_sizes_that_no_llm_has(tmp_path: Path, key: str) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"intermediate_size": 64, "vocab_size": 99, "num_key_value_heads": 4}
    with pytest.raises(ExportError, match=f"{key} must be an integer from 1 to"):
        bounded(read_architecture, {**config, key: 10**12}, tmp_path)


def test_a_settings_file_that_grew_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("1" * 100)
    with pytest.raises(ExportError, match=r"a\.json: has 100 bytes, more than 0 MiB"):
        read_json(tmp_path / "a.json", ExportError, limit=99)
    assert read_json(tmp_path / "a.json", ExportError, limit=100) == int("1" * 100)


# --- weights ----------------------------------------------------------------------------------------------


def _write_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def _entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS: dict[str, tuple[Any, str]] = {
    "a product that wraps around": (_entry([2**32, 2**32], [0, 0]), "does not fill its 0 bytes"),
    "a product of three": (_entry([2**21, 2**21, 2**22], [0, 0]), "does not fill its 0 bytes"),
    "beyond the file": (_entry([2**40], [0, 2**42]), "shorter than its header says"),
    "negative sizes": (_entry([-1, -1], [0, 4]), "are no sizes"),
    "negative offsets": (_entry([1], [-8, -4]), "are no sizes"),
    "offsets backwards": (_entry([0], [4, 0]), "shorter than its header says"),
    "a fraction": (_entry([1.5], [0, 6]), "are no sizes"),
    "infinity": (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', "are no sizes"),
    "truth": (_entry([True], [0, 4]), "are no sizes"),
    "dimensions": (_entry([1] * (MAX_DIMENSIONS + 1), [0, 4]), "has 9 dimensions"),
    "three offsets": (_entry([1], [0, 4, 8]), "cannot be read"),
    "a type that is a list": (_entry([1], [0, 4], []), "cannot be read"),
    "a number for a tensor": ({"a": 1}, "cannot be read"),
    "deep": (b'{"a":' * 100_000, "cannot be read"),
    "a list": ([], "cannot be read"),
    "many tensors": (b"{" + b'"a":{},' * MAX_TENSORS + b'"a":{}}', "more than 131,072 tensors"),
    "many lists": (b'{"a":[' + b"[]," * 2 * MAX_TENSORS + b"[]]}", "more than 131,072 tensors"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_claims_what_is_not_there(tmp_path: Path, name: str) -> None:
    header, reason = HEADERS[name]
    _write_header(tmp_path / "model.safetensors", header, b"\0" * 16)
    with pytest.raises(ExportError, match=rf"model\.safetensors is damaged: .*{reason}"):
        bounded(read_header, tmp_path / "model.safetensors")


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 33 << 20])
def test_a_header_of_any_length(tmp_path: Path, length: int) -> None:
    _write_header(tmp_path / "model.safetensors", b"{}", length=length)
    _sparse(tmp_path / "model.safetensors", 8 * GIB)
    with pytest.raises(ExportError, match=f"its header claims {length} bytes"):
        bounded(read_header, tmp_path / "model.safetensors")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_cannot_name_files_elsewhere(folder: Path, shard: str) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder.parent / "secret.safetensors")
    names = list(read_header(folder.parent / "secret.safetensors"))
    index = {"weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"named by model\.safetensors\.index\.json but does not exist"):
        open_checkpoint(folder)
    with pytest.raises(PlanError, match="no weight_map of file names"):
        weight_files(folder)


# --- vocabularies, modules, numbers of files ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "spiece.model"])
def test_a_vocabulary_larger_than_any(folder: Path, name: str) -> None:
    _sparse(folder / name, MAX_VOCABULARY_BYTES + 1)
    with pytest.raises(FetchError, match=rf"{name} has 134,217,729 bytes, more than 128 MiB"):
        bounded(fetched, folder)
    with pytest.raises(ExportError, match=rf"{name} has 134,217,729 bytes, more than 128 MiB"):
        bounded(write_tokenizer, folder, folder.parent, 99)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "modules.json", "chat_template.jinja"])
def test_other_settings_larger_than_any(folder: Path, name: str) -> None:
    _sparse(folder / name, MAX_JSON_BYTES + 1)
    with pytest.raises(FetchError, match=rf"{name} has 16,777,217 bytes, more than 16 MiB"):
        bounded(fetched, folder)


@pytest.mark.parametrize(
    "content",
    ['{"version":"1.0"', '{"a":' * 50_000, "[]", '{"model": {"type": "WordLevel", "vocab": 5}}', ""],
)
def test_what_is_no_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ExportError, match=r"tokenizer\.json cannot be loaded"):
        bounded(write_tokenizer, folder, folder.parent, 99)


@pytest.mark.parametrize("growth", [["a" * 999] * 3, ["aa"] * 40])
def test_a_tokenizer_that_multiplies_a_text(folder: Path, growth: list[str]) -> None:
    """Ten bytes of a request would become a gigabyte."""
    found = json.loads((folder / "tokenizer.json").read_text())
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": content} for content in growth]
    found["normalizer"] = {"type": "Sequence", "normalizers": steps}
    (folder / "tokenizer.json").write_text(json.dumps(found))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ExportError, match=r"makes a text .* times as long"):
        bounded(write_tokenizer, folder, folder.parent, 99)


def test_more_files_than_a_checkpoint_has(folder: Path) -> None:
    (folder / "many").mkdir()
    for number in range(MAX_FILES):
        (folder / "many" / str(number)).touch()
    with pytest.raises(FetchError, match="more than 4,096 files"):
        bounded(fetched, folder)


def test_a_whole_disk_as_a_checkpoint() -> None:
    with pytest.raises(FetchError, match=r"more than 4,096 files|leaves the checkpoint|no regular file"):
        bounded(fetch_model, _model(Path("/usr")), Path("/nonexistent"))


def _modules(folder: Path, modules: Any) -> Path:
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def _module(kind: str, path: str = "") -> dict[str, Any]:
    return {"idx": 0, "name": "0", "path": path, "type": kind}


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ([_module("evil.Pooling")], r"names 'evil\.Pooling', which is not of sentence_transformers"),
        ([_module("sentence_transformers.models.Pooling", "../..")], "points outside its folder"),
        ([_module("sentence_transformers.models.Pooling", "/etc")], "points outside its folder"),
        ([_module("sentence_transformers.models.Normalize")] * (MAX_MODULES + 1), "65 modules, more than 64"),
        ([1], "not a list of sentence-transformers modules"),
        ({"a": 1}, "not a list of sentence-transformers modules"),
        (5, "not a list of sentence-transformers modules"),
        ([{"idx": "x", "type": "sentence_transformers.A"}], "not a list of sentence-transformers modules"),
    ],
)
def test_modules_that_name_what_is_not_theirs(folder: Path, modules: Any, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        read_sentence(_modules(folder, modules), None, True)


def test_a_dense_module_names_an_activation_of_torch(folder: Path) -> None:
    """The library would import and call whatever stands there."""
    _modules(folder, [_module("sentence_transformers.models.Dense", "2_Dense")])
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text(json.dumps({"activation_function": "os.Tanh"}))
    with pytest.raises(ExportError, match=r"names 'os\.Tanh', which is not of torch\.nn"):
        read_sentence(folder, None, True)


# --- code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling.Evil"}}),
        ("config.json", {"_attn_implementation": "evil/kernel"}),
        ("config.json", {"attn_implementation": {"": "evil/kernel"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil/repo--tokenization.Evil", None]}}),
    ],
)
def test_settings_that_name_code(folder: Path, name: str, settings: dict[str, Any]) -> None:
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**found, **settings}))
    with pytest.raises(FetchError, match=rf"its {name} names .*(Evil|evil/kernel)"):
        fetched(folder)
    fetch_model(_model(folder, allow_remote_code=True), folder.parent / "fetched")


def test_an_adapter_is_no_checkpoint(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/repo"}')
    with pytest.raises(FetchError, match="it is an adapter"):
        fetched(folder)


# --- pickles ------------------------------------------------------------------------------------------------


def _pickled(folder: Path, tensors: dict[str, Any]) -> Path:
    import torch

    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def converted(folder: Path) -> object:
    return fetch_model(_model(folder, allow_pickle=True), folder.parent / "fetched")


def test_a_tensor_that_is_larger_than_its_file(folder: Path) -> None:
    import torch

    _pickled(folder, {"a": torch.ones(1).expand(1 << 33)})
    with pytest.raises(FetchError, match=r"'a' 34,359,738,368 of them, and the file has"):
        converted(folder)
    assert not (folder.parent / "fetched").exists()


def test_tensors_that_are_the_same_very_often(folder: Path) -> None:
    import torch

    weight = torch.ones(4096)
    _pickled(folder, {f"a{number}": weight for number in range(64)})
    with pytest.raises(FetchError, match="tensors repeat what is stored once"):
        converted(folder)


def test_a_compressed_archive_is_not_unpacked(folder: Path) -> None:
    import torch

    _pickled(folder, {"a": torch.zeros(1 << 20)})
    stored = folder / "pytorch_model.bin"
    packed = folder / "packed"
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    packed.replace(stored)
    with pytest.raises(FetchError, match="the archive is compressed"):
        converted(folder)


def test_converting_writes_through_no_link(folder: Path) -> None:
    """A checkpoint's files are linked, not copied: what is written must not be the user's own."""
    import torch

    _pickled(folder, {"a": torch.ones(4)})
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    mine = folder / "model.safetensors.index.json"
    mine.write_text('{"weight_map": {}}')
    fetched = converted(folder).path  # type: ignore[attr-defined]
    assert mine.read_text() == '{"weight_map": {}}'
    written = json.loads((fetched / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == {"a": "model-00001-of-00001.safetensors"}


def test_no_archive_is_ever_unpacked() -> None:
    """Nothing of ours opens one to write what is in it."""
    root = Path(__file__).parents[3]
    sources = [
        path for package in ("build_engines", "triton_repo") for path in (root / package).rglob("*.py")
    ]
    found = [
        path.name
        for path in sources
        for name in ("tarfile", "unpack_archive", "extractall", ".extract(")
        if name in path.read_text()
    ]
    assert sources
    assert found == []
