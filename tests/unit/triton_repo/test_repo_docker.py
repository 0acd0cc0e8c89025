"""The compose file, the images and the script that runs them: what they promise, without running an image."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from triton_repo.container import IMAGE
from triton_repo.server import Server

ROOT = Path(__file__).parent.parent.parent.parent
DOCKER = ROOT / "docker"
SERVICES = ("build", "serve", "client")


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_closed(compose: Any, name: str) -> None:
    service = compose["services"][name]
    assert service["user"] == "1000:1000"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert not {"network_mode", "pid", "ipc", "cap_add"} & service.keys()


def test_nothing_is_published_beyond_this_machine(compose: Any) -> None:
    published = {name: service.get("ports", []) for name, service in compose["services"].items()}
    assert {name for name, ports in published.items() if ports} == {"serve"}
    assert published["serve"] == [f"127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002)]


def test_the_server_reads_engines_that_only_the_build_writes(compose: Any) -> None:
    volumes = {name: compose["services"][name].get("volumes", []) for name in SERVICES}
    assert "engines:/engines:ro" in volumes["serve"]
    assert "engines:/engines" in volumes["build"]
    assert any(volume.endswith(":/stack:ro") for volume in volumes["build"])
    assert f"cache:{compose['services']['serve']['environment']['ONECARD_CACHE_DIR']}" in volumes["serve"]
    assert not volumes["client"]
    assert set(compose["volumes"]) == {"engines", "cache"}
    assert "HF_TOKEN" not in compose["services"]["serve"]["environment"]


def test_build_and_serve_have_the_same_gpu_and_the_client_none(compose: Any) -> None:
    (device,) = compose["services"]["serve"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
    assert compose["services"]["build"]["deploy"] == compose["services"]["serve"]["deploy"]
    assert "deploy" not in compose["services"]["client"]


def test_the_image_is_the_one_that_the_project_names(compose: Any) -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert re.search(r"^ARG TRITON_IMAGE=(.*)$", dockerfile, re.MULTILINE)[1] == IMAGE  # type: ignore[index]
    for name in SERVICES:
        build = compose["services"][name]["build"]
        assert build["args"]["TRITON_IMAGE"] == f"${{TRITON_IMAGE:-{IMAGE}}}"
        assert build["target"] == name
        assert f" AS {name}\n" in dockerfile
    assert re.fullmatch(r"nvcr\.io/nvidia/tritonserver:\d\d\.\d\d-py3", IMAGE)


def test_every_stage_ends_without_root_and_copies_what_exists() -> None:
    stages = (DOCKER / "Dockerfile").read_text().split("\nFROM ")[1:]
    for stage in stages:
        if stage.split(" AS ")[1].split()[0] != "base":
            assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["1000:1000"]
    allowed = [
        line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    ]
    copied = {
        source
        for line in re.findall(r"^COPY (.*)$", "\n".join(stages), re.MULTILINE)
        for source in line.split()[:-1]
    }
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch(source, pattern) for pattern in allowed), f"{source} is ignored"
    assert copied == set(allowed)


def started(arguments: list[str], folder: Path) -> list[str]:
    """What tritonserver is given by the serving image's entry point."""
    (folder / "tritonserver").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "tritonserver").chmod(0o755)
    path = {"PATH": f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin"}
    script = ["sh", str(DOCKER / "serve.sh"), *arguments]
    return subprocess.run(script, env=path, capture_output=True, check=True, text=True).stdout.splitlines()


def test_the_server_is_started_as_the_project_starts_it(compose: Any, tmp_path: Path) -> None:
    stage = (DOCKER / "Dockerfile").read_text().split(" AS serve")[1].split("FROM ")[0]
    assert 'ENTRYPOINT ["sh", "/onecard/serve.sh"]' in stage
    command = started(compose["services"]["serve"]["command"], tmp_path)
    again = started(compose["services"]["serve"]["command"], tmp_path)
    keys = {word.rpartition("=")[2] for word in (*command, *again) if "restricted" in word}
    assert len(keys) == 2, "each start has a key of its own, for both protocols"
    assert min(map(len, keys)) >= 40
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text('name: "m"\nresponse_cache { enable: true }\n')
    installation: Any = type("Found", (), {"binary": "tritonserver", "backends": None, "caches": None})
    server = Server(tmp_path)
    server._key = command[-1].rpartition("=")[2]
    ours = server._command(installation)
    assert {word for word in ours if "restricted" in word} <= set(command)
    own = {word for word in ours if word.split("=")[0] in {entry.split("=")[0] for entry in command}}
    assert own - set(command) == {f"--model-repository={tmp_path}"}
    assert set(command) - own == {"--model-repository=/engines/repository"}


class _Answers(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/v2/health/ready" else 404)
        self.end_headers()

    def log_message(self, format: str, *values: Any) -> None:
        pass


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (400, False)])
def test_the_health_check_asks_whether_every_model_is_ready(compose: Any, status: int, healthy: bool) -> None:
    kind, python, flag, program = compose["services"]["serve"]["healthcheck"]["test"]
    assert (kind, python, flag) == ("CMD", "python3", "-c")
    server = HTTPServer(("127.0.0.1", 0), type("Own", (_Answers,), {"status": status}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = program.replace(":8000", f":{server.server_port}")
    proxy = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    done = subprocess.run([sys.executable, flag, program], env=proxy, capture_output=True, check=False)
    server.shutdown()
    assert (done.returncode == 0) == healthy


@pytest.mark.parametrize(
    ("shell", "script"), [("bash", "up.sh"), ("sh", "serve.sh"), ("sh", "tensorrt-version.sh")]
)
def test_scripts_are_readable_to_their_shell(shell: str, script: str) -> None:
    subprocess.run([shell, "-n", str(DOCKER / script)], check=True)
    assert os.access(DOCKER / "up.sh", os.X_OK)


def test_the_images_tensorrt_is_found_by_its_file(tmp_path: Path) -> None:
    script = ["sh", str(DOCKER / "tensorrt-version.sh"), str(tmp_path)]
    missing = subprocess.run(script, capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert "no libnvinfer.so here" in missing.stderr
    (tmp_path / "lib").mkdir()
    for name in ("libnvinfer.so", "libnvinfer.so.11", "libnvinfer.so.11.2.1", "libnvinfer_plugin.so.11.2.1"):
        (tmp_path / "lib" / name).touch()
    assert subprocess.run(script, capture_output=True, text=True, check=True).stdout == "11.2.1\n"


@pytest.mark.parametrize(("failing", "ran"), [("", ["build", "write"]), ("build-engines", ["build"])])
def test_the_build_writes_the_repository_of_what_it_built(
    compose: Any, tmp_path: Path, failing: str, ran: list[str]
) -> None:
    """Compose's own `$$` is a `$`; a failing build ends it."""
    for name in ("build-engines", "triton-repo"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "{name} $@" >>"$CALLS"\n' + ("exit 3\n" if name == failing else ""))
        tool.chmod(0o755)
    (program,) = compose["services"]["build"]["command"]
    stage = (DOCKER / "Dockerfile").read_text().split(" AS build")[1].split("FROM ")[0]
    assert 'ENTRYPOINT ["bash", "-euc"]' in stage
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "STACK": "/stack/own.toml",
    }
    words = ["bash", "-euc", program.replace("$$", "$")]
    done = subprocess.run(words, env=environment, check=False)
    assert done.returncode == (3 if failing else 0)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ran
    assert all("/stack/own.toml --build-dir /engines --target tensorrt" in call for call in calls)
    assert failing or calls[-1].endswith("--native")


STACK = 'card = "rtx-5070-ti"\ntargets = ["tensorrt"]\n'
FAKE_DOCKER = """#!/bin/sh
[ "$1 $2" = "compose version" ] && exit "$NO_COMPOSE"
case "$*" in *"ps --all --quiet serve") echo onecard-serve-1; exit;; esac
if [ "$1" = inspect ]; then  # the first answer, the next time the second, the last one ever after
  [ "${4}" = onecard-serve-1 ] || exit 1
  read -r state rest <"$STATES"; echo "${state/-/ }"; [ -z "$rest" ] || echo "$rest" >"$STATES"; exit
fi
echo "$@ [$ONECARD_STACK_FILE in $ONECARD_STACK_DIR]" >>"$CALLS"
"""


def up(
    folder: Path,
    *arguments: str,
    gpu: bool = True,
    docker: bool = True,
    states: str = "0-healthy",
    **settings: str,
) -> Any:
    """Run up.sh with a docker and an nvidia-smi of ours, and nothing else of the machine but the basics."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "grep"):
        found = next(path for path in (Path("/usr/bin") / name, Path("/bin") / name) if path.exists())
        (tools / name).symlink_to(found)
    for name, text, wanted in (("docker", FAKE_DOCKER, docker), ("nvidia-smi", "#!/bin/sh\n", gpu)):
        if wanted:
            (tools / name).write_text(text.replace("#!/bin/sh", "#!/bin/bash"))
            (tools / name).chmod(0o755)
    (tools / "sleep").write_text("#!/bin/bash\n")
    (tools / "sleep").chmod(0o755)
    (folder / "states").write_text(f"{states}\n")
    environment = {"PATH": str(tools), "CALLS": str(folder / "calls"), "STATES": str(folder / "states")}
    environment["NO_COMPOSE"] = "0"
    return subprocess.run(
        ["bash", str(DOCKER / "up.sh"), *arguments],
        capture_output=True,
        text=True,
        env=environment | settings,
        check=False,
    )


def test_up_builds_then_serves_then_asks(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(STACK)
    done = up(tmp_path, str(tmp_path / "own.toml"), states="0-starting 0-starting 0-healthy")
    assert (tmp_path / "states").read_text() == "0-healthy\n"
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.endswith(f"[own.toml in {tmp_path}]") for call in calls)
    words = [call.split("compose.yaml ")[1].split(" [")[0] for call in calls]
    assert words == [
        "--profile build --profile client build",
        "run --rm build",
        "up --detach --force-recreate serve",
        "run --rm client status",
    ]


@pytest.mark.parametrize("states", ["0-starting 1-starting 0-healthy", "0-starting 0-unhealthy"])
def test_a_server_that_does_not_come_up_shows_its_log_and_is_stopped(tmp_path: Path, states: str) -> None:
    """Docker would start one that ended again and again, and its health be "starting" each time."""
    (tmp_path / "own.toml").write_text(STACK)
    done = up(tmp_path, str(tmp_path / "own.toml"), states=states)
    assert done.returncode == 1
    assert "the server did not become ready" in done.stderr
    *_, log, stop = (tmp_path / "calls").read_text().splitlines()
    assert "logs --tail 40 serve" in log
    assert "stop serve" in stop


@pytest.mark.parametrize(
    ("text", "arguments", "options", "message"),
    [
        (STACK, [], {}, "one stack file is needed"),
        (STACK, ["none.toml"], {}, "none.toml: no such file"),
        (STACK.replace("tensorrt", "tensorrt-rtx"), ["own.toml"], {}, 'do not name "tensorrt"'),
        (f"{STACK}[models.a]\ntarget = 'tensorrt-llm'\n", ["own.toml"], {}, "needs another image"),
        (STACK, ["own.toml"], {"docker": False}, "docker is not installed"),
        (STACK, ["own.toml"], {"NO_COMPOSE": "1"}, "docker has no compose command"),
        (STACK, ["own.toml"], {"gpu": False}, "no NVIDIA GPU answers"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(
    tmp_path: Path, text: str, arguments: list[str], options: dict[str, Any], message: str
) -> None:
    (tmp_path / "own.toml").write_text(text)
    done = up(tmp_path, *(str(tmp_path / name) for name in arguments), **options)
    assert done.returncode == 1
    assert message in done.stderr
    assert "next: " in done.stderr
    assert not (tmp_path / "calls").exists()
