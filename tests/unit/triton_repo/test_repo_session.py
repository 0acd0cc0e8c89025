"""ONNX Runtime sessions: exact integer products whatever the processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from triton_repo.runtime import session

KEY = "session.x64quantprecision"


@pytest.fixture(autouse=True)
def _forget_the_processor() -> Iterator[None]:
    session._has_vnni.cache_clear()
    yield
    session._has_vnni.cache_clear()


def product(weight: np.ndarray) -> bytes:
    """u8 [1, k] times the constant s8 [k, n], in integers."""
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, len(weight)])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


CASES = [("fpu avx2", True), ("fpu avx2 avx512_vnni", False), ("avx2 avx_vnni", False)]


@pytest.mark.parametrize(("flags", "asked"), CASES)
def test_exact_kernels_are_asked_for_where_the_fast_ones_overflow(
    flags: str, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "cpuinfo"
    information.write_text(f"processor : 0\nflags\t\t: {flags}\n", encoding="utf-8")
    monkeypatch.setattr(session, "_CPU_INFO", information)
    found = session.onnx_session(product(np.full((64, 16), 127, dtype=np.int8)))
    options = found.get_session_options()
    if not asked:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(KEY)
        return
    assert options.get_session_config_entry(KEY) == "1"
    # The largest products there are: pairs of them exceed 16 bits.
    (answer,) = found.run(None, {"x": np.full((1, 64), 255, dtype=np.uint8)})
    assert (answer == 64 * 255 * 127).all()


def test_a_processor_that_cannot_be_asked_gets_the_exact_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_CPU_INFO", tmp_path / "nothing")
    found = session.onnx_session(product(np.ones((4, 4), dtype=np.int8)))
    assert found.get_session_options().get_session_config_entry(KEY) == "1"
