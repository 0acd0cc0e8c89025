"""An engine that can be computed by hand, and finished engine folders around a file that is never run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triton_repo.runtime.session import manifest_digest, sha256


class HandEngine:
    """An engine whose outputs follow from each row's own tokens: [sum of ids, count] or a score of them."""

    max_tokens: int | None = 768

    def __init__(self, task: str, **serving: Any) -> None:
        inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if task == "rerank" else [])
        defaults = {
            "inputs": inputs,
            "labels": ["negative", "neutral", "positive"] if task == "classify" else None,
            "pad_id": 0,
            "max_batch": 4,
            "overflow": "truncate",
        }
        self.manifest = {"task": task, "serving": defaults | serving}
        self.runs: list[tuple[int, int]] = []
        self.break_at_width: int | None = None

    def run(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
        self.runs.append(ids.shape)
        if ids.shape[1] == self.break_at_width:
            raise RuntimeError("out of memory")
        total, count = (ids * mask).sum(1), mask.sum(1)
        classes = np.stack([total % 7, total % 5, total % 3], axis=1).astype(np.float32)
        second = (arrays["token_type_ids"] * ids).sum(1) if "token_type_ids" in arrays else total
        return {
            "embeddings": np.stack([total, count], axis=1).astype(np.float32),
            "probabilities": classes,
            "scores": second.astype(np.float32),
        }


def expected_embedding(ids: list[int]) -> list[float]:
    return [float(sum(ids)), float(len(ids))]


def seal(
    folder: Path,
    model: str,
    precision: str,
    task: str,
    *,
    files: Sequence[str] = ("tokenizer.json",),
    **serving: Any,
) -> None:
    def record(name: str) -> dict[str, Any]:
        return {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}

    manifest: dict[str, Any] = {
        "format": 1,
        "model": model,
        "task": task,
        "precision": precision,
        "target": "onnxruntime",
        "engine": {"file": "engine.onnx", **record("engine.onnx")},
        "files": {name: record(name) for name in files},
        "versions": {"onnxruntime": "1.31.1"},
        "serving": {
            "inputs": ["input_ids", "attention_mask"],
            "labels": ["negative", "positive"] if task == "classify" else None,
            "dimension": 2 if task == "embed" else None,
            "pad_id": 0,
            "max_length": 16,
            "max_batch": 4,
            "overflow": "truncate",
        }
        | serving,
    }
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def reseal(folder: Path, *, engine: str, **changes: Any) -> Path:
    """Write (again) the manifest of every file in `folder`; the folder itself."""
    path = folder / "manifest.json"
    manifest = {"format": 1, **(json.loads(path.read_text()) if path.exists() else {}), **changes}
    files = {
        found.name: {"bytes": found.stat().st_size, "sha256": sha256(found)}
        for found in sorted(folder.iterdir())
        if found != path
    }
    manifest |= {"engine": {"file": engine, **files.pop(engine)}, "files": files}
    path.write_text(json.dumps({**manifest, "digest": manifest_digest(manifest)}))
    return folder
