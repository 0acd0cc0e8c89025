"""The TensorRT runner over the emulator: true numbers, CUDA graphs, the runtime cache, refusals."""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import pytest
from fake_gpu import FakeCudart
from fake_tensorrt import FakeTensorRT, write_engine
from onnx import TensorProto, helper

from triton_repo.runtime.gpu.cuda import CudaError, Device, DeviceMemoryFull
from triton_repo.runtime.gpu.graph_cache import RUNS_BEFORE, GraphCache
from triton_repo.runtime.gpu.tensorrt import ExecutionContext, TensorRTEngine
from triton_repo.runtime.gpu.tensorrt_callbacks import shared_logger
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.texts import EngineFailed

PROFILES = [{"batch": (1, 1, 2), "width": (1, 1, 1)}, {"batch": (1, 4, 4), "width": (1, 8, 16)}]


def graph(kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """y = x + x and z = the sum of x over its width; x is [batch, width]."""
    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("ReduceSum", ["x", "one"], ["z"])]
    values = {
        name: helper.make_tensor_value_info(name, kind, shape)
        for name, shape in {"x": ["batch", "width"], "y": ["batch", "width"], "z": ["batch", 1]}.items()
    }
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    made = helper.make_graph(nodes, "sums", [values["x"]], [values["y"], values["z"]], [one])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture
def api() -> FakeCudart:
    return FakeCudart()


@pytest.fixture
def device(api: FakeCudart) -> Iterator[Device]:
    with Device(api=api) as device:
        yield device
    gc.collect()
    assert api.misuses == []


@pytest.fixture(params=[True, False], ids=["rtx", "full"])
def trt(api: FakeCudart, request: pytest.FixtureRequest) -> FakeTensorRT:
    return FakeTensorRT(api, rtx=request.param)


@pytest.fixture
def rtx(api: FakeCudart) -> FakeTensorRT:
    return FakeTensorRT(api)


@pytest.fixture
def full(api: FakeCudart) -> FakeTensorRT:
    return FakeTensorRT(api, rtx=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_engine(tmp_path / "engine.trt", graph(), PROFILES, activations=[1024, 8192])
    return tmp_path / "engine.trt"


@pytest.fixture
def one_profile(tmp_path: Path) -> Path:
    """As an encoder's engine."""
    write_engine(tmp_path / "one.trt", graph(), PROFILES[1:])
    return tmp_path / "one.trt"


class Runner:
    """One context with buffers for its largest shapes."""

    def __init__(self, engine: TensorRTEngine, context: ExecutionContext) -> None:
        self.context, self.device = context, engine.device
        self.host = self.device.pinned((4, 16), np.float32)
        self.buffers = {name: self.device.array((4, 16), np.float32, "buffers") for name in "xyz"}

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        staged = self.host.reshape(-1)[: x.size].reshape(x.shape)
        staged[...] = x
        self.device.upload(self.buffers["x"].address, staged)
        self.context.enqueue({"x": x.shape}, {name: a.address for name, a in self.buffers.items()})
        y, z = (
            self.device.pinned(shape, np.float32)
            for shape in self.context.output_shapes({"x": x.shape}).values()
        )
        self.device.download(y, self.buffers["y"].address)
        self.device.download(z, self.buffers["z"].address)
        self.device.synchronize()
        return y, z


def rows(batch: int, width: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + batch * width, dtype=np.float32).reshape(batch, width)


def assert_sums(run: Runner, x: np.ndarray) -> None:
    y, z = run(x)
    assert y.tolist() == (2 * x).tolist()
    assert z.tolist() == x.sum(1, keepdims=True).tolist()


def test_the_fake_has_the_real_names_and_arguments() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    for name, fake in vars(fake_tensorrt.CLASSES).items():
        for method, function in vars(fake).items():
            if method.startswith("_") or method == "contexts":
                continue
            assert hasattr(getattr(real, name), method), f"{name}.{method}"
            if not inspect.isfunction(function):
                continue
            documented = getattr(getattr(real, name), method).__doc__
            signatures = re.findall(rf"{method}\(self: [\w.]+(?:, (.*))?\) ->", documented)
            mine = list(inspect.signature(function).parameters)[1:]
            assert mine in [re.findall(r"(?:^|, )(\w+): ", text) for text in signatures], (
                name,
                method,
                signatures,
            )
    for name in ("DataType", "TensorIOMode", "TensorLocation", "SeekPosition", "EngineValidity"):
        assert set(getattr(fake_tensorrt, name).__members__) <= set(getattr(real, name).__members__)
    for name in ("CudaGraphStrategy", "ExecutionContextAllocationStrategy"):
        assert set(getattr(fake_tensorrt, name).__members__) == set(getattr(real, name).__members__)
    for name, value in real.EngineInvalidityDiagnostics.__members__.items():
        assert fake_tensorrt.EngineInvalidityDiagnostics[name] == int(value)
    for name, value in real.ILogger.Severity.__members__.items():
        assert fake_tensorrt.ILogger.Severity[name] == int(value)


def test_tensors_and_profiles(trt: FakeTensorRT, device: Device, path: Path) -> None:
    engine = TensorRTEngine(path, trt, device)
    assert engine.profiles == 2
    x, y = engine.tensors["x"], engine.tensors["y"]
    assert (x.is_input, x.dtype, x.shape) == (True, np.dtype(np.float32), (-1, -1))
    assert x.ranges == (((1, 1), (1, 1), (2, 1)), ((1, 1), (4, 8), (4, 16)))
    assert (y.is_input, y.ranges) == (False, ())
    assert engine.profile_for({"x": (2, 1)}) == 0
    assert engine.profile_for({"x": (3, 1)}) == 1
    with pytest.raises(ValueError, match=re.escape("takes x [5, 1]; it has x [1, 1] to [2, 1]; x [1, 1]")):
        engine.profile_for({"x": (5, 1)})
    engine.close()
    engine.close()


def test_true_numbers_for_changing_shapes(trt: FakeTensorRT, device: Device, path: Path) -> None:
    engine = TensorRTEngine(path, trt, device)
    run = Runner(engine, engine.context(1))
    for start in range(4):
        for shape in ((4, 16), (1, 1), (3, 5)):
            assert_sums(run, rows(*shape, start))
    engine.close()


def test_contexts_share_one_buffer_of_the_largest_profile(
    trt: FakeTensorRT, device: Device, path: Path, api: FakeCudart
) -> None:
    engine = TensorRTEngine(path, trt, device)
    before = api.device_bytes
    decode, prefill = Runner(engine, engine.context(0)), Runner(engine, engine.context(1))
    assert api.device_bytes == before + 2 * 3 * 4 * 16 * 4
    assert [block.nbytes for block in api.blocks if not block.pinned][1] == 8192
    for start in range(3):
        assert_sums(decode, rows(2, 1, start))
        assert_sums(prefill, rows(4, 7, start))
    engine.close()


def test_closing_frees_everything(trt: FakeTensorRT, path: Path, api: FakeCudart) -> None:
    with Device(api=api) as device:
        engine = TensorRTEngine(path, trt, device)
        run = Runner(engine, engine.context(1))
        for _ in range(3):
            assert_sums(run, rows(2, 2))
        trt.engines.clear()
        engine.close()
        gc.collect()
        assert api.device_bytes == 3 * 4 * 16 * 4  # the buffers of the test
    assert api.leaks() == []


def test_full_tensorrt_is_recorded_when_a_run_has_come_often(
    full: FakeTensorRT, device: Device, one_profile: Path, api: FakeCudart
) -> None:
    """Shapes take turns, so that a graph whose context others changed would be noticed."""
    engine = TensorRTEngine(one_profile, full, device)
    run = Runner(engine, engine.context(0))
    for start in range(RUNS_BEFORE + 4):
        for shape in ((2, 3), (4, 4)):
            assert_sums(run, rows(*shape, start))
    assert api.calls["cudaGraphInstantiate"] == 2
    assert api.calls["cudaGraphLaunch"] == 2 * 3
    assert full.runs == 2 * (RUNS_BEFORE + 4)
    assert len(full.engines[0].contexts) == 1 + 2
    engine.close()


def test_tensorrt_rtx_records_by_itself(
    rtx: FakeTensorRT, device: Device, path: Path, tmp_path: Path, api: FakeCudart
) -> None:
    engine = TensorRTEngine(path, rtx, device, runtime_cache=tmp_path / "a.cache")
    decode, prefill = (Runner(engine, engine.context(profile)) for profile in (0, 1))
    for start in range(RUNS_BEFORE + 2):
        assert_sums(decode, rows(2, 1, start))
        assert_sums(prefill, rows(2, 3, start))
    assert "cudaStreamBeginCapture" not in api.calls
    configs = [context.config for context in rtx.engines[0].contexts]
    strategies = rtx.CudaGraphStrategy
    assert [one.cuda_graph_strategy for one in configs] == [
        strategies.WHOLE_GRAPH_CAPTURE,
        strategies.DISABLED,
    ]
    assert configs[0]._cache is configs[1]._cache is not None
    engine.close()


def test_prompts_are_not_recorded(full: FakeTensorRT, device: Device, path: Path, api: FakeCudart) -> None:
    engine = TensorRTEngine(path, full, device)
    run = Runner(engine, engine.context(1))
    for start in range(RUNS_BEFORE + 2):
        assert_sums(run, rows(2, 3, start))
    assert "cudaStreamBeginCapture" not in api.calls
    engine.close()


def test_a_profile_that_the_library_refuses(trt: FakeTensorRT, device: Device, path: Path) -> None:
    engine = TensorRTEngine(path, trt, device)
    with pytest.raises(EngineRefused, match="no execution context for its optimization profile 2"):
        engine.context(2)
    engine.close()


def test_a_recording_that_fails_is_not_tried_again(
    full: FakeTensorRT, device: Device, one_profile: Path, api: FakeCudart
) -> None:
    full.fail_capture = True
    engine = TensorRTEngine(one_profile, full, device)
    run = Runner(engine, engine.context(0))
    for start in range(RUNS_BEFORE + 4):
        assert_sums(run, rows(2, 3, start))
    assert api.calls["cudaStreamBeginCapture"] == 1
    full.fail_capture = False
    for start in range(RUNS_BEFORE + 2):
        assert_sums(run, rows(2, 4, start))
    assert api.calls["cudaGraphLaunch"] == 1
    engine.close()


def test_a_context_that_there_is_no_room_for_leaves_runs_as_they_are(
    full: FakeTensorRT, device: Device, one_profile: Path, api: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TensorRTEngine(one_profile, full, device)
    run = Runner(engine, engine.context(0))
    asked: list[Any] = []
    monkeypatch.setattr(full.engines[0], "create_execution_context", asked.append)
    for start in range(RUNS_BEFORE + 4):
        assert_sums(run, rows(2, 3, start))
    assert len(asked) == 1
    assert "cudaStreamBeginCapture" not in api.calls
    engine.close()


def test_graphs_are_few_and_the_oldest_goes(device: Device, api: FakeCudart) -> None:
    graphs = GraphCache(device, limit=2, runs_before=1)
    array = device.array((4,), np.int32, "buffers", zeroed=True)
    done: list[str] = []

    def run(key: str) -> None:
        def work() -> None:
            done.append(key)
            device.copy(array.address, array.address + 8, 8)

        graphs.run(key, work, lambda: work)

    def graph_bytes() -> int:
        return api.leaks().count("graphs")

    for key in "aaabbbacc":
        run(key)
    assert (len(graphs), graph_bytes()) == (2, 2)
    done.clear()
    for key in "acb":
        run(key)
    assert done == ["b"], "b was not used for longest"
    graphs.close()
    assert graph_bytes() == 0


def test_a_failing_run_names_the_shapes_and_the_log(trt: FakeTensorRT, device: Device, path: Path) -> None:
    engine = TensorRTEngine(path, trt, device)
    run = Runner(engine, engine.context(1))
    assert_sums(run, rows(2, 3))
    trt.fail_enqueue = {trt.enqueued + 1}
    with pytest.raises(EngineFailed, match=r"'x': \(4, 2\).*told to fail"):
        run(rows(4, 2))
    assert_sums(run, rows(4, 2))
    with pytest.raises(EngineFailed, match=r"x cannot have the shape \[5, 2\]: Parameter check failed"):
        run(np.zeros((5, 2), np.float32))
    assert_sums(run, rows(4, 2))
    with pytest.raises(EngineFailed, match="no address for y, z"):
        run.context.enqueue({"x": (1, 1)}, {"x": run.buffers["x"].address})
    engine.close()


@pytest.mark.parametrize(
    ("diagnostics", "reasons"), [(2, "unsupported cc"), (5, "version mismatch, old cuda driver")]
)
def test_an_engine_that_is_not_valid_here(
    diagnostics: int, reasons: str, rtx: FakeTensorRT, device: Device, path: Path
) -> None:
    rtx.diagnostics = diagnostics
    with pytest.raises(EngineRefused, match=reasons) as refused:
        TensorRTEngine(path, rtx, device)
    assert "compute capability 12.0" in str(refused.value)
    assert rtx.engines == []


def test_an_engine_that_cannot_be_loaded(trt: FakeTensorRT, device: Device, path: Path) -> None:
    trt.fail_deserialize = True
    with pytest.raises(EngineRefused, match=r"cannot be loaded.*Serialization.*MiB of the GPU are free"):
        TensorRTEngine(path, trt, device)


def test_who_listens_to_the_library_goes_on_listening(trt: FakeTensorRT, device: Device, path: Path) -> None:
    heard: list[str] = []
    logger = shared_logger(trt)
    logger.sink = lambda _, message: heard.append(message)
    TensorRTEngine(path, trt, device).close()
    logger.log(trt.ILogger.Severity.ERROR, "later")
    assert heard == ["later"]


def test_tensor_types_that_are_not_served(trt: FakeTensorRT, device: Device, tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["batch"]) for name in "xy"]
    made = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    write_engine(tmp_path / "engine.trt", model, [{"batch": (1, 1, 1)}])
    with pytest.raises(EngineRefused, match="tensor x of type BF16"):
        TensorRTEngine(tmp_path / "engine.trt", trt, device)


def test_memory_that_is_too_small_for_weights_or_activations(
    trt: FakeTensorRT, path: Path, api: FakeCudart
) -> None:
    size = path.stat().st_size
    api.used_by_others = api.total_bytes - size + 1
    with Device(api=api, promised={"weights": 2**20}) as device:
        with pytest.raises(DeviceMemoryFull, match="for weights; the plan promised 1 MiB"):
            TensorRTEngine(path, trt, device)
        api.used_by_others = api.total_bytes - size - 8191
        with pytest.raises(DeviceMemoryFull, match="for activations") as full:
            TensorRTEngine(path, trt, device)
        trt.engines.clear()
        assert api.device_bytes == 0, f"as long as {full.value!r} is looked at, too"


def test_a_file_that_cannot_be_read_to_its_end(
    trt: FakeTensorRT, device: Device, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = Path.open

    def broken(self: Path, mode: str = "r") -> Any:
        file = real(self, mode)
        whole = file.read(64)
        file.close()

        class File:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None: ...

            def read(self, size: int) -> bytes:
                if size > 64:
                    raise OSError("the disk is gone")
                return whole[:size]

            def seek(self, *_: int) -> None: ...

        return File()

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        TensorRTEngine(path, trt, device)


def test_the_runtime_cache_is_kept_for_the_next_start(
    rtx: FakeTensorRT, device: Device, path: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "caches" / "a.cache"
    engine = TensorRTEngine(path, rtx, device, runtime_cache=kept)
    assert engine.runtime_cache is not None
    assert not engine.runtime_cache.read
    assert_sums(Runner(engine, engine.context(1)), rows(2, 3))
    engine.save_cache()
    first = kept.read_bytes()
    assert b"(2, 3)" in first
    assert_sums(Runner(engine, engine.context(1)), rows(1, 1))
    engine.close()
    assert kept.read_bytes().startswith(first)
    assert b"(1, 1)" in kept.read_bytes()
    assert [file.name for file in kept.parent.iterdir()] == ["a.cache"]
    again = TensorRTEngine(path, rtx, device, runtime_cache=kept)
    assert again.runtime_cache is not None
    assert again.runtime_cache.read
    again.close()
    rtx.runtime_cache_fits = False
    other = TensorRTEngine(path, rtx, device, runtime_cache=kept)
    assert other.runtime_cache is not None
    assert not other.runtime_cache.read
    assert_sums(Runner(other, other.context(1)), rows(4, 4))
    other.close()
    assert b"(4, 4)" in kept.read_bytes()
    assert b"(2, 3)" not in kept.read_bytes()


def test_a_cache_that_cannot_be_written_costs_nothing_but_a_line(
    rtx: FakeTensorRT, device: Device, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    engine = TensorRTEngine(path, rtx, device, runtime_cache=tmp_path / "file" / "a.cache")
    assert_sums(Runner(engine, engine.context(1)), rows(2, 3))
    engine.close()
    assert "ONECARD_CACHE_DIR" in caplog.text


def test_full_tensorrt_keeps_no_runtime_cache(
    full: FakeTensorRT, device: Device, path: Path, tmp_path: Path
) -> None:
    engine = TensorRTEngine(path, full, device, runtime_cache=tmp_path / "a.cache")
    assert engine.runtime_cache is None
    engine.close()
    assert not (tmp_path / "a.cache").exists()


def test_errors_of_cuda_pass_through(trt: FakeTensorRT, device: Device, path: Path, api: FakeCudart) -> None:
    engine = TensorRTEngine(path, trt, device)
    run = Runner(engine, engine.context(1))
    api.fail("cudaStreamSynchronize", code="cudaErrorLaunchFailure")
    with pytest.raises(CudaError, match="load the model again"):
        run(rows(1, 1))
    engine.close()
