"""A worker process for jobs: JSON lines out, JSON lines in, and what it said last when it ends by itself.

A process of its own, so that its memory is its own, its threads do not disturb the load generator, and this
process never imports torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import BenchError


def check_installed(packages: Iterable[str]) -> None:
    """BenchError that names the packages which are missing."""
    missing = [name.replace("_", "-") for name in packages if find_spec(name) is None]
    if missing:
        raise BenchError(
            f"the baseline needs {', '.join(missing)}", next_step="pip install 'onecard[bench]' installs it"
        )


class Worker:
    """Context manager around `python -m MODULE`; `folder` is one for files, gone with it."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="onecard-bench-")
        self.folder = Path(self._folder.name)
        self._log = self.folder / "worker.log"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # its forks can then be ended with it
                env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._folder.cleanup()

    def job(self, work: dict[str, Any], model: str) -> dict[str, Any]:
        """The job's result; BenchError, naming the model, when it failed or the process is gone."""
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(work) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise BenchError(f"the baseline process ended: {self._last_words()}", model=model)
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            what = f" ({work['precision']})" if "precision" in work else ""
            raise BenchError(f"the baseline failed{what}: {result['error']}", model=model)
        return result

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self._process.wait()}"
