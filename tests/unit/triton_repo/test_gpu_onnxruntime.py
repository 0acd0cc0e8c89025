"""ONNX Runtime engines on the GPU: bound to the device's memory, on its stream, steps recorded or not.

The CUDA runtime is emulated (fake_gpu), and ONNX Runtime's CPU session computes at the device's addresses
(fake_onnxruntime). What is refused is refused by the real onnxruntime, which here is the one for CPUs.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_gpu import FakeCudart
from fake_onnxruntime import FakeSession
from onnx import TensorProto, helper, numpy_helper
from small_decoder import CHUNK, SLOTS, cpu_engine, write_checkpoint
from small_decoder import serving as small_serving

from build_engines.export.decoder import open_decoder, write_decoder
from build_engines.manifest import write_manifest
from build_engines.profiles import DecoderProfile
from build_engines.targets import get_target
from build_engines.targets.decoder_lowering import lower_decoder, widen_decoder
from triton_repo.runtime import engines
from triton_repo.runtime.decoder import DecoderEngine
from triton_repo.runtime.gpu import cuda, onnxruntime
from triton_repo.runtime.gpu.cuda import Device, DeviceMemoryFull
from triton_repo.runtime.gpu.onnxruntime import OnnxRuntimeEngine
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.texts import EngineFailed

VOCABULARY, CAPACITY = 120, 96
SERVING = small_serving(VOCABULARY, capacity=CAPACITY)
# Logits are about 2. Both sides have the same FP16 weights; one of them rounds its cache and sums too.
TOLERANCE = 0.05
Before = Callable[[int], None]


class Gpu:
    """An emulated GPU on which engine folders are opened. `before` is called as each run starts.

    It has room for one engine: a session must be gone before the next is opened.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.api = FakeCudart()
        self.before: Before = lambda graph: None
        self.sessions: list[tuple[weakref.ref[FakeSession], dict[str, bool]]] = []
        monkeypatch.setattr(cuda, "cudart", lambda: self.api)
        monkeypatch.setattr(onnxruntime, "open_session", self._open)

    def _open(self, model: Path, device: Device, **settings: bool) -> FakeSession:
        def before(graph: int) -> None:
            self.before(graph)  # the one of that moment

        assert not any(session() for session, _ in self.sessions)
        session = FakeSession(model, device, before)
        self.sessions.append((weakref.ref(session), settings))
        return session

    @property
    def graphs(self) -> list[int]:
        session = self.sessions[-1][0]()
        assert session is not None
        return session.graphs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu(monkeypatch)
    yield gpu
    assert not gpu.api.misuses


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine folder of a small LLM in FP16, and cpu.onnx beside it."""
    top = tmp_path_factory.mktemp("llm")
    write_checkpoint(top / "checkpoint", VOCABULARY)
    write_decoder(open_decoder(top / "checkpoint"), top / "model.onnx", precision="fp16")
    typed = onnx.load(str(top / "model.onnx"), load_external_data=False)
    onnx.save(lower_decoder(widen_decoder(typed, top), {}), str(top / "cpu.onnx"))
    folder = top / "engine"
    folder.mkdir()
    profile = DecoderProfile(SLOTS, CAPACITY, CHUNK)
    get_target("onnxruntime-cuda").compile(
        top / "model.onnx", folder, profile=profile, compute_capability=None, progress=lambda *_: None
    )
    facts = {"task": "generate", "precision": "fp16", "target": "onnxruntime-cuda", "memory": {}}
    manifest = {**facts, "serving": SERVING, "profile": profile.as_dict()}
    write_manifest(folder, manifest, "engine.onnx")
    return folder


@pytest.fixture(scope="module")
def cpu(llm: Path) -> DecoderEngine:
    return cpu_engine(llm.parent, {"serving": SERVING})


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


def equal(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_an_llm_answers_as_on_the_cpu(gpu: Gpu, llm: Path, cpu: DecoderEngine) -> None:
    """Prompts in chunks, rows of different lengths, gaps that make rows change places, copies."""
    engine = engines.open_decoder_engine(llm)
    prompt = tokens(75, 0)
    equal(engine.logits(prompt, slot=1), cpu.logits(prompt, slot=1))
    lengths = [20, 3, 0, 41]
    for slot, length in enumerate(lengths):
        for start in range(0, length, CHUNK):
            part = tokens(length, slot)[start : start + CHUNK]
            equal(engine.prefill(slot, part, start), cpu.prefill(slot, part, start))
    random = np.random.default_rng(1)
    for step in range(40):
        running = [slot for slot in (0, 1, 3) if random.random() < 0.7] or [3]
        if step == 20:
            for one in (engine, cpu):
                one.copy(0, 2, lengths[0])
            lengths[2] = lengths[0]
        running = [*running, 2] if step >= 20 else running
        new, places = tokens(len(running), 100 + step), [lengths[slot] for slot in running]
        equal(engine.decode(running, new, places), cpu.decode(running, new, places))
        for slot in running:
            lengths[slot] += 1
    engine.close()
    assert not gpu.api.leaks()


def test_past_and_present_are_one_memory_in_fp16(gpu: Gpu, llm: Path) -> None:
    engine = engines.open_decoder_engine(llm)
    bound = [binding.bound for context in engine._engine._contexts for binding, _ in context._bound.values()]
    caches = [name for name in bound[0] if name.startswith("present_")]
    assert len(caches) == 4
    for tensors in bound:
        for name in caches:
            assert tensors[name] == tensors[name.replace("present", "past")]
            assert tensors[name][1] % (CAPACITY * 2 * 16 * 2) == 0  # 2 heads of 16 elements of 2 bytes
    engine.close()


def test_steps_are_recorded_each_under_an_id_and_prompts_are_not(gpu: Gpu, llm: Path) -> None:
    engine = engines.open_decoder_engine(llm)
    assert gpu.sessions[-1][1] == {"exact": False, "graphs": True}
    gpu.graphs.clear()
    engine.prefill(0, tokens(9, 0), 0)
    assert gpu.graphs == [-1]
    gpu.graphs.clear()
    for slots in ([0], [0, 1], [0], [0, 1], [1]):
        engine.decode(slots, [5] * len(slots), [9] * len(slots))
    one, two, again, both, other = gpu.graphs
    assert (one, two) == (again, both)
    assert len({one, two, other}) == 3
    assert min(gpu.graphs) >= 0
    engine.close()


def test_an_llm_whose_steps_cannot_be_recorded_runs_without(
    gpu: Gpu, llm: Path, cpu: DecoderEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def before(graph: int) -> None:
        if graph >= 0:
            raise RuntimeError("capture failed\nand more")

    gpu.before = before
    engine = engines.open_decoder_engine(llm)
    assert [settings["graphs"] for _, settings in gpu.sessions] == [True, False]
    assert "no CUDA graphs" in caplog.text
    assert "capture failed" in caplog.text
    equal(engine.prefill(0, [4, 5, 6], 0), cpu.prefill(0, [4, 5, 6], 0))
    equal(engine.decode([0], [7], [3]), cpu.decode([0], [7], [3]))
    assert set(gpu.graphs) == {-1}
    engine.close()
    assert not gpu.api.leaks()  # of both


def test_steps_that_were_recorded_wrongly_are_noticed(
    gpu: Gpu, llm: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay that does not see the new length."""
    real = OnnxRuntimeEngine.run
    runs: Counter[str] = Counter()

    def run(self: OnnxRuntimeEngine, binding: Any, options: Any) -> None:
        real(self, binding, options)
        graph = options.get_run_config_entry("gpu_graph_id")
        runs[graph] += 1
        if graph != "-1" and runs[graph] > 2:
            address, nbytes = binding.bound["logits"]
            logits = gpu.api.view(address, (nbytes // 4,), np.float32)
            gpu.api.put(self.device.stream, lambda: logits.fill(1.0))

    monkeypatch.setattr(OnnxRuntimeEngine, "run", run)
    engine = engines.open_decoder_engine(llm)
    assert "decoding at" in caplog.text
    assert [settings["graphs"] for _, settings in gpu.sessions] == [True, False]
    engine.close()
    assert not gpu.api.leaks()  # of both


def test_a_closed_engine_keeps_no_session(gpu: Gpu, llm: Path) -> None:
    """It works on the device's stream, so it has to go first."""
    engine = engines.open_decoder_engine(llm)
    engine.close()
    assert gpu.sessions[0][0]() is None


def test_a_full_gpu_is_said_when_the_engine_is_opened(gpu: Gpu, llm: Path) -> None:
    def before(graph: int) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 123")

    gpu.before = before
    with pytest.raises(EngineRefused, match=r"the GPU is full: .* 16,\d+ MiB that are free.*size 123"):
        engines.open_decoder_engine(llm)
    assert not gpu.api.leaks()


def test_a_run_that_fails_is_the_engines_failure(gpu: Gpu, llm: Path, cpu: DecoderEngine) -> None:
    engine = engines.open_decoder_engine(llm)

    def before(graph: int) -> None:
        raise RuntimeError("CUBLAS failure 13\nstack")

    gpu.before = before
    with pytest.raises(EngineFailed, match=r"ONNX Runtime: the run failed: CUBLAS failure 13$"):
        engine.prefill(0, [4, 5], 0)
    gpu.before = lambda graph: None
    equal(engine.prefill(0, [4, 5], 0), cpu.prefill(0, [4, 5], 0))
    engine.close()


# ---- encoders


@pytest.fixture(params=["fp16", "fp32"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An engine folder: embeddings are the sums of attended ids, in two columns."""
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "one"], ["sum"], keepdims=1),
        helper.make_node("Concat", ["sum", "sum"], ["twice"], axis=1),
        helper.make_node("Cast", ["twice"], ["embeddings"], to=TensorProto.FLOAT),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", 2])]
    one = numpy_helper.from_array(np.array([1], np.int64), "one")
    graph = helper.make_graph(nodes, "g", inputs, outputs, [one])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11),
        str(tmp_path / "engine.onnx"),
    )
    served = {"inputs": ["input_ids", "attention_mask"], "pad_id": 0, "max_batch": 4, "max_length": 40}
    facts = {"task": "embed", "precision": request.param, "target": "onnxruntime-cuda", "memory": {}}
    profile = {"batch": [1, 2, 4], "sequence": [1, 20, 40]}
    write_manifest(tmp_path, {**facts, "serving": served, "profile": profile}, "engine.onnx")
    return tmp_path


def test_an_encoder_answers_for_any_shape(gpu: Gpu, encoder: Path) -> None:
    engine = engines.open_encoder_engine(encoder)
    assert gpu.sessions[0][1] == {"exact": engine.manifest["precision"] == "fp32", "graphs": False}
    random = np.random.default_rng(0)
    for rows, width in ((1, 1), (3, 17), (4, 40), (2, 8)):
        ids = random.integers(1, 1000, (rows, width))
        mask = (random.random((rows, width)) < 0.8).astype(np.int64)
        found = engine.run({"input_ids": ids, "attention_mask": mask})["embeddings"]
        np.testing.assert_array_equal(found, np.repeat((ids * mask).sum(1, keepdims=True), 2, 1))
    assert set(gpu.graphs) == {-1}
    engine.close()
    assert not gpu.api.leaks()


# ---- the real module


def test_the_onnxruntime_for_cpus_is_refused_with_what_to_install(
    encoder: Path, llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = FakeCudart()
    monkeypatch.setattr(cuda, "cudart", lambda: api)
    for opened in (
        lambda: engines.open_encoder_engine(encoder),
        lambda: engines.open_decoder_engine(llm),
    ):
        with pytest.raises(EngineRefused, match="is the one for CPUs") as caught:
            opened()
        assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in str(caught.value)
    assert not api.leaks()


def test_a_missing_library_of_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where onnxruntime-gpu is installed and CUDA is not."""
    import onnxruntime as real

    providers = [onnxruntime.PROVIDER, "CPUExecutionProvider"]
    monkeypatch.setattr(real, "get_available_providers", lambda: providers)
    with pytest.raises(EngineRefused, match=r"libonnxruntime_providers\w+\.so: cannot open shared object"):
        onnxruntime.load_library()


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_fell_back_to_the_cpu_is_refused(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as real

    monkeypatch.setattr(onnxruntime, "load_library", lambda: real)
    with Device(api=FakeCudart()) as device, pytest.raises(EngineRefused, match="would compute on the CPU"):
        onnxruntime.open_session(encoder / "engine.onnx", device, exact=True, graphs=False)


def test_memory_that_runs_out_while_loading_is_told_apart(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as real

    def session(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA failure 2: out of memory ; GPU=0")

    monkeypatch.setattr(onnxruntime, "load_library", lambda: real)
    monkeypatch.setattr(real, "InferenceSession", session)
    with Device(api=FakeCudart()) as device, pytest.raises(DeviceMemoryFull, match="the GPU is full"):
        onnxruntime.open_session(encoder / "engine.onnx", device, exact=True, graphs=False)
