"""Whether a TensorRT-RTX engine file is whole, and for this library and card: what its header says.

Read without a GPU; whether it runs on the one that is here is found out when it is opened.
"""

from __future__ import annotations

from pathlib import Path

from build_engines.errors import ArtifactError
from triton_repo.runtime.gpu.engine_header import EngineHeader
from triton_repo.runtime.gpu.engine_header import read_header as read
from triton_repo.runtime.session import EngineRefused

_REBUILD = "run `build-engines build STACK` again with this library and card"


def read_header(path: Path) -> EngineHeader:
    """Read the header of an engine.

    Raises:
        ArtifactError: the file is missing, truncated, or no TensorRT-RTX engine.
    """
    try:
        return read(path)
    except EngineRefused as error:
        raise ArtifactError(str(error), next_step=f"copy the whole file again, or {_REBUILD}") from error


def check_engine(path: Path, *, version: str | None, compute_capability: str | None) -> EngineHeader:
    """Refuse an engine that is not for this library version or this card; None leaves that open.

    Raises:
        ArtifactError: with the reason.
    """
    header = read_header(path)
    if version is not None and header.version != version:
        raise ArtifactError(
            f"{path} was compiled by TensorRT-RTX {header.version}, {version} is installed",
            cause="an engine is tied to the version of the library that compiled it",
            next_step=f"pip install tensorrt-rtx=={header.version}, or " + _REBUILD,
        )
    if compute_capability is not None and compute_capability not in header.compute_capabilities:
        compiled = " and ".join(header.compute_capabilities) or "none that is known here"
        raise ArtifactError(
            f"{path} was compiled for compute capability {compiled}, this card has {compute_capability}",
            cause="it was built for another card",
            next_step="set the card in the stack file, then " + _REBUILD,
        )
    return header
