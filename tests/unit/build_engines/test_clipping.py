"""The clipping search: never worse than the plain range on the calibration rows, better where it can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engines.errors import QuantizeError
from build_engines.quantize.clipping import clip_weight, dequantize_into, plain_rows


def output_errors(weight: Any, codes: Any, scale: Any, rows: Any) -> Any:
    """E ||x (W - Wq)||^2 of every channel, in float64."""
    difference = codes.astype(np.float64) * scale.astype(np.float64) - weight
    return np.square(rows.astype(np.float64) @ difference).mean(axis=0)


def plain_codes(weight: Any) -> tuple[Any, Any]:
    """Absmax, as it is written everywhere: the largest magnitude of a channel is code 127."""
    scale = np.maximum(np.abs(weight).max(axis=0) / 127, 2.0**-20).astype(np.float16).astype(np.float32)
    # Multiplied, as the module does: a weight halfway between two codes may go to either.
    return np.clip(np.rint(weight * (1 / scale)), -127, 127), scale


def plain_errors(weight: Any, rows: Any) -> Any:
    return output_errors(weight, *plain_codes(weight), rows)


def correlated_rows(rng: Any, tokens: int, inputs: int) -> Any:
    """Inputs as layers have them: a few directions carry most, some channels are far larger than others."""
    mixed = rng.standard_normal((tokens, 4)) @ rng.standard_normal((4, inputs)) * 3
    spread = np.exp(rng.standard_normal(inputs))
    return ((mixed + rng.standard_normal((tokens, inputs))) * spread).astype(np.float32)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs, outputs, tokens = draw(st.tuples(st.integers(1, 90), st.integers(1, 40), st.integers(1, 50)))
    tail = draw(st.sampled_from([1.5, 3.0, 30.0]))
    weight = rng.standard_t(tail, (inputs, outputs)) * draw(st.sampled_from([1e-4, 0.02, 3.0]))
    return np.clip(weight, -300, 300).astype(np.float32), correlated_rows(rng, tokens, inputs)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_channel_is_worse_than_the_plain_range(problem: tuple[Any, Any]) -> None:
    weight, rows = problem
    found = clip_weight(weight, rows)
    after = output_errors(weight, found.codes, found.scale, rows)
    before = plain_errors(weight, rows)
    assert (after <= before * (1 + 1e-4) + 1e-12).all()
    assert found.codes.dtype == np.int8
    assert np.abs(found.codes.astype(int)).max() <= 127
    assert np.array_equal(found.scale.astype(np.float16).astype(np.float32), found.scale)
    assert (found.scale > 0).all()


def test_heavy_tails_gain_a_lot() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_t(4, (512, 96)) * 0.02).astype(np.float32)
    rows = correlated_rows(rng, 256, 512)
    found = clip_weight(weight, rows)
    after = output_errors(weight, found.codes, found.scale, rows).sum()
    before = plain_errors(weight, rows).sum()
    assert after < 0.75 * before
    assert found.clipped > 40
    assert 0.2 < found.gain < 1


@pytest.mark.parametrize("tail", [3.0, 5.0, 100.0])
def test_the_range_is_nearly_the_best_there_is(tail: float) -> None:
    """Against brute force over every range, by the true error on the rows."""
    rng = np.random.default_rng(1)
    weight = (rng.standard_t(tail, (300, 24)) * 0.02).astype(np.float32)
    rows = (rng.standard_normal((400, 300)) * np.exp(rng.standard_normal(300))).astype(np.float32)
    best = np.full(24, np.inf)
    for ratio in np.linspace(0.1, 1, 91):
        scale = (np.abs(weight).max(axis=0) * ratio / 127).astype(np.float32)
        codes = np.clip(np.rint(weight / scale), -127, 127)
        best = np.minimum(best, output_errors(weight, codes, scale, rows))
    found = clip_weight(weight, rows)
    reached = output_errors(weight, found.codes, found.scale, rows)
    plain = plain_errors(weight, rows).sum()
    assert plain - reached.sum() > 0.6 * (plain - best.sum())


def test_inputs_decide_what_may_be_cut_off() -> None:
    """The same outlier, once on an input that is almost nothing, once on one that matters."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((256, 2)).astype(np.float32) * 0.02
    weight[7] = 1.0
    rows = rng.standard_normal((512, 256)).astype(np.float32)
    quiet = rows.copy()
    quiet[:, 7] *= 1e-3
    assert clip_weight(weight, rows).clipped == 0
    assert clip_weight(weight, quiet).clipped == 2
    assert (clip_weight(weight, quiet).scale < 0.5 * clip_weight(weight, rows).scale).all()


def test_the_rows_overrule_the_model_of_the_error() -> None:
    """Cut-off parts that add up over correlated inputs: the model, blind to cross terms, would clip."""
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((256, 8)) * 0.02).astype(np.float32)
    weight[:8] = 0.3
    together = np.repeat(rng.standard_normal((512, 1)), 256, axis=1).astype(np.float32)
    apart = rng.standard_normal((512, 256)).astype(np.float32) * np.where(np.arange(256) < 8, 0.01, 1.0)
    moments = np.square(apart).mean(axis=0).astype(np.float32)
    assert clip_weight(weight, apart.astype(np.float32)).clipped == 8
    assert clip_weight(weight, together, moments).clipped == 0


def test_dead_and_tiny_channels() -> None:
    weight = np.zeros((16, 3), dtype=np.float32)
    weight[:, 1] = 1e-9
    weight[:, 2] = np.linspace(-3e-3, 3e-3, 16)
    found = clip_weight(weight, np.ones((4, 16), np.float32))
    assert not found.codes[:, :2].any()
    assert (found.scale > 0).all()
    restored = np.empty_like(weight)
    dequantize_into(restored, found.codes, found.scale)
    assert np.abs(restored - weight).max() <= found.scale.max() / 2 * 1.001


def test_blocks_do_not_show() -> None:
    """A weight wider than one block, against the same columns one by one."""
    rng = np.random.default_rng(4)
    weight = (rng.standard_t(4, (3000, 400)) * 0.02).astype(np.float32)
    rows = rng.standard_normal((20, 3000)).astype(np.float32)
    whole = clip_weight(weight, rows)
    for part in (slice(0, 3), slice(347, 352), slice(398, 400)):
        alone = clip_weight(weight[:, part], rows)
        assert np.array_equal(alone.codes, whole.codes[:, part])
        assert np.array_equal(alone.scale, whole.scale[part])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_an_error(value: float) -> None:
    weight, rows = np.ones((4, 3), np.float32), np.ones((5, 4), np.float32)
    broken = weight.copy()
    broken[1, 2] = value
    with pytest.raises(QuantizeError, match="weight is not finite"):
        clip_weight(broken, rows)
    rows[2, 1] = value
    with pytest.raises(QuantizeError, match="inputs are not finite"):
        clip_weight(weight, rows)


def test_tables_have_a_scale_per_row() -> None:
    table = (np.random.default_rng(5).standard_normal((70, 12)) * np.arange(70)[:, None]).astype(np.float32)
    codes, scale = plain_rows(table)
    assert (codes.shape, scale.shape) == ((70, 12), (70,))
    assert (np.abs(codes * scale[:, None] - table).max(axis=1) <= scale * 0.53 + 1e-7).all()
