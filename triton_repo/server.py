"""Start tritonserver on a repository, wait until it is ready or say why it is not, and stop it cleanly.

with Server(Path("build/demo/repository"), ServerOptions(free_ports=True)) as server:
    print(server.urls["grpc"])
"""

from __future__ import annotations

import contextlib
import ctypes
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
from typing import Any, BinaryIO, Self

from build_engines.errors import RepositoryError, ServerError
from triton_repo import ports, running, server_log, shared_memory
from triton_repo.config_pbtxt import parse
from triton_repo.installation import Installation, find_installation
from triton_repo.ports import Ports
from triton_repo.running import Running

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
_EXIT_TIMEOUT_S = 10
_ATTEMPTS = 4
# What changes the server or writes where its caller says: these need the admin key. Health, metadata, model
# configurations, inference, statistics and metrics stay open.
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How to serve. `free_ports` overrides the three ports; `log` None means a file beside the repository."""

    host: str = "127.0.0.1"
    ports: Ports = field(default_factory=Ports)
    free_ports: bool = False
    ready_timeout_s: float = 300.0
    log: Path | None = None
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
        self._prefix = ""
        self._key = ""
        self._work: Path | None = None

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

        Raises ServerError: nothing to serve with, a port taken, a model that failed to load and why, or not
        ready in time. Nothing is left running then.
        """
        shared_memory.remove_stale()
        shared_memory.check_room(sum(self.models.values()))
        self._work = Path(tempfile.mkdtemp(prefix="onecard-server-"))
        try:
            installation = find_installation(self._work, self.options.binary)
            for attempt in range(_ATTEMPTS):
                self._choose_ports()
                self._launch(installation)
                if self._until_ready(progress, retry=self.options.free_ports and attempt + 1 < _ATTEMPTS):
                    self._record()
                    return self
                self._end_process()
        except BaseException:
            self.stop()
            raise
        raise ServerError("no free ports after several attempts", next_step="choose ports by hand")

    def stop(self) -> None:
        """Stop the server, wait for it, and remove its shared memory and temporary files. Safe to repeat."""
        self._end_process()
        if self._work is not None:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work = None

    def poll(self) -> int | None:
        """The exit code once the process has ended, else None."""
        return self._process.poll() if self._process else None

    def wait(self) -> int:
        """Block until the process ends."""
        return self._process.wait() if self._process else 0

    def ended_error(self) -> ServerError:
        """Why it ended by itself, as far as the log tells."""
        code = self.poll()
        lines = server_log.last_errors(self._read_log())
        return ServerError(
            f"tritonserver ended by itself ({_exit_text(code)})",
            cause="; ".join(lines) or None,
            next_step=f"read {self.log}",
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _choose_ports(self) -> None:
        if self.options.free_ports:
            self.ports = ports.free_ports(self.options.host)
        else:
            ports.check(self.options.host, self.ports)

    def _launch(self, installation: Installation) -> None:
        self._prefix = shared_memory.new_prefix()
        self._key = secrets.token_urlsafe(32)
        with self._open_log() as log:
            self._process = subprocess.Popen(
                self._command(installation),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=installation.environment(),
                # Its own group: an interrupt at the terminal reaches us alone, and we stop it in order.
                start_new_session=True,
                preexec_fn=_die_with_parent(),  # noqa: PLW1509 - one system call, no allocation
            )

    def _record(self) -> None:
        """Leave word of this server beside its repository. Where nothing can be written there it serves all
        the same, and nobody has the key."""
        assert self.pid is not None
        record = Running.of(self.pid, repository=self.repository, urls=self.urls, log=self.log, key=self._key)
        with contextlib.suppress(OSError):
            running.write_running(record)

    def _open_log(self) -> BinaryIO:
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            return self.log.open("wb")
        except OSError as error:
            raise ServerError(
                f"the log {self.log} cannot be written: {error.strerror or error}",
                next_step="name another file with --log",
            ) from error

    def _command(self, installation: Installation) -> list[str]:
        host, own = self.options.host, self.ports
        command = [
            str(installation.binary),
            f"--model-repository={self.repository}",
            "--model-control-mode=explicit",
            "--load-model=*",
            # Or a version that is loading, or answers its last requests, would make the whole server unready.
            "--strict-readiness=false",
            f"--http-restricted-api={','.join(RESTRICTED)}:{running.ADMIN_HEADER}={self._key}",
            f"--grpc-restricted-protocol={','.join(RESTRICTED)}:{running.ADMIN_NAME}={self._key}",
            f"--http-address={host}",
            f"--grpc-address={host}",
            f"--metrics-address={host}",
            f"--http-port={own.http}",
            f"--grpc-port={own.grpc}",
            f"--metrics-port={own.metrics}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
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
        ready = -1
        while time.monotonic() < deadline:
            log = self._read_log()
            if progress and (count := len(server_log.loaded(log))) != ready:
                ready = count
                progress(ready, len(self.models))
            if self.poll() is not None:
                log = self._read_log()
                if server_log.port_taken(log) and retry:
                    return False
                raise self._start_error(log)
            if self._answers_ready():
                if progress:
                    progress(len(self.models), len(self.models))
                return True
            time.sleep(_POLL_S)
        missing = sorted(set(self.models) - server_log.loaded(self._read_log()))
        raise ServerError(
            f"not ready after {self.options.ready_timeout_s:.0f} s; not loaded: {', '.join(missing) or '-'}",
            next_step=f"read {self.log}, or allow more time with --ready-timeout",
        )

    def _answers_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.urls['http']}/v2/health/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

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

    def _read_log(self) -> str:
        try:
            return self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _end_process(self) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_EXIT_TIMEOUT_S + 5)
        # The group holds the Python backend's processes too; what still runs is not going to stop by itself.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shared_memory.remove(self._prefix)
        running.remove_running(self.repository, process.pid)
        self._process = None


def served_models(repository: Path) -> dict[str, int]:
    """Instances by model name, from the config.pbtxt files. Raises ServerError when there are none."""
    models = {
        name: sum(group.count or 1 for group in config.instance_group) or 1
        for name, config in _configs(repository).items()
    }
    if not models:
        raise ServerError(
            f"{repository} is no Triton repository: it has no <model>/config.pbtxt",
            next_step="write one: triton-repo write STACK",
        )
    return models


def uses_cache(repository: Path) -> bool:
    return any(config.response_cache.enable for config in _configs(repository).values())


def _configs(repository: Path) -> dict[str, Any]:
    """Parsed before Triton reads them: its own message does not say what is wrong in the file."""
    found = {}
    for path in sorted(repository.glob("*/config.pbtxt")):
        try:
            found[path.parent.name] = parse(path.read_text("utf-8"))
        except (OSError, ValueError, RepositoryError) as error:
            raise ServerError(
                f"{path}: {error}", next_step="write the repository again: triton-repo write STACK"
            ) from None
    return found


def _exit_text(code: int | None) -> str:
    if code is None:
        return "still running"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _die_with_parent() -> Callable[[], None]:
    """Make the child receive SIGTERM when its parent dies, so that nothing is left running after kill -9."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return in_child
