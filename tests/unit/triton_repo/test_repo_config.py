"""config.pbtxt: what is written parses back to the same message, and holds what Triton is to be told."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2 as pb

from build_engines.errors import RepositoryError
from build_engines.stack import Model, Queue
from triton_repo.config_pbtxt import (
    BatchingSpec,
    ConfigSpec,
    EngineSpec,
    TensorSpec,
    WarmupSpec,
    parse,
    render,
    to_message,
)
from triton_repo.encoders import encoder_spec, warmup_bytes
from triton_repo.runtime.admission import Limits

names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
tensors = st.builds(
    TensorSpec,
    names,
    st.sampled_from(["STRING", "FP32", "BOOL", "INT32", "INT64"]),
    st.lists(st.integers(-1, 4096).filter(bool), min_size=1, max_size=3).map(tuple),
    st.booleans(),
    inner=st.none() | st.lists(st.integers(1, 64), max_size=2).map(tuple),
)
engines = st.builds(
    EngineSpec,
    names,
    st.sampled_from(["0", "1"]),
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512)), max_size=4).map(tuple),
)
batching = st.builds(
    BatchingSpec,
    max_queue_size=st.integers(0, 1 << 20),
    timeout_us=st.integers(0, 1 << 40),
    max_delay_us=st.integers(0, 1 << 20),
)
specs = st.builds(
    ConfigSpec,
    name=names,
    max_batch=st.integers(1, 1024),
    inputs=st.lists(tensors, min_size=1, max_size=3, unique_by=lambda t: t.name).map(tuple),
    outputs=st.lists(tensors, max_size=3).map(tuple),
    batching=st.none() | batching,
    kind=st.sampled_from(["KIND_CPU", "KIND_GPU"]),
    instances=st.integers(1, 8),
    cache=st.booleans(),
    engine=st.none() | engines,
    parameters=st.dictionaries(
        names, st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20)
    ),
)


@given(specs)
@settings(deadline=None)
def test_every_spec_survives_the_round_trip(spec: ConfigSpec) -> None:
    message = to_message(spec)
    text = render(message)
    assert parse(text) == message
    assert [tensor.name for tensor in parse(text).input] == [tensor.name for tensor in spec.inputs]
    assert {name: entry.string_value for name, entry in parse(text).parameters.items()} == dict(
        spec.parameters
    )


def model(**fields: Any) -> Model:
    return Model(**({"name": "m", "task": "classify", "source": "owner/m"} | fields))


def manifest(task: str, **serving: Any) -> dict[str, Any]:
    defaults = {"labels": ["negative", "positive"], "dimension": 384}
    return {"task": task, "precision": "int8", "target": "onnxruntime", "serving": defaults | serving}


def config(own: Model, **fields: Any) -> Any:
    spec = encoder_spec(own, "m-int8", manifest(own.task) | fields, "abc")
    return parse(render(to_message(spec)))


def test_a_batch_size_of_zero_is_written_out() -> None:
    spec = ConfigSpec(name="m", max_batch=0, inputs=(), outputs=(), batching=None)
    text = render(to_message(spec))
    assert text.splitlines()[-1] == "max_batch_size: 0"
    assert "max_batch_size" not in text_format.MessageToString(to_message(spec))


def test_the_queue_is_the_model_s_own_and_triton_gets_no_policy() -> None:
    """An empty policy is not the same: any field of it makes Triton stop prefetching."""
    queue = Queue(max_size=7, deadline_ms=1500, max_delay_us=40, priority_levels=4, default_priority=3)
    message = config(model(queue=queue, max_batch=32))
    batching = message.dynamic_batching
    assert message.HasField("dynamic_batching")
    assert not batching.HasField("default_queue_policy")
    assert batching.max_queue_delay_microseconds == 40
    assert (batching.priority_levels, batching.default_priority_level) == (0, 0)
    parameters = {name: entry.string_value for name, entry in message.parameters.items()}
    assert Limits.read(parameters) == Limits(max_size=7, deadline_s=1.5, levels=4, default_level=3)


@pytest.mark.parametrize(
    ("task", "inputs", "outputs"),
    [
        ("classify", {"text": [1]}, {"labels": [2], "scores": [2], "truncated": [1]}),
        ("embed", {"text": [1]}, {"embedding": [384], "truncated": [1]}),
        ("rerank", {"query": [1], "passages": [-1]}, {"scores": [-1], "truncated": [-1]}),
    ],
)
def test_tensors_by_task(task: Any, inputs: dict[str, list[int]], outputs: dict[str, list[int]]) -> None:
    message = config(model(task=task))
    assert {tensor.name: list(tensor.dims) for tensor in message.input} == inputs
    assert {tensor.name: list(tensor.dims) for tensor in message.output} == outputs
    assert {t.name for t in message.input if t.allow_ragged_batch} == (
        {"passages"} if task == "rerank" else set()
    )
    assert set(message.model_warmup[0].inputs) == set(inputs)


def test_where_and_how_often_it_runs() -> None:
    message = config(model(instances=2, cache=True))
    assert message.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
    assert message.instance_group[0].count == 2
    assert message.response_cache.enable
    assert not config(model()).response_cache.enable
    group = config(model(instances=2), target="tensorrt-rtx").instance_group[0]
    assert group.kind == pb.ModelInstanceGroup.KIND_GPU
    # Both on one card: without a list Triton would put two on each.
    assert (list(group.gpus), group.count) == ([0], 2)
    assert not message.instance_group[0].gpus
    parameters = {name: entry.string_value for name, entry in message.parameters.items()}
    own = {"task": "classify", "precision": "int8", "target": "onnxruntime", "runtime": "abc"}
    assert own.items() <= parameters.items()


def test_what_triton_would_refuse_is_refused_first() -> None:
    with pytest.raises(RepositoryError, match="names no labels"):
        encoder_spec(model(), "m", manifest("classify", labels=None), "abc")
    spec = ConfigSpec(
        name="m", max_batch=0, inputs=(), outputs=(), batching=BatchingSpec(max_queue_size=1, timeout_us=1)
    )
    with pytest.raises(RepositoryError, match="dynamic batching needs"):
        to_message(spec)
    with pytest.raises(RepositoryError, match=r"config\.pbtxt: 1:1"):
        parse("nonsense: 1")


def test_the_warm_up_file_is_one_element() -> None:
    raw = warmup_bytes()
    assert int.from_bytes(raw[:4], "little") == len(raw) - 4
    spec = WarmupSpec("w", {"text": ((1,), "file")})
    message = to_message(
        ConfigSpec(
            name="m",
            max_batch=4,
            inputs=(TensorSpec("text", "STRING", (1,)),),
            outputs=(),
            batching=None,
            warmup=(spec,),
        )
    )
    assert message.model_warmup[0].inputs["text"].input_data_file == "file"
