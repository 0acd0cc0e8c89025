"""The stack file: what it may say, and that everything else is a StackError which helps."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from build_engines import stack as stack_module
from build_engines import stack_fields, stack_model
from build_engines.errors import StackError
from build_engines.stack import DecoderShape, ModelShape, Queue, compiles, load_stack

REPOSITORY = Path(__file__).parents[3]

VALID: dict[str, Any] = {
    "name": "mine",
    "card": "rtx-5070-ti",
    "targets": ["onnxruntime", "tensorrt-rtx"],
    "reserve_mib": 1000,
    "context_mib": 200,
    "models": {
        "sentiment": {
            "task": "classify",
            "source": "../models/classifier",
            "precisions": ["int8", "fp16"],
            "max_batch": 32,
            "max_length": 128,
            "overflow": "refuse",
            "evaluation": "bundled:reviews:evaluation",
            "calibration": {"data": "texts.csv", "samples": 64, "method": "percentile", "percentile": 99.9},
            "gates": {"min_agreement": 0.98},
            "queue": {"max_size": 10, "deadline_ms": 500, "priority_levels": 3, "default_priority": 2},
        },
        "embedder": {
            "task": "embed",
            "source": "owner/name",
            "revision": "v1.2",
            "pooling": "cls",
            "normalize": False,
            "cache": True,
            "instances": 2,
            "allow_pickle": True,
            "shape": {
                "family": "bert",
                "layers": 12,
                "hidden": 768,
                "ffn": 3072,
                "heads": 12,
                "vocabulary": 32000,
            },
        },
        "reranker": {"task": "rerank", "source": "owner/reranker"},
        "assistant": {
            "task": "generate",
            "source": "owner/llm",
            "precisions": ["int8-weights", "fp16"],
            "slots": 4,
            "max_length": 1024,
            "prefill_chunk": 256,
            "embedding": "int8",
            "head": "fp16",
            "evaluation": "talks.jsonl",
            "calibration": {"data": "bundled:conversations:calibration", "samples": 16},
            "gates": {"max_perplexity_increase": 0.02},
            "queue": {"max_size": 32, "deadline_ms": 2000, "priority_levels": 2},
            "shape": {
                "family": "llama",
                "layers": 48,
                "hidden": 4096,
                "ffn": 14336,
                "heads": 32,
                "kv_heads": 8,
                "vocabulary": 40960,
                "positions": 4096,
            },
        },
        "talker": {"task": "generate", "source": "owner/small"},
    },
}


def _toml(value: Any) -> str:
    """Values as inline TOML; JSON's strings are TOML's basic strings."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(str(value), repr(value))
    return json.dumps(value, ensure_ascii=True).replace("\\u007f", "\\u007F")


def _write(folder: Path, content: dict[str, Any] | str | bytes, name: str = "stack.toml") -> Path:
    path = folder / name
    if isinstance(content, dict):
        content = "\n".join(f"{json.dumps(key)} = {_toml(value)}" for key, value in content.items())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _changed(path: str, value: Any) -> dict[str, Any]:
    """VALID with the dotted key set; `...` removes it."""
    content = copy.deepcopy(VALID)
    *parents, key = path.split(".")
    table = content
    for parent in parents:
        table = table.setdefault(parent, {})
    if value is ...:
        del table[key]
    else:
        table[key] = value
    return content


def _refused(tmp_path: Path, content: dict[str, Any] | str | bytes) -> str:
    path = _write(tmp_path, content)
    with pytest.raises(StackError) as caught:
        load_stack(path)
    assert str(path) in str(caught.value)
    assert caught.value.cause or caught.value.next_step
    return str(caught.value)


def test_reads_everything(tmp_path: Path) -> None:
    stack = load_stack(_write(tmp_path, VALID))
    assert (stack.name, stack.card.compute_capability, stack.reserve_mib) == ("mine", "12.0", 1000)
    assert stack.build_dir == Path("build/mine")
    sentiment, embedder, reranker, _, _ = stack.models.values()
    assert sentiment.source_dir == tmp_path.parent / "models" / "classifier"
    assert sentiment.calibration.data is not None
    assert sentiment.calibration.data.path == tmp_path / "texts.csv"
    assert (sentiment.calibration.method, sentiment.calibration.percentile) == ("percentile", 99.9)
    assert sentiment.evaluation is not None
    assert sentiment.evaluation.path is None
    assert (sentiment.gates.min_agreement, sentiment.gates.max_accuracy_loss) == (0.98, 0.01)
    assert sentiment.gates.min_spearman is None
    assert (sentiment.queue.priority_levels, sentiment.queue.default_priority) == (3, 2)
    assert sentiment.variants == {"int8": "sentiment", "fp16": "sentiment-fp16"}
    assert embedder.source_dir is None
    assert (embedder.pooling, embedder.normalize, embedder.revision) == ("cls", False, "v1.2")
    assert isinstance(embedder.shape, ModelShape)
    assert (embedder.shape.embedding, embedder.shape.positions) == (768, 512)
    assert (reranker.max_batch, reranker.max_length, reranker.overflow) == (64, 256, "truncate")
    assert reranker.gates.max_ndcg_loss == 0.01
    assert stack.checkpoint_dir(embedder) == Path("build/mine/sources/embedder")
    assert stack.checkpoint_dir(sentiment) == sentiment.source_dir


def test_reads_everything_of_an_llm(tmp_path: Path) -> None:
    *_, model, talker = load_stack(_write(tmp_path, VALID)).models.values()
    assert (model.slots, model.max_length, model.prefill_chunk) == (4, 1024, 256)
    assert (model.embedding, model.head, model.overflow) == ("int8", "fp16", "refuse")
    assert model.queue == Queue(max_size=32, deadline_ms=2000, priority_levels=2, default_priority=1)
    assert model.gates.max_perplexity_increase == 0.02
    assert model.gates.min_fp16_cosine is None
    assert model.calibration.samples == 16
    assert model.evaluation is not None
    assert model.evaluation.path == tmp_path / "talks.jsonl"
    assert isinstance(model.shape, DecoderShape)
    assert (model.shape.kv_heads, model.shape.head_dim, model.shape.tied) == (8, 128, False)
    # Left open: the plan chooses slots and length, everything else has its default.
    assert (talker.slots, talker.max_length, talker.prefill_chunk) == (0, 0, 128)
    assert (talker.precisions, talker.embedding, talker.head) == (("int8-weights",), "fp16", "int8")
    assert (talker.queue.max_size, talker.queue.deadline_ms) == (256, 60_000)
    assert (talker.gates.max_perplexity_increase, talker.calibration.samples) == (0.01, 64)


def test_a_chunk_is_no_longer_than_a_slot(tmp_path: Path) -> None:
    short = _changed("models.talker.max_length", 64)
    assert load_stack(_write(tmp_path, short)).models["talker"].prefill_chunk == 64
    short["models"]["talker"]["prefill_chunk"] = 128
    assert "at most max_length = 64" in _refused(tmp_path, short)


def test_the_files_in_the_repository_load() -> None:
    for path in (REPOSITORY / "stacks").glob("*.toml"):
        stack = load_stack(path)
        assert stack.name == path.stem
        assert all(model.evaluation and model.calibration.data for model in stack.models.values())
    for name in ("demo", "korean-reviews"):
        models = load_stack(REPOSITORY / "stacks" / f"{name}.toml").models
        assert [model.task for model in models.values()] == ["classify", "embed", "rerank", "generate"]


def test_the_name_is_the_files_by_default(tmp_path: Path) -> None:
    assert load_stack(_write(tmp_path, _changed("name", ...), "shop.toml")).name == "shop"
    with pytest.raises(StackError, match=r"name is 'my_shop', as the file is called[\s\S]*write name = "):
        load_stack(_write(tmp_path, _changed("name", ...), "my_shop.toml"))


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("target", "targets"),
        ("models.sentiment.max_lenght", "max_length"),
        ("models.sentiment.calibration.metod", "method"),
        ("models.sentiment.queue.deadline", "deadline_ms"),
        ("models.embedder.shape.layer", "layers"),
        ("models.sentiment.gates.min_agrement", "min_agreement"),
    ],
)
def test_an_unknown_key_names_itself_and_the_nearest(tmp_path: Path, key: str, near: str) -> None:
    message = _refused(tmp_path, _changed(key, 1))
    assert f"unknown key {key}" in message
    assert f"did you mean {near!r}" in message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("card", "rtx-5070ti", "did you mean 'rtx-5070-ti'"),
        ("card", {"memory_mib": 16000, "compute_capability": "12"}, "12.0"),
        ("card", {"memory_mib": 16000, "compute_capability": 12.0}, 'write it in quotes: "12.0"'),
        ("card", {"memory_mib": 12, "compute_capability": "12.0"}, "from 1,024"),
        ("targets", [], "one or more of onnxruntime"),
        ("targets", ["onnxruntime", "onnxruntime"], "twice"),
        ("targets", "onnxruntime", "must be an array"),
        ("targets", ["tensorrt_rtx"], "did you mean 'tensorrt-rtx'"),
        ("models", {}, "is empty"),
        ("models", 3, "models"),
        ("models.sentiment", 3, "must be a table"),
        ("models.sentiment.task", "generat", "did you mean 'generate'"),
        ("models.sentiment.slots", 4, "for generate only"),
        ("models.embedder.head", "int8", "for generate only"),
        ("models.embedder.shape.kv_heads", 2, "allowed here: family"),
        ("models.assistant.precisions", ["int8"], 'write "int8-weights"'),
        ("models.assistant.precisions", ["int4"], "allowed: int8-weights, fp16, fp32"),
        ("models.assistant.max_batch", 8, "slots says how many sequences"),
        ("models.assistant.overflow", "truncate", "always refused, with both lengths"),
        ("models.assistant.pooling", "mean", "for embed only"),
        ("models.assistant.normalize", True, "for embed only"),
        ("models.assistant.cache", True, "cannot cache streamed answers"),
        ("models.assistant.instances", 2, "raise slots"),
        ("models.assistant.slots", -1, "from 0 to 256 slots"),
        ("models.assistant.max_length", 15, "0: the plan chooses"),
        ("models.assistant.max_length", 65536, "32,768"),
        ("models.assistant.prefill_chunk", 2048, "at most max_length = 1024"),
        ("models.assistant.embedding", "int4", "allowed: fp16, int8"),
        ("models.assistant.calibration.method", "entropy", "only weights are quantized"),
        ("models.assistant.calibration.smoothing", "off", "only weights are quantized"),
        ("models.assistant.queue.max_delay_us", 0, "join the running batch"),
        ("models.assistant.queue.max_size", 0, "from 1"),
        ("models.assistant.gates.min_fp16_cosine", 0.9, "allowed here: max_perplexity_increase"),
        ("models.assistant.evaluation", "bundled:reviews:evaluation", "bundled:conversations:evaluation"),
        ("models.assistant.evaluation", "talks.parquet", "bundled:conversations:<split>"),
        ("models.assistant.shape.family", "bert", "llama, mistral, qwen2, qwen3, exaone, exaone4, gemma2"),
        ("models.assistant.shape.kv_heads", 5, "a divisor of heads = 32"),
        ("models.assistant.shape.positions", ..., "positions is missing"),
        ("models.sentiment.task", ..., "models.sentiment.task is missing"),
        ("models.sentiment.source", ..., "models.sentiment.source is missing"),
        ("models.sentiment.source", "a/b/c", 'starts with "./"'),
        ("models.sentiment.source", "a\u0000b", "printable"),
        ("models.sentiment.precisions", ["int4"], "int8, int8-weights, fp16, fp32"),
        ("models.sentiment.precisions", ["fp16", "fp16"], "twice"),
        ("models.sentiment.max_batch", True, "an integer from 1 to 1,024"),
        ("models.sentiment.max_batch", 0, "an integer from 1"),
        ("models.sentiment.max_batch", 1.5, "an integer from 1"),
        ("models.sentiment.max_length", 10**9, "8,192"),
        ("models.sentiment.calibration.percentile", math.nan, "a number from 90 to 100"),
        ("models.sentiment.gates.min_agreement", 2, "a number from 0 to 1"),
        ("models.sentiment.gates.min_spearman", 0.9, "allowed here: min_agreement"),
        ("models.sentiment.calibration.data", "texts.parquet", ".jsonl"),
        ("models.sentiment.evaluation", "bundled:ranking:evaluation", "bundled:reviews:evaluation"),
        ("models.reranker.evaluation", "pairs.csv", ".jsonl"),
        ("models.sentiment.pooling", "mean", "for embed only"),
        ("models.sentiment.revision", "main", "no meaning for a folder"),
        ("models.sentiment.queue.default_priority", 4, "from 1 to 3"),
        ("models.sentiment.queue.priority_levels", 0, "from 1"),
        ("models.embedder.shape.heads", 7, "divisor of hidden"),
        ("models.embedder.cache", "yes", "true, false"),
        ("models.Bad Name", {"task": "embed", "source": "a/b"}, "is no model name"),
        ("models.-x", {"task": "embed", "source": "a/b"}, "is no model name"),
        ("models.sentiment-fp16", {"task": "embed", "source": "a/b"}, "collides"),
        ("name", "Mine", "a-z"),
        ("reserve_mib", -1, "from 0"),
    ],
)
def test_a_bad_value_names_the_key_and_what_is_allowed(
    tmp_path: Path, key: str, value: Any, words: str
) -> None:
    content = copy.deepcopy(VALID)
    table: Any = content
    parts = key.split(".")
    for parent in parts[:-1]:
        table = table.setdefault(parent, {})
    if value is ...:
        del table[parts[-1]]
    else:
        table[parts[-1]] = value
    message = _refused(tmp_path, content)
    assert words in message
    assert parts[-1] in message


def test_a_target_that_cannot_serve_the_card_or_precision(tmp_path: Path) -> None:
    hopper = _changed("card", {"memory_mib": 80000, "compute_capability": "9.0"})
    assert "does not compile for compute capability 9.0" in _refused(tmp_path, hopper)
    fp32 = _changed("models.sentiment.precisions", ["fp32"])
    load_stack(_write(tmp_path, fp32))
    fp32["targets"] = ["tensorrt-rtx"]
    assert "runs sentiment in fp32" in _refused(tmp_path, fp32)
    fp32["targets"] = ["tensorrt-rtx", "onnxruntime-cuda"]
    load_stack(_write(tmp_path, fp32))


def test_what_onnx_runtime_has_no_kernels_for_on_the_gpu(tmp_path: Path) -> None:
    int8 = _changed("models.sentiment.precisions", ["int8", "fp16"])
    int8["targets"] = ["onnxruntime-cuda"]
    message = _refused(tmp_path, int8)
    assert "has none that runs sentiment in int8" in message
    assert "allowed: onnxruntime, tensorrt-rtx, tensorrt for int8" in message
    assert 'precisions = ["fp16"]' in message
    int8["targets"] = ["onnxruntime-cuda", "tensorrt-rtx"]
    load_stack(_write(tmp_path, int8))
    assert not compiles("onnxruntime-cuda", "generate", "fp32")
    assert not compiles("onnxruntime-cuda", "generate", "int8-weights")
    assert compiles("onnxruntime-cuda", "generate", "fp16")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a = [1,\nb = 2", "line 2"),
        ('card = "x"\ncard = "y"\n', "line 2"),
        ("[models.a]\n[models.a]\n", "line 2"),
        (b"ok = 1\nname = '\xff'\n", "not UTF-8 (line 2)"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "9" * 10_000, "not valid TOML"),
        ("", "card is missing"),
    ],
)
def test_what_is_not_toml(tmp_path: Path, content: str | bytes, words: str) -> None:
    assert words in _refused(tmp_path, content)


def test_portable_engines(tmp_path: Path) -> None:
    """For a card that TensorRT-RTX knows, and for one that it does not compile for by itself."""
    assert not load_stack(_write(tmp_path, VALID)).portable
    content = _changed("portable", True)
    assert load_stack(_write(tmp_path, content)).portable
    content["card"] = {"memory_mib": 143_771, "compute_capability": "9.0"}
    assert load_stack(_write(tmp_path, content)).portable
    content["portable"] = False
    assert "portable = true compiles for 8.0" in _refused(tmp_path, content)


def test_portable_where_it_means_nothing(tmp_path: Path) -> None:
    content = _changed("portable", True)
    assert "the card has 7.5" in _refused(tmp_path, {**content, "card": "t4"})
    content["targets"] = ["onnxruntime", "tensorrt"]
    assert "targets does not name tensorrt-rtx" in _refused(tmp_path, content)
    assert "portable is 1" in _refused(tmp_path, _changed("portable", 1))


def test_huge_numbers_and_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reserve_mib is <int>" in _refused(
        tmp_path, 'card = "t4"\nmodels.a = {task = "embed", source = "a/b"}\nreserve_mib = 0x' + "f" * 10_000
    )
    monkeypatch.setattr(stack_fields, "MAX_FILE_BYTES", 10)
    assert "larger than 10 bytes" in _refused(tmp_path, VALID)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="does not exist"):
        load_stack(tmp_path / "none.toml")
    with pytest.raises(StackError, match="is a folder"):
        load_stack(tmp_path)
    with pytest.raises(StackError, match="cannot be read"):
        load_stack(tmp_path / ("x" * 5000))


def test_a_link_loop_in_a_source_is_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    load_stack(_write(tmp_path, _changed("models.sentiment.source", "./loop/x")))


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [path for key, item in inner for path in _paths(item, (*at, key))]


_SCALARS = (
    st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["", "../x", "a/b", "bundled:reviews:train", "mean", "int8", "t4", 0, -1, 10**30])
)  # fmt: skip
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_valid_file_loads_or_is_a_stack_error(tmp_path: Path, data: st.DataObject) -> None:
    content = copy.deepcopy(VALID)
    for path in data.draw(st.lists(st.sampled_from(_paths(VALID)), min_size=1, max_size=3)):
        table: Any = content
        try:
            for key in path[:-1]:
                table = table[key]
            action = data.draw(st.sampled_from(["set", "delete", "rename"]))
            if action == "set":
                table[path[-1]] = data.draw(_VALUES)
            elif action == "delete":
                del table[path[-1]]
            elif isinstance(table, dict):
                table[data.draw(st.text(max_size=12))] = table.pop(path[-1])
        except (KeyError, IndexError, TypeError):
            continue  # An earlier change of this example has removed the place.
    _load_or_refuse(_write(tmp_path, content))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_byte_loads_or_is_a_stack_error(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray((REPOSITORY / "stacks" / "demo.toml").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    _load_or_refuse(_write(tmp_path, bytes(raw)))


def _load_or_refuse(path: Path) -> None:
    """StackError passes; anything else is what the two tests above look for."""
    with contextlib.suppress(StackError):
        load_stack(path)


def test_the_reference_names_every_key() -> None:
    reference = (REPOSITORY / "docs" / "stack-file.md").read_text(encoding="utf-8")
    keys = {
        *stack_module._STACK_KEYS,
        *stack_module._CUSTOM_CARD_KEYS,
        *stack_model.MODEL_KEYS,
        *stack_model.CALIBRATION_KEYS,
        *stack_model.QUEUE_KEYS,
        *stack_model.SHAPE_KEYS,
        *stack_model.DECODER_SHAPE_KEYS,
    }
    keys |= {key for gates in stack_module.DEFAULT_GATES.values() for key in gates}
    sections = {"shape", "gates", "queue", "calibration"}
    missing = {key for key in keys - sections if key not in re.findall(r"\w+", reference)}
    assert not missing
    assert all(f"[models.<name>.{section}]" in reference for section in sections)
