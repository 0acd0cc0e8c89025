"""Engines against PyTorch on this machine, at fixed shapes, in one run.

Timings on shared machines drift, so only ratios within one run count: every contender runs in blocks, those
in turn, several rounds, and the figure is the median. PyTorch and the engines live in a process each: once
PyTorch has run, ONNX Runtime in the same process is half as slow again for good.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from build_engines import host
from build_engines.errors import ArtifactError, StackError
from build_engines.stack import Model, Stack

if TYPE_CHECKING:
    from rich.console import RenderableType

SHAPES = ((1, 32), (8, 64), (32, 128))
_ROUNDS = 3
_BLOCK_SECONDS = 0.6
_SETTLE_SECONDS = 0.3  # until the other process's threads have stopped spinning

Arrays = Mapping[str, "np.typing.NDArray[Any]"]
Contender = Callable[[Arrays], object]
Progress = Callable[[str, int, int], None]


def measure_stack(stack: Stack, progress: Progress) -> dict[str, Any]:
    """Milliseconds per batch for each encoder's ONNX Runtime engines and for PyTorch FP32 and BF16, by shape.

    Raises:
        ArtifactError: an engine is missing or altered.
        StackError: no model has such engines.
    """
    encoders = {name: model for name, model in measured_models(stack).items() if model.task != "generate"}
    total = len(encoders) * len(SHAPES)
    measured: dict[str, Any] = {}
    for name, model in encoders.items():
        with new_process() as pytorch, new_process() as engines:
            sides = [
                (pytorch, pytorch.submit(_load_pytorch, stack.checkpoint_dir(model), model).result()),
                (engines, engines.submit(_load_engines, stack, model).result()),
            ]
            shapes: dict[str, dict[str, float]] = {}
            for shape in SHAPES:
                done = len(measured) * len(SHAPES) + len(shapes)
                progress(f"{name} {shape[0]}x{shape[1]}", done, total)
                shapes[f"{shape[0]}x{shape[1]}"] = _race(sides, shape)
        measured[name] = {"task": model.task, "milliseconds": shapes}
    return {"machine": machine(), "models": measured}


def measured_models(stack: Stack) -> dict[str, Model]:
    """Those with engines of the target onnxruntime, which alone run without a card. StackError: none has."""
    models = {name: model for name, model in stack.models.items() if model.target is None}
    if "onnxruntime" not in stack.targets or not models:
        raise StackError(
            f"{stack.path}: no model has an engine of the target onnxruntime, which is what is measured",
            next_step="measure what is served: triton-repo serve STACK -- client bench; or add "
            '"onnxruntime" to targets',
        )
    return models


def new_process() -> ProcessPoolExecutor:
    """A process of its own for one kind of contender; spawned, so that it inherits no threads."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _race(sides: Sequence[tuple[ProcessPoolExecutor, list[str]]], shape: tuple[int, int]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for _, names in sides for name in names}
    for _ in range(_ROUNDS):
        for process, names in sides:
            for name in names:
                time.sleep(_SETTLE_SECONDS)
                times[name] += process.submit(_time_block, name, *shape).result()
    return {name: round(1000 * statistics.median(found), 3) for name, found in times.items()}


# --- in the processes: what they have loaded, by name -----------------------------------------------------

_loaded: dict[str, Contender] = {}
_inputs: list[str] = ["input_ids", "attention_mask"]


def _load_pytorch(folder: Path, model: Model) -> list[str]:
    _loaded.update(_pytorch(folder, model))
    return list(_loaded)


def _load_engines(stack: Stack, model: Model) -> list[str]:
    engines, _inputs[:] = _engines(stack, model)
    _loaded.update(engines)
    return list(_loaded)


def _time_block(name: str, batch: int, length: int) -> list[float]:
    """Seconds of each run for a while, after one that does not count."""
    run, arrays = _loaded[name], _random_batch(_inputs, batch, length)
    run(arrays)
    times = []
    end = time.perf_counter() + _BLOCK_SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        run(arrays)
        times.append(time.perf_counter() - started)
    return times


def _engines(stack: Stack, model: Model) -> tuple[dict[str, Contender], list[str]]:
    from triton_repo.runtime.session import EngineRefused, open_engine

    found: dict[str, Contender] = {}
    inputs: list[str] = []
    for precision in model.precisions:
        folder = stack.build_dir / "engines" / model.name / precision / "onnxruntime"
        try:
            engine = open_engine(folder)
        except EngineRefused as error:
            raise ArtifactError(str(error), next_step=f"build-engines build {stack.path}") from None
        found[precision] = engine.run
        inputs = engine.manifest["serving"]["inputs"]
    return found, inputs


def _pytorch(folder: Path, model: Model) -> dict[str, Contender]:
    """The bare encoder without its head, which favours PyTorch a little, in FP32 and BF16."""
    import torch
    from transformers import AutoModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(host.cores())

    def contender(dtype: torch.dtype) -> Contender:
        encoder = AutoModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=model.allow_remote_code
        ).eval()

        def run(arrays: Arrays) -> object:
            with torch.inference_mode():
                return encoder(**{name: torch.from_numpy(value) for name, value in arrays.items()})

        return run

    return {"pytorch-fp32": contender(torch.float32), "pytorch-bf16": contender(torch.bfloat16)}


def _random_batch(inputs: list[str], batch: int, length: int) -> dict[str, Any]:
    """Full rows: what is timed is arithmetic, and padding would only flatter whoever skips it."""
    ids = np.random.default_rng(0).integers(1000, 20000, (batch, length))
    arrays = {name: np.zeros((batch, length), dtype=np.int64) for name in inputs}
    return {**arrays, "input_ids": ids, "attention_mask": np.ones((batch, length), dtype=np.int64)}


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxruntime")}
    return {"cpu": host.cpu_name(), "cores": host.cores(), "python": platform.python_version(), **versions}


def render_measurements(measured: dict[str, Any]) -> RenderableType:
    """Milliseconds per batch, and each engine's speed against both forms of PyTorch."""
    from rich.table import Table

    table = Table(title="Engines against PyTorch, one run", title_justify="left")
    for column in ("model", "batch x tokens", "contender", "ms", "x FP32", "x BF16"):
        table.add_column(column, justify="left" if column in {"model", "contender"} else "right")
    for name, model in measured["models"].items():
        for shape, times in model["milliseconds"].items():
            for contender, milliseconds in times.items():
                ratios = (times[base] / milliseconds for base in ("pytorch-fp32", "pytorch-bf16"))
                table.add_row(
                    name, shape, contender, f"{milliseconds:.2f}", *(f"{ratio:.2f}" for ratio in ratios)
                )
            table.add_section()
    return table
