"""Small encoders on the GPU answer as the same graphs do on the CPU, and give all memory back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from gpu_stack import SIZES

from build_engines.gpu.models import ENCODERS
from triton_repo.runtime.encode import ANSWER_OUTPUT

# Kernels sum in another order, in FP16; INT8 rounds where they differ.
_NEAR = {"fp16": 5e-3, "int8": 5e-2}

every_model = pytest.mark.parametrize("model", ENCODERS)
every_precision = pytest.mark.parametrize("precision", ["fp16", "int8"])


@pytest.fixture
def opened(cuda: Any, stacks: Any, target: str) -> Any:
    """`opened(model, precision)`: the engine on the GPU, and the same on the CPU."""
    from triton_repo.runtime.engines import open_encoder_engine

    closing = []

    def open_both(model: str, precision: str) -> tuple[Any, Any]:
        stack = stacks(target)
        here = open_encoder_engine(stack.folder(model, precision, "onnxruntime"))
        there = open_encoder_engine(stack.folder(model, precision))
        closing.append(there)
        return there, here

    yield open_both
    for engine in closing:
        engine.close()


def arrays(engine: Any, batch: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Rows of different lengths, padded."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, length + 1, batch)
    lengths[0] = length
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    found = {"input_ids": generator.integers(5, 1000, (batch, length)) * mask, "attention_mask": mask}
    if "token_type_ids" in engine.manifest["serving"]["inputs"]:
        found["token_type_ids"] = mask * (np.arange(length) > length // 2)
    return found


def answers(engine: Any, given: dict[str, Any]) -> Any:
    return engine.run(given)[ANSWER_OUTPUT[engine.manifest["task"]]]


@every_model
@every_precision
def test_answers_are_those_of_the_cpu_at_every_shape(opened: Any, model: str, precision: str) -> None:
    there, here = opened(model, precision)
    for batch, length in [(1, 1), (1, 7), (2, 16), (5, 9), (8, 32), (3, 32), (1, 32), (8, 1), (2, 16)]:
        given = arrays(here, batch, length, seed=batch * length)
        found, expected = answers(there, given), answers(here, given)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=_NEAR[precision])


def test_the_same_shape_again_and_again_gives_the_same_answers(opened: Any) -> None:
    """From some run on a CUDA graph answers: new texts must reach it, and its answers must be theirs.

    Two shapes take turns, since a change of shapes must not reach the other's graph.
    """
    there, here = opened("embedder", "fp16")
    for seed in range(24):
        for shape in ((4, 16), (2, 32)):
            given = arrays(here, *shape, seed)
            np.testing.assert_allclose(answers(there, given), answers(here, given), atol=_NEAR["fp16"])


def test_padding_changes_nothing(opened: Any) -> None:
    there, _ = opened("embedder", "fp16")
    row = arrays(there, 1, 9)
    padded = {name: np.pad(array, ((0, 3), (0, 14))) for name, array in row.items()}
    padded["attention_mask"][1:, 0] = 1
    np.testing.assert_allclose(answers(there, padded)[0], answers(there, row)[0], atol=_NEAR["fp16"])


def test_several_threads_get_their_own_answers(opened: Any) -> None:
    there, here = opened("classifier", "fp16")
    given = [arrays(here, 1 + seed % 4, 5 + seed % 20, seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda one: answers(there, one), given))
    for one, answer in zip(given, found, strict=True):
        np.testing.assert_allclose(answer, answers(here, one), atol=_NEAR["fp16"])


def test_more_than_the_largest_shape_is_refused_and_the_engine_goes_on(opened: Any) -> None:
    there, here = opened("classifier", "fp16")
    for batch, length in ((SIZES.max_batch + 1, 8), (1, SIZES.max_length + 1)):
        with pytest.raises(Exception, match=r"\d"):
            there.run(arrays(here, batch, length))
    given = arrays(here, 2, 8)
    np.testing.assert_allclose(answers(there, given), answers(here, given), atol=_NEAR["fp16"])


def test_opening_and_closing_leaves_nothing_on_the_card(
    cuda: Any, device: Any, stacks: Any, target: str
) -> None:
    from triton_repo.runtime.engines import open_encoder_engine

    folder = stacks(target).folder("embedder", "fp16")
    free = []
    for _ in range(6):
        engine = open_encoder_engine(folder)
        engine.run(arrays(engine, 2, 8))
        engine.close()
        free.append(device.memory()[0])
    # The library itself keeps some after its first use.
    assert free[1] - free[-1] < 8 << 20
