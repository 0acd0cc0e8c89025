"""The stack that the load is put on: three encoders of MiniLM's size and a random Llama."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from build_engines.atomic import write_text
from build_engines.console import StageLines
from build_engines.demo import write_demo_models
from build_engines.pipeline import build_stack
from build_engines.random_model import RandomLlama, write_random_llm
from build_engines.stack import Stack, load_stack
from calibration.samples import data_file
from triton_repo.server import Server, ServerOptions
from triton_repo.writer import write_repository

FOLDER = Path("build/reliability/load")
ENCODERS = ("vector", "label", "order")
LLM = "talk"
MODELS = (*ENCODERS, LLM)

# Deadlines are from a request's arrival to its answer, of the LLM to its first token.
DEADLINE_MS = dict.fromkeys(ENCODERS, 2000) | {LLM: 3000}
MAX_SIZE = dict.fromkeys(ENCODERS, 64) | {LLM: 32}
SLOTS = 8
CAPACITY = 256
# So many lines of the bundled data judge an engine here; what the gates measure is not this test's business.
_EVALUATED = 24
# Large enough that its engine, not Python, is what a token costs.
_LLAMA = RandomLlama(layers=6, hidden=512, ffn=1408, heads=8, kv_heads=2, vocabulary=4096, positions=1024)
_ENCODER = """
[models.{name}]
task = "{task}"
source = "./models/{source}"
precisions = ["fp32"]
max_length = 256
evaluation = "{data}.jsonl"
"""
_LLM = """
[models.{name}]
task = "generate"
source = "./models/llama"
precisions = ["fp32"]
slots = {slots}
max_length = {capacity}
evaluation = "conversations.jsonl"
calibration = {{ data = "conversations.jsonl", samples = 8 }}
"""
_QUEUE = """[models.{name}.queue]
max_size = {size}
deadline_ms = {deadline}
priority_levels = 2
default_priority = 2
"""
_KINDS = {
    "vector": ("embed", "embedder", "reviews"),
    "label": ("classify", "classifier", "reviews"),
    "order": ("rerank", "reranker", "ranking"),
}


def stack_text() -> str:
    """FP32 throughout: an answer then depends on its batch by rounding alone, and tokens do not at all."""
    parts = ['name = "load"\ncard = "rtx-5070-ti"\ntargets = ["onnxruntime"]\n']
    for name in MODELS:
        if name == LLM:
            parts.append(_LLM.format(name=name, slots=SLOTS, capacity=CAPACITY))
        else:
            task, source, data = _KINDS[name]
            parts.append(_ENCODER.format(name=name, task=task, source=source, data=data))
        parts.append(_QUEUE.format(name=name, size=MAX_SIZE[name], deadline=DEADLINE_MS[name]))
    return "".join(parts)


def build(folder: Path = FOLDER) -> Stack:
    """The stack, its engines and its repository in `folder`; what is there and current is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("reviews", "ranking", "conversations"):
        lines = data_file(f"bundled:{name}:evaluation").read_text("utf-8").splitlines()
        write_text(folder / f"{name}.jsonl", "\n".join(lines[:_EVALUATED]) + "\n")
    # One step of training: these answers need not be good, only always the same.
    write_demo_models(folder / "models", max_steps=1)
    write_random_llm(folder / "models" / "llama", _LLAMA)
    write_text(folder / "load.toml", stack_text())
    stack = load_stack(folder / "load.toml", build_dir=folder)
    with StageLines() as lines_of_stages:
        build_stack(stack, lines_of_stages, targets=["onnxruntime"])
    write_repository(stack, folder / "engines", folder / "repository")
    return stack


def engine_folder(model: str, folder: Path = FOLDER) -> Path:
    return folder / "engines" / model / "fp32" / "onnxruntime"


@contextmanager
def serving(folder: Path = FOLDER) -> Iterator[Server]:
    """The real server on free ports of loopback; its log is `folder`/tritonserver.log."""
    with Server(folder / "repository", ServerOptions(free_ports=True)) as server:
        yield server
