"""Starting, failing to start, stopping and being killed: clear words, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from server_processes import SERVE, alive, regions, served_by_command, wait_until

from build_engines.errors import ServerError
from client import Client
from client.status import UNKNOWN_ADDRESS
from triton_repo import ports, shared_memory
from triton_repo.control import Control
from triton_repo.running import read_running
from triton_repo.server import Server, ServerOptions

pytestmark = pytest.mark.serving


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything(one_model: Path, tmp_path: Path, number: signal.Signals) -> None:
    before = regions()
    with served_by_command(one_model, "--log", str(tmp_path / "log")) as (process, ready):
        assert regions() > before
        http = ready["urls"]["http"].split(":")
        assert ready["urls"]["grpc"].startswith("127.0.0.1:")
        assert "docker run" in ready["container"]
        process.send_signal(number)
        assert process.wait(20) == (0 if number == signal.SIGTERM else 130)
        assert "Traceback" not in (process.stderr.read() if process.stderr else "")
    assert not alive(ready["pid"])
    assert regions() <= before  # what a killed server left is removed by the next start
    with socket.socket() as probe:
        assert probe.connect_ex((http[0], int(http[1]))) != 0


def test_a_killed_parent_takes_the_server_with_it(one_model: Path, tmp_path: Path) -> None:
    with served_by_command(one_model, "--log", str(tmp_path / "log")) as (process, ready):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wait_until(lambda: not alive(ready["pid"]), 15)
    own = {name for name in regions() if f"_{process.pid}_" in name}
    shared_memory.remove_stale()
    assert not {name for name in own if (Path("/dev/shm") / name).exists()}


def test_a_killed_server_is_reported_and_its_memory_freed(one_model: Path, tmp_path: Path) -> None:
    before = regions()
    with served_by_command(one_model, "--log", str(tmp_path / "log")) as (process, ready):
        os.kill(ready["pid"], signal.SIGKILL)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == ServerError.exit_code
    assert "tritonserver ended by itself (signal SIGKILL)" in errors
    assert regions() <= before  # what a killed server left is removed by the next start


def test_a_command_gets_the_addresses_and_its_exit_code_is_kept(one_model: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys, urllib.request as u;"
        "u.urlopen('http://' + os.environ['ONECARD_URL_HTTP'] + '/v2/models/vector/ready');"
        "print(os.environ['ONECARD_URL_GRPC'], os.environ['ONECARD_SERVER_PID']); sys.exit(7)"
    )
    command = [*SERVE, str(one_model), "--free-ports", "--log", str(tmp_path / "log")]
    done = subprocess.run(
        [*command, "--", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 7
    # The command's output is alone on stdout, so that its last line can be read by a machine.
    address, pid = done.stdout.split()
    assert address in done.stderr
    assert not alive(int(pid))


def test_a_server_is_served_from_and_stopped_beside_a_proxy(
    one_model: Path, tmp_path: Path, proxy: socket.socket
) -> None:
    with Server(one_model, ServerOptions(free_ports=True, log=tmp_path / "log")) as server:
        for url in (server.urls["grpc"], f"http://{server.urls['http']}"):
            with Client(url) as client:
                assert client.embed("good").vector.size
                assert client.status().metrics_error in (None, UNKNOWN_ADDRESS)
        assert Control(read_running(one_model)).states()["vector"][1].phase == "READY"
    with pytest.raises(BlockingIOError):
        proxy.accept()


def test_a_second_server_on_the_folder_leaves_the_first_alone(one_model: Path, tmp_path: Path) -> None:
    with served_by_command(one_model, "--log", str(tmp_path / "log")) as (_, ready):
        command = [*SERVE, str(one_model), "--free-ports", "--log", str(tmp_path / "log")]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert refused.returncode == ServerError.exit_code
        assert f"process {ready['pid']}, http {ready['urls']['http']}" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not (tmp_path / "log.1").exists()
        assert read_running(one_model).pid == ready["pid"]


def copied(repository: Path, out: Path) -> Path:
    shutil.copytree(repository, out / "repository")
    return out / "repository"


def flip_engine(repository: Path) -> None:
    path = repository / "vector" / "1" / "engine.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_runtime(repository: Path) -> None:
    path = repository / "vector" / "1" / "triton_repo" / "runtime" / "texts.py"
    path.write_text(path.read_text() + "\n")


def truncate_tokenizer(repository: Path) -> None:
    path = repository / "vector" / "1" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-10])


def break_config(repository: Path) -> None:
    path = repository / "vector" / "config.pbtxt"
    path.write_text(path.read_text().replace("TYPE_FP32", "TYPE_FP33"))


def change_model_file(repository: Path) -> None:
    path = repository / "vector" / "1" / "model.py"
    path.write_text(path.read_text() + "\n")


def add_module(repository: Path) -> None:
    (repository / "vector" / "1" / "colorsys.py").write_text("")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_engine, "engine.onnx: altered after the build"),
        (change_runtime, "not the runtime that this repository was written with"),
        (truncate_tokenizer, "tokenizer.json:"),
        (change_model_file, "model.py: altered after the repository was written"),
        (add_module, "colorsys.py: was not there when the repository was written"),
        (break_config, "TYPE_FP33"),
    ],
)
def test_a_model_that_cannot_load_is_named_with_the_reason(
    one_model: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    before = regions()
    repository = copied(one_model, tmp_path)
    damage(repository)
    with pytest.raises(ServerError) as caught:
        Server(repository, ServerOptions(free_ports=True)).start()
    assert "vector" in caught.value.message
    assert reason in str(caught.value)
    assert "At:" not in str(caught.value)
    assert regions() <= before  # what a killed server left is removed by the next start


def test_a_taken_port_is_named_before_anything_starts(one_model: Path, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        taken = holder.getsockname()[1]
        free = ports.free_ports("127.0.0.1")
        options = ServerOptions(ports=ports.Ports(free.http, taken, free.metrics), log=tmp_path / "log")
        with pytest.raises(ServerError, match=f"grpc port {taken}: Address already in use"):
            Server(one_model, options).start()
    assert not (tmp_path / "log").exists()


def test_a_port_lost_in_between_is_replaced(
    one_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may take a free port before the server does: the next attempt takes others."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        real = ports.free_ports("127.0.0.1")
        answers = [
            ports.Ports(real.http, holder.getsockname()[1], real.metrics),
            ports.free_ports("127.0.0.1"),
        ]
        monkeypatch.setattr(ports, "free_ports", lambda host: answers.pop(0))
        with Server(one_model, ServerOptions(free_ports=True, log=tmp_path / "log")) as server:
            assert server.ports.grpc != holder.getsockname()[1]
    assert answers == []
