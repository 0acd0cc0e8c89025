"""Many short requests in sequence, some cancelled midway: nothing grows, no slot is lost.

600 by default. docs/benchmarks.md has the figures of ONECARD_SOAK=10000.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import grpc
import pytest
from small_llm import Talk, outputs, quiet
from small_models import Served

pytestmark = [pytest.mark.serving, pytest.mark.timeout(3600)]

REQUESTS = int(os.environ.get("ONECARD_SOAK", "600"))
CANCELLED = max(1, REQUESTS // 20)
# Of all processes together: the server's allocator takes some once, the tokenizer remembers words it saw.
MOST_GROWN_KB = 12 << 10


def resident(server: Served) -> dict[str, int]:
    """Resident kB of the server and of each model's process, by pid."""
    found = {}
    assert server.server.pid is not None
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            if status.parent.name == str(server.server.pid) or int(lines["PPid"]) == server.server.pid:
                found[status.parent.name] = int(lines.get("VmRSS", "0 kB").split()[0])
    return found


def run(talk: Talk, count: int, cancelled: int) -> None:
    for place in range(count):
        gives_up = cancelled and place % (count // cancelled) == 0
        text = f"{place} short {place % 17}"
        call = talk.call(text=text, max_tokens=4000 if gives_up else 2, ignore_eos=True)
        if gives_up:
            assert outputs(next(call))["finish_reason"] == [""]
            call.cancel()
        with contextlib.suppress(grpc.RpcError):
            answers = [outputs(response) for response in call]
            assert answers[-1]["usage"]["completion_tokens"] == 2


def test_short_requests_and_cancelled_ones_leave_nothing_behind(talking: Served) -> None:
    talk = Talk(talking.grpc)
    # What is allocated once: the cache, which is touched as it fills, and buffers of all that takes part.
    talk.whole(text="fill", n=4, max_tokens=4000, ignore_eos=True)
    run(talk, 300, 20)
    before = quiet(talking.server.urls["metrics"], "talk")
    memory = resident(talking)
    started = time.monotonic()
    run(talk, REQUESTS, CANCELLED)
    seconds = time.monotonic() - started
    after = quiet(talking.server.urls["metrics"], "talk")
    done = {name: after[name] - before[name] for name in after if name.startswith("requests_total")}
    cancelled, completed = done.pop("requests_total cancelled"), done.pop("requests_total completed")
    # Triton 2.51 loses a cancellation that meets a response on its way; that request runs to its end.
    assert cancelled + completed == REQUESTS
    assert CANCELLED / 2 < cancelled <= CANCELLED
    assert not any(done.values()), done
    assert (after["slots_active"], after["queue_requests"]) == (0, 0)
    grown = sum(resident(talking).values()) - sum(memory.values())
    print(f"{REQUESTS} requests, {cancelled:.0f} cancelled, {seconds:.0f} s; resident {grown:+,} kB")
    assert grown < MOST_GROWN_KB
    assert talk.whole(text="all", n=4, max_tokens=2, ignore_eos=True)["index"] == [0, 1, 2, 3]
    talk.close()
