"""bench-gpu's last part on a real tritonserver: the engines of a small run, here the CPU's, under load."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_engines.gpu import served
from build_engines.gpu.building import build_one
from build_engines.gpu.models import EncoderSize, Sizes, write_model, write_stack_file
from build_engines.random_model import RandomLlama

pytestmark = pytest.mark.serving


def test_requests_and_streams_stand_beside_the_bare_engine(tmp_path: Path) -> None:
    sizes = Sizes(
        encoder=EncoderSize(layers=1, hidden=32, heads=2, ffn=64, vocabulary=1000, positions=64),
        llm=RandomLlama(layers=1, hidden=32, ffn=64, heads=2, kv_heads=1, vocabulary=1024, positions=256),
        shapes=((2, 32),),
        slots=4,
        capacity=256,
        chunk=64,
    )
    path = write_stack_file(tmp_path, sizes, ["onnxruntime"], "12.0", portable=False)
    built = {"reranker": ("fp16",), "assistant": ("fp16",)}
    for name in built:
        write_model(tmp_path, name, sizes)
        build_one(path, tmp_path / "build", (name, "fp16", "onnxruntime"))
    rows = served.serve(path, tmp_path / "build", "onnxruntime", built, 0.2, 120)
    found = {(row.model, row.case): row for row in rows}
    for callers in (1, 8, 32, 64):
        row = found["reranker", f"{callers} at once"]
        assert row.unit == "passages/s"
        assert min(row.value or 0.0, row.limit or 0.0) > 0
        assert row.runs >= 1
        assert "p99" in row.note
    assert {case for model, case in found if model == "assistant"} == {"1 streams", "4 streams"}
    assert {row.unit for row in rows if row.model == "assistant"} == {"tokens/s"}
