"""All that a served model file may import: the standard library, numpy, tokenizers and the engine library.

The writer copies this package beside every model.py and records its fingerprint in config.pbtxt, so that a
repository always runs the code it was written with.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(package: Path | None = None) -> str:
    """SHA-256 over the names and contents of the runtime's source files (this package's by default)."""
    folder = package or Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}:{len(source)}\n".encode())
        digest.update(source)
    return digest.hexdigest()


def mismatch(expected: str) -> str | None:
    """Why this runtime, or what lies around it in a repository, is not what was written; None when it is."""
    if fingerprint() != expected:
        return (
            f"{Path(__file__).parent} is not the runtime that this repository was written with; "
            "write the repository again"
        )
    from triton_repo.runtime.seal import check_served
    from triton_repo.runtime.session import EngineRefused

    version = Path(__file__).parents[2]
    if not (version / "model.py").exists():
        return None  # the package itself, not its copy in a repository
    try:
        check_served(version)
    except EngineRefused as error:
        return f"{error}; write the repository again"
    return None
