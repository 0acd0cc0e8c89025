"""ONNX files, shared by all stages: read, written whole or not at all, and run straight from memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from build_engines.errors import ArtifactError, CompileError, ExportError

if TYPE_CHECKING:
    import onnx

# A protobuf message ends at 2 GiB; 1.5 GB leaves room for what quantization adds to it.
EXTERNAL_THRESHOLD = 1_500_000_000
# Small constants stay inside: shape inference and TensorRT's parser want to see them.
SMALLEST_EXTERNAL = 1024
_ALIGNMENT = 4096  # of external tensors, so that a runtime can map them


def read_graph(path: Path) -> onnx.ModelProto:
    """Load a graph with its external data in memory.

    Raises:
        ArtifactError: the file is missing or not an ONNX graph, or its external data is missing or short.
    """
    import onnx

    model = read_structure(path)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, TypeError, ValueError, onnx.checker.ValidationError) as error:
        raise ArtifactError(f"the weights of {path} cannot be read: {error}") from error
    return model


def read_structure(path: Path) -> onnx.ModelProto:
    """Load a graph and leave its external data where it is, whole and beside it.

    Raises:
        ArtifactError: as `read_graph`; or the data is to be elsewhere than in files of the graph's folder.
    """
    import onnx

    _check_external_files(path)
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no public common base
        raise ArtifactError(f"{path} is not an ONNX graph: {error}") from error


def save_graph(model: onnx.ModelProto, path: Path, *, external_threshold: int = EXTERNAL_THRESHOLD) -> None:
    """Write a graph, checked, or nothing; above `external_threshold` bytes its weights go to `<path>.data`.

    Raises:
        ArtifactError: the disk is full or read-only.
        ExportError: onnx.checker refuses the graph.
    """
    total = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    with written_aside(path) as draft:
        if total > external_threshold:
            copy = type(model)()
            copy.CopyFrom(model)
            model = copy
            with (draft.parent / f"{path.name}.data").open("wb") as data:
                for tensor in model.graph.initializer:
                    if len(tensor.raw_data) >= SMALLEST_EXTERNAL:
                        store_external(tensor, memoryview(tensor.raw_data), data, f"{path.name}.data")
        draft.write_bytes(model.SerializeToString())
        verify_graph(draft)


def verify_graph(path: Path) -> None:
    """onnx.checker with full shape inference, and every external tensor within its file.

    Raises:
        ExportError: what the checker said, with the file's name.
        ArtifactError: as `read_graph`.
    """
    import onnx

    _check_external_files(path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses {path.name}: {error}") from error


def store_external(
    tensor: onnx.TensorProto, payload: memoryview | Iterable[memoryview], data: IO[bytes], location: str
) -> None:
    """Append `payload` to `data`, the file `location` beside the graph, and let `tensor` point there.

    A tensor too large for memory comes in pieces, which are written as they come.
    """
    from onnx import TensorProto

    data.write(b"\0" * (-data.tell() % _ALIGNMENT))
    start = data.tell()
    for piece in (payload,) if isinstance(payload, memoryview) else payload:
        data.write(piece)
    entries = {"location": location, "offset": str(start), "length": str(data.tell() - start)}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def operator_counts(model: onnx.ModelProto) -> dict[str, int]:
    """{operator: how many nodes}, in the order in which they first appear."""
    return dict(Counter(node.op_type for node in model.graph.node))


def load_external(tensor: onnx.TensorProto, folder: Path) -> None:
    """Read one external tensor into the graph.

    onnx's own loader takes a file with several hard links for an attack; engines share their weights by them.

    Raises:
        ArtifactError: the file is missing, short, or not in `folder`.
    """
    from onnx import TensorProto

    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / Path(entries["location"]).name
    try:
        start, length = int(entries.get("offset", 0)), int(entries["length"])
        with file.open("rb") as data:
            # Compared before it is asked for: a length is a claim.
            whole = 0 <= start <= start + length <= os.fstat(data.fileno()).st_size
            data.seek(start if whole else 0)
            raw = data.read(length) if whole else b""
    except (OSError, ValueError) as error:
        raise ArtifactError(f"the weights file {file} cannot be read: {error}") from error
    if len(raw) != length:
        raise ArtifactError(
            f"the weights file {file} ends inside {tensor.name}",
            cause="the copy was cut short",
            next_step="delete its folder and run the build again",
        )
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT
    tensor.raw_data = raw


def _check_external_files(path: Path) -> None:
    from triton_repo.runtime.external_data import UnsafeGraph, check_external

    try:
        check_external(path)
    except UnsafeGraph as error:
        raise ArtifactError(
            str(error),
            cause="the graph was copied without its .data file, or cut short, or altered",
            next_step="copy both files together, or run the export again",
        ) from None


def fix_dimension(model: onnx.ModelProto, name: str, size: int) -> None:
    """Give the symbolic dimension `name` of a graph's inputs and outputs the fixed `size`, in place.

    Raises:
        ArtifactError: no input has such a dimension.
    """
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    dims = [dim for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param == name]
    if not dims:
        raise ArtifactError(
            f"the graph has no dimension called {name!r}",
            cause="it was written by another version, or is no graph of a causal LM",
            next_step="run `build-engines build STACK` again",
        )
    for dim in dims:
        dim.dim_value = size  # of one protobuf oneof with dim_param, which this clears


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a draft path beside `path`; on success swap draft and its .data in, on failure leave nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    final_data = path.with_name(f"{path.name}.data")
    try:
        draft = folder / path.name
        yield draft
        # The graph goes first and comes back last: no graph ever stands beside another graph's data.
        path.unlink(missing_ok=True)
        final_data.unlink(missing_ok=True)
        if (folder / final_data.name).exists():
            os.replace(folder / final_data.name, final_data)
        os.replace(draft, path)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written: {error.strerror or error}",
            next_step="free some disk space or choose another build folder, then run the same command",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def open_session(model: onnx.ModelProto | Path) -> Any:
    """A CPU session over a graph; one too large for a protobuf message goes through a temporary file.

    Raises:
        CompileError: ONNX Runtime refuses the graph.
    """
    from triton_repo.runtime.session import EngineRefused, onnx_session

    try:
        if isinstance(model, Path):
            return onnx_session(model)
        if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= EXTERNAL_THRESHOLD:
            return onnx_session(model.SerializeToString())
        with tempfile.TemporaryDirectory(prefix="onecard-") as folder:
            path = Path(folder) / "model.onnx"
            save_graph(model, path)
            return onnx_session(path)
    except EngineRefused as error:
        raise CompileError(str(error)) from error
