"""What of bench-gpu talks to a GPU by itself: runs without copies, the ballast, one small run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from gpu_stack import SIZES

from build_engines.gpu import contenders, memory
from build_engines.gpu.bare import Bare
from build_engines.gpu.ceilings import Sizes
from build_engines.gpu.command import run_bench
from build_engines.gpu.models import LLM
from build_engines.gpu.settings import Settings
from build_engines.gpu.timing import encoder_arrays, timed_runs

stood_in = os.environ.get("ONECARD_STAND_IN") == "1"


def test_the_network_alone_runs_at_several_shapes(cuda: Any, stacks: Any, target: str) -> None:
    stack = stacks(target)
    encoder = Bare(stack.folder("reranker", "fp16"))
    for shape in SIZES.shapes:
        run = encoder.encoder_run(
            encoder_arrays(["input_ids", "attention_mask", "token_type_ids"], *shape, 100)
        )
        assert min(timed_runs(run, 0.01)) > 0
    encoder.close()
    llm = Bare(stack.folder(LLM, "fp16"))
    for batch in (1, SIZES.slots):
        assert len(timed_runs(llm.step_run(batch, 20), 0, least=5)) == 5
    llm.close()


def test_contenders_are_timed_both_ways(cuda: Any, stacks: Any, target: str) -> None:
    stack = stacks(target)
    contenders.load_encoder("encoder", stack.folder("reranker", "fp16"), 1000)
    contenders.load_decoder("llm", stack.folder(LLM, "fp16"))
    try:
        for way in ("host", "device"):
            assert min(contenders.time_encoder("encoder", way, (3, 16), 0.01)) > 0
            assert len(contenders.time_decode("llm", way, 2, SIZES.prompt, SIZES.new)) == SIZES.new
        assert min(contenders.time_prompt("llm", SIZES.prompt, 0.01)) > 0
        for name in ("encoder", "llm"):
            contenders.run_largest(name)
    finally:
        for engine in (*contenders._bare.values(), *contenders._loaded.values()):
            engine.close()
        contenders._bare.clear()
        contenders._loaded.clear()


def test_the_ballast_leaves_what_it_is_told(cuda: Any) -> None:
    from triton_repo.runtime.gpu.cuda import Device

    with Device() as watching:
        leave = watching.memory()[0] // 2
        held, left = memory.hold(leave)
        try:
            assert held > 0
            assert left <= leave
            assert abs(watching.memory()[0] - leave) < 64 << 20
        finally:
            memory._kept.pop("device").close()
            memory._kept.clear()


@pytest.mark.skipif(stood_in, reason="side processes have no stand-in")
def test_a_small_run_measures_every_part_that_is_installed(card: Any, tmp_path: Path) -> None:
    """Nothing may fail; what is not installed is skipped by name."""
    settings = Settings(
        folder=tmp_path,
        minutes=3,
        sizes=SIZES,
        ceilings=Sizes(buffer=1 << 20, edge=64, transfer=1 << 18),
        block=0.02,
        rounds=1,
        compiled=False,
        served_seconds=0.5,
    )
    found = run_bench(settings, lambda text: None)
    failed = [
        f"{row.part} {row.model} {row.contender} {row.case}: {row.reason}"
        for row in found.rows
        if row.status == "failed"
    ]
    assert not failed, "\n".join(failed)
    assert {row.part for row in found.measured()} >= {"ceilings"}
