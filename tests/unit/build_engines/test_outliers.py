"""Outlier channels of an FFN: split without changing an answer, and to a purpose."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from tiny_models import batch

from build_engines.graphs import open_session, read_graph
from build_engines.quantize import Quantizer
from build_engines.quantize.outliers import find_pairs, split_outliers
from build_engines.quantize.scales import search_scales
from build_engines.quantize.statistics import InputStatistics

SETTINGS: dict[str, Any] = {"method": "minmax", "percentile": 99.99, "smoothing": "auto"}


def statistics_of(rows: np.ndarray) -> InputStatistics:
    return InputStatistics(rows.min(axis=0), rows.max(axis=0), rows)


def with_outlier(width: int = 96, size: float = 60.0) -> tuple[np.ndarray, InputStatistics]:
    """Activations of which one channel fires rarely, and then far beyond the others."""
    generator = np.random.default_rng(0)
    rows = np.abs(generator.normal(0, 1, (400, width))).astype(np.float32)
    rows[:, 5] = 0
    rows[::50, 5] = size
    return generator.normal(0, 0.1, (width, 24)).astype(np.float32), statistics_of(rows)


def test_copies_carry_the_same_product() -> None:
    weight, found = with_outlier()
    split = split_outliers(weight, found)
    assert split is not None
    rows, halves = split.first_columns(found.rows), split.second_rows(weight)
    np.testing.assert_allclose(rows @ halves, found.rows @ weight, rtol=1e-4, atol=1e-4)
    assert np.bincount(split.parents).argmax() == 5
    assert len(split.parents) % 16 == 0


def test_the_copies_are_worth_it() -> None:
    weight, found = with_outlier()
    split = split_outliers(weight, found)
    assert split is not None
    before = search_scales(weight, found, **SETTINGS)
    after = search_scales(
        split.second_rows(weight), split.statistics(found), **SETTINGS, stagger=split.stagger
    )
    assert after.error < 0.5 * before.error
    # The staggered offsets are part of that: the copies' mean rounds finer than one of them.
    same = search_scales(split.second_rows(weight), split.statistics(found), **SETTINGS)
    assert after.error <= same.error


def test_even_channels_are_left_alone() -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (200, 96)).astype(np.float32)
    weight = np.full((96, 8), 0.1, dtype=np.float32)
    assert split_outliers(weight, statistics_of(rows)) is None


@given(st.lists(st.floats(0.01, 100), min_size=48, max_size=96), st.integers(0, 3))
def test_stagger_is_even_and_centred(reach: list[float], seed: int) -> None:
    rows = np.random.default_rng(seed).uniform(-1, 1, (20, len(reach))).astype(np.float32) * np.float32(reach)
    split = split_outliers(np.ones((len(reach), 4), dtype=np.float32), statistics_of(rows))
    if split is None:
        return
    channels = np.concatenate([np.arange(len(reach)), split.parents])
    for channel in range(len(reach)):
        offsets = np.sort(split.stagger[channels == channel])
        assert abs(offsets.sum()) < 1e-5
        assert np.abs(offsets).max() < 0.5
        np.testing.assert_allclose(np.diff(offsets), 1 / len(offsets), atol=1e-5)


def test_the_split_graph_is_the_same_model(export: Any) -> None:
    """A real graph with one FFN channel blown up: split, and in float it answers as before."""
    model = read_graph(export("embed").path)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for first, _ in find_pairs(Quantizer(model).linears):
        weight = numpy_helper.to_array(initializers[first.weight]).copy()
        weight[:, 3] *= 60
        initializers[first.weight].CopyFrom(numpy_helper.from_array(weight, first.weight))
    arrays = batch((4, 12), 0, False)
    expected = open_session(model).run(["embeddings"], arrays)[0]
    quantizer = Quantizer(model)
    before = {linear.name: linear.inputs for linear in quantizer.linears}
    quantizer.calibrate([arrays], **SETTINGS)
    widened = [linear for linear in quantizer.linears if linear.inputs > before[linear.name]]
    assert len(widened) == len(find_pairs(quantizer.linears))
    floats = quantizer.assemble({linear.name: "float" for linear in quantizer.linears})
    np.testing.assert_allclose(open_session(floats).run(["embeddings"], arrays)[0], expected, atol=1e-5)
