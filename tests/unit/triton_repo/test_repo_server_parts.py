"""The parts of serving that need no server: its log, ports, shared memory, what is missing, containers."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from build_engines.errors import ServerError
from build_engines.stack import load_stack
from triton_repo import installation, ports, server_log, shared_memory
from triton_repo.cli import main
from triton_repo.container import IMAGE, LLM_IMAGE, docker_command
from triton_repo.running import ADMIN_HEADER, ADMIN_NAME
from triton_repo.server import Server, ServerOptions
from triton_repo.writer import write_repository

DATA = Path(__file__).parent / "data"
LOG = (DATA / "failed_load.txt").read_text()
PORT_LOG = (DATA / "port_taken.txt").read_text()


def test_the_log_tells_what_loaded_and_why_not() -> None:
    assert server_log.loaded(LOG) == {"similarity"}
    assert server_log.failures(LOG) == {"order": "engine refused: /x/engine.onnx: altered after the build"}
    assert server_log.last_errors(LOG)[-1] == "creating server: Internal - failed to load all models"
    assert not server_log.port_taken(LOG)
    assert server_log.port_taken(PORT_LOG)


def test_every_taken_port_is_named() -> None:
    with socket.socket() as first, socket.socket() as second:
        for holder in (first, second):
            holder.bind(("127.0.0.1", 0))
            holder.listen(1)
        http, metrics = first.getsockname()[1], second.getsockname()[1]
        free = ports.free_ports("127.0.0.1").grpc
        with pytest.raises(ServerError) as caught:
            ports.check("127.0.0.1", ports.Ports(http, free, metrics))
    text = str(caught.value)
    assert f"http port {http}" in text
    assert f"metrics port {metrics}" in text
    assert "grpc" not in text.split("cause", maxsplit=1)[0]
    assert "--free-ports" in text


def test_free_ports_differ_and_equal_ones_are_refused() -> None:
    assert len(set(ports.free_ports("127.0.0.1").named().values())) == 3
    with pytest.raises(ServerError, match="different ports"):
        ports.check("127.0.0.1", ports.Ports(9000, 9000, 9001))
    with pytest.raises(ServerError, match=r"cannot listen on 203\.0\.113\.1"):
        ports.check("203.0.113.1", ports.free_ports("127.0.0.1"))
    with pytest.raises(ServerError, match=r"cannot listen on 203\.0\.113\.1"):
        ports.free_ports("203.0.113.1")


def test_only_regions_of_dead_processes_of_this_namespace_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "SHM", tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = shared_memory.new_prefix()
    stale = mine.replace(f"_{os.getpid()}_", f"_{dead.pid}_")
    elsewhere = stale.replace(mine.split("_")[1], "1")
    for name in (f"{mine}a", f"{stale}a", f"{elsewhere}a", "onecard_notes", "other_region"):
        (tmp_path / name).touch()
    assert shared_memory.remove_stale() == [f"{stale}a"]
    assert shared_memory.remove(mine) == [f"{mine}a"]
    assert {path.name for path in tmp_path.iterdir()} == {f"{elsewhere}a", "onecard_notes", "other_region"}


def test_a_small_shared_memory_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_FREE_BYTES_PER_INSTANCE", 1 << 60)
    with pytest.raises(ServerError, match="--shm-size=1g"):
        shared_memory.check_room(3)


def test_a_missing_server_library_or_stub_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    wheel = tmp_path / "pytriton" / "tritonserver"
    (wheel / "bin").mkdir(parents=True)
    monkeypatch.setattr(installation, "_wheel", lambda: None)
    with pytest.raises(ServerError, match="pip install nvidia-pytriton"):
        installation.find_installation(tmp_path)
    monkeypatch.setattr(installation, "_wheel", lambda: wheel)
    with pytest.raises(ServerError, match=f"no Python-backend stub for Python {version}"):
        installation.find_installation(tmp_path)
    stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.touch()
    with pytest.raises(ServerError, match="force-reinstall"):
        installation.find_installation(tmp_path / "a")
    (tmp_path / "nvidia_pytriton.libs").mkdir()
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(installation.sysconfig, "get_config_var", lambda name: None)
    with pytest.raises(
        ServerError, match=rf"(?s)libpython{version}\.so\.1\.0 is missing.*apt install libpython"
    ) as e:
        installation.find_installation(tmp_path / "b")
    assert "--enable-shared" in str(e.value)


def test_the_wheel_s_server_is_not_started_with_a_numpy_that_it_crashes_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(np, "__version__", "2.5.2")
    with pytest.raises(ServerError, match=r"crashes with numpy 2\.5\.2") as refused:
        installation.find_installation(tmp_path)
    assert "pip install 'numpy<2'" in str(refused.value)
    assert not list(tmp_path.iterdir())
    # Another server has a Python backend of its own.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").touch()
    found = installation.find_installation(tmp_path, tmp_path / "bin" / "tritonserver")
    assert found.origin == "PATH"


def test_an_installed_server_for_another_python_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "bin" / "tritonserver"
    stub = tmp_path / "backends" / "python" / "triton_python_backend_stub"
    binary.parent.mkdir()
    binary.touch()
    (tmp_path / "backends").mkdir()
    with pytest.raises(ServerError, match="has no Python backend"):
        installation.find_installation(tmp_path, binary)
    stub.parent.mkdir()
    stub.write_bytes(b"\x7fELF\0libpython3.7.so.1.0\0")
    with pytest.raises(ServerError, match=r"runs Python 3\.7"):
        installation.find_installation(tmp_path, binary)


def test_the_server_does_not_inherit_thread_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("KMP_AFFINITY", "compact")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/own")
    found = installation.Installation(Path("t"), None, None, (Path("/a"), Path("/b")), "nvidia-pytriton")
    environment = found.environment()
    assert environment["OMP_NUM_THREADS"] == "1"
    assert "KMP_AFFINITY" not in environment
    assert "PYTHONPATH" not in environment
    assert environment["LD_LIBRARY_PATH"] == "/a:/b:/own"
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)


@pytest.fixture
def repository(tmp_path: Path, engine_folder: Callable[..., Path]) -> Path:
    model = (
        '[models.m]\ntask = "embed"\nsource = "./m"\nprecisions = ["int8"]\nmax_batch = 4\nmax_length = 16\n'
    )
    (tmp_path / "s.toml").write_text(f'name = "s"\ncard = "rtx-5070-ti"\n{model}')
    engine_folder(tmp_path / "engines", "m", "int8", "embed")
    return write_repository(load_stack(tmp_path / "s.toml"), tmp_path / "engines", tmp_path / "repository")


def test_the_container_command_pins_what_built_the_engines(repository: Path) -> None:
    options = ServerOptions(host="0.0.0.0", ports=ports.Ports(9000, 9001, 9002))
    words = docker_command(repository, options)
    assert words[:2] == ["docker", "run"]
    assert "0.0.0.0:9001:8001" in words
    assert f"{repository}:/models:ro" in words
    assert "onnxruntime==1.31.1" in words[-1]
    assert "--gpus" not in words
    (repository / "begun").mkdir()
    loaded = set(re.findall(r"--load-model=(\S+)", docker_command(repository, options)[-1]))
    assert loaded == {path.parent.name for path in repository.glob("*/config.pbtxt")}
    subprocess.run(["bash", "-n", "-c", words[-1]], check=True)
    for kind, name in (("http-restricted-api", ADMIN_HEADER), ("grpc-restricted-protocol", ADMIN_NAME)):
        assert f'"--{kind}=model-repository,shared-memory,trace,logging:{name}=$key"' in words[-1]


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", "{}", '{"target": "cuda", "engine": {"file": "x"}}', '{"target": [], "engine": 3}'],
)
def test_the_container_of_a_broken_repository_is_an_error_of_ours(repository: Path, text: str) -> None:
    path = repository / "m" / "1" / "manifest.json"
    path.unlink()
    path.write_text(text)
    with pytest.raises(ServerError, match="manifest") as refused:
        docker_command(repository, ServerOptions())
    assert "triton-repo write" in str(refused.value)


def test_a_folder_without_models_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="is no Triton repository"):
        Server(tmp_path)


def test_the_command_line_reports_errors_without_a_traceback(tmp_path: Path, repository: Path) -> None:
    result = CliRunner().invoke(main, ["serve", str(tmp_path)])
    assert result.exit_code == ServerError.exit_code
    assert "triton-repo write STACK" in result.output
    result = CliRunner().invoke(main, ["container", str(repository)])
    assert result.output.startswith("docker run")
    result = CliRunner().invoke(main, ["write", str(tmp_path / "s.toml"), "--target", "cuda"])
    assert result.exit_code == 2


def test_a_missing_gpu_is_said_in_plain_words() -> None:
    log = (
        "E1120 19:49:01.1 7 model_lifecycle.cc:642] \"failed to load 'vector' version 1: Invalid argument: "
        "instance group vector_0 of model vector specifies invalid or unsupported gpu id 0. GPUs with at "
        'least the minimum required CUDA compute compatibility of 6.000000 are: "\n'
    )
    assert server_log.failures(log)["vector"].startswith("it is for a GPU, and Triton finds none here")


def test_a_repository_for_a_gpu_is_not_to_be_written_again_but_served_elsewhere(repository: Path) -> None:
    lines = [
        f"E1120 19:49:01.1 7 model_lifecycle.cc:642] \"failed to load '{name}' version 1: Invalid argument: "
        f'instance group {name}_0 of model {name} specifies invalid or unsupported gpu id 0."\n'
        for name in ("a", "b")
    ]
    refused = Server(repository)._start_error("".join(lines))
    assert "could not load a, b: it is for a GPU" in str(refused)
    assert "triton-repo container" in str(refused)
    lines.append("E1120 19:49:01.1 7 x.cc:1] \"failed to load 'c' version 1: Internal: altered\"\n")
    assert "  c: altered" in str(Server(repository)._start_error("".join(lines)))


@pytest.mark.parametrize(
    ("target", "library", "image"),
    [
        ("onnxruntime-cuda", "onnxruntime-gpu", IMAGE),
        ("tensorrt-rtx", "tensorrt-rtx", IMAGE),
        ("tensorrt", "tensorrt", IMAGE),
        ("tensorrt-llm", "", LLM_IMAGE),
    ],
)
def test_the_container_of_a_gpu_engine(repository: Path, target: str, library: str, image: str) -> None:
    path = repository / "m" / "1" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"target": target, "versions": {library: "1.2.3"}}
    path.unlink()  # a hard link to the engine's own
    path.write_text(json.dumps(manifest))
    words = docker_command(repository, ServerOptions())
    assert words[words.index("--gpus") + 1] == "all"
    assert image in words
    assert "ONECARD_CACHE_DIR=/cache" in words
    assert "onecard-cache:/cache" in words
    install = words[-1].split(" && ")[0]
    assert (f" {library}==1.2.3" in install) == bool(library)
    assert ("cuda-bindings" in install) == bool(library)
    # TensorRT-LLM's image has a tokenizers of its own, which its Transformers needs.
    assert ("tokenizers==" in install) == bool(library)
    # An engine that Triton's own backend runs needs nothing but the image.
    (repository / "m" / "1" / "model.py").unlink()
    assert not library or library not in docker_command(repository, ServerOptions())[-1]
