"""A model file that is corrupted while it is served; a disk that is full while a repository is written."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path

from chaos_tools import Work, figure
from namespaces import in_mount_namespace

from triton_repo.server import Server, ServerOptions


def reload(server: Server, model: str) -> tuple[int, str]:
    url = f"http://{server.urls['http']}/v2/repository/models/{model}/load"
    request = urllib.request.Request(url, b"{}", dict([server.admin_header]))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, str(json.loads(error.read())["error"])


def test_a_file_corrupted_while_served_is_refused_and_the_served_one_goes_on(
    one_model: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(one_model, repository)
    engine = repository / "vector" / "1" / "engine.onnx"
    with Server(repository, ServerOptions(free_ports=True)) as server, Work(server.urls["grpc"]) as work:
        content = bytearray(engine.read_bytes())
        content[len(content) // 2] ^= 1
        # As a copy that breaks off or goes wrong does it: in place.
        engine.write_bytes(content)
        time.sleep(0.5)
        started = time.monotonic()
        status, reason = reload(server, "vector")
        refused = time.monotonic() - started
        before = work.answered
        time.sleep(1)
        assert work.answered > before + 20
        assert server.fault() is None
        content[len(content) // 2] ^= 1
        engine.write_bytes(content)
        assert reload(server, "vector") == (200, "")
        work.end()
    assert status == 400
    assert "engine.onnx: altered after the build" in reason
    assert (work.failures, work.wrong) == ([], 0)
    figure("a served model's file corrupted", reload_refused_s=refused, answered=work.answered, failed=0)


WRITE = """
    import os, sys
    from pathlib import Path
    from build_engines.errors import RepositoryError
    from build_engines.stack import load_stack
    from triton_repo.writer import write_repository

    folder, full = Path(sys.argv[1]), Path(sys.argv[2])
    stack = load_stack(folder / "one.toml", build_dir=folder)
    out = full / "repository"
    write_repository(stack, folder / "engines", out)
    before = {str(path): path.stat().st_size for path in sorted(full.rglob("*")) if not path.is_dir()}
    status = os.statvfs(full)
    with open(full / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, status.f_bavail * status.f_frsize - (64 << 10))
    try:
        write_repository(stack, folder / "engines", out)
    except RepositoryError as error:
        print(error)
    os.unlink(full / "filler")
    after = {str(path): path.stat().st_size for path in sorted(full.rglob("*")) if not path.is_dir()}
    assert after == before, set(after) ^ set(before)
    write_repository(stack, folder / "engines", out)
"""


def test_a_disk_that_is_full_leaves_the_old_repository(one_model: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    program = [sys.executable, "-c", textwrap.dedent(WRITE), str(one_model.parent), str(full)]
    done = in_mount_namespace({full: "4m"}, program)
    assert done.returncode == 0, done.stderr
    assert "cannot be written (No space left on device)" in done.stdout
    assert "nothing half-written is left" in done.stdout
    figure("disk full while a repository is written", left="the old one, whole", then="written again")
