"""What a server on this machine relies on: Triton, ports, shared memory, the repository; and one that runs.

`examine_server` gathers the facts; each check turns some into a finding and asks nothing itself.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from build_engines.errors import RepositoryError, ServerError
from build_engines.findings import Finding, refused
from triton_repo import ports, shared_memory
from triton_repo.installation import Installation, find_installation, shared_python
from triton_repo.ports import Ports
from triton_repo.running import answers

if TYPE_CHECKING:
    from build_engines.stack import Stack

_PROC: Final = Path("/proc")
_LISTENING: Final = "0A"  # in /proc/net/tcp
_READY_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PortUse:
    """One port that a server would take. `refusal`: why it cannot; `holder`: the process that has it."""

    service: str
    number: int
    refusal: str | None = None
    holder: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A tritonserver on this machine. `pid` None: it answers, and its process cannot be seen."""

    pid: int | None
    host: str
    ports: Ports
    is_ready: bool


def examine_server(host: str, numbers: tuple[int, int, int], stack: Stack | None = None) -> list[Finding]:
    """Every check of what serves, on ports for HTTP, gRPC and metrics; with a stack what serves that one."""
    wanted = Ports(*numbers)
    library, installation = _shared_python(), _installation()
    running = find_running(stack, host, wanted) if stack else None
    free = os.statvfs(shared_memory.SHM) if shared_memory.SHM.is_dir() else None
    findings = [
        check_python_library(library),
        check_tritonserver(installation, library),
        check_ports([_use(host, name, port) for name, port in wanted.named().items()], running),
        check_shared_memory(
            (free.f_bavail * free.f_frsize, free.f_blocks * free.f_frsize) if free else None,
            _instances(stack) if stack else 1,
        ),
        check_stale(shared_memory.stale()),
    ]
    if stack:
        repository = stack.build_dir / "repository"
        findings += [check_repository(stack, repository), check_running(running, stack)]
    return findings


def check_python_library(found: Path | ServerError) -> Finding:
    """The shared library of Python, which Triton's Python backend is linked to."""
    if isinstance(found, ServerError):
        return refused("python library", found)
    return Finding("python library", "ok", str(found))


def check_tritonserver(found: Installation | ServerError, library: Path | ServerError) -> Finding:
    """A tritonserver and all that its Python backend needs, numpy 1 among it where it is the wheel's."""
    if isinstance(found, Installation):
        return Finding("tritonserver", "ok", f"{found.binary} ({found.origin})")
    if isinstance(library, ServerError) and str(library) == str(found):
        return Finding("tritonserver", "skipped", "the one in the wheel needs the Python library")
    return refused("tritonserver", found)


def check_ports(uses: Sequence[PortUse], running: Running | None) -> Finding:
    """Whether a server can listen; ports that the stack's own server has are as they should be."""
    taken = [use for use in uses if use.refusal]
    numbers = ", ".join(str(use.number) for use in uses)
    if not taken:
        return Finding("ports", "ok", f"{numbers} are free")
    own = set(running.ports.named().values()) if running else set()
    if running and {use.number for use in taken} <= own:
        return Finding(
            "ports", "ok", f"{', '.join(str(use.number) for use in taken)} are the stack's server's"
        )
    shown = "; ".join(
        f"{use.service} port {use.number}: {use.refusal}{f' by {use.holder}' if use.holder else ''}"
        for use in taken
    )
    do = "stop what has them, or: triton-repo serve STACK --free-ports"
    return Finding("ports", "problem", shown, do, ServerError)


def check_shared_memory(space: tuple[int, int] | None, instances: int) -> Finding:
    """`space`: free and total bytes of /dev/shm, for the regions of that many model instances."""
    check, needed = "shared memory", shared_memory.needed_bytes(instances)
    if space is None:
        found = f"{shared_memory.SHM} is not there"
        return Finding(check, "problem", found, "mount a tmpfs on /dev/shm", ServerError)
    found = f"{space[0] >> 20:,} of {space[1] >> 20:,} MiB free in {shared_memory.SHM}"
    if space[0] < needed:
        do = "give the container a larger one (docker run --shm-size=1g), or remove what fills it"
        return Finding(check, "problem", f"{found}, {needed >> 20} are needed", do, ServerError)
    return Finding(check, "ok", f"{found}, {needed >> 20} are needed")


def check_stale(regions: Sequence[Path]) -> Finding:
    """What servers that were killed left in /dev/shm."""
    if not regions:
        return Finding("stale regions", "ok", "none")
    size = sum(region.stat().st_size for region in regions if region.exists())
    do = f"the next triton-repo serve removes them; or: rm {shlex.join(map(str, regions))}"
    found = f"{len(regions)} of servers that are gone, {size / 2**20:,.1f} MiB"
    return Finding("stale regions", "warning", found, do)


def check_repository(stack: Stack, repository: Path) -> Finding:
    """Whether every model is in the repository, with the engine that was built last."""
    write = f"triton-repo write {stack.path}"
    if not repository.is_dir():
        return Finding("repository", "warning", f"{repository} is not written yet", write)
    names = [name for model in stack.models.values() for name in model.variants.values()]
    missing = [name for name in names if not (repository / name / "config.pbtxt").is_file()]
    # A precision that the served target has no engines of is rightly not there; a whole model is.
    lost = [name for name, model in stack.models.items() if set(model.variants.values()) <= set(missing)]
    if lost:
        found = f"{repository} lacks {', '.join(lost)}"
        return Finding("repository", "problem", found, write, RepositoryError)
    built = {_digest(path) for path in (stack.build_dir / "engines").glob("*/*/*/manifest.json")}
    served = {name: _digest(path) for name in names if (path := _served_manifest(repository / name))}
    if old := [name for name, digest in served.items() if built and digest not in built]:
        found = f"{repository} has other engines than those built last: {', '.join(old)}"
        return Finding("repository", "warning", found, write)
    return Finding("repository", "ok", f"{repository}, {len(names) - len(missing)} models")


def check_running(running: Running | None, stack: Stack) -> Finding:
    if running is None:
        return Finding("server", "ok", "none runs for this stack", f"triton-repo serve {stack.path}")
    where = ", ".join(f"{name} {running.host}:{port}" for name, port in running.ports.named().items())
    found = f"runs{f' as process {running.pid}' if running.pid else ''} at {where}"
    if not running.is_ready:
        do = f"read {stack.build_dir / 'tritonserver.log'}"
        return Finding("server", "problem", f"{found}, but is not ready", do, ServerError)
    return Finding(
        "server", "ok", f"{found}, ready", f"client status --url {running.host}:{running.ports.grpc}"
    )


def find_running(stack: Stack, host: str, wanted: Ports) -> Running | None:
    """The server of the stack's repository, by its command line; else who serves its models on `wanted`."""
    repository = str((stack.build_dir / "repository").absolute())
    for pid, command in _commands(_PROC):
        options = dict(word[2:].partition("=")[::2] for word in command if word.startswith("--"))
        if Path(command[0]).name == "tritonserver" and options.get("model-repository") == repository:
            at = options.get("http-address", host)
            own = Ports(*(int(options.get(f"{name}-port", port)) for name, port in wanted.named().items()))
            return Running(
                pid=pid, host=at, ports=own, is_ready=answers(f"{at}:{own.http}", "health/ready", _READY_S)
            )
    if all(answers(f"{host}:{wanted.http}", f"models/{name}/ready", _READY_S) for name in stack.models):
        return Running(pid=None, host=host, ports=wanted, is_ready=True)
    return None


def holder_of(port: int, proc: Path = _PROC) -> str:
    """Who listens on a TCP port: command and process, or the user where that cannot be seen; else nothing."""
    sockets = {inode: user for number, inode, user in _listeners(proc) if number == port}
    for pid, command in _commands(proc):
        if sockets.keys() & _sockets(proc / str(pid)):
            return f"{Path(command[0]).name} (process {pid})"
    return next((f"a process of user {user}" for user in sockets.values()), "")


def _listeners(proc: Path) -> Iterator[tuple[int, str, str]]:
    """Port, inode and user of every TCP socket that listens."""
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENING:
                yield int(fields[1].rpartition(":")[2], 16), fields[9], fields[7]


def _commands(proc: Path) -> Iterator[tuple[int, list[str]]]:
    """Every process that has a command line, which kernel threads have not."""
    for folder in proc.glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if command[0]:
            yield int(folder.name), command


def _sockets(process: Path) -> set[str]:
    """Inodes of the sockets that a process holds; none where it belongs to somebody else."""
    found = set()
    try:
        for link in (process / "fd").iterdir():
            target = os.readlink(link)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:
        return found
    return found


def _use(host: str, service: str, number: int) -> PortUse:
    refusal = ports.refusal(host, number)
    return PortUse(
        service=service, number=number, refusal=refusal, holder=holder_of(number) if refusal else ""
    )


def _instances(stack: Stack) -> int:
    return sum(model.instances * len(model.variants) for model in stack.models.values())


def _served_manifest(model: Path) -> Path | None:
    """Of the newest version that is there; the parts of the native layout have none under this name."""
    found = [path for path in model.glob("*/manifest.json") if path.parent.name.isdigit()]
    return max(found, key=lambda path: int(path.parent.name), default=None)


def _digest(manifest: Path) -> str:
    try:
        found: Mapping[str, Any] = json.loads(manifest.read_bytes())
        return str(found["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _shared_python() -> Path | ServerError:
    try:
        return shared_python()
    except ServerError as error:
        return error


def _installation() -> Installation | ServerError:
    with tempfile.TemporaryDirectory(prefix="onecard-doctor-") as work:
        try:
            return find_installation(Path(work))
        except ServerError as error:
            return error
