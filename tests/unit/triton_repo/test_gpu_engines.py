"""Engine folders opened on an emulated GPU: answers equal those computed by hand, and what is refused."""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_gpu import FakeCudart
from fake_tensorrt import FakeTensorRT, emulate, write_engine
from onnx import TensorProto, helper
from repo_fakes import HandEngine, seal

from triton_repo import runtime
from triton_repo.runtime import session
from triton_repo.runtime.encode import Encoder
from triton_repo.runtime.engines import open_decoder_engine, open_encoder_engine
from triton_repo.runtime.gpu.cuda import Device, DeviceMemoryFull
from triton_repo.runtime.gpu.encoder import GpuEncoderEngine, round_up
from triton_repo.runtime.gpu.runtime_cache import cache_path
from triton_repo.runtime.gpu.tensorrt import TensorRTEngine
from triton_repo.runtime.service import EncoderService
from triton_repo.runtime.session import EngineRefused, manifest_digest, sha256
from triton_repo.runtime.tokenization import Row, TextTokenizer

MAX_BATCH, MAX_LENGTH = 6, 40
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def hand_graph(task: str) -> onnx.ModelProto:
    """HandEngine as a graph: sums over each row's own tokens."""
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["own"]),
        helper.make_node("ReduceSum", ["own", "one"], ["total"], keepdims=1),
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["count"], keepdims=1),
    ]
    inputs, last = list(INPUTS[:2]), 2
    if task == "rerank":
        inputs.append("token_type_ids")
        nodes += [
            helper.make_node("Mul", ["input_ids", "token_type_ids"], ["second"]),
            helper.make_node("ReduceSum", ["second", "one"], ["sums"], keepdims=0),
            helper.make_node("Cast", ["sums"], ["scores"], to=TensorProto.FLOAT),
        ]
        output = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch"])
    else:
        nodes += [
            helper.make_node("Concat", ["total", "count"], ["both"], axis=1),
            helper.make_node("Cast", ["both"], ["embeddings"], to=TensorProto.FLOAT),
        ]
        output = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", last])
    values = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"]) for n in inputs]
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, task, values, [output], [one])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture
def folder(tmp_path: Path, wordpiece_file: Path) -> Callable[..., Path]:
    """Write a finished folder with an engine for the emulated GPU; keywords replace parts of its manifest."""

    def write(task: str = "embed", *, cards: tuple[str, ...] = ("12.0",), **changes: Any) -> Path:
        made = tmp_path / task
        made.mkdir(exist_ok=True)
        ranges = {"batch": (1, 2, MAX_BATCH), "sequence": (1, 16, MAX_LENGTH)}
        for name in ("engine.trt", "engine.onnx"):  # seal() knows the second name
            write_engine(made / name, hand_graph(task), [ranges], cards=cards)
        (made / "tokenizer.json").write_bytes(wordpiece_file.read_bytes())
        inputs = [*INPUTS[:2], *(["token_type_ids"] if task == "rerank" else [])]
        seal(made, "m", "fp16", task, inputs=inputs, max_length=MAX_LENGTH, max_batch=MAX_BATCH)
        manifest = json.loads((made / "manifest.json").read_text())
        target = changes.get("target", "tensorrt-rtx")
        engine = made / "engine.trt"
        manifest |= {
            "target": target,
            "engine": {"file": engine.name, "bytes": engine.stat().st_size, "sha256": sha256(engine)},
            "versions": {target: "1.7.1.116" if target == "tensorrt-rtx" else "11.4.0.106"},
            "profile": {name: list(sizes) for name, sizes in ranges.items()},
            "compute_capability": "12.0",
            "portable": False,
            "memory": {"weights": 2**20, "activations": 2**20, "buffers": 2**20},
        }
        manifest |= changes
        manifest["digest"] = manifest_digest(manifest)
        (made / "manifest.json").write_text(json.dumps(manifest))
        return made

    return write


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, FakeCudart, FakeTensorRT]]:
    api, trt = emulate(monkeypatch, rtx=request.param == "tensorrt-rtx", devices=2)
    yield request.param, api, trt
    assert api.misuses == []


def texts(count: int) -> np.ndarray:
    words = ["good", "bad noodles", "the review", "별로예요 " * 3, "not good, not bad; " * 2]
    made = [f"{words[index % 5]} {'x' * (index % 7)}" for index in range(count)]
    return np.array([[text.encode()] for text in made], dtype=object)


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_requests_are_answered_as_by_hand(
    task: str, gpu: tuple[str, FakeCudart, FakeTensorRT], folder: Callable[..., Path]
) -> None:
    target, api, trt = gpu
    made = folder(task, target=target)
    encoder = Encoder.open(made, device=1)
    tokenizer = TextTokenizer(made / "tokenizer.json", max_length=MAX_LENGTH)
    by_hand = HandEngine(task, max_batch=MAX_BATCH)
    requests: list[dict[str, Any]] = [{"text": texts(count)} for count in (1, 2, 5, 6, 11, 6, 2, 1)]
    if task == "rerank":
        requests = [{"query": r["text"][:1], "passages": r["text"].reshape(1, -1)} for r in requests]
    expected = EncoderService(Encoder(by_hand, tokenizer, overhead=32)).answer(requests)
    for _ in range(3):
        for mine, theirs in zip(EncoderService(encoder).answer(requests), expected, strict=True):
            assert isinstance(mine, dict)
            assert isinstance(theirs, dict)
            assert {name: value.tolist() for name, value in mine.items()} == {
                name: value.tolist() for name, value in theirs.items()
            }
    assert [stream.device for stream in api.streams.values()] == [1]
    encoder.close()
    encoder.close()
    trt.engines.clear()
    gc.collect()
    assert api.leaks() == []


def test_shapes_are_few_and_inside_the_profile(
    gpu: tuple[str, FakeCudart, FakeTensorRT], folder: Callable[..., Path]
) -> None:
    target, _, _ = gpu
    engine = open_encoder_engine(folder(target=target))
    seen = set()
    enqueue = engine._context.enqueue
    engine._context.enqueue = lambda shapes, addresses: (
        seen.add(shapes["input_ids"]),
        enqueue(shapes, addresses),
    )
    for batch in range(1, MAX_BATCH + 1):
        for width in range(1, MAX_LENGTH + 1):
            ids = np.arange(batch * width).reshape(batch, width)
            found = engine.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
            assert found["embeddings"].tolist() == [[sum(row), width] for row in ids.tolist()]
    assert seen == {(batch, width) for batch in (1, 2, 4, 6) for width in (16, 24, 32, 40)}
    engine.close()


def test_rounding_up() -> None:
    assert [round_up(size, 1, 256) for size in (1, 2, 3, 5, 9, 16)] == [1, 2, 4, 8, 16, 16]
    assert [round_up(size, 16, 500) for size in (1, 17, 24, 25, 33, 49, 65, 97, 200, 300, 400)] == (
        [16, 24, 24, 32, 48, 64, 96, 128, 256, 384, 500]
    )
    assert round_up(7, 1, 6) == 7, "what is too much stays so, and is refused"
    for most in (1, 6, 40, 512):
        for size in range(1, most + 1):
            assert size <= round_up(size, 1, most) <= most
            assert size <= round_up(size, min(16, most), most) <= most


def test_padding_rows_are_no_rows_without_any_token(
    gpu: tuple[str, FakeCudart, FakeTensorRT], folder: Callable[..., Path]
) -> None:
    """A mean over no token would be 0 / 0, and TensorRT's softmax over nothing likewise."""
    target, _, _ = gpu
    engine = open_encoder_engine(folder(target=target))
    mask = engine._inputs["attention_mask"]
    engine.run({name: np.ones((3, 5), np.int64) for name in INPUTS[:2]})
    assert mask.host((4, 16)).sum(1).tolist() == [5, 5, 5, 1]
    engine.close()


def test_the_engine_says_how_much_it_takes_at_once(folder: Callable[..., Path]) -> None:
    class Recorded(HandEngine):
        max_tokens = None

    engine = Recorded("embed", max_batch=64)
    tokenizer = TextTokenizer(folder() / "tokenizer.json", max_length=MAX_LENGTH)
    rows = [Row([1] * 40, [0] * 40, False)] * 64
    Encoder(engine, tokenizer, overhead=100_000).encode(rows)
    assert engine.runs == [(64, 40)]
    engine.runs.clear()
    engine.max_tokens = 768  # type: ignore[assignment]
    Encoder(engine, tokenizer, overhead=100_000).encode(rows)
    assert max(rows * width for rows, width in engine.runs) <= 768


def test_a_failing_run_fails_its_rows_alone(
    gpu: tuple[str, FakeCudart, FakeTensorRT], folder: Callable[..., Path]
) -> None:
    target, _, trt = gpu
    service = EncoderService(Encoder.open(folder(target=target)))
    assert isinstance(service.answer([{"text": texts(2)}])[0], dict)
    service.encoder.engine.run({name: np.ones((1, 33), np.int64) for name in INPUTS[:2]})
    trt.fail_enqueue = {trt.enqueued + 1}
    (failed,) = service.answer([{"text": np.array([[b"good " * 30]], dtype=object)}])
    assert "told to fail" in str(failed)
    trt.fail_enqueue = set()
    assert isinstance(service.answer([{"text": texts(2)}])[0], dict)
    service.encoder.close()


def test_the_plan_s_promise_is_in_the_error_when_the_gpu_is_full(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    api, trt = emulate(monkeypatch, total_bytes=2**20)
    api.used_by_others = 2**20 - 6000
    made = folder()
    with pytest.raises(EngineRefused, match=r"the GPU is full: .* the plan promised 1 MiB") as refused:
        open_encoder_engine(made)
    assert isinstance(refused.value.__cause__, DeviceMemoryFull)
    trt.engines.clear()
    gc.collect()
    assert api.leaks() == []


def test_every_allocation_may_fail_and_nothing_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    made, refused = folder("rerank"), 0
    for nth in range(1, 30):
        api, trt = emulate(monkeypatch)
        name = "cudaMalloc" if nth < 15 else "cudaHostAlloc"
        api.fail(name, nth if nth < 15 else nth - 14)
        try:
            open_encoder_engine(made).close()
        except EngineRefused as error:
            refused += any(words in str(error) for words in ("MemoryAllocation", "the GPU is full"))
        trt.engines.clear()
        gc.collect()
        assert api.leaks() == []
    assert refused >= 8


def test_the_runtime_cache_lies_by_engine_and_gpu(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path], tmp_path: Path
) -> None:
    emulate(monkeypatch)
    made = folder()
    engine = open_encoder_engine(made)
    digest = json.loads((made / "manifest.json").read_text())["engine"]["sha256"]
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept == cache_path(digest, "Fake GPU 16 GB")
    assert kept.name == f"{digest[:16]}-fake-gpu-16-gb.cache"
    engine.close()
    monkeypatch.delenv("ONECARD_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_path("ab" * 32, "A") == Path("/home/someone/.cache/onecard/abababababababab-a.cache")


def test_an_engine_for_another_card(monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]) -> None:
    emulate(monkeypatch, compute_capability="9.0", name="Another GPU")
    with pytest.raises(
        EngineRefused, match=re.escape("compiled for compute capability 12.0, the GPU here")
    ) as no:
        open_encoder_engine(folder())
    assert "(Another GPU) has 9.0" in str(no.value)
    assert "portable = true" in str(no.value)
    open_encoder_engine(folder(portable=True)).close()
    with pytest.raises(EngineRefused, match=r"8\.6 and 8\.9"):
        open_encoder_engine(folder(cards=("8.6", "8.9")))


def test_a_portable_engine_is_not_for_older_cards(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    emulate(monkeypatch, compute_capability="7.5")
    with pytest.raises(EngineRefused, match=r"has 7\.5"):
        open_encoder_engine(folder(portable=True))


def test_full_tensorrt_is_for_the_card_it_was_built_on(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    emulate(monkeypatch, rtx=False, compute_capability="8.9")
    with pytest.raises(EngineRefused, match=r"capability 12\.0") as refused:
        open_encoder_engine(folder(target="tensorrt"))
    assert "portable" not in str(refused.value)
    open_encoder_engine(folder(target="tensorrt", compute_capability="8.9")).close()
    with pytest.raises(EngineRefused, match=r"compiled by tensorrt 10\.1, 11\.4\.0\.106 is installed"):
        open_encoder_engine(
            folder(target="tensorrt", compute_capability="8.9", versions={"tensorrt": "10.1"})
        )


def test_another_version_of_the_library(monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]) -> None:
    _, trt = emulate(monkeypatch)
    trt.__version__ = "1.8.0.1"
    with pytest.raises(
        EngineRefused, match=r"1\.7\.1\.116, 1\.8\.0\.1 is installed here.*pip install tensorrt-rtx=="
    ):
        open_encoder_engine(folder())


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]) -> None:
    made = folder()
    api, _ = emulate(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineRefused, match="pip install tensorrt-rtx"):
        open_encoder_engine(made)
    api.devices = 0
    with pytest.raises(EngineRefused, match="cudaErrorNoDevice"):
        open_encoder_engine(made)
    with pytest.raises(EngineRefused, match="target 'openvino'; engines of onnxruntime, onnxruntime-cuda"):
        open_encoder_engine(folder(target="openvino"))
    with pytest.raises(EngineRefused, match="target 'tensorrt-llm'"):
        open_decoder_engine(folder(target="tensorrt-llm"))


def test_altered_files_are_found_before_the_gpu_is_asked(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    api, _ = emulate(monkeypatch)
    made = folder()
    (made / "engine.trt").write_bytes((made / "engine.trt").read_bytes()[:-1] + b"?")
    with pytest.raises(EngineRefused, match="altered after the build"):
        open_encoder_engine(made)
    assert api.calls == {}


def test_inputs_that_are_not_the_manifest_s(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    api, trt = emulate(monkeypatch)
    made = folder("rerank")
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["serving"]["inputs"] = ["input_ids", "attention_mask"]
    with Device(api=api) as device:
        engine = TensorRTEngine(made / "engine.trt", trt, device)
        with pytest.raises(EngineRefused, match="the manifest says attention_mask, input_ids"):
            GpuEncoderEngine(manifest, engine, device)


def test_the_code_for_gpus_is_part_of_the_runtime_s_fingerprint(tmp_path: Path) -> None:
    copied = shutil.copytree(Path(runtime.__file__).parent, tmp_path / "runtime")
    assert runtime.fingerprint(copied) == runtime.fingerprint()
    (copied / "gpu" / "cuda.py").write_text("")
    assert runtime.fingerprint(copied) != runtime.fingerprint()


def test_the_cpu_is_opened_as_before(engine_folder: Callable[..., Path], tmp_path: Path) -> None:
    made = engine_folder(tmp_path, "m", "fp32", "embed")
    (made / "engine.onnx").write_bytes(hand_graph("embed").SerializeToString())
    seal(made, "m", "fp32", "embed")
    engine = open_encoder_engine(made, threads=1)
    assert isinstance(engine, session.Engine)
    found = engine.run({"input_ids": np.array([[3, 4]]), "attention_mask": np.array([[1, 1]])})
    assert found["embeddings"].tolist() == [[7, 2]]


def test_the_real_library_is_asked_and_its_words_are_kept(tmp_path: Path) -> None:
    """With the real TensorRT-RTX: a file that it does not know, on a machine that may have no GPU."""
    real = pytest.importorskip("tensorrt_rtx")
    api = FakeCudart()
    (tmp_path / "engine.trt").write_bytes(b"no engine" * 1000)
    refused = pytest.raises(EngineRefused, match=r"cannot run here: malformed engine \(Fake GPU")
    with Device(api=api) as device, refused:
        TensorRTEngine(tmp_path / "engine.trt", real, device)
