"""Ports for the three services of a server: checked before it starts, or free ones found."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from build_engines.errors import ServerError


@dataclass(frozen=True, slots=True)
class Ports:
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def named(self) -> dict[str, int]:
        return {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}


def free_ports(host: str) -> Ports:
    """Three different ports that are free on `host` now. Another process may still be quicker. Raises
    ServerError when nothing can listen there."""
    try:
        with contextlib.ExitStack() as stack:
            # Held together, so that they differ.
            return Ports(*[stack.enter_context(_bound(host, 0)).getsockname()[1] for _ in range(3)])
    except OSError as error:
        raise ServerError(
            f"cannot listen on {host}: {error.strerror or error}",
            next_step="give --host an address of this machine, 127.0.0.1 or 0.0.0.0",
        ) from None


def check(host: str, ports: Ports) -> None:
    """Raise ServerError naming every port that cannot be bound and its option."""
    numbers = list(ports.named().values())
    if len(set(numbers)) < len(numbers):
        raise ServerError(f"the three services need different ports, not {ports.named()}")
    problems = []
    for name, port in ports.named().items():
        if reason := refusal(host, port):
            problems.append(f"{name} port {port}: {reason}")
    if problems:
        raise ServerError(
            f"cannot listen on {host}: {'; '.join(problems)}",
            cause="another server is running" if "in use" in " ".join(problems) else None,
            next_step="stop it, choose others (--http-port, --grpc-port, --metrics-port) or use --free-ports",
        )


def refusal(host: str, port: int) -> str | None:
    """Why nothing can listen there now, or None where a server could."""
    try:
        with _bound(host, port):
            return None
    except OSError as error:
        return error.strerror or str(error)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        # As the server does it: a port in TIME_WAIT after a restart can be bound.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)
        yield listener
