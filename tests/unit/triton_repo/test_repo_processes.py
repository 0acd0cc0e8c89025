"""Which model's process died and how, of real processes; a secret that leaves the command line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from triton_repo.processes import DeadModel, ModelProcesses, hide, how_it_ended

# Starts two children as tritonserver does, and collects the second when told to unload.
SERVER = """
import subprocess, sys
stub, folder = sys.argv[1:]
first, second = (subprocess.Popen([stub, f"{folder}/{name}/1/model.py"]) for name in ("vector", "talk"))
print(first.pid, second.pid, flush=True)
for line in sys.stdin:
    second.kill()
    second.wait()
    print("unloaded", flush=True)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    shell = shutil.which("sh")
    assert shell
    stub = tmp_path / "triton_python_backend_stub"
    shutil.copy(Path(shell).resolve(), stub)
    os.mkfifo(tmp_path / "nobody")
    for name in ("vector", "talk"):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / "model.py").write_text(f"read -r line < {tmp_path}/nobody\n")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(stub), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    first, second = map(int, process.stdout.readline().split())
    yield process, first, second
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGKILL, "signal SIGKILL"), (signal.SIGSEGV, "signal SIGSEGV")]
)
def test_a_killed_model_is_named_within_a_second(
    server: tuple[subprocess.Popen[str], int, int], number: signal.Signals, how: str
) -> None:
    process, first, _ = server
    models = ModelProcesses(process.pid)
    assert models.crashed() is None
    assert models.running()
    os.kill(first, number)
    killed = time.monotonic()
    while (dead := models.crashed()) is None:
        assert time.monotonic() - killed < 1
        time.sleep(0.05)
    assert dead == DeadModel("vector", how)
    assert time.monotonic() - killed > 0.4


def test_an_unloaded_model_is_no_crash_and_then_nothing_runs(
    server: tuple[subprocess.Popen[str], int, int],
) -> None:
    process, first, _ = server
    models = ModelProcesses(process.pid)
    assert models.crashed() is None
    assert process.stdin
    assert process.stdout
    process.stdin.write("unload\n")
    process.stdin.flush()
    process.stdout.readline()
    deadline = time.monotonic() + 0.8
    while time.monotonic() < deadline:
        assert models.crashed() is None
        time.sleep(0.05)
    assert models.running()
    os.kill(first, signal.SIGKILL)
    time.sleep(0.1)
    assert not models.running()


@pytest.mark.parametrize("served", [1, 2])
def test_a_version_that_dies_while_it_loads_is_left_to_triton_for_longer(
    server: tuple[subprocess.Popen[str], int, int], tmp_path: Path, served: int
) -> None:
    process, first, _ = server
    config = f"version_policy {{\n  specific {{\n    versions: {served}\n  }}\n}}\n"
    (tmp_path / "vector" / "config.pbtxt").write_text(config)
    models = ModelProcesses(process.pid)
    assert models.crashed() is None
    os.kill(first, signal.SIGKILL)
    killed = time.monotonic()
    while (dead := models.crashed()) is None:
        time.sleep(0.05)
    assert dead == DeadModel("vector", "signal SIGKILL")
    assert (time.monotonic() - killed > 1.5) is (served == 2)


def test_a_server_that_has_gone_has_no_processes() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    models = ModelProcesses(ended.pid)
    assert models.crashed() is None
    assert not models.running()


def test_exit_codes_in_words() -> None:
    assert [how_it_ended(code) for code in (0, 3, -9)] == ["exit code 0", "exit code 3", "signal SIGKILL"]


def test_a_secret_leaves_the_command_line_and_the_process_still_has_it() -> None:
    program = "import sys; print('up', flush=True); sys.stdin.readline(); print(sys.argv[2])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--key=s3cret", "s3cret"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.readline()
    assert hide(process.pid, "s3cret")
    line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert line.endswith(b"\0--key=******\0******\0")
    assert process.communicate("\n")[0] == "s3cret\n"
    assert not hide(process.pid, "s3cret")
