"""The way from a stack file to answers on a GPU machine: judged engines, promised memory, Triton."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_stack import SIZES, SmallStack

from build_engines.gpu.models import ENCODERS, LLM, EncoderSize
from build_engines.gpu.served import cannot_serve
from build_engines.random_model import RandomLlama

MIB = 1 << 20
# What a library keeps for itself on its first use in a process, beside what an engine is promised.
_LIBRARY = 96 * MIB

stood_in = os.environ.get("ONECARD_STAND_IN") == "1"


@pytest.mark.parametrize("model", [*ENCODERS, LLM])
def test_an_engine_is_judged_on_the_gpu_before_it_is_published(stacks: Any, target: str, model: str) -> None:
    folder = stacks(target).folder(model, "fp16")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["gates"]["engine"]["passed"] is True
    assert stood_in or manifest["memory"]["weights"] > 0


@pytest.mark.skipif(stood_in, reason="the stand-in compiles nothing")
@pytest.mark.parametrize("model", ["embedder", LLM])
def test_memory_is_no_more_than_the_plan_promised(
    cuda: Any, device: Any, card: Any, tmp_path: Path, target: str, model: str
) -> None:
    """Wide enough that weights, activations and caches are more than what the library takes for itself."""
    from triton_repo.runtime.engines import open_decoder_engine, open_encoder_engine

    sizes = replace(
        SIZES,
        encoder=EncoderSize(layers=4, hidden=768, heads=12, ffn=3072, vocabulary=8000),
        llm=RandomLlama(layers=4, hidden=1024, ffn=2816, heads=16, kv_heads=4, vocabulary=8192),
        shapes=((32, 256),),
        slots=8,
        capacity=2048,
        chunk=128,
    )
    folder = SmallStack(tmp_path, target, card, stand_in=False, sizes=sizes).folder(model, "fp16")
    promised = json.loads((folder / "manifest.json").read_text("utf-8"))["memory"]
    open_engine = open_decoder_engine if model == LLM else open_encoder_engine
    open_engine(folder).close()  # what a library loads once is no part of the engine
    before = device.memory()[0]
    engine = open_engine(folder)
    taken = before - device.memory()[0]
    engine.close()
    plan = sum(promised[part] for part in ("weights", "activations", "buffers", "cache"))
    assert taken <= plan + _LIBRARY, f"{taken / MIB:.0f} MiB taken, {plan / MIB:.0f} MiB promised"


@pytest.fixture
def served(stacks: Any, target: str, tmp_path: Path) -> Any:
    """A running Triton with the small stack's FP16 engines."""
    from triton_repo.server import Server, ServerOptions
    from triton_repo.writer import write_repository

    if reason := cannot_serve():
        pytest.skip(reason)
    small = stacks(target)
    for model in (*ENCODERS, LLM):
        small.folder(model, "fp16")
    models = {name: replace(model, precisions=("fp16",)) for name, model in small.stack.models.items()}
    stack = replace(small.stack, models=models)
    engines = stack.build_dir / "engines"
    repository = write_repository(stack, engines, tmp_path / "repository", target=target)
    with Server(repository, ServerOptions(free_ports=True, ready_timeout_s=180)) as server:
        yield server, small


def test_triton_answers_as_the_engine_does_in_process(served: Any) -> None:
    from client import Client
    from triton_repo.runtime.encode import Encoder

    server, small = served
    texts = [
        "The soup was cold.",
        "배송이 빨랐어요.",
        "We will not be back, the meal was the worst of our trip.",
    ]
    encoder = Encoder.open(small.folder("embedder", "fp16"))
    expected = encoder.encode(encoder.tokenizer.singles(texts))
    with Client(server.urls["grpc"]) as client:
        found = client.embed(texts, model="embedder")
        np.testing.assert_allclose(np.stack([one.vector for one in found]), np.stack(expected), atol=1e-2)
        assert {answer.label for answer in client.classify(texts, model="classifier")} <= {
            "negative",
            "positive",
        }
        ranked = client.rerank("soup", texts, model="reranker")
        assert sorted(answer.index for answer in ranked) == [0, 1, 2]
        answers = {
            "".join(piece.text for piece in client.chat_stream("The soup was", model=LLM, max_tokens=8))
            for _ in range(3)
        }
        assert len(answers) == 1  # greedy: the same each time
