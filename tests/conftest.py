"""What all tests share."""

from __future__ import annotations

import gc
import signal
import socket
import urllib.request
from collections.abc import Iterator

import pytest


def pytest_configure() -> None:
    """Who runs the tests in the background or under nohup has these ignored, and so have all children."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="module")
def _frozen_heap() -> None:
    """What is imported by now is not looked through again: a collection over PyTorch's and its users' objects
    takes half a second, and tests that look for leaks ask for dozens."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The proxy that the environment names for everything. It answers nothing; who connects can be accepted,
    and where nobody has, that raises BlockingIOError."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
            for spelled in (name, name.upper()):
                monkeypatch.setenv(spelled, f"http://127.0.0.1:{listener.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        # urllib keeps the one of its first request.
        monkeypatch.setattr(urllib.request, "_opener", None)
        yield listener
