"""What the trainings of the demo models share: sums in a fixed order, and folders that say their origin."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "has_bfloat16",
    "is_current",
    "quiet_transformers",
    "reproducible",
    "use_own_core",
    "versions",
    "write_json",
]


def has_bfloat16() -> bool:
    """BF16 halves the training time where the processor multiplies it, and costs time where it does not."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def use_own_core() -> None:
    """Make this thread compute by itself; PyTorch holds the number of threads for each calling thread."""
    import torch

    torch.set_num_threads(1)


@contextmanager
def reproducible(threads: int = 1) -> Iterator[None]:
    """Deterministic algorithms on so many threads, which fixes the order of every floating-point sum."""
    import torch

    before, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(strict)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of its own, and no report that the fresh head was missing in the checkpoint."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def is_current(folder: Path, origin: dict[str, Any]) -> bool:
    """Whether the `metrics.json` in `folder` says that the model was made of the same things."""
    try:
        written = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(written, dict) and written.get("origin") == origin


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
