"""Graphs with external weights: every place that onnx would read is one that was found and checked."""

from __future__ import annotations

import draw
import onnx
from onnx import TensorProto, helper

from build_engines.errors import ArtifactError
from build_engines.graphs import read_graph
from triton_repo.runtime.external_data import UnsafeGraph, external_tensors


def _tensor(location: str, name: str = "w") -> TensorProto:
    made = TensorProto(name=name, data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        made.external_data.add(key=key, value=value)
    return made


def _seed(location: str, *, inside: bool) -> bytes:
    values = [helper.make_tensor_value_info(name, 1, [4]) for name in "xyz"]
    node = helper.make_node("Constant", [], ["w"], value=_tensor(location))
    inner = helper.make_graph([node, helper.make_node("Identity", ["w"], ["z"])], "inner", [], values[2:])
    branch = helper.make_node("If", ["x"], ["w"], then_branch=inner, else_branch=inner)
    add = helper.make_node("Add", ["x", "w"], ["y"])
    stored = [] if inside else [_tensor(location)]
    graph = helper.make_graph([branch, add] if inside else [add], "g", values[:1], values[1:2], stored)
    return bytes(helper.make_model(graph).SerializeToString())


SEEDS = [_seed(name, inside=inside) for name in ("ok.bin", "../x", "/etc/passwd") for inside in (True, False)]
WORDS = [
    *(
        b"location",
        b"offset",
        b"length",
        b"ok.bin",
        b"../",
        b"/",
        b"\x6a",
        b"\x70\x01",
        b"\x2a",
        b"\x32",
        b"\x3a",
    ),
    *(
        b"\x0a\x08location",
        b"\x12\x06ok.bin",
        b"\xff\xff\xff\xff\x0f",
        b"\x80\x80\x00",
        b"\xca\x01",
        b"\xa2\x01",
    ),
]


def target(data: bytes) -> None:
    with draw.folder() as folder:
        (folder / "ok.bin").write_bytes(bytes(16))
        graph = folder / "model.onnx"
        graph.write_bytes(data)
        try:
            found = {tensor.location for tensor in external_tensors(graph)}
        except UnsafeGraph as error:
            assert str(graph) in str(error)
            return
        try:
            model = onnx.load(str(graph), load_external_data=False)
        except Exception:  # protobuf's own error has no public base
            return
        for tensor in onnx.external_data_helper._get_all_tensors(model):
            if tensor.data_location == TensorProto.EXTERNAL:
                assert {entry.value for entry in tensor.external_data if entry.key == "location"} <= found
        try:
            read_graph(graph)
        except ArtifactError as error:
            assert str(error)
