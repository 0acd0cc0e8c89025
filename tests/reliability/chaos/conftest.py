"""Small real stacks, those of tests/serving, and after each test: nothing left of it.

Its figures are printed: `make chaos`, or pytest -s.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import secrets
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from chaos_tools import processes_with, wait_until

from triton_repo.shared_memory import SHM

_SERVING = Path(__file__).parents[2] / "serving" / "conftest.py"
# Under a name of its own: there can be only one module `conftest`.
_SPEC = importlib.util.spec_from_file_location("serving_fixtures", _SERVING)
assert _SPEC
assert _SPEC.loader
_FIXTURES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FIXTURES)
_needs_a_server = _FIXTURES._needs_a_server
one_model = _FIXTURES.one_model
talk_stack = _FIXTURES.talk_stack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.reliability)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test that lets no file grow must not stop pytest's own lines: they may go to one, too."""
    try:
        return (yield)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture(scope="session")
def talk_repository(talk_stack: tuple[Path, dict[str, Path]]) -> Path:
    return talk_stack[0] / "repository"


@pytest.fixture(autouse=True)
def _nothing_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """No shared memory, process, or half-written file of the test behind it."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv("ONECARD_CHAOS", mark)
    before = set(SHM.glob("onecard_*"))
    yield
    # A server whose parent was killed takes a moment.
    gone = wait_until(lambda: not processes_with(mark), 15)
    assert gone, f"still running: {processes_with(mark)}"
    leaked = [path.name for path in set(SHM.glob("onecard_*")) - before if not _others(path)]
    assert not leaked
    half = [
        path for folder in (tmp_path, tmp_path_factory.getbasetemp()) for path in folder.rglob("*.aside-*")
    ]
    assert not half
    states = [json.loads(path.read_text()) for path in tmp_path_factory.getbasetemp().rglob("server.json")]
    assert not [state for state in states if not Path(f"/proc/{state['pid']}").exists()]


def _others(region: Path) -> bool:
    """Whether another test run, which is not over, made it."""
    with contextlib.suppress(ValueError, IndexError):
        starter = int(region.name.split("_")[2])
        return starter != os.getpid() and Path(f"/proc/{starter}").exists()
    return False
