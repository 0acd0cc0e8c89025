"""Golden requests of real engines: the same engine passes, whatever runs beside it, and no other one does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_stack import write_lines, write_stack
from test_pipeline import model_table

from build_engines.export import export_encoder
from build_engines.export.decoder import open_decoder, write_decoder
from build_engines.export.decoder_serving import copy_chat_tokenizer, decoder_serving
from build_engines.golden import record_encoder, record_generator
from build_engines.manifest import write_manifest
from build_engines.pipeline import BuiltEngine
from build_engines.random_model import RandomLlama, write_random_llm
from build_engines.stack import DataRef, load_stack
from build_engines.targets.decoder_lowering import lower_decoder, widen_decoder
from build_engines.verify import load_evaluation
from triton_repo.runtime.encode import Encoder
from triton_repo.runtime.engines import open_decoder_engine
from triton_repo.runtime.generation import GenerationService
from triton_repo.runtime.golden import FILE, Differs, Golden, ProbeFailed, generator_distance, read_golden
from triton_repo.runtime.probe import probe_encoder, probe_generator
from triton_repo.runtime.scheduler import Scheduler
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.tokenization import read_tokenizer

TASKS = ("classify", "embed", "rerank")
LLAMA = RandomLlama(
    layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, vocabulary=512, positions=256, tied=False
)


@pytest.fixture(scope="module")
def engines(checkpoint: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BuiltEngine]:
    """One engine of each task for the CPU, with its golden requests beside it."""
    folder = tmp_path_factory.mktemp("golden")
    found = {task: encoder(checkpoint(task), folder / task, task, data) for task in TASKS}
    return found | {"generate": generator(folder / "llama", folder / "generate")}


def encoder(checkpoint: Path, folder: Path, task: str, data: Path) -> BuiltEngine:
    source = shutil.copytree(checkpoint, folder / "source")
    emphatic(source)
    out = folder / "engine"
    graph = export_encoder(source, task, out)
    graph.path.rename(out / "engine.onnx")
    serving = {**graph.serving, "max_length": 64, "max_batch": 8, "overflow": "truncate"}
    write_manifest(out, facts(task, serving), "engine.onnx")
    table = model_table(task, source, data)
    model = load_stack(write_stack(folder / "stack.toml", {"tiny": table})).models["tiny"]
    evaluation = load_evaluation(model, serving["labels"])
    record_encoder(out, evaluation.texts, evaluation.groups)
    return BuiltEngine(out, write_manifest(out, facts(task, serving), "engine.onnx"), skipped=False)


def generator(source: Path, out: Path) -> BuiltEngine:
    write_random_llm(source, LLAMA)
    emphatic(source)
    out.mkdir()
    decoder = open_decoder(source)
    write_decoder(decoder, out / "model.onnx", precision="fp32")
    graph = widen_decoder(onnx.load(str(out / "model.onnx"), load_external_data=False), out)
    onnx.save(lower_decoder(graph, {}), str(out / "lowered.onnx"))
    resave(onnx.load(str(out / "lowered.onnx")), out / "engine.onnx")
    for path in out.glob("*.onnx*"):
        if path.name != "engine.onnx":
            path.unlink()
    copy_chat_tokenizer(source, out)
    texts = [
        {"text": f"The parcel number {n} came {n} days late, 포장은 좋았어요. " * (n + 1)} for n in range(12)
    ]
    write_lines(source / "talks.jsonl", texts)
    serving = {**decoder_serving(decoder, "fp32"), "slots": 2, "capacity": 96, "chunk": 16}
    write_manifest(out, facts("generate", serving), "engine.onnx")
    record_generator(out, DataRef(spec="talks.jsonl", path=source / "talks.jsonl"))
    return BuiltEngine(out, write_manifest(out, facts("generate", serving), "engine.onnx"), skipped=False)


def facts(task: str, serving: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "tiny",
        "task": task,
        "precision": "fp32",
        "target": "onnxruntime",
        "serving": serving,
    }


def emphatic(checkpoint: Path) -> None:
    """Random weights prefer nothing: with a larger head they do, as trained ones."""
    from safetensors.numpy import load_file, save_file

    path = checkpoint / "model.safetensors"
    tensors = load_file(str(path))
    for name in ("classifier.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = (tensors[name] * 40).astype(tensors[name].dtype)
    save_file(tensors, str(path), metadata={"format": "pt"})


def changed(engine: BuiltEngine, out: Path, change: Callable[[Path], None]) -> Path:
    """A copy with something changed and a manifest that says so: digests do not tell."""
    shutil.copytree(engine.folder, out)
    change(out)
    left_out = ("format", "engine", "files", "digest")
    manifest = {name: value for name, value in engine.manifest.items() if name not in left_out}
    (out / "manifest.json").unlink()
    write_manifest(out, manifest, engine.manifest["engine"]["file"])
    return out


def noisy(folder: Path) -> None:
    """One weight matrix with noise of its own size."""
    path = folder / "engine.onnx"
    model = onnx.load(str(path))
    weights = [
        tensor
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and min(tensor.dims) >= 32 and max(tensor.dims) <= 128
    ]
    weight = weights[len(weights) // 2]
    values = numpy_helper.to_array(weight)
    noise = np.random.default_rng(0).normal(0, values.astype(np.float32).std(), values.shape)
    altered = values + noise
    if values.dtype.kind in "iu":
        bounds = np.iinfo(values.dtype)
        altered = np.clip(np.rint(altered), bounds.min, bounds.max)
    weight.CopyFrom(numpy_helper.from_array(altered.astype(values.dtype), weight.name))
    resave(model, path)


def resave(model: onnx.ModelProto, path: Path) -> None:
    """In one file, in the place of all that were the engine."""
    for pattern in ("engine.onnx*", "prefill.onnx"):
        for found in path.parent.glob(pattern):
            found.unlink()
    onnx.save(model, str(path))


def probe(folder: Path, threads: int | None = None) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["task"] != "generate":
        probe_encoder(Encoder.open(folder, threads), folder)
        return
    service = GenerationService.open(folder, threads=threads)
    try:
        probe_generator(service, folder)
    finally:
        service.close()


@pytest.mark.parametrize("task", [*TASKS, "generate"])
def test_an_engine_passes_its_own_and_one_with_a_weight_altered_does_not(
    engines: dict[str, BuiltEngine], tmp_path: Path, task: str
) -> None:
    engine = engines[task]
    assert FILE in engine.manifest["files"]
    assert (engine.folder / FILE).stat().st_size < 20_000
    probe(engine.folder)
    probe(engine.folder, threads=1)
    with pytest.raises(ProbeFailed, match="golden request") as refused:
        probe(changed(engine, tmp_path / "noisy", noisy))
    golden = read_golden(engine.folder, engine.manifest)
    assert golden is not None
    for request in golden.requests:
        text = request.get("text") or request["query"]
        assert text not in str(refused.value)


@pytest.mark.parametrize("task", ["embed", "generate"])
def test_another_tokenizer_is_named(engines: dict[str, BuiltEngine], tmp_path: Path, task: str) -> None:
    def other(folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"String": ""},
            "behavior": "Isolated",
            "invert": False,
        }
        path.write_text(json.dumps(tokenizer))

    with pytest.raises(ProbeFailed, match="another tokenizer"):
        probe(changed(engines[task], tmp_path / "other", other))


def test_what_the_probe_asked_is_not_counted_as_traffic(engines: dict[str, BuiltEngine]) -> None:
    encoder = Encoder.open(engines["embed"].folder)
    probe_encoder(encoder, engines["embed"].folder)
    assert (encoder.tokens, encoder.padding) == (0, 0)


def without(folder: Path) -> None:
    (folder / FILE).unlink()


@pytest.mark.parametrize("task", [*TASKS, "generate"])
def test_without_golden_requests_an_engine_must_answer_something(
    engines: dict[str, BuiltEngine], tmp_path: Path, task: str
) -> None:
    probe(changed(engines[task], tmp_path / "plain", without))

    def broken(folder: Path) -> None:
        without(folder)
        path = folder / "engine.onnx"
        model = onnx.load(str(path))
        for tensor in model.graph.initializer:
            if (
                tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
                and len(tensor.dims) == 1
            ):
                values = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.full_like(values, np.nan), tensor.name))
        resave(model, path)

    with pytest.raises(EngineRefused, match="the engine does not answer a short text: "):
        probe(changed(engines[task], tmp_path / "broken", broken))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "labels": [], "requests": []}']
)
def test_a_file_that_is_none_of_ours_is_refused(
    engines: dict[str, BuiltEngine], tmp_path: Path, text: str
) -> None:
    folder = changed(engines["embed"], tmp_path / "other", lambda folder: _write(folder, text))
    with pytest.raises(ProbeFailed, match="no golden requests of format 1"):
        probe(folder)


def _write(folder: Path, text: str) -> None:
    (folder / FILE).write_text(text)


def test_texts_of_all_lengths_are_recorded_and_none_that_the_server_refuses(
    engines: dict[str, BuiltEngine], tmp_path: Path
) -> None:
    def refusing(folder: Path) -> None:
        _write(folder, "")

    engine = engines["embed"]
    serving = {**engine.manifest["serving"], "overflow": "refuse"}
    strict = BuiltEngine(engine.folder, {**engine.manifest, "serving": serving}, False)
    folder = changed(strict, tmp_path / "strict", refusing)
    texts = tuple(" ".join(["w7"] * count) for count in (1, 5, 2000, 20, 30))
    record_encoder(folder, texts, ())
    recorded = json.loads((folder / FILE).read_text())["requests"]
    assert [request["tokens"] for request in recorded] == [[3], [7], [22], [32]]


def test_only_tokens_that_are_well_ahead_are_recorded(engines: dict[str, BuiltEngine]) -> None:
    engine = engines["generate"]
    golden = read_golden(engine.folder, engine.manifest)
    assert golden is not None
    opened = open_decoder_engine(engine.folder)
    service = GenerationService(opened, read_tokenizer(engine.folder / "tokenizer.json"), Scheduler(opened))
    for request in golden.requests:
        ids = service.prompt({"text": request["text"]})
        assert len(ids) == request["tokens"] <= opened.capacity - 8
        rows = opened.logits([*ids, *request["token_ids"]])[len(ids) - 1 :]
        for token, logprob, row in zip(request["token_ids"], request["logprobs"], rows, strict=False):
            second, best = np.sort(row)[-2:]
            assert row[token] == best
            assert best - second > 0.3  # 0.5 when it was decoded
            assert logprob == pytest.approx(float(row[token] - np.log(np.exp(row).sum())), abs=0.1)
    assert sum(len(request["token_ids"]) for request in golden.requests) > 8
    service.close()


def test_a_generation_is_compared_token_by_token() -> None:
    recorded = {"token_ids": [5, 6], "logprobs": [-0.1, -0.2]}
    assert generator_distance(recorded, [5, 6], [-0.1, -0.4]) == pytest.approx(0.1)
    with pytest.raises(Differs, match="7 instead of token 6, at place 2"):
        generator_distance(recorded, [5, 7], [-0.1, -0.2])
    with pytest.raises(Differs, match="nothing instead of token 6, at place 2"):
        generator_distance(recorded, [5], [-0.1])
    with pytest.raises(Differs, match="not finite"):
        generator_distance(recorded, [5, 6], [-0.1, float("nan")])
    # The second was not clear: any token may come there, but not with any probability.
    assert generator_distance({"token_ids": [5], "logprobs": [-0.1, -0.8]}, [5, 9], [-0.1, -0.9]) < 0.06
    with pytest.raises(Differs, match="1 log probabilities instead of 2"):
        generator_distance({"token_ids": [5], "logprobs": [-0.1, -0.8]}, [5], [-0.1])


def test_one_request_far_away_is_no_other_engine_but_all_of_them_are() -> None:
    golden = Golden("embed", 0.12, (), ({},) * 4)
    golden.judge([0.3, 0.05, 0.05, 0.05])
    with pytest.raises(
        Differs, match=r"on average 0\.175 of an embedding's length .*request 2 of 4 most, with 0\.250"
    ):
        golden.judge([0.15, 0.25, 0.15, 0.15])
    with pytest.raises(Differs):
        golden.judge([float("nan")] * 4)
