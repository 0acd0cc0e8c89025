"""A served stack under light work, and what its clients saw while something broke."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from server_processes import SERVE, wait_until

from client import Client, ClientError
from client.retry import RetryPolicy

__all__ = ["Serving", "Work", "figure", "model_process", "processes_with", "serving", "wait_until"]

TEXT = "the noodles were very good"
PATIENT = RetryPolicy(attempts=60, initial=0.1, maximum=0.3)
ONCE = RetryPolicy(attempts=1)


def figure(fault: str, **measured: float | str) -> None:
    """One line for docs/reliability.md."""
    words = [
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:.4g}'}"
        for name, value in measured.items()
    ]
    print(f"\n[chaos] {fault}: {', '.join(words)}", flush=True)


@dataclass
class Serving:
    """`triton-repo serve --json` as a process; every line of its output with the moment it came."""

    process: subprocess.Popen[str]
    records: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def wait_for(self, event: str, count: int = 1, seconds: float = 30) -> tuple[float, dict[str, Any]]:
        """Moment and content of the count-th record of that event."""

        def found() -> list[tuple[float, dict[str, Any]]]:
            return [entry for entry in self.records if entry[1].get("event") == event]

        assert wait_until(lambda: len(found()) >= count or self.process.poll() is not None, seconds), (
            self.errors
        )
        assert len(found()) >= count, self.errors
        return found()[count - 1]

    @property
    def ready(self) -> dict[str, Any]:
        return self.wait_for("ready")[1]

    def ended(self, seconds: float = 30) -> tuple[int, str]:
        """Exit code and all that stderr said."""
        code = self.process.wait(seconds)
        assert wait_until(lambda: bool(self.errors) and self.errors[-1] is END, 5)
        return code, "".join(self.errors[:-1])


END = "\0"


@contextlib.contextmanager
def serving(repository: Path, log: Path, *words: str) -> Iterator[Serving]:
    """A server on free ports, ready; `words` are further options, and behind `--` a command."""
    command = [*SERVE, str(repository), "--free-ports", "--json", "--log", str(log), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    served = Serving(process)
    readers = [
        threading.Thread(target=_read_records, args=(served,), daemon=True),
        threading.Thread(target=_read_errors, args=(served,), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        assert served.ready
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        process.kill()
        process.wait()
        for reader in readers:
            reader.join(5)


def _read_records(served: Serving) -> None:
    assert served.process.stdout
    for line in served.process.stdout:
        with contextlib.suppress(ValueError):
            served.records.append((time.monotonic(), json.loads(line)))


def _read_errors(served: Serving) -> None:
    assert served.process.stderr
    served.errors.extend(served.process.stderr)
    served.errors.append(END)


class Work:
    """Threads that embed one text again and again, and check the answer against the first one."""

    def __init__(
        self, url: str, *, threads: int = 4, retry: RetryPolicy = PATIENT, timeout: float = 20
    ) -> None:
        self.answered = 0
        self.wrong = 0
        self.failures: list[ClientError] = []
        self.longest = 0.0
        self._client = Client(url, timeout=timeout, retry=retry)
        self._expected = self._client.embed(TEXT, model="vector").vector
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Work:
        for thread in self._threads:
            thread.start()
        assert wait_until(lambda: self.answered > 20, 10)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Let the requests that run end: every one of them has an answer or an error then."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a client hangs"
        self._client.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            failure = None
            right = True
            try:
                vector = self._client.embed(TEXT, model="vector").vector
                right = bool(np.allclose(vector, self._expected, atol=1e-5))
            except ClientError as error:
                failure = error
                # Not in a tight circle around a server that is gone.
                time.sleep(0.05)
            with self._lock:
                self.longest = max(self.longest, time.monotonic() - started)
                self.answered += failure is None
                self.wrong += not right
                if failure:
                    self.failures.append(failure)


def model_process(server: int, model: str) -> int:
    """The process of that model's only instance."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"/{model}/1/model.py".encode() in path.read_bytes():
                stat = path.with_name("stat").read_text().rpartition(")")[2].split()
                if int(stat[1]) == server:
                    return int(path.parent.name)
    raise AssertionError(f"{model} has no process")


def processes_with(mark: str) -> list[str]:
    """Command lines of other processes whose environment has ONECARD_CHAOS=`mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        if path.parent.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):
            if f"ONECARD_CHAOS={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
    return found


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run `call` beside; its result or its error ends up in the list, with the moment."""
    results: list[Any] = []

    def run() -> None:
        try:
            result = call()
        except Exception as error:
            result = error
        results.append((time.monotonic(), result))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results
