"""Tiny checkpoints and their graphs, made once per test session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_stack import write_texts, write_tokenizer
from tiny_models import save_tiny

from build_engines.export import ExportedGraph

Checkpoint = Callable[..., Path]
Export = Callable[..., ExportedGraph]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """`checkpoint(task, family="bert", **config)`: a Hugging Face folder; do not write to it."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(task: str, family: str = "bert", **config: Any) -> Path:
        key = (task, family, repr(sorted(config.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{task}")
            save_tiny(folder, family, task, **({"num_hidden_layers": 2} if family == "bert" else {}) | config)
            write_tokenizer(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def export(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`export(task, family="bert")`: the FP32 graph of that checkpoint; do not write to it."""
    made: dict[tuple[str, str], ExportedGraph] = {}

    def make(task: str, family: str = "bert") -> ExportedGraph:
        from build_engines.export import export_encoder

        if (task, family) not in made:
            out = tmp_path_factory.mktemp(f"{family}-{task}-graph")
            made[task, family] = export_encoder(checkpoint(task, family), task, out)
        return made[task, family]

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with calibration and evaluation data for every task."""
    folder = tmp_path_factory.mktemp("data")
    write_texts(folder)
    return folder
