"""All stages on tiny models, with the real compilers: what is built, what is skipped, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_stack import LABELS, write_lines, write_stack, write_texts

from build_engines.errors import ArtifactError, DataError, ExportError, FetchError, GateError
from build_engines.manifest import StageRun
from build_engines.pipeline import BuiltEngine, build_stack
from build_engines.pipeline.encoder import EncoderBuild
from build_engines.stack import Stack, load_stack
from triton_repo.runtime.encode import Encoder
from triton_repo.runtime.probe import probe_encoder

TASKS = ("classify", "embed", "rerank")
# Random weights in 32 dimensions are not robust, and these tests are not about accuracy.
GATES = {
    "classify": {"min_agreement": 0.8, "max_accuracy_loss": 0.2},
    "embed": {"min_mean_cosine": 0.95, "min_cosine": 0.9, "min_spearman": 0.9},
    "rerank": {"min_spearman": 0.8, "max_ndcg_loss": 0.2},
}


class Lines:
    """A reporter that remembers the stages: (model, stage, skipped)."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, str, bool]] = []
        self.phases: list[str] = []
        self._current = ("", "")

    def start(self, model: str, stage: str) -> None:
        self._current = (model, stage)

    def progress(self, phase: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.phases.append(phase)

    def finish(self, run: StageRun, detail: str) -> None:
        assert detail
        self.stages.append((*self._current, run.skipped))

    @property
    def made(self) -> list[str]:
        return [stage for _, stage, skipped in self.stages if not skipped]


def model_table(task: str, source: Path, data: Path, **extra: Any) -> dict[str, Any]:
    file = "groups.jsonl" if task == "rerank" else "texts.jsonl"
    other = "groups.jsonl" if task == "rerank" else "other.jsonl"
    return {
        "task": task,
        "source": str(source),
        "max_batch": 8,
        "max_length": 64,
        "evaluation": str(data / file),
        "calibration": {"data": str(data / other), "samples": 32},
        "gates": GATES[task],
        **extra,
    }


def stack_of(folder: Path, models: dict[str, dict[str, Any]], **top: Any) -> Stack:
    folder.mkdir(parents=True, exist_ok=True)
    path = write_stack(folder / "stack.toml", models, **{"targets": ["onnxruntime"], **top})
    return load_stack(path, build_dir=folder / "build")


@pytest.fixture(scope="module")
def built(
    checkpoint: Any, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Stack, list[BuiltEngine], Lines]:
    models = {task: model_table(task, checkpoint(task), data) for task in TASKS}
    models["classify"]["precisions"] = ["int8", "int8-weights", "fp16", "fp32"]
    stack = stack_of(tmp_path_factory.mktemp("stack"), models, targets=["onnxruntime", "tensorrt-rtx"])
    lines = Lines()
    return stack, build_stack(stack, lines), lines


@pytest.fixture
def small(checkpoint: Any, data: Path, tmp_path: Path) -> Stack:
    """One embedder with its own copy of the checkpoint and the data, one precision, one target."""
    shutil.copytree(checkpoint("embed"), tmp_path / "source")
    shutil.copytree(data, tmp_path / "data")
    table = model_table("embed", tmp_path / "source", tmp_path / "data", precisions=["fp16"])
    return stack_of(tmp_path, {"tiny": table})


def test_every_engine_is_there_and_says_all_of_itself(built: tuple[Stack, list[BuiltEngine], Lines]) -> None:
    stack, engines, lines = built
    expected = {
        (task, precision, target)
        for task in TASKS
        for precision in stack.models[task].precisions
        for target in stack.targets
        if (precision, target) != ("fp32", "tensorrt-rtx")
    }
    assert {(e.manifest["model"], e.manifest["precision"], e.manifest["target"]) for e in engines} == expected
    assert not any(engine.skipped for engine in engines)
    for engine in engines:
        manifest = engine.manifest
        task, precision, target = (manifest[key] for key in ("model", "precision", "target"))
        assert engine.folder == stack.build_dir / "engines" / task / precision / target
        file = engine.folder / manifest["engine"]["file"]
        assert file.name == ("engine.onnx" if target == "onnxruntime" else "engine.trt")
        assert manifest["engine"]["bytes"] == file.stat().st_size
        assert manifest["versions"].keys() == {target}
        assert manifest["compute_capability"] == ("12.0" if target == "tensorrt-rtx" else None)
        assert manifest["portable"] is False
        assert bool(manifest["memory"]) is (target == "tensorrt-rtx")
        assert manifest["profile"] == {"batch": [1, 8, 8], "sequence": [1, 64, 64]}
        # An engine that has run here says what it answered, and answers it again.
        assert ("golden.json" in manifest["files"]) is (target == "onnxruntime")
        if target == "onnxruntime":
            probe_encoder(Encoder.open(engine.folder, threads=1), engine.folder)
        assert {"checkpoint", "model.onnx"} <= manifest["sources"].keys()
        assert all(len(digest) == 64 for digest in manifest["sources"].values())
        assert manifest["layers"]
        assert manifest["gates"]["graph"]["gate"]["passed"] is True
        assert ("engine" in manifest["gates"]) is (target == "onnxruntime")
        if target == "onnxruntime":
            assert manifest["gates"]["engine"]["passed"] is True
            assert manifest["gates"]["engine"]["samples"] > 0
        serving = manifest["serving"]
        assert serving["labels"] == (list(LABELS) if task == "classify" else None)
        assert (serving["max_length"], serving["max_batch"], serving["overflow"]) == (64, 8, "truncate")
    assert "calibrate" in lines.phases
    assert "Building engine" in lines.phases


def test_the_engines_answer(built: tuple[Stack, list[BuiltEngine], Lines]) -> None:
    """Every precision of the classifier, opened as the server opens it, agrees with PyTorch on most texts."""
    stack, engines, _ = built
    reference = np.load(stack.build_dir / "work" / "classify" / "reference" / "answers.npy")
    texts = [
        json.loads(line)["text"]
        for line in (stack.models["classify"].evaluation.path).read_text().splitlines()  # type: ignore[union-attr]
    ]
    for engine in engines:
        if engine.manifest["target"] == "onnxruntime" and engine.manifest["model"] == "classify":
            encoder = Encoder.open(engine.folder)
            found = np.stack(encoder.encode(encoder.tokenizer.singles(texts)))  # type: ignore[arg-type]
            assert found.shape == reference.shape
            tolerance = {"fp32": 1e-4, "fp16": 5e-3}.get(engine.manifest["precision"], 0.2)
            assert np.abs(found - reference).max() < tolerance


SECOND_RUN = """
import sys, time
from pathlib import Path
started = time.monotonic()
from build_engines.pipeline import build_stack
from build_engines.stack import load_stack

class Quiet:
    def start(self, model, stage): pass
    def progress(self, phase, done, total): raise AssertionError(f"{phase} runs again")
    def finish(self, run, detail): assert run.skipped, run.folder

engines = build_stack(load_stack(Path(sys.argv[1]), build_dir=Path(sys.argv[2])), Quiet())
assert all(engine.skipped for engine in engines)
heavy = {"torch", "transformers", "onnx", "onnxruntime", "sentence_transformers"} & sys.modules.keys()
assert not heavy, heavy
print(len(engines), time.monotonic() - started)
"""


def test_a_second_run_skips_everything_and_loads_no_model_library(
    built: tuple[Stack, list[BuiltEngine], Lines],
) -> None:
    stack, engines, _ = built
    command = [sys.executable, "-c", SECOND_RUN, str(stack.path), str(stack.build_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    count, seconds = done.stdout.split()
    assert int(count) == len(engines)
    assert float(seconds) < 10  # a few tenths on an idle machine


def test_what_changed_is_made_again_and_nothing_else(small: Stack) -> None:
    def stages(stack: Stack) -> list[str]:
        lines = Lines()
        build_stack(stack, lines)
        return lines.made

    everything = ["export", "reference", "fp16", "fp16 onnxruntime"]
    assert stages(small) == everything
    assert stages(small) == []
    work = small.build_dir / "work" / "tiny"
    # A file that was altered after it was made; what follows from it is the same, and so is left alone.
    graph = work / "export" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-3])
    assert stages(small) == ["export"]
    (work / "fp16" / "model.onnx").unlink()
    assert stages(small) == ["fp16"]
    engine = small.build_dir / "engines" / "tiny" / "fp16" / "onnxruntime"
    (engine / "manifest.json").write_text("{}")
    assert stages(small) == ["fp16 onnxruntime"]
    # Other evaluation texts: the graph may be the same, its figures are not, and the manifest must say so.
    before = json.loads((engine / "manifest.json").read_text())["gates"]
    path = small.models["tiny"].evaluation.path  # type: ignore[union-attr]
    assert path is not None
    path.write_text("\n".join(path.read_text().splitlines()[:20]))
    assert stages(small) == ["reference", "fp16", "fp16 onnxruntime"]
    after = json.loads((engine / "manifest.json").read_text())["gates"]
    assert (before["graph"]["gate"]["samples"], after["graph"]["gate"]["samples"]) == (48, 20)
    assert after["engine"]["samples"] == 20
    # A setting of the server alone.
    tiny = dataclasses.replace(small.models["tiny"], overflow="refuse")
    assert stages(dataclasses.replace(small, models={"tiny": tiny})) == ["fp16 onnxruntime"]
    # Another gate.
    gates = dataclasses.replace(tiny.gates, min_cosine=0.91)
    tiny = dataclasses.replace(tiny, gates=gates)
    assert stages(dataclasses.replace(small, models={"tiny": tiny})) == ["fp16", "fp16 onnxruntime"]
    # The checkpoint.
    assert small.models["tiny"].source_dir is not None
    config = small.models["tiny"].source_dir / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_version": "0"}))
    assert stages(dataclasses.replace(small, models={"tiny": tiny}))[:2] == ["export", "reference"]


def test_a_checkpoint_that_changes_under_the_build(small: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small.models["tiny"].source_dir
    assert source is not None
    real = EncoderBuild._parity

    def parity(self: Any, graph: Path, serving: dict[str, Any]) -> float:
        (source / "config.json").write_text((source / "config.json").read_text() + " ")
        return real(self, graph, serving)

    monkeypatch.setattr(EncoderBuild, "_parity", parity)
    with pytest.raises(ArtifactError, match="changed while"):
        build_stack(small, Lines())
    assert not (small.build_dir / "work" / "tiny" / "export").exists()


def test_an_export_that_is_not_the_model_is_refused(small: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    from build_engines.reference import TorchReference

    real = TorchReference.forward
    monkeypatch.setattr(TorchReference, "forward", lambda self, arrays: real(self, arrays) * 1.001)
    with pytest.raises(ExportError, match="differs from PyTorch by"):
        build_stack(small, Lines())
    assert not (small.build_dir / "engines").exists()


def test_a_checkpoint_that_answers_nothing(small: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    from build_engines.reference import TorchReference

    real = TorchReference.forward

    def broken(self: Any, arrays: Any) -> np.ndarray:
        found = real(self, arrays)
        return found if isinstance(arrays, dict) else found * np.nan  # only the tokenized texts

    monkeypatch.setattr(TorchReference, "forward", broken)
    with pytest.raises(ExportError, match="own FP32 answers are not finite"):
        build_stack(small, Lines())


def with_model(stack: Stack, **changes: Any) -> Stack:
    return dataclasses.replace(stack, models={"tiny": dataclasses.replace(stack.models["tiny"], **changes)})


def test_gates_that_cannot_be_met_publish_nothing(small: Stack) -> None:
    gates = dataclasses.replace(small.models["tiny"].gates, min_mean_cosine=1.0, min_cosine=1.0)
    with pytest.raises(GateError, match="no engine was published"):
        build_stack(with_model(small, gates=gates, precisions=("int8",)), Lines())
    assert not (small.build_dir / "engines").exists()


def test_an_engine_that_answers_otherwise_than_its_graph(
    small: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled engine is judged by itself, as the server will open it."""
    from build_engines.targets import onnxruntime

    real = onnxruntime.lower

    def broken(model: Any) -> Any:
        from onnx import numpy_helper

        lowered = real(model)
        for tensor in lowered.graph.initializer:
            if tensor.name == "layers.1.ffn.down.weight":
                values = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(-3 * values, tensor.name))
        return lowered

    monkeypatch.setattr(onnxruntime, "lower", broken)
    with pytest.raises(GateError, match="fails the gate that its graph passed"):
        build_stack(small, Lines())
    assert not (small.build_dir / "engines" / "tiny" / "fp16" / "onnxruntime").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluation": None}, "'tiny' has no evaluation data"),
        ({"calibration": None}, "'tiny' has no calibration data"),
    ],
)
def test_data_that_is_missing_is_known_before_the_work(
    small: Stack, change: dict[str, Any], message: str
) -> None:
    if "calibration" in change:
        change = {"calibration": dataclasses.replace(small.models["tiny"].calibration, data=None)}
    lines = Lines()
    with pytest.raises(DataError, match=message):
        build_stack(with_model(small, **change), lines)
    assert lines.stages == []


def test_labels_that_are_not_the_models(checkpoint: Any, data: Path, tmp_path: Path) -> None:
    write_texts(tmp_path)
    lines = [{"text": "w5 w6", "label": LABELS[0]}] * 6 + [{"text": "w7", "label": "cheerful"}]
    write_lines(tmp_path / "texts.jsonl", lines)
    table = model_table("classify", checkpoint("classify"), data, evaluation=str(tmp_path / "texts.jsonl"))
    with pytest.raises(DataError, match=r"texts\.jsonl, line 7: the label is not one of the model's"):
        build_stack(stack_of(tmp_path, {"tiny": table}), Lines())


def test_labels_in_any_order(checkpoint: Any, data: Path, tmp_path: Path) -> None:
    """Labels are matched by name: their order in the file says nothing."""
    lines = [json.loads(line) for line in (data / "texts.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "texts.jsonl", lines[::-1])
    table = model_table("classify", checkpoint("classify"), data, precisions=["fp32"])
    straight = build_stack(stack_of(tmp_path / "a", {"tiny": table}), Lines())
    table = {**table, "evaluation": str(tmp_path / "texts.jsonl")}
    reverse = build_stack(stack_of(tmp_path / "b", {"tiny": table}), Lines())

    def accuracy(engines: list[BuiltEngine]) -> float:
        checks = engines[0].manifest["gates"]["engine"]["checks"]
        return float(next(check["value"] for check in checks if check["name"] == "accuracy"))

    assert accuracy(straight) == accuracy(reverse)


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"num_labels": 5}, 5),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, 1),
        ({"num_labels": 4, "problem_type": "multi_label_classification"}, 4),
    ],
)
def test_classifiers_of_every_kind(
    checkpoint: Any, data: Path, tmp_path: Path, config: dict[str, Any], labels: int
) -> None:
    write_lines(
        tmp_path / "texts.jsonl",
        [{"text": f"w{i + 5} w{i + 9}", "label": f"LABEL_{i % labels}"} for i in range(12)],
    )
    source = checkpoint("classify", **config)
    evaluation = str(tmp_path / "texts.jsonl")
    table = model_table("classify", source, data, evaluation=evaluation, precisions=["int8"])
    (engine,) = build_stack(stack_of(tmp_path, {"tiny": table}), Lines())
    assert engine.manifest["serving"]["labels"] == [f"LABEL_{i}" for i in range(labels)]
    assert engine.manifest["serving"]["multi_label"] is ("problem_type" in config)


def test_a_reranker_with_two_classes(checkpoint: Any, data: Path, tmp_path: Path) -> None:
    source = checkpoint("rerank", num_labels=2)
    table = model_table("rerank", source, data, precisions=["int8"])
    (engine,) = build_stack(stack_of(tmp_path, {"tiny": table}), Lines())
    assert engine.manifest["gates"]["engine"]["passed"] is True


def test_longer_texts_than_the_checkpoint_has_positions(small: Stack) -> None:
    """`plan` refuses this; whoever builds without it gets an engine for what the checkpoint can read."""
    (engine,) = build_stack(with_model(small, max_length=4096), Lines())
    assert engine.manifest["serving"]["max_length"] == 200
    assert engine.manifest["profile"]["sequence"] == [1, 64, 200]


def test_token_types_for_a_model_that_has_none(checkpoint: Any, data: Path, tmp_path: Path) -> None:
    """DistilBERT with a tokenizer that makes token types: Transformers ignores them, and so do we."""
    source = checkpoint("classify", "distilbert")
    table = model_table("classify", source, data, precisions=["fp32"])
    (engine,) = build_stack(stack_of(tmp_path, {"tiny": table}), Lines())
    assert engine.manifest["serving"]["inputs"] == ["input_ids", "attention_mask"]


def test_external_weights_all_the_way(small: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model beyond a protobuf message: every stage reads and writes weights beside the graph."""
    from build_engines import graphs
    from build_engines.export import encoder

    for owner, function in ((encoder, "export_encoder"), (graphs, "save_graph")):
        monkeypatch.setitem(getattr(owner, function).__kwdefaults__, "external_threshold", 1000)
    monkeypatch.setattr(graphs, "EXTERNAL_THRESHOLD", 1000)
    engines = build_stack(with_model(small, precisions=("int8", "fp16")), Lines())
    for engine in engines:
        assert set(engine.manifest["files"]) == {"engine.onnx.data", "golden.json", "tokenizer.json"}
        assert engine.manifest["gates"]["engine"]["passed"] is True
    work = small.build_dir / "work" / "tiny"
    assert (work / "export" / "model.onnx.data").is_file()
    assert (work / "int8" / "model.onnx.data").is_file()
    data = engines[0].folder / "engine.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    again = Lines()
    build_stack(with_model(small, precisions=("int8", "fp16")), again)
    assert again.made == ["int8 onnxruntime"]


def test_a_checkpoint_that_is_not_there(small: Stack, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="the checkpoint of model 'tiny' is not at") as caught:
        build_stack(with_model(small, source_dir=tmp_path / "nowhere"), Lines())
    assert "correct [models.tiny] source" in str(caught.value)
    with pytest.raises(FetchError, match="not fetched yet"):
        build_stack(with_model(small, source_dir=None, source="owner/name"), Lines())


def test_a_checkpoint_that_transformers_cannot_load(small: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Unrecognized configuration class\nwith a very long list of others")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ExportError, match="Transformers cannot load") as caught:
        build_stack(small, Lines())
    assert "Unrecognized configuration class\n  cause:" in str(caught.value)


def test_a_tokenizer_without_a_padding_token(small: Stack) -> None:
    source = small.models["tiny"].source_dir
    assert source is not None
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (engine,) = build_stack(small, Lines())
    assert engine.manifest["gates"]["engine"]["passed"] is True


def test_only_the_models_and_targets_named(checkpoint: Any, data: Path, tmp_path: Path) -> None:
    tables = {name: model_table("embed", checkpoint("embed"), data, precisions=["fp16"]) for name in "ab"}
    stack = stack_of(tmp_path, tables, targets=["onnxruntime", "tensorrt-rtx"])
    engines = build_stack(stack, Lines(), models=["b"], targets=["tensorrt-rtx"])
    assert [(e.manifest["model"], e.manifest["target"]) for e in engines] == [("b", "tensorrt-rtx")]


def test_a_stack_may_be_built_inside_its_checkpoint(checkpoint: Any, data: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("embed"), tmp_path / "source")
    table = model_table("embed", tmp_path / "source", data, precisions=["fp32"])
    stack = stack_of(tmp_path / "source", {"tiny": table})
    build_stack(stack, Lines())
    again = Lines()
    build_stack(stack, again)
    assert again.made == []


def test_a_checkpoint_may_lie_inside_the_build_folder(checkpoint: Any, data: Path, tmp_path: Path) -> None:
    """As one from the hub does, and the demo's: it is watched like any other."""
    source = shutil.copytree(checkpoint("embed"), tmp_path / "build" / "models" / "tiny")
    stack = stack_of(tmp_path, {"tiny": model_table("embed", source, data)})
    before = EncoderBuild(stack, stack.models["tiny"], Lines()).source_digests
    assert before.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    (source / "config.json").write_text((source / "config.json").read_text() + " ")
    assert EncoderBuild(stack, stack.models["tiny"], Lines()).source_digests != before


def test_swapped_labels_are_judged_anew(checkpoint: Any, data: Path, tmp_path: Path) -> None:
    """The graph does not hold its labels, so neither its digest nor its answers change with them."""
    shutil.copytree(checkpoint("classify"), tmp_path / "source")
    gates = {"min_agreement": 0, "max_accuracy_loss": 1}
    table = model_table("classify", tmp_path / "source", data, precisions=["fp32"], gates=gates)
    stack = stack_of(tmp_path, {"tiny": table})
    build_stack(stack, Lines())
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = dict(zip("012", reversed(LABELS), strict=True))
    path.write_text(json.dumps(config))
    again = Lines()
    (engine,) = build_stack(stack, again)
    assert "fp32" in again.made
    figures = engine.manifest["gates"]
    assert figures["graph"]["gate"]["checks"][1] == figures["engine"]["checks"][1]  # accuracy


def test_a_tokenizer_with_more_token_types_than_the_model(
    checkpoint: Any, data: Path, tmp_path: Path
) -> None:
    """Korean RoBERTa models come with BERT's tokenizer, which numbers the second text 1."""
    from small_stack import write_tokenizer
    from tiny_models import save_tiny

    save_tiny(tmp_path / "source", "roberta", "rerank", type_vocab_size=1, pad_token_id=0)
    write_tokenizer(tmp_path / "source")
    table = model_table("rerank", tmp_path / "source", data, precisions=["fp32"])
    (engine,) = build_stack(stack_of(tmp_path, {"tiny": table}), Lines())
    assert "token_type_ids" not in engine.manifest["serving"]["inputs"]
