"""Real tritonservers for the session: small random encoders of every task; a small LLM beside an encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from small_llm import POSITIONS, Silent, write_llm
from small_models import Served, build_engine, write_checkpoint

from build_engines.errors import ServerError
from build_engines.pipeline import build_stack
from build_engines.stack import load_stack
from triton_repo.installation import find_installation
from triton_repo.server import Server, ServerOptions
from triton_repo.writer import write_repository

STACK = """
name = "small"
card = "rtx-5070-ti"

[models.label]
task = "classify"
source = "./label"
precisions = ["fp32"]
max_length = 64
evaluation = "texts.jsonl"

[models.vector]
task = "embed"
source = "./vector"
precisions = ["fp32"]
max_length = 64
evaluation = "texts.jsonl"

[models.order]
task = "rerank"
source = "./order"
precisions = ["fp32"]
max_length = 64
evaluation = "groups.jsonl"

[models.strict]
task = "embed"
source = "./vector"
precisions = ["fp32"]
max_length = 64
instances = 2
overflow = "refuse"
cache = true

[models.narrow]
task = "embed"
source = "./vector"
precisions = ["fp32"]
max_length = 64
[models.narrow.queue]
max_size = 1
deadline_ms = 2000
priority_levels = 2
default_priority = 2
"""
TEXTS = (
    '{"text": "the noodles were very good", "label": "positive"}\n{"text": "별로예요", "label": "negative"}\n'
)
GROUPS = '{"query": "noodles", "passages": ["the noodles were good", "never again"], "relevance": [1, 0]}\n'

TALK = f"""
name = "talk"
card = "rtx-5070-ti"

[models.talk]
task = "generate"
source = "./llama"
precisions = ["fp32"]
slots = 4
max_length = {POSITIONS}
prefill_chunk = 64
evaluation = "talks.jsonl"
calibration = {{ data = "talks.jsonl" }}

[models.tight]
task = "generate"
source = "./llama"
precisions = ["fp32"]
slots = 1
max_length = {POSITIONS}
prefill_chunk = 64
evaluation = "talks.jsonl"
calibration = {{ data = "talks.jsonl" }}
[models.tight.queue]
max_size = 1
deadline_ms = 300

[models.vector]
task = "embed"
source = "./vector"
precisions = ["fp32"]
max_length = 64
"""
TALKS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"{number} " + "the noodles " * 20}]}) + "\n"
    for number in range(4)
)


@pytest.fixture(scope="session", autouse=True)
def _needs_a_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        find_installation(tmp_path_factory.mktemp("installation"))
    except ServerError as error:
        pytest.skip(f"no tritonserver can run here: {error}")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A folder with the stack file, the checkpoints, the engines and the written repository."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.toml").write_text(STACK)
    (folder / "texts.jsonl").write_text(TEXTS)
    (folder / "groups.jsonl").write_text(GROUPS)
    stack = load_stack(folder / "small.toml", build_dir=folder)
    engines = {}
    for seed, (name, model) in enumerate(stack.models.items()):
        checkpoint = folder / str(model.source)
        if not checkpoint.exists():
            write_checkpoint(checkpoint, model.task, seed=seed)
        out = folder / "engines" / name / "fp32" / "onnxruntime"
        fields: dict[str, Any] = {"model": name, "task": model.task, "overflow": model.overflow}
        engines[name] = build_engine(checkpoint, out, **fields)
    write_repository(stack, folder / "engines", folder / "repository")
    return folder, engines


@pytest.fixture(scope="session")
def servers() -> Iterator[list[Server]]:
    """Those that live as long as the session: stopped at the same time, each takes seconds."""
    started: list[Server] = []
    yield started
    with ThreadPoolExecutor() as threads:
        # Calls that were cancelled in the moment of their last response stay open in Triton 2.51.
        list(threads.map(lambda server: server.stop(within_s=1.0), started))


@pytest.fixture(scope="session")
def served(built: tuple[Path, dict[str, Path]], servers: list[Server]) -> Served:
    folder, engines = built
    servers.append(Server(folder / "repository", ServerOptions(free_ports=True)))
    return Served(servers[-1].start(), folder, engines)


@pytest.fixture(scope="session")
def one_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of one small model, for tests that start and stop servers of their own."""
    folder = tmp_path_factory.mktemp("one")
    model = '[models.vector]\ntask = "embed"\nsource = "./vector"\nprecisions = ["fp32"]\nmax_length = 64\n'
    (folder / "one.toml").write_text(f'name = "one"\ncard = "rtx-5070-ti"\n{model}')
    checkpoint = write_checkpoint(folder / "vector", "embed", seed=1)
    engines = folder / "engines"
    build_engine(checkpoint, engines / "vector" / "fp32" / "onnxruntime", model="vector", task="embed")
    write_repository(load_stack(folder / "one.toml", build_dir=folder), engines, folder / "repository")
    return folder / "repository"


@pytest.fixture(scope="session")
def talk_stack(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Two LLMs (one with a single slot and a short queue) and an encoder, in one repository."""
    folder = tmp_path_factory.mktemp("talk")
    (folder / "talk.toml").write_text(TALK)
    (folder / "talks.jsonl").write_text(TALKS)
    stack = load_stack(folder / "talk.toml", build_dir=folder)
    write_llm(folder / "llama", seed=1)
    write_checkpoint(folder / "vector", "embed", seed=1)
    out = folder / "engines" / "vector" / "fp32" / "onnxruntime"
    engines = {"vector": build_engine(folder / "vector", out, model="vector", task="embed")}
    built = build_stack(stack, Silent(), models=["talk", "tight"], targets=["onnxruntime"])
    engines |= {engine.manifest["model"]: engine.folder for engine in built}
    write_repository(stack, folder / "engines", folder / "repository")
    return folder, engines


@pytest.fixture(scope="session")
def talking(talk_stack: tuple[Path, dict[str, Path]], servers: list[Server]) -> Served:
    folder, engines = talk_stack
    servers.append(Server(folder / "repository", ServerOptions(free_ports=True)))
    return Served(servers[-1].start(), folder, engines)
