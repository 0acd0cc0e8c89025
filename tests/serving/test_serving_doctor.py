"""The doctor beside a real tritonserver: it finds the stack's, and who holds a port that is taken."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner
from small_models import Served

from build_engines.cli import main
from build_engines.errors import ServerError
from triton_repo.server import Server


def checks(*arguments: object) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and every check by name."""
    result = CliRunner().invoke(main, ["doctor", "--json", *map(str, arguments)])
    return result.exit_code, {check["check"]: check for check in json.loads(result.stdout)["checks"]}


def numbers(server: Server) -> list[int]:
    return list(server.ports.named().values())


def test_the_stacks_server_is_found_and_its_ports_are_its_own(served: Served) -> None:
    stack = (served.folder / "small.toml", "--build-dir", served.folder)
    code, found = checks(*stack, "--ports", *numbers(served.server))
    assert code == 0, [check for check in found.values() if check["state"] == "problem"]
    assert f"runs as process {served.server.pid} at http {served.http}" in found["server"]["found"]
    assert found["server"]["found"].endswith(", ready")
    assert found["server"]["do"] == f"client status --url {served.grpc}"
    assert found["ports"]["found"].endswith("are the stack's server's")
    assert found["repository"]["state"] == "ok"
    assert found["stale regions"]["state"] == "ok"


def test_ports_of_a_server_of_something_else_are_a_problem(served: Served) -> None:
    code, found = checks("--ports", *numbers(served.server))
    assert code == ServerError.exit_code
    holder = f"Address already in use by tritonserver (process {served.server.pid})"
    assert f"http port {served.server.ports.http}: {holder}" in found["ports"]["found"]
