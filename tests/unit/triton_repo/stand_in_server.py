"""As much of a tritonserver as its starter sees: it says over HTTP that it is ready, until SIGTERM."""

from __future__ import annotations

import sys
from pathlib import Path

_PROGRAM = """
import http.server, sys

options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.do_GET()
        self.wfile.write(b"[]")

    def log_message(self, *words):
        print(self.command, self.path, flush=True)


address = options["http-address"], int(options["http-port"])
http.server.ThreadingHTTPServer(address, Handler).serve_forever()
"""


def write_binary(folder: Path) -> Path:
    """The program, where an installation without backends has it."""
    binary = folder / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.write_text(f"#!{sys.executable} -IS\n{_PROGRAM}")
    binary.chmod(0o755)
    return binary
