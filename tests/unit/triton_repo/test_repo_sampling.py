"""The sampler against Transformers' own processors, its draws against the distribution, its limits."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from triton_repo.runtime.sampling import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_IDS,
    MAX_STOPS,
    FloatArray,
    Sampler,
    SamplingParams,
    _kth_largest,
)
from triton_repo.runtime.texts import BadRequest, EngineFailed

VOCABULARY = 500


def logits(seed: int, vocabulary: int = VOCABULARY, spread: float = 4.0) -> FloatArray:
    random = np.random.default_rng(seed)
    return (random.standard_normal(vocabulary) * spread).astype(np.float32)


def transformers_scores(params: SamplingParams, prompt: list[int], scores: FloatArray) -> FloatArray:
    """What Transformers' generate would draw from, by its own choice and order of processors."""
    import torch
    from transformers import GenerationConfig, GenerationMixin

    config = GenerationConfig(
        do_sample=params.temperature > 0,
        temperature=params.temperature or None,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p or None,
        repetition_penalty=params.repetition_penalty,
    )
    config._eos_token_tensor = None

    class Model(GenerationMixin):
        config = SimpleNamespace(is_encoder_decoder=False)

    processors = Model()._get_logits_processor(config, input_ids_seq_length=len(prompt), logits_processor=[])
    answer = processors(torch.tensor([prompt]), torch.from_numpy(scores)[None].clone())
    return np.asarray(answer[0].numpy(), dtype=np.float32)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_k": 10_000},
        {"temperature": 0.3, "top_p": 0.9},
        {"temperature": 5.0, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 2.0, "min_p": 1.0},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.8},
        {"temperature": 1.2, "top_k": 60, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 0.8, "top_p": 0.7, "repetition_penalty": 0.6},
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_transformers(fields: dict[str, float], seed: int) -> None:
    params = SamplingParams(**fields)  # type: ignore[arg-type]
    prompt = np.random.default_rng(seed).integers(0, VOCABULARY, 40).tolist()
    scores = logits(seed)
    expected = transformers_scores(params, prompt, scores)
    mine = Sampler(params, prompt, VOCABULARY).process(scores)
    assert np.array_equal(np.isfinite(mine), np.isfinite(expected))
    kept = np.isfinite(expected)
    np.testing.assert_allclose(mine[kept], expected[kept], rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 50, 999, 4999])
def test_the_kth_largest_is_found_among_few(k: int) -> None:
    """Also where the sample misleads: the largest all where it does not look, or there alone."""
    scores = logits(9, vocabulary=5000)
    for case in (scores, np.sort(scores), np.full(5000, 2, np.float32), np.tile(np.sort(scores[:50]), 100)):
        assert _kth_largest(case, k) == np.sort(case)[-k]
    spiked = scores.copy()
    spiked[1::16] += 100
    spiked[::16] -= 100
    assert _kth_largest(spiked, k) == np.sort(spiked)[-k]
    assert _kth_largest(-spiked, k) == np.sort(-spiked)[-k]


def test_generated_tokens_are_penalized_too_and_the_logits_left_alone() -> None:
    params = SamplingParams(repetition_penalty=50.0)
    scores = np.array([1.0, 3.0, 2.0, -1.0], dtype=np.float32)
    sampler = Sampler(params, [1], 4)
    assert [sampler.sample(scores)[0] for _ in range(3)] == [2, 0, 1]
    assert scores.tolist() == [1.0, 3.0, 2.0, -1.0]


def test_tokens_with_equal_scores_at_the_border_of_top_k_all_stay() -> None:
    scores = np.array([1, 5, 3, 3, 3, 0], dtype=np.float32)
    params = SamplingParams(temperature=1.0, top_k=2)
    kept = np.isfinite(Sampler(params, [], 6).process(scores))
    assert kept.tolist() == [False, True, True, True, True, False]
    assert np.array_equal(kept, np.isfinite(transformers_scores(params, [0], scores)))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 12},
        {"temperature": 1.3, "top_p": 0.85, "min_p": 0.01},
    ],
)
def test_draws_follow_the_distribution(fields: dict[str, float]) -> None:
    """Pearson's chi-square over 8,000 draws, with a seed that makes it the same every time."""
    scores = logits(5, vocabulary=40, spread=1.5)
    sampler = Sampler(SamplingParams(seed=11, **fields), [], 40)  # type: ignore[arg-type]
    processed = sampler.process(scores).astype(np.float64)
    expected = np.exp(processed - processed.max())
    expected *= 8_000 / expected.sum()
    drawn = np.bincount([sampler.sample(scores)[0] for _ in range(8_000)], minlength=40)
    assert not drawn[expected == 0].any()
    often = expected >= 5
    freedom = often.sum() - 1
    statistic = ((drawn[often] - expected[often]) ** 2 / expected[often]).sum()
    # Mean and variance of chi-square are n and 2 n: four deviations.
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def draws(seed: int | None, sample: int = 0, between: int = 0) -> list[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [], VOCABULARY, sample=sample)
    other = Sampler(SamplingParams(temperature=1.0, seed=99), [], VOCABULARY)
    answer = []
    for step in range(20):
        for _ in range(between):
            other.sample(logits(step))
        answer.append(sampler.sample(logits(step, spread=1.0))[0])
    return answer


def test_a_seed_decides_the_draws_whatever_runs_beside() -> None:
    assert draws(7) == draws(7) == draws(7, between=3)
    assert draws(7) != draws(8)
    assert draws(7) != draws(7, sample=1)
    assert draws(7, sample=1) == draws(7, sample=1)
    assert draws(-1) == draws(-1) != draws(1)
    assert draws(None) != draws(None)


def test_log_probabilities_are_of_the_model_itself() -> None:
    scores = logits(3)
    reference = scores.astype(np.float64)
    reference = reference - np.log(np.exp(reference).sum())
    for fields in ({}, {"temperature": 2.0, "top_k": 3, "repetition_penalty": 2.0, "seed": 1}):
        sampler = Sampler(SamplingParams(logprobs=True, **fields), [4], VOCABULARY)  # type: ignore[arg-type]
        for _ in range(5):
            token, value = sampler.sample(scores)
            assert value == pytest.approx(reference[token], abs=1e-6)
    assert Sampler(SamplingParams(), [], VOCABULARY).sample(scores)[1] is None


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-320, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    """The coldest choose the best token, the hottest any of them."""
    scores = logits(2)
    sampler = Sampler(SamplingParams(temperature=temperature, top_p=0.999, seed=3), [], VOCABULARY)
    drawn = {sampler.sample(scores)[0] for _ in range(50)}
    assert drawn == {int(scores.argmax())} if temperature < 1 else len(drawn) > 30


@pytest.mark.parametrize("penalty", [1e-320, 1e-45, 1e-39, 3e38, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_extreme_penalties(penalty: float, temperature: float) -> None:
    """The smallest choose what was there before, the largest what was not."""
    scores = logits(2)
    seen = np.argsort(scores)[-2:].tolist()
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, seed=3)
    drawn = {Sampler(params, seen, VOCABULARY).sample(scores)[0] for _ in range(9)}
    assert drawn <= set(seen) if penalty < 1 else not drawn & set(seen)
    everywhere = Sampler(params, range(VOCABULARY), VOCABULARY)
    assert 0 <= everywhere.sample(scores)[0] < VOCABULARY


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}])
def test_logits_that_are_no_numbers_are_no_answer(value: float, fields: dict[str, Any]) -> None:
    scores = logits(1)
    scores[17] = value
    with pytest.raises(EngineFailed, match=r"^the engine failed: .* no numbers"):
        Sampler(SamplingParams(**fields), [], VOCABULARY).sample(scores)


def test_tokens_that_cannot_be_are_never_drawn() -> None:
    scores = np.full(VOCABULARY, -np.inf, dtype=np.float32)
    scores[[5, 9]] = [1.0, 2.0]
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0, top_p=0.99), [], VOCABULARY)
    assert {sampler.sample(scores)[0] for _ in range(50)} == {5, 9}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "'max_tokens' is 0; it must be at least 1"),
        ({"max_tokens": -5}, "'max_tokens' is -5"),
        ({"max_tokens": True}, "'max_tokens' is True, not an integer"),
        ({"max_tokens": 2.5}, "'max_tokens' is 2.5, not an integer"),
        ({"temperature": math.nan}, "'temperature' is nan; it must be 0"),
        ({"temperature": -0.5}, "'temperature' is -0.5"),
        ({"temperature": math.inf}, "'temperature' is inf"),
        ({"top_k": -1}, r"'top_k' is -1; it must be at least 0 \(0 turns it off\)"),
        ({"top_p": 0.0}, "'top_p' is 0"),
        ({"top_p": 1.01}, "'top_p' is 1.01"),
        ({"top_p": math.nan}, "'top_p' is nan"),
        ({"min_p": -0.1}, "'min_p' is -0.1"),
        ({"min_p": 2.0}, "'min_p' is 2"),
        ({"repetition_penalty": 0.0}, "'repetition_penalty' is 0"),
        ({"seed": 1 << 63}, "'seed' is 9223372036854775808"),
        ({"n": 0}, "'n' is 0"),
        ({"stop": ("",)}, "'stop' is empty"),
        ({"stop": ("x" * 10_000,)}, f"'stop' has 10000 characters; .* at most {MAX_STOP_CHARACTERS}"),
        ({"stop": ("a", "x" * 300)}, "'stop' 1 has 300 characters"),
        ({"stop": ("a",) * (MAX_STOPS + 1)}, f"'stop' has 17 strings; at most {MAX_STOPS}"),
        ({"stop_token_ids": (3, -1)}, "'stop_token_ids' is -1"),
        ({"stop_token_ids": (1,) * (MAX_STOP_IDS + 1)}, "'stop_token_ids' has 65 ids"),
    ],
)
def test_a_bad_parameter_is_named_with_its_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        SamplingParams(**fields).validate()


def test_the_limits_themselves_are_good() -> None:
    SamplingParams(
        max_tokens=1,
        temperature=0.0,
        top_p=1.0,
        min_p=1.0,
        seed=-(1 << 63),
        stop=("x" * MAX_STOP_CHARACTERS,) * MAX_STOPS,
        stop_token_ids=(0,) * MAX_STOP_IDS,
    ).validate()
