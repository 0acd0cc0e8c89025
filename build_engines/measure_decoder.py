"""A causal LM's engines against Transformers on this machine, in process: first token and decoding.

Contenders take turns, as encoders do (build_engines.measure), in a process each. Prompts are random tokens of
one length, decoding is greedy and never stops early, so that every contender computes the same number of
steps. The wall for one sequence is the memory: every weight is read once per token, and the read bandwidth is
measured in the same run.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from build_engines.errors import ArtifactError
from build_engines.graphs import read_structure
from build_engines.measure import new_process
from build_engines.stack import Model, Stack

if TYPE_CHECKING:
    from rich.console import RenderableType

PROMPT, NEW = 128, 48
BATCHES = (1, 4, 8)
_ROUNDS = 3
_SETTLE_SECONDS = 0.3  # until the other process's threads have stopped spinning
_READ_BYTES = 1 << 30

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds to the first token of a prompt (batch 1), and per decode step by batch size."""

    first: float
    step: Mapping[int, float]


def measure_decoder(stack: Stack, model: Model, progress: Progress) -> dict[str, Any]:
    """First-token milliseconds, tokens per second by batch size, and the memory's wall, by contender.

    Raises:
        ArtifactError: an engine is missing or altered.
    """
    with new_process() as pytorch, new_process() as engines:
        sides: list[tuple[ProcessPoolExecutor, list[str]]] = [
            (pytorch, pytorch.submit(_load_pytorch, stack.checkpoint_dir(model), model).result()),
            (engines, engines.submit(_load_engines, stack, model).result()),
        ]
        found: dict[str, list[Timed]] = {name: [] for _, names in sides for name in names}
        total, done = _ROUNDS * len(found), 0
        for _ in range(_ROUNDS):
            for process, names in sides:
                for name in names:
                    progress(f"{model.name} {name}", done, total)
                    time.sleep(_SETTLE_SECONDS)
                    found[name].append(process.submit(_time, name).result())
                    done += 1
        bandwidth = pytorch.submit(_read_bandwidth).result()
        read = engines.submit(_bytes_per_step).result()
    contenders = {name: _summary(timed, read.get(name), bandwidth) for name, timed in found.items()}
    return {
        "task": model.task,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "contenders": contenders,
    }


def _summary(timed: list[Timed], read: int | None, bandwidth: float) -> dict[str, Any]:
    steps = {batch: statistics.median(one.step[batch] for one in timed) for batch in BATCHES}
    summary: dict[str, Any] = {
        "first_token_ms": round(1000 * statistics.median(one.first for one in timed), 2),
        "tokens_per_s": {str(batch): round(batch / seconds, 1) for batch, seconds in steps.items()},
    }
    if read is not None:
        summary["bytes_per_step"] = read
        summary["roofline_tokens_per_s"] = round(bandwidth / read, 1)
        summary["share_of_roofline"] = round(read / steps[1] / bandwidth, 3)
    return summary


# --- in the processes: what they have loaded, by name -----------------------------------------------------

_loaded: dict[str, Callable[[], Timed]] = {}
_read: dict[str, int] = {}


def _time(name: str) -> Timed:
    return _loaded[name]()


def _bytes_per_step() -> dict[str, int]:
    return dict(_read)


def _prompts(batch: int, vocabulary: int) -> Any:
    return np.random.default_rng(batch).integers(0, vocabulary, (batch, PROMPT))


def _load_engines(stack: Stack, model: Model) -> list[str]:
    from triton_repo.runtime.decoder import DecoderEngine
    from triton_repo.runtime.session import EngineRefused

    for precision in model.precisions:
        folder = stack.build_dir / "engines" / model.name / precision / "onnxruntime"
        try:
            engine = DecoderEngine.open(folder)
        except EngineRefused as error:
            raise ArtifactError(str(error), next_step=f"build-engines build {stack.path}") from None
        _loaded[precision] = lambda engine=engine: _time_engine(engine)  # type: ignore[misc]
        _read[precision] = weights_read(folder / engine.manifest["engine"]["file"]) + _cache_read(engine)
    return list(_loaded)


def _time_engine(engine: Any) -> Timed:
    first, steps = 0.0, {}
    for batch in BATCHES:
        if batch > engine.slots:
            raise ArtifactError(
                f"the engine has {engine.slots} slots; {batch} sequences at once are measured",
                next_step=f"set slots = {batch} or more in the stack file and build again",
            )
        prompts = _prompts(batch, engine.vocabulary)
        started = time.perf_counter()
        tokens = [_prefilled(engine, slot, prompt.tolist()) for slot, prompt in enumerate(prompts)]
        if batch == 1:
            first = time.perf_counter() - started
        started = time.perf_counter()
        for step in range(NEW):
            logits = engine.decode(range(batch), tokens, [PROMPT + step] * batch)
            tokens = logits.argmax(axis=1).tolist()
        steps[batch] = (time.perf_counter() - started) / NEW
    return Timed(first, steps)


def _prefilled(engine: Any, slot: int, prompt: list[int]) -> int:
    for start in range(0, PROMPT, engine.chunk):
        logits = engine.prefill(slot, prompt[start : start + engine.chunk], start)
    return int(logits.argmax())


def _cache_read(engine: Any) -> int:
    """Keys and values that a decode step of one sequence reads, in the middle of the run; float32."""
    serving = engine.manifest["serving"]
    per_token = 2 * serving["layers"] * serving["kv_heads"] * serving["head_dim"] * 4
    return int(per_token * (PROMPT + NEW // 2))


def weights_read(graph: Path) -> int:
    """Bytes of weights that one decode step reads: all but the embedding table, FP16 matrices widened."""
    import onnx

    model = read_structure(graph)
    gathered = {name for node in model.graph.node if node.op_type == "Gather" for name in node.input}
    sizes = {onnx.TensorProto.INT8: 1, onnx.TensorProto.FLOAT16: 4, onnx.TensorProto.FLOAT: 4}
    return sum(
        sizes.get(tensor.data_type, 0) * int(np.prod(tensor.dims, dtype=np.int64))
        for tensor in model.graph.initializer
        if tensor.name not in gathered and not tensor.name.startswith("rotary.")
    )


def _load_pytorch(folder: Path, model: Model) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for name, dtype in (("transformers-fp32", torch.float32), ("transformers-bf16", torch.bfloat16)):
        lm = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=model.allow_remote_code
        ).eval()
        _loaded[name] = lambda lm=lm: _time_pytorch(lm)  # type: ignore[misc]
    return list(_loaded)


def _time_pytorch(lm: Any) -> Timed:
    import torch

    def seconds(ids: Any, new: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            lm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        return time.perf_counter() - started

    first, steps = 0.0, {}
    for batch in BATCHES:
        ids = torch.from_numpy(_prompts(batch, lm.config.vocab_size))
        one = seconds(ids, 1)
        first = first or one
        steps[batch] = (seconds(ids, NEW + 1) - one) / NEW
    return Timed(first, steps)


def _read_bandwidth() -> float:
    """Bytes per second that all cores together read from a buffer far beyond the caches; the best of five."""
    import torch

    buffer = torch.ones(_READ_BYTES // 4)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return _READ_BYTES / min(seconds[1:])


def render_decoder(name: str, measured: dict[str, Any]) -> RenderableType:
    """First token and decoding by contender, each engine's as multiples of both forms of Transformers."""
    from rich.table import Table

    wall = measured["read_bandwidth_gb_s"]
    table = Table(
        title=f"{name}: {measured['prompt_tokens']}-token prompts, {measured['new_tokens']} new tokens; "
        f"memory reads {wall} GB/s",
        title_justify="left",
    )
    for column in ("contender", "what", "value", "x FP32", "x BF16", "of the memory's wall"):
        table.add_column(column, justify="left" if column in {"contender", "what"} else "right")
    contenders = measured["contenders"]
    bases = [contenders["transformers-fp32"], contenders["transformers-bf16"]]
    for contender, found in contenders.items():
        ratios = [f"{found['first_token_ms'] / base['first_token_ms']:.2f}" for base in bases]
        table.add_row(contender, "first token, ms", f"{found['first_token_ms']:.1f}", *ratios, "")
        for batch, rate in found["tokens_per_s"].items():
            ratios = [f"{rate / base['tokens_per_s'][batch]:.2f}" for base in bases]
            share = found.get("share_of_roofline") if batch == "1" else None
            table.add_row(
                "", f"tokens/s, {batch} at once", f"{rate:.0f}", *ratios, f"{share:.0%}" if share else ""
            )
        table.add_section()
    return table
