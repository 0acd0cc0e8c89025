"""/dev/shm too small for the stack, and one that fills up while it is served: in a namespace of its own."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

from chaos_tools import figure
from namespaces import in_mount_namespace

SHM = Path("/dev/shm")


def test_too_little_is_refused_before_the_start(talk_repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "triton_repo.cli", "serve", str(talk_repository), "--free-ports"]
    done = in_mount_namespace({SHM: "8m"}, [*command, "--log", str(tmp_path / "log")])
    assert done.returncode == 20
    assert "/dev/shm has 8 MiB free; 3 model instances need 12 MiB" in done.stderr
    assert "--shm-size" in done.stderr
    assert not (tmp_path / "log").exists()
    figure("/dev/shm of 8 MiB for 3 models", exit_code="20", said="8 MiB free, 12 MiB needed")


FILL = """
    import json, os, sys
    from pathlib import Path
    from client import Client, ClientError
    from client.retry import RetryPolicy
    from triton_repo.server import Server, ServerOptions

    SMALL, LARGE = ["the noodles"], ["the noodles " * 5000] * 64
    filler = Path("/dev/shm/filler")
    with Server(Path(sys.argv[1]), ServerOptions(free_ports=True, log=Path(sys.argv[2]))) as server:
        client = Client(server.urls["grpc"], retry=RetryPolicy(attempts=1))
        expected = client.embed(SMALL, model="vector")[0].vector

        def ask(texts):
            try:
                answers = client.embed(texts, model="vector")
            except ClientError as error:
                return f"{type(error).__name__}: {error}"
            right = len(answers) == len(texts)
            if texts == SMALL:
                right = right and abs(answers[0].vector - expected).max() < 1e-5
            return "right" if right else "wrong"

        status = os.statvfs("/dev/shm")
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)
        found = {"small, full": [ask(SMALL) for _ in range(20)], "large, full": ask(LARGE)}
        found["small again, full"] = ask(SMALL)
        filler.unlink()
        found["large, freed"] = ask(LARGE)
        found["fault"] = str(server.fault() or "")
    found["left"] = os.listdir("/dev/shm")
    print(json.dumps(found))
"""


def test_memory_that_fills_up_fails_what_does_not_fit_and_nothing_else(
    talk_repository: Path, tmp_path: Path
) -> None:
    program = [sys.executable, "-c", textwrap.dedent(FILL), str(talk_repository), str(tmp_path / "log")]
    done = in_mount_namespace({SHM: "32m"}, program)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["small, full"]) == {"right"}
    assert "Failed to increase the shared memory pool size" in found["large, full"]
    assert found["small again, full"] == "right"
    assert found["large, freed"] == "right"
    assert (found["fault"], found["left"]) == ("", [])
    figure(
        "/dev/shm fills up while serving",
        small_requests="20 of 20 answered",
        one_of_3_8_MB=found["large, full"].split(":")[0],
        freed="answered",
    )
