"""The doctor's checks of what serves: Triton, ports, shared memory, the repository, a server that runs."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from build_engines.errors import RepositoryError, ServerError
from build_engines.stack import Stack, load_stack
from triton_repo import doctor, shared_memory
from triton_repo.doctor import PortUse, Running
from triton_repo.installation import Installation
from triton_repo.ports import Ports, free_ports

LIBRARY = Path("/usr/lib/libpython3.12.so.1.0")
INSTALLED = Installation(Path("/opt/tritonserver/bin/tritonserver"), None, None, (), "PATH")
USES = [PortUse(service=name, number=number) for name, number in Ports().named().items()]
RUNNING = Running(pid=7, host="127.0.0.1", ports=Ports(), is_ready=True)


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    path = tmp_path / "s.toml"
    path.write_text(
        'card = "rtx-5070-ti"\n[models.mood]\ntask = "classify"\nsource = "a/b"\ninstances = 3\n'
        '[models.talk]\ntask = "generate"\nsource = "a/c"\nprecisions = ["int8-weights"]\n'
    )
    return load_stack(path, build_dir=tmp_path / "build")


def test_no_python_library_is_said_once() -> None:
    error = ServerError("libpython3.12.so.1.0 is missing", next_step="apt install libpython3.12")
    assert doctor.check_python_library(LIBRARY).state == "ok"
    found = doctor.check_python_library(error)
    assert (found.state, found.do, found.error) == ("problem", "apt install libpython3.12", ServerError)
    assert doctor.check_tritonserver(error, error).state == "skipped"


def test_no_tritonserver_or_one_beside_numpy_2() -> None:
    assert doctor.check_tritonserver(INSTALLED, LIBRARY).state == "ok"
    for message in ("no tritonserver found", "the tritonserver of nvidia-pytriton crashes with numpy 2.3.1"):
        found = doctor.check_tritonserver(ServerError(message, next_step="pip install x"), LIBRARY)
        assert (found.state, found.found, found.do) == ("problem", message, "pip install x")


def test_a_taken_port_names_its_holder() -> None:
    assert doctor.check_ports(USES, None).state == "ok"
    taken = [replace(USES[0], refusal="Address already in use", holder="nginx (process 12)"), *USES[1:]]
    found = doctor.check_ports(taken, None)
    assert (found.state, found.error) == ("problem", ServerError)
    assert found.found == "http port 8000: Address already in use by nginx (process 12)"
    assert doctor.check_ports(taken, RUNNING).state == "ok"  # it is the stack's own server
    elsewhere = replace(RUNNING, ports=Ports(9000, 9001, 9002))
    assert doctor.check_ports(taken, elsewhere).state == "problem"


def test_too_little_shared_memory() -> None:
    assert doctor.check_shared_memory((64 << 20, 64 << 20), 16).state == "ok"
    found = doctor.check_shared_memory((10 << 20, 64 << 20), 16)
    assert (found.state, found.error) == ("problem", ServerError)
    assert "10 of 64 MiB free in /dev/shm, 64 are needed" in found.found
    assert "--shm-size" in found.do
    assert doctor.check_shared_memory(None, 1).state == "problem"


def test_regions_of_dead_servers(tmp_path: Path) -> None:
    assert doctor.check_stale([]).state == "ok"
    region = tmp_path / "onecard_1_2_00000000_a"
    region.write_bytes(bytes(3 << 20))
    found = doctor.check_stale([region, tmp_path / "gone"])
    assert (found.state, found.found) == ("warning", "2 of servers that are gone, 3.0 MiB")
    assert f"rm {region}" in found.do


def manifest(folder: Path, digest: str) -> None:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"digest": digest}))


def serve_model(repository: Path, name: str, digest: str, version: str = "1") -> None:
    manifest(repository / name / version, digest)
    (repository / name / "config.pbtxt").touch()


def test_a_repository_that_is_missing_lacks_a_model_or_is_older(stack: Stack) -> None:
    repository = stack.build_dir / "repository"
    found = doctor.check_repository(stack, repository)
    assert (found.state, found.do) == ("warning", f"triton-repo write {stack.path}")
    manifest(stack.build_dir / "engines" / "mood" / "int8" / "onnxruntime", "new")
    manifest(stack.build_dir / "engines" / "talk" / "int8-weights" / "onnxruntime", "newer")
    serve_model(repository, "mood", "new")
    found = doctor.check_repository(stack, repository)
    assert (found.state, found.error) == ("problem", RepositoryError)
    assert found.found == f"{repository} lacks talk"
    serve_model(repository, "talk", "old")
    found = doctor.check_repository(stack, repository)
    assert (found.state, "other engines than those built last: talk" in found.found) == ("warning", True)
    serve_model(repository, "talk", "newer", version="10")  # of the versions there the last one counts
    assert doctor.check_repository(stack, repository).state == "ok"


def test_a_server_that_is_not_ready(stack: Stack) -> None:
    found = doctor.check_running(None, stack)
    assert (found.state, found.do) == ("ok", f"triton-repo serve {stack.path}")
    assert "ready" in doctor.check_running(RUNNING, stack).found
    found = doctor.check_running(replace(RUNNING, is_ready=False), stack)
    assert (found.state, found.error) == ("problem", ServerError)
    assert "tritonserver.log" in found.do


# --- the facts ---


def test_the_holder_of_a_port_is_found_by_its_socket() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        number = taken.getsockname()[1]
        assert doctor.holder_of(number) == f"{Path(sys.executable).name} (process {os.getpid()})"
    assert doctor.holder_of(free_ports("127.0.0.1").http) == ""


def test_a_holder_that_cannot_be_seen_is_named_by_its_user(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    rows = [
        "  sl  local_address rem_address   st tx rx tr tm retr   uid  timeout inode",
        "   0: 0100007F:1F40 00000000:0000 0A 0:0 00:0 0     0        0 4711 1",
        "   1: 0100007F:1F41 00000000:0000 01 0:0 00:0 0     0        0 4712 1",
    ]
    (tmp_path / "net" / "tcp").write_text("\n".join(rows))
    assert doctor.holder_of(8000, tmp_path) == "a process of user 0"
    assert doctor.holder_of(8001, tmp_path) == ""  # connected, and nobody listens


@contextmanager
def answering(ready: set[str]) -> Iterator[int]:
    """An HTTP server that says of these paths that they are ready; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in ready else 400)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


@contextmanager
def tritonserver(folder: Path, *options: str) -> Iterator[int]:
    """A process that looks like a tritonserver with these options."""
    binary = folder / "tritonserver"
    binary.symlink_to("/bin/sh")
    command = [str(binary), "-c", "read line", "x", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        # For a moment the new program runs and has no command line yet.
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(os.fsencode(binary)):
            time.sleep(0.001)
        yield process.pid
        process.kill()


def test_the_stacks_server_is_found_by_its_command_line(stack: Stack, tmp_path: Path) -> None:
    repository = (stack.build_dir / "repository").absolute()
    with answering({"/v2/health/ready"}) as http_port:
        own = [f"--model-repository={repository}", f"--http-port={http_port}", "--http-address=127.0.0.1"]
        with tritonserver(tmp_path, *own) as pid:
            found = doctor.find_running(stack, "127.0.0.1", free_ports("127.0.0.1"))
        assert found is not None
        assert (found.pid, found.ports.http, found.is_ready) == (pid, http_port, True)
    (tmp_path / "other").mkdir()
    with tritonserver(tmp_path / "other", "--model-repository=/elsewhere"):
        assert doctor.find_running(stack, "127.0.0.1", free_ports("127.0.0.1")) is None


def test_a_server_in_a_container_is_found_by_its_models(stack: Stack) -> None:
    free = free_ports("127.0.0.1")
    with answering({"/v2/models/mood/ready", "/v2/models/talk/ready"}) as port:
        found = doctor.find_running(stack, "127.0.0.1", replace(free, http=port))
        assert found is not None
        assert (found.pid, found.is_ready) == (None, True)
    with answering({"/v2/models/mood/ready"}) as port:
        assert doctor.find_running(stack, "127.0.0.1", replace(free, http=port)) is None


def test_everything_is_asked_of_this_machine(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(shared_memory, "needed_bytes", lambda instances: asked.append(instances) or 4 << 20)
    free = free_ports("127.0.0.1")
    found = {
        one.check: one
        for one in doctor.examine_server("127.0.0.1", (free.http, free.grpc, free.metrics), stack)
    }
    assert found["ports"].state == "ok"
    assert found["repository"].state == "warning"
    assert found["server"].found == "none runs for this stack"
    assert found["tritonserver"].state in {"ok", "problem"}
    assert asked == [2 * 3 + 1]  # both precisions of the classifier, three instances each, and the LLM
    assert len(doctor.examine_server("127.0.0.1", (free.http, free.grpc, free.metrics))) == 5
