"""The real nginx with the project's configuration, on ports and in a folder of the test's own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

CONFIGURATION = Path(__file__).parents[2] / "proxy" / "nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
OPENSSL = shutil.which("openssl")


def write_authority(folder: Path) -> Path:
    """A new authority's certificate and key."""
    folder.mkdir(exist_ok=True)
    _openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
        *("-subj", "/CN=test authority", "-keyout", f"{folder}/ca.key", "-out", f"{folder}/ca.pem"),
    )
    return folder / "ca.pem"


def write_certificate(authority: Path, folder: Path) -> None:
    """A certificate for 127.0.0.1 that the authority signed."""
    names = folder / "names"
    names.write_text("subjectAltName=IP:127.0.0.1\n")
    _openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=onecard"),
        *("-keyout", f"{folder}/key.pem", "-out", f"{folder}/request.pem"),
    )
    _openssl(
        *("x509", "-req", "-in", f"{folder}/request.pem", "-CA", str(authority)),
        *("-CAkey", str(authority.with_name("ca.key")), "-CAcreateserial", "-days", "2"),
        *("-extfile", str(names), "-out", f"{folder}/certificate.pem"),
    )


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class Proxy:
    """nginx before one server; `tokens` are name by token, `changes` what a line of the file is instead."""

    def __init__(
        self,
        folder: Path,
        authority: Path,
        tokens: dict[str, str],
        urls: dict[str, str],
        changes: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        (folder / "onecard").mkdir(parents=True)
        write_certificate(authority, folder / "onecard")
        lines = [f'"Bearer {token}" {name};\n' for token, name in tokens.items()]
        (folder / "onecard" / "tokens").write_text("".join(lines))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        text = CONFIGURATION.read_text()
        temporary = "".join(
            f"{kind}_temp_path {folder}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        for ours, theirs in (
            ("user www-data;", "user root;" if os.geteuid() == 0 else ""),
            ("pid /run/nginx.pid;", f"pid {folder}/nginx.pid;"),
            ("error_log /var/log/nginx/", f"error_log {folder}/"),
            ("access_log /var/log/nginx/", f"access_log {folder}/"),
            ("listen 8443 ", f"listen 127.0.0.1:{self.port} "),
            ("server 127.0.0.1:8000;", f"server {urls['http']};"),
            ("server 127.0.0.1:8001;", f"server {urls['grpc']};"),
            ("\nhttp {\n", f"\nhttp {{\n{temporary}"),
            *(changes or {}).items(),
        ):
            assert text.count(ours) == 1, ours
            text = text.replace(ours, theirs)
        (folder / "nginx.conf").write_text(text)

    @property
    def log(self) -> str:
        """Everything nginx wrote down."""
        return "".join((self.folder / name).read_text() for name in ("onecard.log", "error.log"))

    def __enter__(self) -> Self:
        assert NGINX is not None
        words = [NGINX, "-p", f"{self.folder}", "-c", f"{self.folder}/nginx.conf", "-g", "daemon off;"]
        self._process = subprocess.Popen(
            [*words, "-e", f"{self.folder}/error.log"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                assert self._process.stdout is not None
                raise RuntimeError(self._process.stdout.read().decode())
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return self
        raise RuntimeError("nginx does not listen")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()
