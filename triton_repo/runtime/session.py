"""Open an engine folder: check every digest, then hand out one small interface to run it.

The build tool opens engines through this module too, so that the session that passes the gate is the session
that is served. Imports the standard library, numpy and the engine library only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from triton_repo.runtime.external_data import UnsafeGraph, check_external
from triton_repo.runtime.huge_pages import collapse_heap

MANIFEST_FORMAT = 1
# A chat template is the largest part of one; the longest that is taken has 256 KiB.
MAX_MANIFEST_BYTES = 16 << 20
_CPU_INFO = Path("/proc/cpuinfo")
Arrays = Mapping[str, npt.NDArray[Any]]

# ONNX Runtime's SkipLayerNormalization kernel is several times slower on the CPU than the Add and
# LayerNormalization that it replaces (docs/benchmarks.md, "What was tried").
_SLOW_FUSIONS = ["SkipLayerNormFusion"]

# How long an idle compute thread looks out for work before it sleeps. Between two operators that saves waking
# it; ONNX Runtime's default is much longer, and takes a third of the cores from the models beside this one.
_SPIN_US = 20

# ONNX Runtime's option for processors whose fast u8 x s8 kernels overflow.
EXACT_PRODUCTS = "session.x64quantprecision"


class EngineRefused(Exception):
    """The engine folder is incomplete, altered, or made for something that is not here."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The parsed manifest.json of an engine folder; EngineRefused when it is missing or malformed."""
    path = folder / "manifest.json"
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise EngineRefused(f"{path}: larger than {MAX_MANIFEST_BYTES:,} bytes; this is no manifest")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineRefused(f"{path}: no manifest, so this is not a finished engine") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EngineRefused(f"{path}: unreadable manifest ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise EngineRefused(f"{path}: not a manifest of format {MANIFEST_FORMAT}")
    missing = [key for key in ("engine", "files", "target", "serving", "digest") if key not in manifest]
    if missing:
        raise EngineRefused(f"{path}: the manifest has no {', '.join(missing)}")
    if manifest["digest"] != manifest_digest(manifest):
        raise EngineRefused(f"{path}: the manifest was altered after the build (its own digest differs)")
    if wrong := _malformed(manifest):
        raise EngineRefused(f"{path}: the manifest's {wrong} is not what it should be")
    return manifest


def _malformed(manifest: Mapping[str, Any]) -> str | None:
    """The part of a manifest that is of another type than everybody who reads it takes for granted."""
    engine, files = manifest["engine"], manifest["files"]
    kinds = {"engine": dict, "files": dict, "target": str, "serving": dict}
    if wrong := next((key for key, kind in kinds.items() if not isinstance(manifest[key], kind)), None):
        return wrong
    for name, record in [(engine.get("file"), engine), *files.items()]:
        is_record = isinstance(record, dict) and isinstance(record.get("sha256"), str)
        if not (isinstance(name, str) and is_record and type(record.get("bytes")) is int):
            return f"record of {name!r:.100}"
    return None


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest's canonical JSON without its own `digest` field."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare size and SHA-256 of the engine and of every file beside it with the manifest."""
    check_sizes(folder, manifest)
    for name, record in _listed(manifest).items():
        path = folder / name
        if sha256(path) != record["sha256"]:
            raise EngineRefused(f"{path}: altered after the build (SHA-256 differs from the manifest)")


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the sizes alone, which needs no reading of gigabytes."""
    for name, record in _listed(manifest).items():
        path = folder / name
        if path.parent != folder or path.name in {"", ".", ".."}:
            raise EngineRefused(f"{folder}: the manifest names a file outside its folder: {name!r}")
        try:
            size = path.stat().st_size
        except (OSError, ValueError):
            raise EngineRefused(f"{path}: missing, though the manifest lists it") from None
        if size != record["bytes"]:
            raise EngineRefused(f"{path}: {size} bytes, the manifest says {record['bytes']} (truncated?)")


def _listed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of each file, the engine first."""
    return {manifest["engine"]["file"]: manifest["engine"], **manifest["files"]}


def checked_folder(folder: Path) -> dict[str, Any]:
    """The manifest of an engine folder whose files are those that it lists, and whose graphs use no others.

    Raises EngineRefused.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if str(manifest["target"]).startswith("onnxruntime"):
        listed = manifest["files"]
        for name in [manifest["engine"]["file"], *(name for name in listed if name.endswith(".onnx"))]:
            _check_graph(folder / name, listed)
    return manifest


def _check_graph(graph: Path, listed: Collection[str] | None = None) -> None:
    try:
        check_external(graph, listed)
    except UnsafeGraph as error:
        raise EngineRefused(str(error)) from None


class Engine:
    """One loaded engine. `run` takes and returns named arrays and is safe to call from several threads."""

    # A run of 512 to 1024 tokens costs a third less per token than one of 4096, whose activations no longer
    # stay in the caches (docs/benchmarks.md, "What was tried").
    max_tokens: int | None = 768

    def __init__(self, manifest: dict[str, Any], session: Any) -> None:
        self.manifest = manifest
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(arrays)), strict=True))


def open_engine(folder: Path, threads: int | None = None) -> Engine:
    """Check digests, then load the engine for the target named in its manifest.

    `threads` is the number of compute threads (default: one per core). Raises EngineRefused.
    """
    folder = Path(folder)
    manifest = checked_folder(folder)
    if manifest["target"] != "onnxruntime":
        raise EngineRefused(
            f"{folder}: built for target {manifest['target']!r}; this runtime serves 'onnxruntime' engines"
        )
    session = onnx_session(folder / manifest["engine"]["file"], threads)
    collapse_heap()
    return Engine(manifest, session)


def onnx_session(
    model: Path | bytes,
    threads: int | None = None,
    *,
    optimize: bool = True,
    settings: Mapping[str, str] | None = None,
) -> Any:
    """An ONNX Runtime CPU session with the options that were measured to be fastest here, and `settings`."""
    import onnxruntime as ort

    if isinstance(model, Path):
        _check_graph(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    usual = {"session.intra_op.spin_duration_us": str(_SPIN_US)}
    if not _has_vnni():
        usual[EXACT_PRODUCTS] = "1"
    for key, value in {**usual, **(settings or {})}.items():
        options.add_session_config_entry(key, value)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=_SLOW_FUSIONS
        )
    except Exception as error:  # ONNX Runtime raises its own untyped exceptions
        name = "graph in memory" if isinstance(model, bytes) else str(model)
        raise EngineRefused(f"{name}: ONNX Runtime refuses it: {str(error).splitlines()[0]}") from error


@functools.cache
def _has_vnni() -> bool:
    """Without these instructions the fast u8 x s8 kernels add pairs of products in 16 bits, which overflows;
    ONNX Runtime has exact, slower ones that must be asked for."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return "vnni" in flags
