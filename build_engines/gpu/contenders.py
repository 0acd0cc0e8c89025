"""The engines' side: opened as they are served, timed with arrays on the host and with all data on the GPU.

Runs in a side process of its own, one for each target.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from build_engines.gpu.bare import Bare
from build_engines.gpu.timing import encoder_arrays, prompts, timed_runs

# In the side process: the engines it has opened, and the size of their vocabularies, by contender.
_loaded: dict[str, Any] = {}
_vocabulary: dict[str, int] = {}
_folders: dict[str, Path] = {}
_bare: dict[str, Bare] = {}


def load_encoder(contender: str, folder: Path, vocabulary: int) -> float:
    """Open the engine; returns the seconds that took."""
    from triton_repo.runtime.engines import open_encoder_engine

    started = time.perf_counter()
    _loaded[contender] = open_encoder_engine(folder)
    _vocabulary[contender], _folders[contender] = vocabulary, folder
    return time.perf_counter() - started


def time_encoder(contender: str, way: str, shape: tuple[int, int], seconds: float) -> list[float]:
    """Seconds of each run at `shape`."""
    engine = _loaded[contender]
    arrays = encoder_arrays(engine.manifest["serving"]["inputs"], *shape, _vocabulary[contender])
    if way == "host":
        return timed_runs(lambda: engine.run(arrays), seconds)
    return timed_runs(_bare_engine(contender).encoder_run(arrays), seconds)


def _bare_engine(contender: str) -> Bare:
    """A second copy of the engine, for runs without copies; loaded when first asked for."""
    if contender not in _bare:
        _bare[contender] = Bare(_folders[contender])
    return _bare[contender]


# --- LLM --------------------------------------------------------------------------------------------------


def load_decoder(contender: str, folder: Path) -> float:
    """Open the engine with its cache; returns the seconds that took."""
    from triton_repo.runtime.engines import open_decoder_engine

    started = time.perf_counter()
    engine = _loaded[contender] = open_decoder_engine(folder)
    _vocabulary[contender], _folders[contender] = engine.vocabulary, folder
    return time.perf_counter() - started


def time_prompt(contender: str, length: int, seconds: float) -> list[float]:
    """Seconds from a prompt on the host to its first token, one sequence, in the engine's own chunks."""
    engine = _loaded[contender]
    prompt = prompts(1, length, _vocabulary[contender])[0].tolist()
    return timed_runs(lambda: _prefilled(engine, 0, prompt), seconds)


def time_decode(contender: str, way: str, batch: int, prompt: int, new: int) -> list[float]:
    """Seconds of each of `new` steps after prompts of one length. "host": greedy, logits reach the host;
    "device": the same step in the middle of them again and again, logits stay on the GPU."""
    if way == "device":
        run = _bare_engine(contender).step_run(batch, prompt + new // 2)
        return timed_runs(run, 0, least=new)
    engine = _loaded[contender]
    rows = prompts(batch, prompt, _vocabulary[contender])
    tokens = [_prefilled(engine, slot, row.tolist()) for slot, row in enumerate(rows)]
    times = []
    for step in range(new):
        started = time.perf_counter()
        logits = engine.decode(range(batch), tokens, [prompt + step] * batch)
        tokens = logits.argmax(axis=1).tolist()
        times.append(time.perf_counter() - started)
    return times


def _prefilled(engine: Any, slot: int, prompt: list[int]) -> int:
    for start in range(0, len(prompt), engine.chunk):
        logits = engine.prefill(slot, prompt[start : start + engine.chunk], start)
    return int(logits.argmax())


def taken(contender: str) -> dict[str, int]:
    """Bytes on the GPU that the engine's own code took, by purpose; empty on the CPU."""
    device = getattr(_loaded[contender], "_device", None)
    return device.taken() if device else {}


def run_largest(contender: str) -> None:
    """An encoder's largest batch at its largest length; an LLM's whole chunk, then a step of all slots."""
    engine = _loaded[contender]
    serving = engine.manifest["serving"]
    if engine.manifest["task"] != "generate":
        shape = (serving["max_batch"], serving["max_length"])
        engine.run(encoder_arrays(serving["inputs"], *shape, serving["pad_id"] + 6))
        return
    for slot in range(engine.slots):
        engine.prefill(slot, [1] * min(engine.chunk, engine.capacity - 1), 0)
    held = min(engine.chunk, engine.capacity - 1)
    engine.decode(range(engine.slots), [1] * engine.slots, [held] * engine.slots)
