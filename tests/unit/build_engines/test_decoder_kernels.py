"""The CPU engine of a decoder: what the gate decides, and that it judged what is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_decoder_lowering import CAPACITY, VOCABULARY, checkpoint, tokens

from build_engines.decoder_kernels import Material, compile_for_cpu
from build_engines.errors import GateError
from build_engines.export.decoder import open_decoder, write_decoder
from build_engines.gates import Check, GateReport
from triton_repo.runtime.decoder import DecoderEngine, kernel_settings
from triton_repo.runtime.session import onnx_session

SERVING = {
    "slots": 2,
    "capacity": CAPACITY,
    "chunk": 16,
    "vocabulary": VOCABULARY,
    "layers": 2,
    "kv_heads": 2,
    "head_dim": 16,
}
PROMPT = tokens(40, 0)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT8 graph in which one Linear reads a token that drowns all others in one common scale."""
    folder = tmp_path_factory.mktemp("graph")
    decoder = open_decoder(checkpoint("llama", folder / "checkpoint"))

    def codes(name: str) -> Any:
        weight = decoder.weight(name).copy()
        if name == "layers.0.ffn.up":
            # Both branches of one inner channel: its product is what layers.0.ffn.down reads.
            weight[:, [5, 96 + 5]] *= 400
        scale = np.maximum(np.abs(weight).max(axis=0) / 127, 1e-6).astype(np.float16).astype(np.float32)
        return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale

    sources = {name: lambda name=name: codes(name) for name in decoder.linears()}
    write_decoder(decoder, folder / "model.onnx", precision="int8-weights", quantized=sources)
    return folder / "model.onnx"


def silent(phase: str, done: int, total: int) -> None:
    del phase, done, total


def report(passed: bool) -> GateReport:
    return GateReport((Check("perplexity increase", 0.0 if passed else 1.0, 0.5, "at most"),), 1)


def accept(engine: DecoderEngine) -> GateReport:
    return report(np.isfinite(engine.logits(PROMPT)).all())


def build(graph: Path, out: Path, judge: Callable[[DecoderEngine], GateReport] = accept) -> dict[str, Any]:
    out.mkdir()
    return compile_for_cpu(graph, out, Material(SERVING, judge, PROMPT), silent)


def test_both_graphs_share_the_weights_that_the_typed_graph_has(graph: Path, tmp_path: Path) -> None:
    made = build(graph, tmp_path / "engine")
    assert made["kernels"] == {"block": 256, "accuracy": 4}
    assert made["prefill"] == {"one_scale": 9, "returned": []}
    assert sorted(path.name for path in (tmp_path / "engine").iterdir()) == [
        "engine.onnx",
        "engine.onnx.data",
        "prefill.onnx",
    ]
    assert (tmp_path / "engine" / "engine.onnx.data").samefile(f"{graph}.data")


def test_linears_return_until_the_gate_passes_the_most_sensitive_first(graph: Path, tmp_path: Path) -> None:
    judged: list[int] = []

    def strict(engine: DecoderEngine) -> GateReport:
        """Passes an engine whose prompts come out as decoding them token by token does."""
        step_by_step = np.concatenate(
            [engine.decode([0], [token], [place]).copy() for place, token in enumerate(PROMPT)]
        )
        found = engine.logits(PROMPT)
        judged.append(len(judged))
        return report(float(np.abs(found - step_by_step).max()) < 0.15 * np.abs(step_by_step).max())

    made = build(graph, tmp_path / "engine", strict)
    assert made["gate"]["passed"]
    assert "layers.0.ffn.down" in made["prefill"]["returned"]
    assert made["prefill"]["one_scale"] + len(made["prefill"]["returned"]) == 9
    assert len(judged) > 2


def test_finer_kernels_are_tried_before_giving_up(graph: Path, tmp_path: Path) -> None:
    tried: list[str] = []

    def refuse(engine: DecoderEngine) -> GateReport:
        tried.append("judged")
        return report(len(tried) > 2)

    made = build(graph, tmp_path / "engine", refuse)
    assert made["kernels"] == {"block": 32, "accuracy": 1}
    with pytest.raises(GateError, match="fails the gate that its graph passed"):
        build(graph, tmp_path / "refused", lambda engine: report(False))


def test_without_any_linear_left_there_is_no_second_graph(graph: Path, tmp_path: Path) -> None:
    def one_graph_only(engine: DecoderEngine) -> GateReport:
        return report(engine._prefill is engine._session)

    # The search may end at all Linears returned, which is the decoding graph again; then nothing is written.
    with pytest.raises(GateError):
        build(graph, tmp_path / "engine", one_graph_only)


def test_the_served_engine_is_the_judged_one(graph: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def remember(engine: DecoderEngine) -> GateReport:
        seen.append(engine.logits(PROMPT))
        return report(True)

    made = build(graph, tmp_path / "engine", remember)
    decode, prefill = (
        onnx_session(tmp_path / "engine" / name, settings=kernel_settings(made["kernels"], prefill=second))
        for name, second in (("engine.onnx", False), ("prefill.onnx", True))
    )
    served = DecoderEngine({"serving": SERVING}, decode, prefill)
    np.testing.assert_array_equal(served.logits(PROMPT), seen[-1])
    assert (seen[-1] != seen[0]).any()  # the first judgement was of the decoding graph
