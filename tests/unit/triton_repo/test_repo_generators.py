"""The repository of a causal LLM: its config, its files, its line in stack.json."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repo_fakes import seal
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import triton_to_np_dtype

from build_engines.errors import ArtifactError, RepositoryError
from build_engines.stack import Model, Queue, Stack, load_stack
from triton_repo import writer
from triton_repo.config_pbtxt import ConfigSpec, parse, render, to_message
from triton_repo.container import docker_command
from triton_repo.generators import INPUTS, generator_spec, warmup_files
from triton_repo.runtime import fingerprint
from triton_repo.server import ServerOptions
from triton_repo.writer import write_repository

SERVING = {"slots": 4, "capacity": 96, "chunk": 32, "positions": 128}
STACK = """
name = "talk"
card = "rtx-5070-ti"

[models.assistant]
task = "generate"
source = "./assistant"
precisions = ["int8-weights", "fp16"]
slots = 4
max_length = 96
prefill_chunk = 32
evaluation = "talks.jsonl"
[models.assistant.queue]
max_size = 7
deadline_ms = 1500
"""
TALKS = [{"messages": [{"role": "user", "content": "안녕"}]}, {"text": "plain"}]


def config(**fields: Any) -> Any:
    model = Model(name="m", task="generate", source="o/m", queue=Queue(max_size=7, deadline_ms=1500))
    manifest = {"precision": "int8-weights", "target": "onnxruntime", "serving": SERVING} | fields
    return parse(render(to_message(generator_spec(model, "m", manifest, "abc"))))


def test_the_model_answers_with_a_stream_and_has_no_queue_of_tritons() -> None:
    message = config()
    assert message.model_transaction_policy.decoupled
    assert message.max_batch_size == 0
    assert not message.HasField("dynamic_batching")
    assert [(group.kind, group.count) for group in message.instance_group] == [
        (pb.ModelInstanceGroup.KIND_CPU, 1)
    ]
    assert config(target="tensorrt-rtx").instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert all(tensor.optional for tensor in message.input)


def test_the_parameters_say_what_is_served() -> None:
    parameters = {name: entry.string_value for name, entry in config().parameters.items()}
    assert parameters == {
        "task": "generate",
        "precision": "int8-weights",
        "target": "onnxruntime",
        "slots": "4",
        "capacity": "96",
        "chunk": "32",
        "max_queue": "7",
        "deadline_ms": "1500",
        "priority_levels": "3",
        "default_priority": "2",
        "runtime": "abc",
    }


def test_the_warm_up_is_one_whole_request_that_triton_does_not_skip() -> None:
    sample = config().model_warmup[0]
    assert sample.batch_size == 1
    files = warmup_files()
    assert {entry.input_data_file for entry in sample.inputs.values()} == set(files)
    types = {tensor.name: tensor.data_type for tensor in INPUTS}
    for name, entry in sample.inputs.items():
        assert entry.data_type == pb.DataType.Value(f"TYPE_{types[name]}")
        assert list(entry.dims) == [1]
        if types[name] != "STRING":
            dtype = triton_to_np_dtype(types[name])
            assert len(files[name]) == np.dtype(dtype).itemsize
    assert struct.unpack_from("<I", files["text"]) == (len(files["text"]) - 4,)


def test_a_decoupled_model_cannot_be_cached() -> None:
    spec = ConfigSpec(name="m", max_batch=0, inputs=(), outputs=(), batching=None, cache=True, decoupled=True)
    with pytest.raises(RepositoryError, match="caches no responses"):
        to_message(spec)


@pytest.fixture
def stack(tmp_path: Path, engine_folder: Callable[..., Path]) -> Stack:
    (tmp_path / "stack.toml").write_text(STACK)
    lines = (json.dumps(talk, ensure_ascii=False) for talk in TALKS)
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    for precision in ("int8-weights", "fp16"):
        folder = engine_folder(tmp_path / "engines", "assistant", precision, "generate")
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "engine.onnx.data").write_bytes(b"weights")
        files = ("tokenizer.json", "chat_template.jinja", "engine.onnx.data")
        seal(folder, "assistant", precision, "generate", files=files, **SERVING)
    return load_stack(tmp_path / "stack.toml", build_dir=tmp_path)


def test_every_file_of_the_engine_is_served(stack: Stack, tmp_path: Path) -> None:
    out = write_repository(stack, tmp_path / "engines", tmp_path / "repository")
    assert {path.name for path in out.iterdir()} == {"assistant", "assistant-fp16"}
    version = out / "assistant" / "1"
    assert {"engine.onnx.data", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in version.iterdir()
    }
    engine = tmp_path / "engines" / "assistant" / "int8-weights" / "onnxruntime" / "engine.onnx.data"
    assert (version / "engine.onnx.data").samefile(engine)
    model_file = Path(writer.__file__).parent / "models" / "generator.py"
    assert (version / "model.py").read_bytes() == model_file.read_bytes()
    assert fingerprint(version / "triton_repo" / "runtime") == fingerprint()
    for name, content in warmup_files().items():
        assert (out / "assistant" / "warmup" / name).read_bytes() == content


def test_the_summary_tells_the_client_what_is_served(stack: Stack, tmp_path: Path) -> None:
    write_repository(stack, tmp_path / "engines", tmp_path / "repository")
    found = json.loads((tmp_path / "stack.json").read_text())["models"]["assistant"]
    talks = [json.loads(line) for line in Path(found.pop("evaluation")).read_text().splitlines()]
    assert talks == TALKS
    assert found == {
        "task": "generate",
        "target": "onnxruntime",
        "source": str(tmp_path / "assistant"),
        "variants": {"int8-weights": "assistant", "fp16": "assistant-fp16"},
        "slots": 4,
        "capacity": 96,
        "chunk": 32,
    }


def test_the_container_gets_what_chat_templates_need(stack: Stack, tmp_path: Path) -> None:
    out = write_repository(stack, tmp_path / "engines", tmp_path / "repository")
    assert "jinja2==" in docker_command(out, ServerOptions())[-1]


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("slots = 4", "slots = 8", "slots = 4 where the stack file says 8"),
        ("max_length = 96", "max_length = 64", "max_length = 96 where the stack file says 64"),
        ("prefill_chunk = 32", "prefill_chunk = 64", "prefill_chunk = 32 where the stack file says 64"),
    ],
)
def test_engines_of_another_stack_file_are_refused(
    stack: Stack, tmp_path: Path, was: str, now: str, message: str
) -> None:
    path = tmp_path / "stack.toml"
    path.write_text(STACK.replace(was, now))
    with pytest.raises(ArtifactError, match=f"{message}(.|\n)*build it again"):
        write_repository(load_stack(path, build_dir=tmp_path), tmp_path / "engines", tmp_path / "repository")


def test_what_the_stack_file_leaves_open_is_what_was_built(stack: Stack, tmp_path: Path) -> None:
    path = tmp_path / "stack.toml"
    path.write_text(STACK.replace("slots = 4\nmax_length = 96\n", ""))
    write_repository(load_stack(path, build_dir=tmp_path), tmp_path / "engines", tmp_path / "repository")
