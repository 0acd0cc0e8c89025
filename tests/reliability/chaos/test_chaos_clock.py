"""The wall clock of the server jumps, an hour on and a day back: nobody's deadline moves.

The machine's clock stays: libfaketime answers the server's questions for the time of day, and leaves its
monotonic clock alone.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_tools import Work, figure
from small_llm import Refused, Talk

from triton_repo.server import Server, ServerOptions

LIBRARY = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
JUMPS = {"+3600": 3600, "-86400": -86400, "+0": 0}


@pytest.fixture
def offset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The file that says how far the clock of processes started now is off."""
    if LIBRARY is None:
        pytest.skip("libfaketime is not installed (Debian: apt-get install libfaketime)")
    path = tmp_path / "offset"
    path.write_text("+0")
    monkeypatch.setenv("LD_PRELOAD", str(LIBRARY))
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(path))
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    monkeypatch.setenv("FAKETIME_CACHE_DURATION", "1")
    yield path
    for left in Path("/dev/shm").glob(f"*faketime*{os.getpid()}*"):
        left.unlink()


def server_clock(server: Server) -> float:
    """How far the server's clock is off, as it dates its last inference."""
    with urllib.request.urlopen(f"http://{server.urls['http']}/v2/models/vector/stats", timeout=10) as answer:
        stamp: int = json.loads(answer.read())["model_stats"][0]["last_inference"]
    return stamp / 1000 - time.time()


def test_no_answer_and_no_deadline_follows_the_wall_clock(
    talk_repository: Path, tmp_path: Path, offset: Path
) -> None:
    seen = {}
    options = ServerOptions(free_ports=True, log=tmp_path / "log", exit_timeout_s=5)
    with Server(talk_repository, options) as server, Work(server.urls["grpc"], threads=2) as work:
        tight = Talk(server.urls["grpc"], "tight")
        for jump, seconds in JUMPS.items():
            running = tight.call(text="busy", max_tokens=8000, ignore_eos=True)
            next(running)
            offset.write_text(jump)
            time.sleep(2)
            seen[jump] = server_clock(server)
            assert abs(seen[jump] - seconds) < 30
            # Whoever waits behind it is told so after the 300 ms of its queue, and not at once or never.
            asked = time.monotonic()
            with pytest.raises(Refused, match="the wait"):
                tight.whole(text="waits", max_tokens=3)
            assert time.monotonic() - asked < 2
            running.cancel()
            assert server.fault() is None
        work.end()
    assert (work.failures, work.wrong) == ([], 0)
    assert work.longest < 3
    figure(
        "wall clock +1 h, -1 day, back",
        answered=work.answered,
        failed=0,
        longest_wait_s=work.longest,
    )
