"""config.pbtxt as the protobuf message that tritonclient ships, rendered to text and parsed back.

A typed `ConfigSpec` becomes a `ModelConfig` message, so that a misspelt field cannot be written; the text is
parsed again and compared with the message before anyone gets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from build_engines.errors import RepositoryError

DataType = Literal["STRING", "FP32", "BOOL", "INT32", "INT64"]
InstanceKind = Literal["KIND_CPU", "KIND_GPU"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output; `dims` without the batch dimension, -1 for a size that differs per request.

    `ragged`: requests whose sizes differ may share a batch. `optional`: a request may leave the input out.
    """

    name: str
    data_type: DataType
    dims: tuple[int, ...]
    ragged: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingSpec:
    """Dynamic batching and its queue. A request that finds `max_queue_size` others waiting is rejected, so
    is one that waited `timeout_us`. A request may ask for a shorter timeout, never for a longer one.

    `max_delay_us` 0 sends whatever waits as soon as the model is free: under load batches form by themselves.
    `priority_levels` 0 turns priorities off; 1 is the first to run.

    A bound, a timeout or priorities cost latency: with any of them Triton stops fetching the next batch while
    one runs, and a request that arrives just before the model is free again is not noticed until the next one
    arrives or 500 ms have passed (measured: p99 of one client at a time 510 ms instead of 40 ms). So 0, the
    default, writes no policy at all; a request whose client has given up is dropped from the queue even then.
    """

    max_queue_size: int = 0
    timeout_us: int = 0
    max_delay_us: int = 0
    priority_levels: int = 0
    default_priority: int = 0


@dataclass(frozen=True, slots=True)
class WarmupSpec:
    """A request that Triton sends before the model is ready: per input its dims and a file in `warmup/`."""

    name: str
    files: Mapping[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSpec:
    """Everything config.pbtxt says about one Python-backend model.

    `decoupled`: it answers a request with any number of responses. `max_batch` 0: tensors have no batch
    dimension, and requests are never batched by Triton.
    """

    name: str
    max_batch: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batching: BatchingSpec | None
    kind: InstanceKind = "KIND_CPU"
    instances: int = 1
    cache: bool = False
    decoupled: bool = False
    warmup: tuple[WarmupSpec, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)


def to_message(spec: ConfigSpec) -> Any:
    """The ModelConfig message of a spec. Raises RepositoryError for a combination that Triton refuses."""
    from tritonclient.grpc import model_config_pb2 as pb

    message = pb.ModelConfig(name=spec.name, backend="python", max_batch_size=spec.max_batch)
    types = {tensor.name: pb.DataType.Value(f"TYPE_{tensor.data_type}") for tensor in spec.inputs}
    for tensor in spec.inputs:
        message.input.add(
            name=tensor.name,
            data_type=types[tensor.name],
            dims=tensor.dims,
            allow_ragged_batch=tensor.ragged,
            optional=tensor.optional,
        )
    for tensor in spec.outputs:
        kind = pb.DataType.Value(f"TYPE_{tensor.data_type}")
        message.output.add(name=tensor.name, data_type=kind, dims=tensor.dims)
    if spec.batching is not None:
        if spec.max_batch < 1:
            raise RepositoryError(f"{spec.name}: dynamic batching needs max_batch_size of at least 1")
        message.dynamic_batching.CopyFrom(_batching(pb, spec.name, spec.batching))
    message.instance_group.add(kind=pb.ModelInstanceGroup.Kind.Value(spec.kind), count=spec.instances)
    if spec.cache and spec.decoupled:
        raise RepositoryError(f"{spec.name}: Triton caches no responses of a decoupled model")
    if spec.cache:
        message.response_cache.enable = True
    if spec.decoupled:
        message.model_transaction_policy.decoupled = True
    for warmup in spec.warmup:
        # 1 also for a model without batches: Triton leaves out a warm-up of 0.
        sample = message.model_warmup.add(name=warmup.name, batch_size=1)
        for name, (dims, file) in warmup.files.items():
            entry = sample.inputs[name]
            entry.data_type, entry.input_data_file = types[name], file
            entry.dims.extend(dims)
    for name, value in spec.parameters.items():
        message.parameters[name].string_value = value
    return message


def render(message: Any) -> str:
    """The text of a ModelConfig message. Raises RepositoryError unless it parses back to an equal message."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(message, as_utf8=True)
    if message.max_batch_size == 0:
        # Protobuf leaves out a zero, but to Triton a missing field means "complete the config yourself".
        text += "max_batch_size: 0\n"
    if parse(text) != message:
        raise RepositoryError(f"{message.name}: config.pbtxt does not parse back to what was written")
    return text


def parse(text: str) -> Any:
    """The ModelConfig message of a config.pbtxt. Raises RepositoryError naming line and column."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    try:
        return text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        raise RepositoryError(f"config.pbtxt: {error}") from None


def _batching(pb: Any, name: str, spec: BatchingSpec) -> Any:
    if spec.priority_levels and not 1 <= spec.default_priority <= spec.priority_levels:
        raise RepositoryError(
            f"{name}: default priority {spec.default_priority} is outside 1..{spec.priority_levels}"
        )
    batching = pb.ModelDynamicBatching(
        max_queue_delay_microseconds=spec.max_delay_us,
        priority_levels=spec.priority_levels,
        default_priority_level=spec.default_priority if spec.priority_levels else 0,
    )
    if spec.max_queue_size or spec.timeout_us:
        policy = batching.default_queue_policy
        policy.timeout_action = pb.ModelQueuePolicy.REJECT
        policy.max_queue_size = spec.max_queue_size
        policy.default_timeout_microseconds = spec.timeout_us
        policy.allow_timeout_override = spec.timeout_us > 0
    return batching
