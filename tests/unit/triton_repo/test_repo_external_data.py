"""Graphs whose weights lie in another file: beside the graph, and of an engine only what was digested."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bounded import bounded
from onnx import TensorProto, helper
from repo_fakes import reseal

from build_engines.errors import ArtifactError
from build_engines.graphs import load_external, read_graph, read_structure, verify_graph
from triton_repo.runtime.external_data import External, UnsafeGraph, check_external, external_tensors
from triton_repo.runtime.session import EngineRefused, onnx_session, open_engine

DATA = np.arange(4, dtype=np.float32).tobytes()


def tensor(location: str, offset: Any = 0, length: Any = 16, name: str = "w") -> TensorProto:
    found = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            found.external_data.add(key=key, value=str(value))
    return found


def model(*initializers: TensorProto, nodes: list[Any] | None = None, **more: Any) -> Any:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    added = [helper.make_node("Add", ["x", "w"], ["y"])]
    graph = helper.make_graph([*(nodes or []), *added], "g", value[:1], value[1:], list(initializers), **more)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def in_initializer(found: TensorProto) -> Any:
    return model(found)


def in_constant(found: TensorProto) -> Any:
    return model(nodes=[helper.make_node("Constant", [], ["w"], value=found)])


def in_subgraph(found: TensorProto) -> Any:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["z"])],
        "inner",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])],
        [found],
    )
    made = [helper.make_node("If", ["condition"], ["w"], then_branch=inner, else_branch=inner)]
    return model(helper.make_tensor("condition", TensorProto.BOOL, [], [True]), nodes=made)


def in_function(found: TensorProto) -> Any:
    whole = model(helper.make_tensor("w", TensorProto.FLOAT, [4], [0.0] * 4))
    node = helper.make_node("Constant", [], ["z"], value=found)
    opsets = [helper.make_opsetid("", 20)]
    whole.functions.append(helper.make_function("own", "f", [], ["z"], [node], opsets))
    return whole


def in_sparse(found: TensorProto) -> Any:
    sparse = onnx.SparseTensorProto(values=found, indices=tensor("ok.bin", name="i"), dims=[4])
    return model(sparse_initializer=[sparse])


PLACES: dict[str, Callable[[TensorProto], Any]] = {
    "initializer": in_initializer,
    "constant": in_constant,
    "subgraph": in_subgraph,
    "function": in_function,
    "sparse": in_sparse,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file that may be read, and links to one outside that may not."""
    inside = tmp_path / "engine"
    (inside / "sub").mkdir(parents=True)
    for path in (tmp_path / "secret.bin", inside / "ok.bin", inside / "sub" / "deep.bin"):
        path.write_bytes(DATA)
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    (inside / "relative.bin").symlink_to("../secret.bin")
    (inside / "inner.bin").symlink_to("ok.bin")
    (inside / "up").symlink_to(tmp_path)
    os.link(inside / "ok.bin", inside / "hard.bin")
    return inside


def written(folder: Path, whole: Any) -> Path:
    path = folder / "engine.onnx"
    path.write_bytes(whole if isinstance(whole, bytes) else whole.SerializeToString())
    return path


OUTSIDE = ["../secret.bin", "/etc/passwd", "link.bin", "relative.bin", "inner.bin", "up/secret.bin", "up"]
OUTSIDE += ["sub/deep.bin", "sub/../ok.bin", "", ".", "..", "ok.bin\0", "missing.bin", "*/_ORT_MEM_ADDR_/*"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", OUTSIDE)
def test_weights_are_beside_their_graph(folder: Path, location: str, place: str) -> None:
    graph = written(folder, PLACES[place](tensor(location)))
    with pytest.raises(UnsafeGraph, match=r"may only be in files of its own folder|is missing"):
        check_external(graph)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["ok.bin", "hard.bin"])
def test_weights_beside_it_are_found_wherever_they_are_named(folder: Path, location: str, place: str) -> None:
    graph = written(folder, PLACES[place](tensor(location)))
    assert External(location, 0, 16) in set(external_tensors(graph))
    check_external(graph)
    with pytest.raises(UnsafeGraph, match="which the manifest does not list"):
        check_external(graph, {"engine.onnx"})


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 2**60), (2**62, 16), (-8, 16), (0, -1), (1, 16), (17, None), ("x", 16)]
)
def test_places_that_the_file_does_not_have(folder: Path, offset: Any, length: Any) -> None:
    """Each is read before anything is allocated for it."""
    graph = written(folder, model(tensor("ok.bin", offset, length)))
    for read in (check_external, read_graph, read_structure, verify_graph):
        with pytest.raises((UnsafeGraph, ArtifactError), match=r"a tensor is to lie at|is no number"):
            bounded(read, graph)


@pytest.mark.parametrize("length", [2**60, -1])
def test_one_tensor_is_read_within_its_file(folder: Path, length: int) -> None:
    with pytest.raises(ArtifactError, match=r"ok\.bin ends inside w"):
        bounded(load_external, tensor("ok.bin", 0, length), folder)
    with pytest.raises(ArtifactError, match="invalid literal"):
        load_external(tensor("ok.bin", "x"), folder)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "link.bin", "inner.bin"])
def test_the_build_and_the_server_refuse_the_same(folder: Path, location: str) -> None:
    graph = written(folder, model(tensor(location)))
    for read in (read_graph, read_structure, verify_graph):
        with pytest.raises(ArtifactError, match="may only be in files of its own folder"):
            read(graph)
    with pytest.raises(EngineRefused, match="may only be in files of its own folder"):
        onnx_session(graph)


def test_an_engine_reads_only_what_was_digested(folder: Path) -> None:
    """`swapped.bin` lies beside the engine, and the manifest says nothing of it."""
    written(folder, model(tensor("ok.bin")))
    for link in ("link.bin", "relative.bin", "inner.bin", "up"):
        (folder / link).unlink()
    (folder / "sub" / "deep.bin").unlink()
    (folder / "sub").rmdir()
    serving = {"max_length": 8}
    reseal(folder, engine="engine.onnx", target="onnxruntime", serving=serving)
    engine = open_engine(folder)
    assert engine.run({"x": np.zeros(4, np.float32)})["y"].tolist() == [0, 1, 2, 3]
    (folder / "ok.bin").unlink()
    (folder / "hard.bin").unlink()
    written(folder, model(tensor("swapped.bin")))
    reseal(folder, engine="engine.onnx")
    (folder / "swapped.bin").write_bytes(DATA)
    with pytest.raises(EngineRefused, match=r"'swapped\.bin', which the manifest does not list"):
        open_engine(folder)


def test_weights_twice_in_one_tensor(folder: Path) -> None:
    """Which of two locations counts is for no library to decide."""
    both = tensor("ok.bin")
    both.external_data.add(key="location", value="../secret.bin")
    with pytest.raises(UnsafeGraph, match="a tensor in two files"):
        check_external(written(folder, model(both)))


def test_a_place_that_is_no_text(folder: Path) -> None:
    content = model(tensor("ok.bin")).SerializeToString().replace(b"ok.bin", b"ok.\xffin")
    with pytest.raises(UnsafeGraph, match=r"in no UTF-8"):
        check_external(written(folder, content))


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data")
@pytest.mark.parametrize("key", ["offset", "length", "checksum", "strange"])
def test_what_onnx_itself_refuses_is_named(folder: Path, key: str) -> None:
    """Found by fuzzing: onnx's own loader raises a class of its own, or fails while it complains."""
    broken = tensor("ok.bin")
    del broken.external_data[:]
    broken.external_data.add(key=key, value="0")
    with pytest.raises(ArtifactError, match=r"the weights of .*engine\.onnx cannot be read"):
        read_graph(written(folder, model(broken)))


def _deep() -> bytes:
    message = b""
    for _ in range(2000):  # a graph in an attribute of a node of a graph
        for field in (b"\x32", b"\x2a", b"\x0a"):
            length = b""
            size = len(message)
            while True:
                length += bytes([size & 0x7F | (0x80 if size > 0x7F else 0)])
                size >>= 7
                if not size:
                    break
            message = field + length + message
    return message


@pytest.mark.parametrize(
    ("content", "how"),
    [
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7fabc", "ends inside a field"),
        (b"\x3a", "ends inside a number"),
        (b"\x80" * 20, "ends inside a number"),
        (b"\x3b\x3c", "has a field of no kind"),
        (b"\xba\x80\x80\x80\x10\x00", "has a field of no number"),  # ONNX Runtime takes it for a graph
        (b"\x02\x00", "has a field of no number"),
        (b"\x3d\x00", "ends inside a field"),
        (b"\x3a" + b"\xff\xff\x03" + _deep()[-0xFFFF:], "ends inside"),
    ],
)
def test_what_is_no_graph(folder: Path, content: bytes, how: str) -> None:
    with pytest.raises(UnsafeGraph, match=f"is not an ONNX graph: it {how}"):
        bounded(check_external, written(folder, content))


def test_a_graph_in_graphs_without_end(folder: Path) -> None:
    deep = _deep()
    size = bytes([len(deep) & 0x7F | 0x80, len(deep) >> 7 & 0x7F | 0x80, len(deep) >> 14])
    with pytest.raises(UnsafeGraph, match="is nested too deeply"):
        bounded(check_external, written(folder, b"\x3a" + size + deep))


def test_many_small_fields_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_repo.runtime import external_data

    monkeypatch.setattr(external_data, "MAX_FIELDS", 1000)
    with pytest.raises(UnsafeGraph, match="has more than 1,000 fields"):
        check_external(written(folder, b"\x08\x01" * 1001))


def test_an_empty_or_missing_file(folder: Path) -> None:
    check_external(written(folder, b""))
    with pytest.raises(UnsafeGraph, match="cannot be read: No such file"):
        check_external(folder / "nothing.onnx")
    with pytest.raises(UnsafeGraph, match="cannot be read: Is a directory"):
        check_external(folder / "sub")
