"""Exported graphs against transformers, family by family: FP32 and FP16, unseen shapes, padding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import FAMILIES, batch, save_tiny, session

from build_engines.export import export_encoder, to_fp16
from build_engines.graphs import read_graph, save_graph

TASKS = ("classify", "embed", "rerank")
SHAPES = ((1, 1), (3, 17), (5, 130))


@dataclass(frozen=True)
class Exported:
    """One exported model: `run` gives the graph's outputs, `expect` what transformers computes for them."""

    folder: Path
    serving: dict[str, Any]
    fp32: Any
    fp16: Any
    expect: Callable[[dict[str, Any]], dict[str, Any]]

    def run(self, arrays: dict[str, Any], precision: str = "fp32") -> dict[str, Any]:
        engine = self.fp32 if precision == "fp32" else self.fp16
        return dict(zip(self.serving["outputs"], engine.run(self.serving["outputs"], arrays), strict=True))

    def inputs(self, shape: tuple[int, int], seed: int = 0) -> dict[str, Any]:
        return batch(shape, self.serving["pad_id"], "token_type_ids" in self.serving["inputs"], seed)


def reference(model: Any, task: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """transformers' own forward pass, then what sentence-transformers does for embeddings and scores."""
    import torch

    def expect(arrays: dict[str, Any]) -> dict[str, Any]:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad():
            result = model(**tensors)
        if task == "embed":
            weight = tensors["attention_mask"].unsqueeze(-1).float()
            mean = (result.last_hidden_state * weight).sum(1) / weight.sum(1)
            return {"embeddings": torch.nn.functional.normalize(mean).numpy()}
        logits = result.logits
        if task == "rerank":
            return {"logits": logits.numpy(), "scores": logits[:, 0].sigmoid().numpy()}
        return {"logits": logits.numpy(), "probabilities": logits.softmax(-1).numpy()}

    return expect


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Exported]:
    @cache
    def build(family: str, task: str) -> Exported:
        folder = tmp_path_factory.mktemp(f"{family}-{task}")
        model = save_tiny(folder, family, task)
        graph = export_encoder(folder, task, folder / "out", pooling="mean")
        save_graph(to_fp16(read_graph(graph.path)), folder / "out" / "half.onnx")
        half = session(folder / "out" / "half.onnx")
        return Exported(folder, graph.serving, session(graph.path), half, reference(model, task))

    return build


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_graph_equals_transformers(
    family: str, task: str, exported: Callable[[str, str], Exported]
) -> None:
    model = exported(family, task)
    for shape in SHAPES:
        arrays = model.inputs(shape)
        expected = model.expect(arrays)
        found = model.run(arrays)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].shape == value.shape
            assert found[name].dtype == np.float32
            np.testing.assert_allclose(found[name], value, atol=1e-4, rtol=0, err_msg=f"{name} at {shape}")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_graph_follows_the_fp32_graph(
    family: str, task: str, exported: Callable[[str, str], Exported]
) -> None:
    model = exported(family, task)
    for shape in SHAPES:
        arrays = model.inputs(shape, seed=1)
        for name, half in model.run(arrays, "fp16").items():
            assert half.dtype == np.float32
            assert np.isfinite(half).all()
            full = model.run(arrays)[name]
            a, b = half.reshape(-1), full.reshape(-1)
            assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) >= 0.9999


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_a_row(family: str, exported: Callable[[str, str], Exported]) -> None:
    model = exported(family, "embed")
    arrays = model.inputs((5, 130))
    together = model.run(arrays)["embeddings"]
    for row in range(5):
        length = int(arrays["attention_mask"][row].sum())
        alone = model.run({name: array[row : row + 1, :length] for name, array in arrays.items()})[
            "embeddings"
        ]
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5, rtol=0)


def test_a_reranker_reads_token_types(exported: Callable[[str, str], Exported]) -> None:
    model = exported("bert", "rerank")
    arrays = model.inputs((2, 12))
    flat = {**arrays, "token_type_ids": np.zeros_like(arrays["input_ids"])}
    assert np.abs(model.run(arrays)["logits"] - model.run(flat)["logits"]).max() > 1e-3
    assert "token_type_ids" not in exported("xlm-roberta", "rerank").serving["inputs"]


def test_local_attention_is_local(exported: Callable[[str, str], Exported]) -> None:
    """A window as wide as the text must give another answer, or the parity above compares nothing."""
    import onnx

    model = exported("modernbert", "embed")
    graph = onnx.load(str(model.folder / "out" / "model.onnx"))
    for tensor in graph.graph.initializer:
        if tensor.name == "mask.window":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(10_000), tensor.name))
    widened = model.folder / "wide.onnx"
    onnx.save(graph, str(widened))
    arrays = model.inputs((2, 60))
    assert np.abs(session(widened).run(None, arrays)[0] - model.run(arrays)["embeddings"]).max() > 1e-3


def test_a_window_beyond_every_text_and_every_integer(tmp_path: Path) -> None:
    """It hides nothing, as Transformers with a window as long as the model's positions."""
    model = save_tiny(tmp_path, "modernbert", "embed")
    positions = model.config.max_position_embeddings
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    found = []
    arrays = batch((2, positions), model.config.pad_token_id, False)
    for name, window in (("huge", 10**30), ("all", 2 * positions)):
        path.write_text(json.dumps({**config, "local_attention": window}))
        graph = export_encoder(tmp_path, "embed", tmp_path / name)
        found.append(session(graph.path).run(None, arrays)[0])
    np.testing.assert_array_equal(*found)
