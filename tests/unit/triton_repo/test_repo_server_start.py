"""Starting and stopping a server, with a stand-in for its binary: what is refused, and what is left alone."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from stand_in_server import write_binary

from build_engines.errors import ServerError
from triton_repo import cli, log_file, running
from triton_repo.control import Control
from triton_repo.running import Running, read_running, state_file
from triton_repo.server import Server, ServerOptions
from triton_repo.supervisor import RestartPolicy, Supervisor


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    return write_binary(tmp_path / "installation")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "site" / "repository"
    (folder / "m").mkdir(parents=True)
    (folder / "m" / "config.pbtxt").write_text('name: "m"\nbackend: "python"\n')
    return folder


def server(repository: Path, binary: Path, **options: Any) -> Server:
    chosen = {"free_ports": True, "ready_timeout_s": 10.0, "exit_timeout_s": 2.0} | options
    return Server(repository, ServerOptions(binary=binary, **chosen))


def test_requests_to_a_server_of_our_own_go_through_no_proxy(
    repository: Path, binary: Path, proxy: socket.socket
) -> None:
    with server(repository, binary) as started:
        assert started.answers()
    assert "POST /v2/repository/index" in started.log.read_text()
    with pytest.raises(BlockingIOError):
        proxy.accept()


def test_the_admin_key_goes_through_no_proxy_over_grpc(tmp_path: Path, proxy: socket.socket) -> None:
    urls = {"grpc": "127.0.0.1:1"}
    control = Control(Running.of(os.getpid(), repository=tmp_path, urls=urls, log=tmp_path, key="secret"))
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:1 is gone"):
        control.states()
    control.close()
    with pytest.raises(BlockingIOError):
        proxy.accept()


def test_a_second_server_on_a_folder_is_refused_before_anything_is_touched(
    repository: Path, binary: Path, tmp_path: Path
) -> None:
    with server(repository, binary) as first:
        found, files = read_running(repository), set(repository.parent.iterdir())
        for log in (None, tmp_path / "another.log"):
            second = server(repository, binary, log=log)
            with pytest.raises(ServerError, match=f"process {first.pid}, .*grpc {first.urls['grpc']}") as no:
                second.start()
            second.stop()
        assert "deploy" in str(no.value)
        assert "another folder" in str(no.value)
        assert read_running(repository) == found
        assert set(repository.parent.iterdir()) == files
        assert not (tmp_path / "another.log").exists()
        assert first.answers()
    assert not state_file(repository).exists()
    with server(repository, binary) as next_one:
        assert next_one.answers()


def test_of_two_that_start_at_the_same_moment_one_serves(repository: Path, binary: Path) -> None:
    together = threading.Barrier(2)

    def start(number: int) -> Server | ServerError:
        candidate = server(repository, binary)
        together.wait()
        try:
            return candidate.start()
        except ServerError as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(start, range(2)))
        (won,) = [outcome for outcome in outcomes if isinstance(outcome, Server)]
        (lost,) = [outcome for outcome in outcomes if isinstance(outcome, ServerError)]
        assert "another server is being started" in lost.message
        assert read_running(repository).pid == won.pid
        won.stop()


def test_a_server_that_was_killed_keeps_nobody_away(repository: Path, binary: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from triton_repo.server import *\n"
        "options = ServerOptions(free_ports=True, binary=Path(sys.argv[2]))\n"
        "print(Server(Path(sys.argv[1]), options).start().pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(repository), str(binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline())
        with pytest.raises(ServerError, match="a server runs on"):
            server(repository, binary).start()
        process.kill()
    with server(repository, binary) as next_one:
        assert read_running(repository).pid == next_one.pid


def test_a_supervisor_brings_it_back_in_the_same_folder(repository: Path, binary: Path) -> None:
    with server(repository, binary) as started:
        assert started.pid is not None
        os.kill(started.pid, signal.SIGKILL)
        while (fault := started.fault()) is None:
            pass
        Supervisor(started, lambda restart: None).recover(fault)
        assert started.answers()
        assert read_running(repository).pid == started.pid


def test_where_nothing_can_be_written_or_locked_servers_share_a_folder(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlockable(descriptor: int, how: int) -> None:
        raise OSError(errno.EBADF, "a network file system locks no folder")

    with monkeypatch.context() as patched:
        patched.setattr(running.os, "access", lambda path, mode: False)
        assert running.claim(repository) is None
    monkeypatch.setattr(running.fcntl, "flock", unlockable)
    assert running.claim(repository) is None


def make_not_executable(binary: Path) -> None:
    binary.chmod(0o644)


def make_no_program(binary: Path) -> None:
    binary.write_bytes(b"\0 a file of another kind of machine")


def take_its_interpreter(binary: Path) -> None:
    binary.write_text("#!/nowhere/python\n")


BROKEN = [
    (make_not_executable, "Permission denied(?s:.*)it is not executable"),
    (make_no_program, "Exec format error(?s:.*)it is no program"),
    (take_its_interpreter, "No such file or directory(?s:.*)the interpreter that it names"),
]


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(("damage", "reason"), BROKEN)
def test_a_binary_that_cannot_be_run_is_named_with_the_reason(
    repository: Path, binary: Path, damage: Any, reason: str, form: str
) -> None:
    damage(binary)
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(ServerError, match=f"{binary} cannot be run: {reason}(?s:.*)--tritonserver"):
        server(repository, binary, log_format=form).start()
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_what_the_system_refuses_a_start_is_an_error_of_ours(
    repository: Path, binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**words: str) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    before = set(Path("/proc/self/fd").iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "mkdtemp", full)
        with pytest.raises(ServerError, match=r"/tmp/x: No space left(?s:.*)TMPDIR"):
            server(repository, binary).start()
    with monkeypatch.context() as patched:
        patched.setattr(log_file.sys, "executable", "/nowhere/python")
        with pytest.raises(ServerError, match="/nowhere/python: No such file"):
            server(repository, binary, log_format="json").start()
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_a_binary_that_is_gone_at_a_restart_counts_as_a_crash(repository: Path, binary: Path) -> None:
    with server(repository, binary) as started:
        make_not_executable(binary)
        policy = RestartPolicy(crashes=3, first_delay_s=0.01)
        with pytest.raises(ServerError, match=r"given up after 3 crashes(?s:.*)cannot be run"):
            Supervisor(started, lambda restart: None, policy).recover(ServerError("gone"))


def make_link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))
    path.with_name("elsewhere").write_text("of somebody else")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_device_link(path: Path) -> None:
    path.symlink_to("/dev/null")


@pytest.mark.parametrize("make", [make_link, make_dangling_link, make_device_link, os.mkfifo, os.mkdir])
def test_a_log_that_is_no_file_is_refused_and_left_alone(
    repository: Path, binary: Path, tmp_path: Path, make: Any
) -> None:
    log = tmp_path / "log"
    make(log)
    with pytest.raises(ServerError, match=rf"the log {log} is a \w+(?s:.*)tail -F"):
        server(repository, binary, log=log).start()
    assert os.path.lexists(log)
    elsewhere = tmp_path / "elsewhere"
    assert not elsewhere.exists() or elsewhere.read_text() == "of somebody else"
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_is_no_binary(repository: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, ["serve", str(repository), "--tritonserver", str(tmp_path)])
    assert result.exit_code == 2
    assert "is a directory" in result.output


def test_a_command_beside_the_interpreter_is_found(
    repository: Path, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with server(repository, binary) as started:
        assert cli._run_command(started, (Path(sys.executable).name, "-c", "import click"), None) == 0
