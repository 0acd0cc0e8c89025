"""A real Prometheus with the project's own configuration and rules, scraping once a second."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

MONITORING = Path(__file__).parents[2] / "monitoring"


class Prometheus:
    """Runs in `folder`; `targets` (host:port) stand where the configuration names the server's usual port."""

    def __init__(self, folder: Path, targets: Sequence[str]) -> None:
        self._folder = folder
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": list(targets)}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        for name in config["rule_files"]:
            shutil.copy(MONITORING / name, folder)
        self._address = f"127.0.0.1:{unused_port()}"

    def __enter__(self) -> Self:
        command = [
            "prometheus",
            f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self._address}",
        ]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait_for(lambda: self._answers("/-/ready"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(20)

    def wait_for(self, condition: Callable[[], Any], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self._folder / "log").read_text()[-2000:]
            time.sleep(0.1)

    def get(self, path: str, **parameters: str | float) -> Any:
        """`data` of an answer of the HTTP API; an error of Prometheus' is raised with its text."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {json.load(error)['error']}") from None

    def query(self, expression: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series that `expression` has at the unix time `at` (now)."""
        when = {} if at is None else {"time": at}
        found = self.get("query", query=expression, **when)
        return [(sample["metric"], float(sample["value"][1])) for sample in found["result"]]

    def scraped(self) -> dict[str, float]:
        """1 or 0 by target: whether the last scrape succeeded."""
        return {labels["instance"]: value for labels, value in self.query("up")}

    def _answers(self, path: str) -> bool:
        assert self._process.poll() is None, (self._folder / "log").read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"http://{self._address}{path}", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def unused_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])
