"""The state file of a running server: for its owner alone, and no other server is taken for it."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from build_engines.errors import ServerError
from triton_repo.running import Running, read_running, remove_running, state_file, write_running


def record(repository: Path, pid: int) -> Running:
    urls = {"http": "127.0.0.1:1", "grpc": "127.0.0.1:2", "metrics": "127.0.0.1:3"}
    return Running.of(pid, repository=repository, urls=urls, log=repository.parent / "log", key="secret")


def test_what_was_written_is_found_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write_running(record(tmp_path / "repository", os.getpid()))
    finally:
        os.umask(old)
    found = read_running(tmp_path / "repository")
    assert (found.pid, found.urls["grpc"]) == (os.getpid(), "127.0.0.1:2")
    assert found.admin_header == ("triton-grpc-protocol-onecard-admin-key", "secret")
    assert "secret" not in repr(found)
    assert [path.name for path in tmp_path.iterdir()] == ["server.json"]
    assert stat.S_IMODE(state_file(tmp_path / "repository").stat().st_mode) == 0o600


def test_nobody_is_taken_for_the_server(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    with pytest.raises(ServerError, match=r"server\.json does not exist(?s:.*)triton-repo serve"):
        read_running(repository)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    gone = record(repository, ended.pid)
    ended.wait()
    write_running(gone)
    with pytest.raises(ServerError, match=rf"process {ended.pid}, which is gone"):
        read_running(repository)
    # Another process has got the number since.
    write_running(dataclasses.replace(record(repository, os.getpid()), born=1))
    with pytest.raises(ServerError, match="which is gone"):
        read_running(repository)
    write_running(record(tmp_path / "another", os.getpid()))
    with pytest.raises(ServerError, match=rf"that of a server on {tmp_path}/another"):
        read_running(repository)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"pid": 1}', "[" * 100_000, b"\xff\xfe".decode("latin1"), '{"pid": "1", "x": 2}'],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    state_file(tmp_path / "repository").write_text(content, encoding="latin1")
    with pytest.raises(ServerError, match=r"server\.json is not the state of a server"):
        read_running(tmp_path / "repository")


def test_fields_of_another_type_are_refused(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    fields = dataclasses.asdict(record(repository, os.getpid()))
    for name, value in {"pid": "1", "urls": [], "key": None}.items():
        state_file(repository).write_text(json.dumps(fields | {name: value}))
        with pytest.raises(ServerError, match="is not the state of a server"):
            read_running(repository)


def test_a_server_removes_its_own_file_only(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write_running(record(repository, os.getpid()))
    remove_running(repository, os.getpid() + 1)
    assert state_file(repository).exists()
    remove_running(repository, os.getpid())
    assert not state_file(repository).exists()
    remove_running(repository, os.getpid())
