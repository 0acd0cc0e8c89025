"""ONNX files shared by all stages: reading, writing whole or not at all, and running graphs held in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_engines.export.graph import EXTERNAL_THRESHOLD, read_graph, save_graph, verify_graph

if TYPE_CHECKING:
    import onnx

__all__ = ["open_session", "read_graph", "save_graph", "verify_graph"]


def open_session(model: onnx.ModelProto | Path) -> Any:
    """A CPU session over a graph in memory; one too large for a protobuf message goes through a temporary file."""
    from triton_repo.runtime.session import onnx_session

    if isinstance(model, Path):
        return onnx_session(model)
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= EXTERNAL_THRESHOLD:
        return onnx_session(model.SerializeToString())
    with tempfile.TemporaryDirectory(prefix="onecard-") as folder:
        path = Path(folder) / "model.onnx"
        save_graph(model, path)
        return onnx_session(path)
