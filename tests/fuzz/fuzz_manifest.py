"""Records and manifests of engines, stages, checkpoints and served models: read, or refused by name.

A manifest that parses gets its right digest: what is behind that check is meant.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import draw

from build_engines.digests import require_whole, verify_digests
from build_engines.errors import ArtifactError
from build_engines.inspection import describe_engine, render_engine
from build_engines.manifest import is_whole, recorded_inputs
from triton_repo.runtime.seal import check_served
from triton_repo.runtime.session import (
    EngineRefused,
    check_files,
    checked_folder,
    manifest_digest,
    read_manifest,
)

_DIGEST = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of nothing
_FILE = {"bytes": 0, "sha256": _DIGEST}
_MANIFEST: dict[str, Any] = {
    "format": 1,
    "model": "m",
    "task": "classify",
    "precision": "int8",
    "target": "onnxruntime",
    "compute_capability": None,
    "profile": {"batch": [1, 4, 8], "sequence": [1, 64, 128]},
    "memory": {"weights": 1},
    "versions": {"onnxruntime": "1.31.1"},
    "gates": {"graph": {"gate": {"checks": [{"name": "a", "value": 1.0, "limit": 0.9, "sense": "least"}]}}},
    "serving": {"inputs": ["input_ids"], "outputs": ["logits"], "labels": ["a"], "max_length": 8},
    "engine": {"file": "engine.onnx", **_FILE},
    "files": {"tokenizer.json": _FILE},
    "layers": {"MatMul": 2},
}
_LLM = {**_MANIFEST, "task": "generate", "profile": {"slots": 2, "capacity": 64, "chunk": 16}}
_RECORD = {"key": "k", "inputs": {}, "outputs": {"engine.onnx": _FILE}, "result": {}, "seconds": 1.5}
_SEAL = {"format": 1, "files": {"model.py": _FILE}}
KINDS = ("manifest.json", "stage.json", "fetched.json", "digests.json")
SEEDS = [
    bytes([kind]) + json.dumps(content).encode()
    for kind, content in enumerate([_MANIFEST, _RECORD, {"format": 1, "files": {"a": _FILE}}, _SEAL])
] + [b"\x00" + json.dumps(_LLM).encode()]
WORDS = [
    *(b'"engine"', b'"files"', b'"file"', b'"bytes"', b'"sha256"', b'"target"', b'"serving"', b'"format"'),
    *(
        b"null",
        b"[]",
        b"{}",
        b'""',
        b"-1",
        b"1e999",
        b"NaN",
        b'".."',
        b'"/etc/passwd"',
        b'"a/b"',
        b'"\\u0000"',
    ),
    *(b"9" * 20, b"tensorrt-rtx", b"tensorrt-llm", b'"gates"', b'"checks"', b'"profile"', b'"model.py"'),
]


def target(data: bytes) -> None:
    found = draw.Draw(data)
    name, content = found.choice(KINDS), found.rest()
    with draw.folder() as place:
        folder = place / "1"
        folder.mkdir()
        for file in ("engine.onnx", "tokenizer.json", "model.py"):
            (folder / file).touch()
        (folder / name).write_bytes(_resealed(content) if name == KINDS[0] else content)
        for read in (_verified, _served, _recorded) if name != KINDS[0] else (_engine, _inspected, _verified):
            read(folder)


def _resealed(content: bytes) -> bytes:
    try:
        manifest = json.loads(content)
        manifest["digest"] = manifest_digest(manifest)
        return json.dumps(manifest).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return content


def _engine(folder: Path) -> None:
    try:
        check_files(folder, read_manifest(folder))
        checked_folder(folder)
    except EngineRefused as error:
        assert str(folder) in str(error)


def _inspected(folder: Path) -> None:
    try:
        render_engine(describe_engine(folder))
    except ArtifactError as error:
        assert str(folder) in str(error)


def _verified(folder: Path) -> None:
    try:
        require_whole(verify_digests(folder))
    except ArtifactError as error:
        assert str(folder) in str(error)


def _served(folder: Path) -> None:
    try:
        check_served(folder)
    except EngineRefused as error:
        assert str(folder.parent) in str(error)


def _recorded(folder: Path) -> None:
    is_whole(folder)
    recorded_inputs(folder)
