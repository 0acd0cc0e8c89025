"""The server seen from outside under load: memory, shared memory, descriptors, processor time, gauges."""

from __future__ import annotations

import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from load_served import MODELS

from client.bench.machine import model_pids, process_tree, resident_mib
from triton_repo.server import Server

# Gauges that would grow with a queue: ours, and that of requests which Triton has not handed on.
QUEUES = ("onecard_queue_requests", "nv_inference_pending_request_count")
SERVER, GENERATOR = "tritonserver", "generator"
_TICKS = os.sysconf("SC_CLK_TCK")
_METRIC = re.compile(r'^(\w+)\{[^}]*?model="([^"]+)"[^}]*\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. `at` is time.monotonic(); by process: resident MiB, descriptors, seconds of processor time.
    `shared_mib`: of the server's regions in /dev/shm. `queues`: by gauge and model."""

    at: float
    resident_mib: Mapping[str, float]
    descriptors: Mapping[str, int]
    cpu_s: Mapping[str, float]
    shared_mib: float
    queues: Mapping[tuple[str, str], float]


@dataclass(slots=True)
class Observer:
    """Looks every `every_s` seconds, from entering to leaving; `on_sample` is called on its thread. `also`:
    pids of processes beside the server whose processor time is wanted."""

    server: Server
    every_s: float = 1.0
    on_sample: Callable[[Sample], None] = lambda sample: None
    also: Mapping[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _pids: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._pids = processes(self.server)
        self.samples.append(self._look())
        self._thread = threading.Thread(target=self._run, name="observer")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join()

    def cpu_s(self, name: str, begin: float, end: float) -> float:
        """Processor time of a process between two times of time.monotonic(), between samples by the line."""
        times = [sample.at for sample in self.samples]
        used = [sample.cpu_s[name] for sample in self.samples]
        return float(np.interp(end, times, used) - np.interp(begin, times, used))

    def queue(self, gauge: str, model: str, begin: float, end: float) -> list[float]:
        """A gauge's values between two times."""
        samples = (sample for sample in self.samples if begin <= sample.at <= end)
        return [sample.queues.get((gauge, model), 0.0) for sample in samples]

    def _run(self) -> None:
        due = time.monotonic() + self.every_s
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            self.samples.append(self._look())
            self.on_sample(self.samples[-1])
            due += self.every_s
        self.samples.append(self._look())

    def _look(self) -> Sample:
        # Descriptors before the gauges, whose connection is one of them.
        resident = {name: resident_mib(pid) or 0.0 for name, pid in self._pids.items()}
        descriptors = {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in self._pids.items()}
        cpu = {name: _cpu_s(pid) for name, pid in (*self._pids.items(), *self.also.items())}
        shared, queues = shared_mib(self._pids[SERVER]), gauges(self.server.urls["metrics"])
        return Sample(time.monotonic(), resident, descriptors, cpu, shared, queues)


def processes(server: Server) -> dict[str, int]:
    """Pids by what runs in them: the server itself, and each model's process."""
    assert server.pid is not None
    tree = process_tree(server.pid)
    found = {SERVER: server.pid}
    for model in MODELS:
        (found[model],) = model_pids(tree, model)
    return found


def shared_mib(pid: int) -> float:
    """Memory of the regions in /dev/shm that belong to the server, by the names that it has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    names = set(re.findall(r"(/dev/shm/onecard_\S+)", maps))
    return sum(Path(name).stat().st_blocks * 512 for name in names) / 2**20


def gauges(address: str, names: Sequence[str] = QUEUES) -> dict[tuple[str, str], float]:
    """Values by name and model, added up over other labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = {}
    for name, model, value in _METRIC.findall(text):
        if name in names:
            found[name, model] = found.get((name, model), 0.0) + float(value)
    return found


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
