"""The native layout: an encoder as an ensemble of tokenizer, engine that Triton runs itself, and answer.

    <model>            the ensemble: the same inputs and outputs as the Python model
    <model>_tokenize   texts to rows, padded to few widths so that requests share batches
    <model>_engine     platform tensorrt_plan: batching, optimization profile and CUDA graphs are Triton's
    <model>_answer     labels best first, or scores in the request's shape; an embedder needs none

No name of a stack file has an underscore, so these never meet another model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from build_engines.errors import RepositoryError
from build_engines.stack import Model, Queue
from triton_repo.config_pbtxt import BatchingSpec, ConfigSpec, EngineSpec, StepSpec, TensorSpec, WarmupSpec
from triton_repo.encoders import WARMUP_FILE, encoder_spec
from triton_repo.runtime.encode import ANSWER_OUTPUT
from triton_repo.runtime.steps import widths

# Launching kernels one by one costs most where a run is short; larger runs are bound by what they compute.
GRAPH_BATCHES: Final = (1, 2, 4, 8)
_SHAPE = TensorSpec("shape", "INT32", (2,))


@dataclass(frozen=True, slots=True)
class Part:
    """One Triton model of the layout. `source` is the file of `triton_repo.models` that serves it (None: no
    Python); `files` of the engine folder lie beside it; `warmup`: it is warmed with a text."""

    spec: ConfigSpec
    source: str | None
    files: tuple[str, ...]
    warmup: bool = False


def check_native(model: Model, target: str) -> None:
    """Raises RepositoryError, with the reason, for what the native layout cannot serve."""
    if target != "tensorrt":
        raise RepositoryError(
            f"--native needs engines of the target tensorrt, not {target}",
            cause="Triton's own TensorRT backend runs nothing else: not TensorRT-RTX, whose engines are of "
            "another library, and not ONNX Runtime's CPU engines",
            next_step='name "tensorrt" in targets, build on the GPU and add --target tensorrt, or leave out '
            "--native",
        )
    asked, default = model.queue, Queue()
    if (asked.priority_levels, asked.default_priority) != (default.priority_levels, default.default_priority):
        raise RepositoryError(
            f"models.{model.name}: the native layout has no priorities",
            cause="Triton drops a request's priority at an ensemble",
            next_step="remove priority_levels, or leave out --native",
        )


def native_parts(model: Model, name: str, manifest: Mapping[str, Any], runtime: str) -> list[Part]:
    """The Triton models that serve one encoder engine under `name`; the ensemble comes first."""
    whole = encoder_spec(model, name, manifest, runtime)
    parts = [
        Part(_ensemble(whole, manifest), None, ()),
        Part(_tokenizer(whole, manifest), "tokenize.py", ("manifest.json", "tokenizer.json"), warmup=True),
        Part(_engine(whole, manifest, model.queue), None, ("manifest.json", manifest["engine"]["file"])),
    ]
    if manifest["task"] != "embed":
        parts.append(Part(_answer(whole, manifest), "answer.py", ("manifest.json",)))
    return parts


def _ensemble(whole: ConfigSpec, manifest: Mapping[str, Any]) -> ConfigSpec:
    """Tensors between the steps have the names that the engine or the answer step gives them."""
    task, rows = manifest["task"], {name: name for name in manifest["serving"]["inputs"]}
    given = {tensor.name: tensor.name for tensor in whole.inputs}
    found = ANSWER_OUTPUT[task]
    tokenized = {**rows, "truncated": "truncated"} | ({"shape": "shape"} if task == "rerank" else {})
    last = {"classify": "probabilities", "embed": "embedding", "rerank": "row_scores"}[task]
    steps = [
        StepSpec(f"{whole.name}_tokenize", given, tokenized),
        StepSpec(f"{whole.name}_engine", rows, {found: last}),
    ]
    if task == "classify":
        answer = StepSpec(f"{whole.name}_answer", {last: last}, {"labels": "labels", "scores": "scores"})
        steps.append(answer)
    elif task == "rerank":
        steps.append(
            StepSpec(f"{whole.name}_answer", {"scores": last, "shape": "shape"}, {"scores": "scores"})
        )
    parameters = {name: value for name, value in whole.parameters.items() if name != "runtime"}
    return replace(
        whole, batching=None, warmup=(), parameters=parameters | {"layout": "native"}, steps=tuple(steps)
    )


def _tokenizer(whole: ConfigSpec, manifest: Mapping[str, Any]) -> ConfigSpec:
    rows = tuple(TensorSpec(name, "INT64", (-1,)) for name in manifest["serving"]["inputs"])
    truncated = next(tensor for tensor in whole.outputs if tensor.name == "truncated")
    shape = (_SHAPE,) if manifest["task"] == "rerank" else ()
    return replace(
        whole,
        name=f"{whole.name}_tokenize",
        outputs=(*rows, truncated, *shape),
        batching=BatchingSpec(),
        kind="KIND_CPU",
        instances=1,
        cache=False,
        warmup=(WarmupSpec("one text", {tensor.name: ((1,), WARMUP_FILE) for tensor in whole.inputs}),),
        parameters={"model": whole.name, "runtime": whole.parameters["runtime"]},
    )


def _engine(whole: ConfigSpec, manifest: Mapping[str, Any], queue: Queue) -> ConfigSpec:
    serving = manifest["serving"]
    largest = serving["max_length"]
    batches = [batch for batch in GRAPH_BATCHES if batch <= whole.max_batch]
    graphs = tuple((batch, width) for width in widths(largest) for batch in batches)
    inputs = tuple(TensorSpec(name, "INT64", (-1,)) for name in serving["inputs"])
    return replace(
        whole,
        name=f"{whole.name}_engine",
        inputs=inputs,
        outputs=_engine_outputs(manifest),
        batching=_engine_batching(queue),
        cache=False,
        # The largest run there is: what the card has no room for fails now, not under load.
        warmup=(
            WarmupSpec(
                "the largest batch",
                {tensor.name: ((largest,), None) for tensor in inputs},
                batch=whole.max_batch,
            ),
        ),
        parameters={"model": whole.name},
        engine=EngineSpec(manifest["engine"]["file"], profile="0", graphs=graphs),
    )


def _engine_batching(queue: Queue) -> BatchingSpec:
    """Triton keeps this queue: bounds only where they were asked for, for what they cost there."""
    if replace(queue, max_delay_us=0) == Queue():
        return BatchingSpec(max_delay_us=queue.max_delay_us)
    return BatchingSpec(
        max_queue_size=queue.max_size, timeout_us=queue.deadline_ms * 1000, max_delay_us=queue.max_delay_us
    )


def _engine_outputs(manifest: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """All outputs of the engine: the backend refuses to leave one out."""
    serving = manifest["serving"]
    size = {"classify": len(serving["labels"] or ()), "embed": serving["dimension"], "rerank": -1}[
        manifest["task"]
    ]
    return tuple(
        TensorSpec(name, "FP32", (1,), inner=()) if name == "scores" else TensorSpec(name, "FP32", (size,))
        for name in serving["outputs"]
    )


def _answer(whole: ConfigSpec, manifest: Mapping[str, Any]) -> ConfigSpec:
    if manifest["task"] == "rerank":
        inputs: tuple[TensorSpec, ...] = (TensorSpec("scores", "FP32", (1,)), _SHAPE)
    else:
        inputs = (TensorSpec("probabilities", "FP32", (len(manifest["serving"]["labels"]),)),)
    return replace(
        whole,
        name=f"{whole.name}_answer",
        inputs=inputs,
        outputs=tuple(tensor for tensor in whole.outputs if tensor.name != "truncated"),
        batching=BatchingSpec(),
        kind="KIND_CPU",
        instances=1,
        cache=False,
        warmup=(),
        parameters={"runtime": whole.parameters["runtime"]},
    )
