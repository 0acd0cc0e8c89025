"""The native layout's configs, as Triton's own messages, and what it refuses to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from repo_fakes import seal
from tritonclient.grpc import model_config_pb2 as pb

from build_engines.errors import RepositoryError
from build_engines.stack import Model, Queue, Task, load_stack
from triton_repo.cli import main
from triton_repo.config_pbtxt import BatchingSpec, ConfigSpec, StepSpec, parse, render, to_message
from triton_repo.container import docker_command
from triton_repo.native import native_parts
from triton_repo.runtime import fingerprint
from triton_repo.runtime.session import manifest_digest
from triton_repo.runtime.steps import widths
from triton_repo.server import ServerOptions
from triton_repo.writer import write_repository

OUTPUTS = {
    "classify": ["logits", "probabilities"],
    "embed": ["embeddings"],
    "rerank": ["logits", "scores"],
}


def manifest(task: Task, **serving: Any) -> dict[str, Any]:
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if task == "rerank" else [])
    defaults = {
        "inputs": inputs,
        "outputs": OUTPUTS[task],
        "labels": ["negative", "positive"] if task == "classify" else None,
        "dimension": 384 if task == "embed" else None,
        "max_length": 100,
    }
    return {
        "task": task,
        "precision": "fp16",
        "target": "tensorrt",
        "engine": {"file": "engine.trt"},
        "serving": defaults | serving,
    }


def configs(task: Task, **fields: Any) -> dict[str, Any]:
    model = Model(**({"name": "m", "task": task, "source": "owner/m", "max_batch": 6} | fields))
    parts = native_parts(model, "m-fp16", manifest(task), "abc")
    return {part.spec.name: parse(render(to_message(part.spec))) for part in parts}


def tensors(group: Any) -> dict[str, tuple[int, list[int]]]:
    return {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in group}


@pytest.mark.parametrize("task", ["classify", "embed", "rerank"])
def test_the_ensemble_connects_every_tensor_once(task: Task) -> None:
    """What Triton checks when it loads: names, types and shapes on both ends of every connection."""
    found = configs(task)
    ensemble = found["m-fp16"]
    assert ensemble.platform == "ensemble"
    assert not ensemble.instance_group
    assert ensemble.WhichOneof("scheduling_choice") == "ensemble_scheduling"
    assert ensemble.max_batch_size == 6
    known = tensors(ensemble.input)
    for step in ensemble.ensemble_scheduling.step:
        config = found.pop(step.model_name)
        assert config.max_batch_size == 6
        assert set(step.input_map) == {tensor.name for tensor in config.input}
        for name, tensor in step.input_map.items():
            assert tensors(config.input)[name] == known[tensor]
        for name, tensor in step.output_map.items():
            assert tensor not in known
            known[tensor] = tensors(config.output)[name]
    assert tensors(ensemble.output).items() <= known.items()
    assert set(found) == {"m-fp16"}


def test_the_engine_is_the_tensorrt_backends() -> None:
    engine = configs("classify")["m-fp16_engine"]
    assert (engine.platform, engine.backend) == ("tensorrt_plan", "tensorrt")
    assert engine.default_model_filename == "engine.trt"
    group = engine.instance_group[0]
    assert (group.kind, list(group.gpus), list(group.profile)) == (pb.ModelInstanceGroup.KIND_GPU, [0], ["0"])
    assert engine.HasField("dynamic_batching")
    # Every output of the graph, or the backend refuses to load it.
    assert tensors(engine.output) == {"logits": (pb.TYPE_FP32, [2]), "probabilities": (pb.TYPE_FP32, [2])}
    warmup = engine.model_warmup[0]
    assert warmup.batch_size == 6
    assert {name: (list(entry.dims), entry.zero_data) for name, entry in warmup.inputs.items()} == {
        "input_ids": ([100], True),
        "attention_mask": ([100], True),
    }


def test_graphs_are_captured_for_the_shapes_that_the_tokenizer_makes() -> None:
    cuda = configs("rerank")["m-fp16_engine"].optimization.cuda
    assert cuda.graphs
    captured = set()
    for spec in cuda.graph_spec:
        sizes = {tuple(shape.dim) for shape in spec.input.values()}
        assert set(spec.input) == {"input_ids", "attention_mask", "token_type_ids"}
        assert len(sizes) == 1
        # With a lower bound, rows of an earlier run would take part in this one.
        assert not spec.HasField("graph_lower_bound")
        captured.add((spec.batch_size, *sizes.pop()))
    assert captured == {(batch, width) for batch in (1, 2, 4) for width in widths(100)}


def test_a_rerankers_score_is_one_number_a_row() -> None:
    engine = configs("rerank")["m-fp16_engine"]
    scores = next(tensor for tensor in engine.output if tensor.name == "scores")
    assert scores.HasField("reshape")
    assert list(scores.reshape.shape) == []
    assert not any(tensor.HasField("reshape") for tensor in engine.output if tensor.name != "scores")


def test_the_queue_and_the_instances_are_the_engines_and_the_cache_the_ensembles() -> None:
    queue = Queue(max_size=7, deadline_ms=1500, max_delay_us=40)
    found = configs("classify", queue=queue, instances=2, cache=True)
    engine = found["m-fp16_engine"]
    policy = engine.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (7, 1_500_000)
    assert (policy.timeout_action, policy.allow_timeout_override) == (pb.ModelQueuePolicy.REJECT, True)
    assert engine.dynamic_batching.max_queue_delay_microseconds == 40
    assert engine.instance_group[0].count == 2
    assert {name for name, config in found.items() if config.response_cache.enable} == {"m-fp16"}
    for step in ("m-fp16_tokenize", "m-fp16_answer"):
        config = found[step]
        assert not config.dynamic_batching.HasField("default_queue_policy")
        assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
        assert config.instance_group[0].count == 1


def test_the_engine_s_queue_has_bounds_only_where_they_are_asked_for() -> None:
    """Any policy makes Triton stop preparing the next batch while one runs."""
    batching = configs("classify", queue=Queue(max_delay_us=40))["m-fp16_engine"].dynamic_batching
    assert not batching.HasField("default_queue_policy")
    assert batching.max_queue_delay_microseconds == 40


def test_only_the_ensemble_has_a_task() -> None:
    """By its task a client finds a model."""
    found = configs("classify")
    assert [name for name, config in found.items() if "task" in config.parameters] == ["m-fp16"]
    assert found["m-fp16"].parameters["layout"].string_value == "native"


def test_an_ensemble_has_no_queue() -> None:
    steps = (StepSpec("s", {}, {}),)
    spec = ConfigSpec(name="m", max_batch=1, inputs=(), outputs=(), batching=BatchingSpec(), steps=steps)
    with pytest.raises(RepositoryError, match="an ensemble has no queue"):
        to_message(spec)


STACK = """
name = "s"
card = "rtx-5070-ti"
targets = ["tensorrt", "tensorrt-rtx", "onnxruntime"]

[models.m]
task = "embed"
source = "./m"
precisions = ["fp16"]
max_batch = 4
max_length = 16
"""


def engines(folder: Path, target: str, tokenizer: Path, **gates: Any) -> None:
    engine = folder / "engines" / "m" / "fp16" / target
    engine.mkdir(parents=True)
    (engine / "engine.onnx").write_bytes(b"engine" * 100)
    (engine / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    seal(engine, "m", "fp16", "embed", outputs=["embeddings"])
    found = json.loads((engine / "manifest.json").read_text()) | {"target": target, "gates": gates}
    found["versions"] = {"tensorrt": "11.2.1.2"}
    found["digest"] = manifest_digest(found)
    (engine / "manifest.json").write_text(json.dumps(found))


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_other_targets_are_refused_with_the_reason(tmp_path: Path, wordpiece_file: Path, target: str) -> None:
    (tmp_path / "s.toml").write_text(STACK)
    engines(tmp_path, target, wordpiece_file)
    result = CliRunner().invoke(
        main,
        ["write", str(tmp_path / "s.toml"), "--build-dir", str(tmp_path), "--target", target, "--native"],
    )
    assert result.exit_code == RepositoryError.exit_code
    assert f"--native needs engines of the target tensorrt, not {target}" in result.output
    assert not (tmp_path / "repository").exists()


def test_priorities_are_refused_with_the_reason(tmp_path: Path, wordpiece_file: Path) -> None:
    queue = "[models.m.queue]\npriority_levels = 2\ndefault_priority = 2\n"
    (tmp_path / "s.toml").write_text(STACK + queue)
    engines(tmp_path, "tensorrt", wordpiece_file)
    stack = load_stack(tmp_path / "s.toml", build_dir=tmp_path)
    with pytest.raises(RepositoryError, match="drops a request's priority at an ensemble"):
        write_repository(stack, tmp_path / "engines", tmp_path / "out", target="tensorrt", native=True)


def test_a_written_repository_has_what_each_step_needs(tmp_path: Path, wordpiece_file: Path) -> None:
    (tmp_path / "s.toml").write_text(STACK)
    engines(tmp_path, "tensorrt", wordpiece_file, graph={})
    arguments = ["write", str(tmp_path / "s.toml"), "--build-dir", str(tmp_path), "--target", "tensorrt"]
    result = CliRunner().invoke(main, [*arguments, "--native"])
    assert result.exit_code == 0, result.output
    assert "m, m_engine, m_tokenize" in result.output
    assert "not judged on a GPU yet: m_engine" in result.output
    repository = tmp_path / "repository"
    found = {
        name: {path.name for path in (repository / name / "1").iterdir()}
        for name in ("m", "m_engine", "m_tokenize")
    }
    assert found == {
        "m": {"digests.json"},
        "m_engine": {"engine.onnx", "manifest.json", "digests.json"},
        "m_tokenize": {"manifest.json", "tokenizer.json", "model.py", "triton_repo", "digests.json"},
    }
    assert fingerprint(repository / "m_tokenize" / "1" / "triton_repo" / "runtime") == fingerprint()
    assert (repository / "m_tokenize" / "warmup" / "text").is_file()
    summary = json.loads((tmp_path / "stack.json").read_text())
    assert summary["models"]["m"]["variants"] == {"fp16": "m"}
    words = docker_command(repository, ServerOptions())
    assert "--gpus" in words
    assert "tensorrt==" not in words[-1], "the image's own TensorRT runs these engines"
    judged = json.loads((tmp_path / "engines/m/fp16/tensorrt/manifest.json").read_text())
    judged["gates"] = {"engine": {}}
    judged["digest"] = manifest_digest(judged)
    (tmp_path / "engines/m/fp16/tensorrt/manifest.json").write_text(json.dumps(judged))
    assert "not judged" not in CliRunner().invoke(main, arguments).output
