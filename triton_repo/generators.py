"""The config spec of a causal LLM: one decoupled model that answers a request with a stream of responses."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from build_engines.stack import Model
from triton_repo.config_pbtxt import ConfigSpec, TensorSpec, WarmupSpec
from triton_repo.encoders import queue_parameters

# All optional for Triton: which go together is for the model to say, with a better message.
INPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text", "STRING", (1,), optional=True),
    TensorSpec("messages", "STRING", (1,), optional=True),
    TensorSpec("max_tokens", "INT32", (1,), optional=True),
    TensorSpec("temperature", "FP32", (1,), optional=True),
    TensorSpec("top_k", "INT32", (1,), optional=True),
    TensorSpec("top_p", "FP32", (1,), optional=True),
    TensorSpec("min_p", "FP32", (1,), optional=True),
    TensorSpec("repetition_penalty", "FP32", (1,), optional=True),
    TensorSpec("seed", "INT64", (1,), optional=True),
    TensorSpec("stop", "STRING", (-1,), optional=True),
    TensorSpec("stop_token_ids", "INT32", (-1,), optional=True),
    TensorSpec("n", "INT32", (1,), optional=True),
    TensorSpec("logprobs", "BOOL", (1,), optional=True),
    TensorSpec("ignore_eos", "BOOL", (1,), optional=True),
    TensorSpec("stream", "BOOL", (1,), optional=True),
)
OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text", "STRING", (-1,)),
    TensorSpec("index", "INT32", (-1,)),
    TensorSpec("token_ids", "INT32", (-1,)),
    TensorSpec("token_counts", "INT32", (-1,)),
    TensorSpec("logprobs", "FP32", (-1,)),
    TensorSpec("finish_reason", "STRING", (-1,)),
    TensorSpec("usage", "STRING", (1,)),
)

# A prompt that every tokenizer and slot has room for, and enough steps to have decoded, not just read it.
_WARMUP: Mapping[str, bytes] = {
    "text": struct.pack("<I", 2) + b"ok",
    "max_tokens": struct.pack("<i", 4),
    "stream": struct.pack("<?", False),
}


def generator_spec(model: Model, triton_name: str, manifest: Mapping[str, Any], runtime: str) -> ConfigSpec:
    """The spec that serves one engine; `runtime` is the fingerprint of the runtime copied beside it.

    No queue of Triton's: requests wait for a slot in the model's own scheduler, whose bounds are parameters.
    """
    serving = manifest["serving"]
    return ConfigSpec(
        name=triton_name,
        max_batch=0,
        inputs=INPUTS,
        outputs=OUTPUTS,
        batching=None,
        # TensorRT-LLM finds the GPU itself.
        kind="KIND_CPU" if manifest["target"] in {"onnxruntime", "tensorrt-llm"} else "KIND_GPU",
        decoupled=True,
        warmup=(WarmupSpec("a few tokens", {name: ((1,), name) for name in _WARMUP}),),
        parameters={
            "task": model.task,
            "precision": manifest["precision"],
            "target": manifest["target"],
            "slots": str(serving["slots"]),
            "capacity": str(serving["capacity"]),
            "chunk": str(serving["chunk"]),
            **queue_parameters(model.queue),
            "runtime": runtime,
        },
    )


def warmup_files() -> dict[str, bytes]:
    """Contents by file name in `warmup/`, each tensor in Triton's raw form."""
    return dict(_WARMUP)
