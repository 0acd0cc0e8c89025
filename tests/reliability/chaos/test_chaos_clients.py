"""Clients that read slowly, that are killed, and that wait for milliseconds only."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_tools import figure, wait_until
from small_llm import Talk, metrics, outputs, quiet, thrice

from client import AsyncClient, Client, DeadlineExceeded, Overloaded, RetryPolicy
from triton_repo.server import Server, ServerOptions


@pytest.fixture(scope="module")
def server(talk_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("clients") / "log"
    with Server(talk_repository, ServerOptions(free_ports=True, log=log)) as server:
        yield server


def seconds(talk: Talk) -> float:
    started = time.monotonic()
    assert talk.whole(text="fast", max_tokens=1000, ignore_eos=True)["usage"]["completion_tokens"] == 1000
    return time.monotonic() - started


def test_slow_readers_hold_up_nobody(server: Server) -> None:
    """They hold three of the four slots as long as their answers take to make, and no longer."""
    talk = Talk(server.urls["grpc"])
    seconds(talk)
    alone = min(seconds(talk) for _ in range(3))
    slow = [
        Talk(server.urls["grpc"]).call(text=f"slow {i}", max_tokens=2000, ignore_eos=True) for i in range(3)
    ]
    for call in slow:
        next(call)
    assert wait_until(lambda: metrics(server.urls["metrics"], "talk")["slots_active"] == 0, 30)
    beside = min(seconds(talk) for _ in range(3))
    # All of it is there when they read on.
    assert [outputs(list(call)[-1])["usage"]["completion_tokens"] for call in slow] == [2000] * 3
    assert beside < 2 * alone + 0.5
    figure("3 streams that nobody reads", another_stream_alone_s=alone, beside_them_s=beside)


VANISHING = """
    import sys
    sys.path[:0] = {paths!r}
    from small_llm import Talk
    call = Talk({address!r}).call(text="forever", max_tokens=8000, ignore_eos=True)
    next(call)
    print("running", flush=True)
    for _ in call:
        pass
"""


@thrice
def test_a_killed_client_frees_its_slot(server: Server) -> None:
    quiet(server.urls["metrics"], "talk")
    program = textwrap.dedent(VANISHING).format(paths=sys.path, address=server.urls["grpc"])
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "running\n"
        assert wait_until(lambda: metrics(server.urls["metrics"], "talk")["slots_active"] == 1, 5)
        client.send_signal(signal.SIGKILL)
        killed = time.monotonic()
    assert wait_until(lambda: metrics(server.urls["metrics"], "talk")["slots_active"] == 0, 3)
    freed = time.monotonic() - killed
    figure("kill -9 of a client in mid-stream", slot_seen_free_s=freed)


async def hurry(url: str, limit: int) -> tuple[int, int]:
    """Six callers who hardly wait, each call by a client of its own; how many were answered, and how many not
    in time, of which there are `limit`."""
    answered = late = 0

    async def one() -> None:
        nonlocal answered, late
        while late < limit:
            async with AsyncClient(url, retry=RetryPolicy(attempts=1)) as client:
                try:
                    await client.embed("good", model="vector", timeout=random.uniform(0.001, 0.01))
                    answered += 1
                except (DeadlineExceeded, Overloaded):
                    late += 1

    await asyncio.gather(*[one() for _ in range(6)])
    return answered, late


def test_clients_in_a_hurry_do_not_bring_the_server_down(server: Server) -> None:
    """Triton 2.51 crashes when a gRPC call is cancelled just as it is answered; before our clients left such
    calls to end, it did within 200 to 1,800 of these."""
    url = f"grpc://{server.urls['grpc']}"
    answered, late = asyncio.run(hurry(url, 5000))
    with Client(url) as client:
        assert client.embed("good", model="vector").vector.shape == (32,)
    figure("clients that wait for 1 to 10 ms", late=late, answered=answered)
