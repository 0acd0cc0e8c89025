"""Start tritonserver on a repository, wait until it is ready or say why it is not, and stop it cleanly.

with Server(Path("build/demo/repository"), ServerOptions(free_ports=True)) as server:
    print(server.urls["grpc"])
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from build_engines.errors import ServerError
from triton_repo import ports, running, server_log, shared_memory
from triton_repo.installation import Installation, find_installation
from triton_repo.log_file import LogFile, LogFormat
from triton_repo.ports import Ports
from triton_repo.processes import ModelProcesses, die_with_parent, hide, how_it_ended, not_run, not_started
from triton_repo.repository import all_in_python, served_models, uses_cache
from triton_repo.running import Running

_POLL_S = 0.05
_ATTEMPTS = 4
_CONTROL_S = 2.0
# Triton 2.51 that reaches its own exit timeout may crash and hang instead of ending, so we are there first.
_TRITON_LATER_S = 5
# Where a model has died, those that live cannot be told from it by whether Triton still waits for requests.
_DRAIN_BESIDE_A_DEAD_MODEL_S = 3.0
# What changes the server or writes where its caller says: these need the admin key. Health, metadata, model
# configurations, inference, statistics and metrics stay open.
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How to serve. `free_ports` overrides the three ports; `log` None means a file beside the repository;
    `exit_timeout_s` is what requests in flight get when the server is told to stop."""

    host: str = "127.0.0.1"
    ports: Ports = field(default_factory=Ports)
    free_ports: bool = False
    ready_timeout_s: float = 300.0
    exit_timeout_s: float = 10.0
    log: Path | None = None
    log_format: LogFormat = "text"
    binary: Path | None = None
    cache_mib: int = 64
    verbose: int = 0


class Server:
    """One tritonserver process. Start it from a thread that outlives it: it is stopped when that thread ends,
    which is what stops it when this process is killed."""

    def __init__(self, repository: Path, options: ServerOptions | None = None) -> None:
        self.repository = Path(repository).absolute()
        self.options = options or ServerOptions()
        self.models = served_models(self.repository)
        self.ports = self.options.ports
        self.log = self.options.log or self.repository.parent / "tritonserver.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._processes: ModelProcesses | None = None
        self._log_file: LogFile | None = None
        self._in_python = False
        self._prefix = ""
        self._key = ""
        self._work: Path | None = None
        self._claim: int | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def urls(self) -> dict[str, str]:
        """host:port by service: http, grpc, metrics. A server on all addresses is reached on loopback."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.options.host, self.options.host)
        return {name: f"{host}:{port}" for name, port in self.ports.named().items()}

    @property
    def admin_header(self) -> tuple[str, str]:
        """Name and value of the header (gRPC: of the metadata) that opens the restricted APIs."""
        return running.ADMIN_HEADER, self._key

    def start(self, progress: Progress | None = None) -> Self:
        """Start and wait until every model is ready; `progress(ready, total)` is called as they load.

        Raises ServerError: another server there, nothing to serve with, a port taken, a model that failed to
        load and why, not ready in time, or what the system refused. Nothing is left running then.
        """
        self._start(progress, free_ports=self.options.free_ports)
        return self

    def restart(self) -> None:
        """Start again after `stop`, on the ports it had, with what the repository holds now. Raises as
        `start` does."""
        self._start(None, free_ports=False)

    def stop(self, within_s: float | None = None) -> None:
        """Let requests in flight finish, for the exit timeout unless `within_s` says otherwise, then end the
        server and remove its shared memory and temporary files. Safe to repeat."""
        self._end_process(self.options.exit_timeout_s if within_s is None else within_s)
        if self._work is not None:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work = None
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def poll(self) -> int | None:
        """The exit code once the process has ended, else None."""
        return self._process.poll() if self._process else None

    def fault(self) -> ServerError | None:
        """Why it no longer serves: it ended by itself, or a model's process died half a second ago or more,
        which Triton does not notice. None while all is well. Ask several times a second."""
        if self.poll() is not None:
            return self.ended_error()
        dead = self._processes.crashed() if self._processes else None
        if dead is None:
            return None
        killed = "the kernel kills what memory runs out for (dmesg tells), and so may a person"
        lines = server_log.last_errors(self._log_text())
        return ServerError(
            f"the process of model {dead.model} died ({dead.how})",
            cause=killed if dead.how == "signal SIGKILL" else "; ".join(lines) or None,
            next_step=f"serve again (--supervise does that by itself), or read {self.log}",
        )

    def answers(self, timeout_s: float = 2.0) -> bool:
        """Whether it says over HTTP that it lives."""
        return running.answers(self.urls["http"], "health/live", timeout_s)

    def ended_error(self) -> ServerError:
        """Why it ended by itself, as far as the log tells."""
        status = self.poll()
        how = "still running" if status is None else how_it_ended(status)
        lines = server_log.last_errors(self._log_text())
        return ServerError(
            f"tritonserver ended by itself ({how})",
            cause="; ".join(lines) or None,
            next_step=f"read {self.log}",
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, progress: Progress | None, *, free_ports: bool) -> None:
        self.models = served_models(self.repository)
        try:
            self._claim = running.claim(self.repository)
            self._serve(progress, free_ports=free_ports)
        except OSError as error:
            self.stop(0)
            raise not_started(error) from error
        except BaseException:
            self.stop(0)
            raise

    def _serve(self, progress: Progress | None, *, free_ports: bool) -> None:
        shared_memory.remove_stale()
        shared_memory.check_room(sum(self.models.values()))
        self._in_python = all_in_python(self.repository)
        self._work = Path(tempfile.mkdtemp(prefix="onecard-server-"))
        installation = find_installation(self._work, self.options.binary)
        for attempt in range(_ATTEMPTS):
            if free_ports:
                self.ports = ports.free_ports(self.options.host)
            else:
                ports.check(self.options.host, self.ports)
            self._launch(installation)
            if self._until_ready(progress, retry=free_ports and attempt + 1 < _ATTEMPTS):
                self._record()
                if self._processes:
                    self._processes.find()
                return
            self._end_process(0)
        raise ServerError("no free ports after several attempts", next_step="choose ports by hand")

    def _launch(self, installation: Installation) -> None:
        self._prefix = shared_memory.new_prefix()
        self._key = secrets.token_urlsafe(32)
        self._log_file = LogFile(self.log, self.options.log_format)
        try:
            self._process = subprocess.Popen(
                self._command(installation),
                stdin=subprocess.DEVNULL,
                stdout=self._log_file.descriptor,
                stderr=subprocess.STDOUT,
                env=installation.environment(),
                # Its own group: an interrupt at the terminal reaches us alone, and we stop it in order.
                start_new_session=True,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - one system call, no allocation
            )
        except OSError as error:
            raise not_run(installation.binary, error) from error
        finally:
            self._log_file.opened()
            if self._process is None:
                self._log_file.close()
        self._processes = ModelProcesses(self._process.pid)

    def _record(self) -> None:
        """Leave word of this server beside its repository. Where nothing can be written there it serves all
        the same, and nobody has the key."""
        assert self.pid is not None
        record = Running.of(self.pid, repository=self.repository, urls=self.urls, log=self.log, key=self._key)
        with contextlib.suppress(OSError):
            running.write_running(record)

    def _command(self, installation: Installation) -> list[str]:
        host, own = self.options.host, self.ports
        apis = ",".join(RESTRICTED)
        command = [
            str(installation.binary),
            f"--model-repository={self.repository}",
            "--model-control-mode=explicit",
            # Not `*`: a deploy that was killed may have left the folder of a model it was adding, without a
            # config, and Triton would not start for it.
            *(f"--load-model={name}" for name in self.models),
            # Or a version that is loading, or answers its last requests, would make the whole server unready.
            "--strict-readiness=false",
            f"--http-restricted-api={apis}:{running.ADMIN_HEADER}={self._key}",
            f"--grpc-restricted-protocol={apis}:{running.ADMIN_NAME}={self._key}",
            f"--http-address={host}",
            f"--grpc-address={host}",
            f"--metrics-address={host}",
            f"--http-port={own.http}",
            f"--grpc-port={own.grpc}",
            f"--metrics-port={own.metrics}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            f"--exit-timeout-secs={math.ceil(self.options.exit_timeout_s) + _TRITON_LATER_S}",
            # Complete configs are written; guessing would start every model's process twice.
            "--disable-auto-complete-config",
            f"--log-verbose={self.options.verbose}",
        ]
        if installation.backends:
            command.append(f"--backend-directory={installation.backends}")
        if uses_cache(self.repository):
            command.append(f"--cache-config=local,size={self.options.cache_mib << 20}")
            if installation.caches:
                command.append(f"--cache-directory={installation.caches}")
        return command

    def _until_ready(self, progress: Progress | None, *, retry: bool) -> bool:
        """True when ready, False when a port was taken in between and another attempt is allowed."""
        deadline = time.monotonic() + self.options.ready_timeout_s
        ready, hidden = -1, False
        while time.monotonic() < deadline:
            log = self._log_text()
            if log and not hidden and self.pid:
                # What it logs first, it logs when it has read its command line.
                hidden = hide(self.pid, self._key) or True
            if progress and (count := len(server_log.loaded(log))) != ready:
                ready = count
                progress(ready, len(self.models))
            if self.poll() is not None:
                log = self._log_text()
                if server_log.port_taken(log) and retry:
                    return False
                raise self._start_error(log)
            if running.answers(self.urls["http"], "health/ready", timeout_s=2):
                if progress:
                    progress(len(self.models), len(self.models))
                return True
            time.sleep(_POLL_S)
        missing = sorted(set(self.models) - server_log.loaded(self._log_text()))
        raise ServerError(
            f"not ready after {self.options.ready_timeout_s:.0f} s; not loaded: {', '.join(missing) or '-'}",
            next_step=f"read {self.log}, or allow more time with --ready-timeout",
        )

    def _start_error(self, log: str) -> ServerError:
        failed = server_log.failures(log)
        if failed:
            reasons = "\n".join(f"  {model}: {reason}" for model, reason in failed.items())
            names = ", ".join(failed)
            if set(failed.values()) == {server_log.NO_GPU}:
                return ServerError(
                    f"tritonserver could not load {names}: {server_log.NO_GPU}",
                    next_step="serve it where the card is (triton-repo container prints how), or the CPU's "
                    "engines here: triton-repo write STACK --target onnxruntime",
                )
            return ServerError(
                f"tritonserver could not load {names}\n{reasons}",
                next_step=f"write the repository again (triton-repo write), or read {self.log}",
            )
        if server_log.port_taken(log):
            return ServerError(
                "a port was taken while the server started",
                next_step="add --free-ports or choose other ports",
            )
        return self.ended_error()

    def _log_text(self) -> str:
        return self._log_file.text() if self._log_file else ""

    def _end_process(self, within_s: float) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None and within_s > 0:
            self._drain(process, within_s)
        # The group holds the Python backend's processes too; what still runs is not going to stop by itself.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._log_file:
            self._log_file.close()
        shared_memory.remove(self._prefix)
        running.remove_running(self.repository, process.pid)
        self._process = self._processes = None

    def _drain(self, process: subprocess.Popen[bytes], within_s: float) -> None:
        """Until nothing is left that could answer. By itself Triton goes on taking requests while a
        connection over HTTP is open, idle or not, and waits for a model that died with requests in flight."""
        if self._processes and self._processes.crashed():
            within_s = min(within_s, _DRAIN_BESIDE_A_DEAD_MODEL_S)
        deadline = time.monotonic() + within_s
        if self._in_python:
            self._unload_all()
        process.terminate()
        while time.monotonic() < deadline and process.poll() is None:
            if self._in_python and self._processes and not self._processes.running():
                return
            time.sleep(_POLL_S)

    def _unload_all(self) -> None:
        """Have every model end with the last request it has taken. A server that cannot be asked is stopped
        all the same."""
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            for model in json.loads(self._control("index")):
                self._control(f"models/{model['name']}/unload")

    def _control(self, what: str) -> bytes:
        url = f"http://{self.urls['http']}/v2/repository/{what}"
        request = urllib.request.Request(url, b"{}", dict([self.admin_header]))
        with running.DIRECT.open(request, timeout=_CONTROL_S) as answer:
            return bytes(answer.read())
