"""The config spec of an encoder: its tensors by task, its queue from the stack file, its warm-up request."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from build_engines.errors import RepositoryError
from build_engines.stack import Model, Queue
from triton_repo.config_pbtxt import BatchingSpec, ConfigSpec, TensorSpec, WarmupSpec

# Short enough for every max_length, so that no model refuses its own warm-up.
_WARMUP_TEXT = b"ok"
# The versions of a model share a folder of these: another content would need another name.
WARMUP_FILE = "text"


def encoder_spec(model: Model, triton_name: str, manifest: Mapping[str, Any], runtime: str) -> ConfigSpec:
    """The spec that serves one engine; `runtime` is the fingerprint of the runtime copied beside it."""
    inputs, outputs = _tensors(triton_name, manifest)
    return ConfigSpec(
        name=triton_name,
        max_batch=model.max_batch,
        inputs=inputs,
        outputs=outputs,
        # What waits, and for how long, is the model's own business: see runtime.batching.
        batching=BatchingSpec(max_delay_us=model.queue.max_delay_us),
        kind="KIND_CPU" if manifest["target"] == "onnxruntime" else "KIND_GPU",
        instances=model.instances,
        cache=model.cache,
        warmup=(WarmupSpec("one text", {tensor.name: ((1,), WARMUP_FILE) for tensor in inputs}),),
        parameters={
            "task": model.task,
            "precision": manifest["precision"],
            "target": manifest["target"],
            **queue_parameters(model.queue),
            "runtime": runtime,
        },
    )


def queue_parameters(queue: Queue) -> dict[str, str]:
    """The queue's limits as the served model reads them (runtime.admission.Limits.read)."""
    return {
        "max_queue": str(queue.max_size),
        "deadline_ms": str(queue.deadline_ms),
        "priority_levels": str(queue.priority_levels),
        "default_priority": str(queue.default_priority),
    }


def warmup_bytes() -> bytes:
    """The warm-up file: one BYTES element in Triton's raw form, length first."""
    return struct.pack("<I", len(_WARMUP_TEXT)) + _WARMUP_TEXT


def _tensors(name: str, manifest: Mapping[str, Any]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    serving, task = manifest["serving"], manifest["task"]
    text = (TensorSpec("text", "STRING", (1,)),)
    flag = TensorSpec("truncated", "BOOL", (1,))
    if task == "classify":
        labels = serving.get("labels")
        if not labels:
            raise RepositoryError(f"{name}: the manifest of its engine names no labels")
        size = len(labels)
        return text, (TensorSpec("labels", "STRING", (size,)), TensorSpec("scores", "FP32", (size,)), flag)
    if task == "embed":
        return text, (TensorSpec("embedding", "FP32", (serving["dimension"],)), flag)
    if task == "rerank":
        # Ragged, so that requests with different numbers of passages share a batch.
        return (
            (TensorSpec("query", "STRING", (1,)), TensorSpec("passages", "STRING", (-1,), ragged=True)),
            (TensorSpec("scores", "FP32", (-1,)), TensorSpec("truncated", "BOOL", (-1,))),
        )
    raise RepositoryError(f"{name}: no Triton model serves task {task!r}")
