"""A command that sees small file systems of its own, and nobody else does."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

# The second form needs no root where the kernel lets anybody make user namespaces.
_UNSHARE = (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"])


def in_mount_namespace(
    sizes: Mapping[Path, str], command: Sequence[str], timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `command` with a tmpfs of that size on each folder. Skips the test where that is not allowed."""
    mounts = " && ".join(f"mount -t tmpfs -o size={size} tmpfs {path}" for path, size in sizes.items())
    for unshare in _UNSHARE:
        if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0:
            script = f"{mounts} && exec {shlex.join(command)}"
            environment = dict(os.environ, PYTHONPATH=os.pathsep.join(_paths()))
            return subprocess.run(
                [*unshare, "sh", "-c", script],
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout,
                env=environment,
            )
    pytest.skip("mount namespaces are not allowed here (unshare --mount)")


def _paths() -> list[str]:
    root = Path(__file__).parents[3]
    return [str(root), str(root / "tests" / "serving"), str(Path(__file__).parent)]
