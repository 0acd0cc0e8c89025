"""What may die while a model is replaced: the new version's process, tritonserver, the command itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from chaos_tools import Serving, Work, figure, serving, wait_until
from small_models import build_engine

from build_engines.errors import ServerError
from triton_repo.control import Control
from triton_repo.running import read_running
from triton_repo.versions import ServedModel


def stack_with_a_change(one_model: Path, folder: Path) -> Path:
    """The small stack in a folder of its own, its repository written, and a setting changed since."""
    shutil.copytree(one_model.parent, folder)
    stack = folder / "one.toml"
    stack.write_text(stack.read_text() + "cache = true\n")
    return stack


def deploying(stack: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "triton_repo.cli",
        "deploy",
        str(stack),
        "--build-dir",
        str(stack.parent),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def new_process(version: str) -> int | None:
    """The Python backend's process of that version, once there is one."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"/{version}/model.py".encode() in path.read_bytes():
                return int(path.parent.name)
    return None


def as_it_loads(kill: Callable[[int], None], version: str = "vector/2") -> None:
    """When its engine library is there: the death of one that it has not spoken with Triton never notices."""

    def seen() -> bool:
        pid = new_process(version)
        with contextlib.suppress(OSError):
            return pid is not None and "onnxruntime" in Path(f"/proc/{pid}/maps").read_text()
        return False

    assert wait_until(seen, 30)
    pid = new_process(version)
    assert pid
    kill(pid)


def versions(folder: Path) -> tuple[int, list[int]]:
    model = ServedModel(folder / "repository" / "vector")
    return model.version, model.kept


def ready(folder: Path) -> list[int]:
    control = Control(read_running(folder / "repository"))
    states = control.states()["vector"]
    control.close()
    return [version for version, state in states.items() if state.phase == "READY"]


def refused_as_it_loads(served: Serving, stack: Path, version: str) -> tuple[str, Work, float]:
    """What a deploy says whose new process is killed, the load that noticed nothing, the seconds it took."""
    with Work(served.ready["urls"]["grpc"]) as work:
        command = deploying(stack)
        as_it_loads(lambda pid: os.kill(pid, signal.SIGKILL), version)
        killed = time.monotonic()
        _, said = command.communicate(timeout=60)
        refused = time.monotonic() - killed
        time.sleep(3)  # who watches the processes must not restart the server for this
    assert command.returncode == ServerError.exit_code, said
    assert not [record for _, record in served.records if record.get("event") == "restart"]
    assert (work.failures, work.wrong) == ([], 0)
    return said, work, refused


def test_a_new_version_whose_process_is_killed_leaves_the_old_one_serving(
    one_model: Path, tmp_path: Path
) -> None:
    stack = stack_with_a_change(one_model, tmp_path / "stack")
    with serving(stack.parent / "repository", tmp_path / "log", "--supervise") as served:
        said, work, refused = refused_as_it_loads(served, stack, "vector/2")
        assert "vector: version 2 was not taken up" in said
        assert "version 1 serves on" in said
        assert versions(stack.parent) == (1, [1])
        command = deploying(stack)
        _, said = command.communicate(timeout=60)
        assert command.returncode == 0, said
        assert (versions(stack.parent), ready(stack.parent)) == ((2, [1, 2]), [2])
    figure("kill -9 of a version that loads", refused_s=refused, answered=work.answered, failed=0)


def test_a_new_model_whose_process_is_killed_costs_the_others_nothing(
    one_model: Path, tmp_path: Path
) -> None:
    stack = stack_with_a_change(one_model, tmp_path / "stack")
    text = stack.read_text().removesuffix("cache = true\n")
    stack.write_text(text + text[text.index("[models.vector]") :].replace("models.vector", "models.second"))
    engine = stack.parent / "engines" / "second" / "fp32" / "onnxruntime"
    build_engine(stack.parent / "vector", engine, model="second", task="embed")
    with serving(stack.parent / "repository", tmp_path / "log", "--supervise") as served:
        said, work, refused = refused_as_it_loads(served, stack, "second/1")
        assert "second: version 1 was not taken up" in said
        assert not (stack.parent / "repository" / "second").exists()
        command = deploying(stack)
        _, said = command.communicate(timeout=60)
        assert command.returncode == 0, said
    figure("kill -9 of a new model that loads", refused_s=refused, answered=work.answered, failed=0)


def test_a_server_killed_while_a_model_is_replaced_is_back_with_the_old_version(
    one_model: Path, tmp_path: Path
) -> None:
    stack = stack_with_a_change(one_model, tmp_path / "stack")
    with serving(stack.parent / "repository", tmp_path / "log", "--supervise") as served:
        with Work(served.ready["urls"]["grpc"]) as work:
            command = deploying(stack)
            as_it_loads(lambda pid: os.kill(served.ready["pid"], signal.SIGKILL))
            killed = time.monotonic()
            _, said = command.communicate(timeout=60)
            back, _ = served.wait_for("ready", 2)
            time.sleep(0.5)
        assert command.returncode == ServerError.exit_code, said
        assert "is gone" in said
        assert "Traceback" not in said
        assert versions(stack.parent)[0] == 1
        assert ready(stack.parent) == [1]
        assert (work.failures, work.wrong) == ([], 0)
        command = deploying(stack)
        _, said = command.communicate(timeout=60)
        assert command.returncode == 0, said
        new, kept = versions(stack.parent)
        assert (ready(stack.parent), kept) == ([new], [1, new])
    figure(
        "kill -9 of tritonserver while a model is replaced",
        back_s=back - killed,
        answered=work.answered,
        failed=0,
        longest_wait_s=work.longest,
    )


def test_a_deploy_killed_at_any_moment_is_made_good_by_the_next(one_model: Path, tmp_path: Path) -> None:
    stack = stack_with_a_change(one_model, tmp_path / "stack")
    with serving(stack.parent / "repository", tmp_path / "log") as served:
        with Work(served.ready["urls"]["grpc"]) as work:
            for seconds in (1.0, 1.5, 2.0, 2.5, 3.0):
                command = deploying(stack)
                time.sleep(seconds)
                command.kill()
                command.communicate()
                assert versions(stack.parent)[0] in (1, 2, 3, 4, 5)
            command = deploying(stack)
            _, said = command.communicate(timeout=60)
        assert command.returncode == 0, said
        new, kept = versions(stack.parent)
        assert (ready(stack.parent), len(kept) <= 2, new in kept) == ([new], True, True)
        assert (work.failures, work.wrong) == ([], 0)
    figure("kill -9 of deploy, five times", version=str(new), answered=work.answered, failed=0)
