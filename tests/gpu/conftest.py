"""What a GPU test needs, or why it is skipped; and at the end a table and build/gpu/test.json of all of them.

With ONECARD_STAND_IN=1 a CUDA runtime over host memory and a TensorRT that runs ONNX graphs stand in, so that
these tests themselves are tried where there is no GPU. What they show then is that they run, nothing more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from build_engines import nvidia
from build_engines.gpu import machine
from build_engines.gpu.results import Row

ROOT = Path(__file__).parents[2]
REPORT = Path(os.environ.get("ONECARD_GPU_REPORT", ROOT / "build" / "gpu" / "test.json"))
STAND_IN = os.environ.get("ONECARD_STAND_IN") == "1"
# The table must come within ten minutes, on a card that nobody knows: what is left then is skipped by name.
MINUTES = float(os.environ.get("ONECARD_GPU_MINUTES", "9"))
_TEST_S, _LEAST_S = 300.0, 30.0
_started = time.monotonic()
sys.path.insert(0, str(ROOT / "tests" / "unit" / "triton_repo"))

_rows: list[Row] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def _left() -> float:
    return 60 * MINUTES - (time.monotonic() - _started)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """The last test has no more than half a minute beyond the time that is left."""
    item.add_marker(pytest.mark.timeout(min(_TEST_S, max(0.0, _left()) + _LEAST_S)))
    return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    del item
    if _left() <= 0:
        pytest.skip(f"the {MINUTES:g} minutes are over; ONECARD_GPU_MINUTES gives more")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    report = yield
    if item.get_closest_marker("gpu") is not None:
        _keep(item, report)
    return report


def _keep(item: pytest.Item, report: Any) -> None:
    """One row for each test: its call, or the set-up that skipped or broke it."""
    if report.when == "teardown" and not report.failed:
        return
    if report.when == "setup" and report.passed:
        return
    reason = ""
    if report.skipped:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        reason = reason.removeprefix("Skipped: ")
    elif report.failed:
        reason = str(report.longrepr).strip().splitlines()[-1][:300] if report.longrepr else "failed"
    status = "skipped" if report.skipped else "failed" if report.failed else "measured"
    _rows.append(
        Row(
            part="machine",
            case=item.name,
            model=item.path.stem,
            value=round(report.duration, 3),
            unit="s",
            status=status,  # type: ignore[arg-type]
            reason=reason,
        )
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """All of it when these tests are what was asked for; else a line that says why they did not run."""
    if not _rows:
        return
    reasons = {row.reason for row in _rows}
    if not any("gpu" in str(argument) for argument in config.args):
        if len(reasons) == 1 and reasons != {""}:
            terminalreporter.line(f"GPU tests: {len(_rows)} skipped, {reasons.pop()}")
        return
    facts = _facts()
    document = {"format": 1, "stand_in": STAND_IN, **facts, "tests": [row.as_dict() for row in _rows]}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    gpu = facts["gpu"]
    terminalreporter.section("GPU tests", sep="-")
    terminalreporter.line(f"GPU: {gpu['name'] if gpu else facts['no_gpu']}")
    for line in _table(_rows):
        terminalreporter.line(line)
    terminalreporter.line(f"wrote {REPORT}, which has every test by name")


def _table(rows: list[Row]) -> list[str]:
    """A line for all tests of one file that passed, or were skipped for one reason; one for each failure."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        failed = row.case if row.status == "failed" else ""
        groups.setdefault((row.model, row.status, failed, row.reason), []).append(row)
    lines = []
    for (model, status, failed, reason), found in sorted(groups.items()):
        state = {"measured": "passed"}.get(status, status)
        seconds = sum(row.value or 0 for row in found)
        said = ": ".join(part for part in (failed, reason) if part)
        lines.append(f"{len(found):4} {state:8} {model:19} {seconds:6.1f} s  {said}".rstrip())
    return lines


def _facts() -> dict[str, Any]:
    try:
        return machine.describe(nvidia.find_card())
    except nvidia.NoGpu as reason:
        return machine.describe(None, str(reason))


@pytest.fixture(scope="session")
def card() -> nvidia.Card:
    """The GPU; every test asks for it first, directly or not."""
    if STAND_IN:
        return nvidia.Card(
            name="stand-in",
            compute_capability="12.0",
            total_bytes=1 << 30,
            bus="",
            driver="",
            driver_cuda="13.0",
            processors=1,
            clock_mhz=1,
            l2_bytes=1,
        )
    try:
        return nvidia.find_card()
    except nvidia.NoGpu as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where engines keep the kernels that they compile here: compiled once, read by the tests after it."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def cuda(card: nvidia.Card, monkeypatch: pytest.MonkeyPatch, kernels: Path) -> Any:
    """The CUDA runtime's module, for all code of a test."""
    monkeypatch.setenv("ONECARD_CACHE_DIR", str(kernels))
    if not STAND_IN:
        return pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    import cuda.bindings
    from fake_gpu import FakeCudart
    from fake_tensorrt import FakeTensorRT

    api = FakeCudart()
    monkeypatch.setattr(cuda.bindings, "runtime", api)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", api)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTensorRT(api))
    return api


@pytest.fixture
def device(cuda: Any) -> Iterator[Any]:
    from triton_repo.runtime.gpu.cuda import Device

    with Device() as found:
        yield found


@pytest.fixture(params=["tensorrt-rtx", "tensorrt", "onnxruntime-cuda"])
def target(request: pytest.FixtureRequest, card: nvidia.Card) -> str:
    """Each target that can be compiled and run here; the others skip with what is missing."""
    from build_engines.gpu.building import check_target

    name = str(request.param)
    if STAND_IN:
        if name != "tensorrt-rtx":
            pytest.skip("nothing stands in for it")
        # What compiles or serves cannot use an engine of the stand-in: the CPU's own take its place there.
        return "onnxruntime" if request.path.stem == "test_gpu_pipeline" else name
    if reason := check_target(name, on_gpu=True):
        pytest.skip(reason)
    return name


@pytest.fixture(scope="session")
def stacks(tmp_path_factory: pytest.TempPathFactory, card: nvidia.Card) -> Any:
    """`stacks(target)`: the small stack of gpu_stack, built for the CPU and for that target."""
    from gpu_stack import SmallStack

    made: dict[str, SmallStack] = {}

    def make(target: str) -> SmallStack:
        if target not in made:
            made[target] = SmallStack(tmp_path_factory.mktemp(f"stack-{target}"), target, card, STAND_IN)
        return made[target]

    return make
