"""The same engines behind Triton: single requests over gRPC, beside what the bare engine answers in process.

Needs tritonserver and tritonclient, and says which is missing. Runs in a side process: it starts the server,
loads it and stops it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from build_engines.gpu.models import ENCODERS, LLM
from build_engines.gpu.results import Clock, Failed, Row, Skipped, said
from build_engines.gpu.settings import Run
from build_engines.stack import Stack, load_stack

_SIDE: Final = "served"
_NEEDS: Final = ("tritonclient", "grpc", "google.protobuf")
_STREAMS: Final = (1, 4, 8, 16)
_PROMPT_CHARACTERS: Final = 400


def measure_served(run: Run, targets: Sequence[str], clock: Clock) -> None:
    """Rows for every model of the first target with engines: 1 to 64 requests at once, 1 to 16 streams."""
    assert run.stack is not None
    for target in targets:
        if built := _built(run, target):
            break
    else:
        with run.results.case("served", "server"):
            raise Skipped("no engine was built")
        return
    settings, stack = run.settings, run.stack
    run.drop_all()
    with run.results.case("served", "server", contender=target):
        given = (stack.path, stack.build_dir, target, built)
        left = clock.need(30)
        limits = (settings.served_seconds, left - 20)
        found = run.side(_SIDE).call(serve, *given, *limits, seconds=left + 15)
        for row in found:
            limit = _bare_decoding(run, row) if row.model == LLM else row.limit
            run.results.add(replace(row, limit=limit))
    run.drop(_SIDE)


def _built(run: Run, target: str) -> dict[str, tuple[str, ...]]:
    """Model -> precisions that have an engine, in the stack's order."""
    assert run.stack is not None
    found = {
        name: tuple(
            precision
            for precision in model.precisions
            if (run.engines_folder / name / precision / target / "manifest.json").is_file()
        )
        for name, model in run.stack.models.items()
    }
    return {name: precisions for name, precisions in found.items() if precisions}


def _bare_decoding(run: Run, row: Row) -> float | None:
    """What the bare engine decoded with as many sequences as there were streams."""
    streams = row.case.split()[0]
    return next(
        (
            bare.value
            for bare in run.results.measured("decoders")
            if bare.contender == row.contender
            and bare.case == f"decode, {streams} at once"
            and bare.way == "host"
        ),
        None,
    )


# --- in the side process ----------------------------------------------------------------------------------


def serve(
    path: Path,
    build_dir: Path,
    target: str,
    built: dict[str, tuple[str, ...]],
    seconds: float,
    limit: float,
) -> list[Row]:
    """Write the repository of what was built, serve it, load each model; rows in order.

    Each point of load takes `seconds`; models that `limit` seconds leave no time for are skipped rows.
    """
    clock = Clock(limit)
    from triton_repo.server import Server, ServerOptions
    from triton_repo.writer import write_repository

    if reason := cannot_serve():
        raise Skipped(reason)
    stack = load_stack(path, build_dir=build_dir)
    models = {
        name: replace(stack.models[name], precisions=chosen)  # type: ignore[arg-type]
        for name, chosen in built.items()
    }
    stack = replace(stack, models=models)
    bare = {name: _bare(stack, name, target) for name in models if name in ENCODERS}
    repository = write_repository(
        stack, build_dir / "engines", build_dir / "served" / "repository", target=target
    )
    rows: list[Row] = []
    options = ServerOptions(
        free_ports=True, ready_timeout_s=180, log=build_dir / "served" / "tritonserver.log"
    )
    with Server(repository, options) as server:
        for name in sorted(models, key=lambda name: name != LLM):
            if not clock.left:
                over = Row(part="served", case="load", model=name, contender=target, status="skipped")
                rows.append(replace(over, reason="the time for this part is over; --minutes gives more"))
                continue
            served = (server.urls["grpc"], repository.parent / "stack.json", name, target, seconds)
            rows += _stream(*served) if name == LLM else _load(*served, bare[name])
    return rows


def cannot_serve() -> str:
    """Why no server can be started and asked here, or nothing."""
    from build_engines.errors import ServerError
    from triton_repo.installation import find_installation

    if missing := [name for name in _NEEDS if not _installed(name)]:
        return f"{', '.join(missing)} is not installed (pip install 'tritonclient[grpc]')"
    with tempfile.TemporaryDirectory(prefix="onecard-") as work:
        try:
            find_installation(Path(work))
        except ServerError as error:
            return said(error)
    return ""


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _bare(stack: Stack, name: str, target: str) -> dict[str, float]:
    """Precision -> texts (or pairs) per second of the engine in this process, on the texts of the load."""
    from build_engines.verify import load_evaluation
    from triton_repo.runtime.encode import Encoder

    found: dict[str, float] = {}
    model = stack.models[name]
    for precision in model.precisions:
        encoder = Encoder.open(stack.build_dir / "engines" / name / precision / target)
        labels = encoder.engine.manifest["serving"].get("labels")
        texts = load_evaluation(model, labels)
        rows = texts.rows(encoder.tokenizer)
        encoder.encode(rows)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            texts.rows(encoder.tokenizer)  # the server tokenizes too
            encoder.encode(rows)
            times.append(time.perf_counter() - started)
        found[precision] = len(rows) / sorted(times)[2]
        encoder.close()
    return found


def _load(
    address: str,
    summary: Path,
    name: str,
    target: str,
    seconds: float,
    bare: dict[str, float],
) -> list[Row]:
    from client.bench.served import Plan, Variant
    from client.bench.summary import read_summary
    from client.bench.workload import choose_pool, unit_name, units
    from client.client import Client

    plan = Plan(seconds=seconds, warm_up=min(0.5, seconds / 4), minimum=20, pool=256, evaluated=0, rates=())
    rows = []
    (model,) = read_summary(summary, (name,))
    pool = choose_pool(model.items, plan.pool)
    with Client(address, timeout=60) as client:
        for precision, triton_name in model.variants.items():
            load = Variant(client, address, model, triton_name).load(pool, plan)
            for callers, served in load.closed.items():
                point = served.point
                batch = f", batches of {served.mean_batch:.1f}" if served.mean_batch else ""
                rows.append(
                    Row(
                        part="served",
                        case=f"{callers} at once",
                        model=name,
                        contender=f"{target} {precision}",
                        value=point.per_s * units(model, pool),
                        unit=f"{unit_name(model)}/s",
                        limit=bare.get(precision),
                        runs=point.requests,
                        note=f"p50 {point.p50_ms:.1f} ms, p99 {point.p99_ms:.1f} ms{batch}",
                    )
                )
    return rows


def _stream(address: str, summary: Path, name: str, target: str, seconds: float) -> list[Row]:
    from client.bench.generate_data import Prompt, read_generators
    from client.bench.generate_load import Streamer, serialize

    (model,) = read_generators(summary, (name,))
    new = min(48, model.capacity // 4)
    texts = [prompt.text or str(prompt.messages[-1]["content"]) for prompt in model.prompts]
    if not texts:
        raise Failed("the stack names no evaluation texts to make prompts of")
    room = min(_PROMPT_CHARACTERS, (model.capacity - new) // 3)
    prompts = [Prompt(text=(text * 20)[:room]) for text in texts]
    rows = []
    for precision, triton_name in model.variants.items():
        numbers = itertools.count(10_000_000)
        payloads = (
            serialize(triton_name, prompts[number % len(prompts)].distinct(number), new) for number in numbers
        )

        async def load(streams: int, payloads: Any = payloads) -> Any:
            async with Streamer(address) as streamer:
                return await streamer.closed_loop(
                    payloads, concurrency=streams, warm_up=seconds / 4, seconds=seconds
                )

        for streams in [count for count in _STREAMS if count <= model.slots]:
            point = asyncio.run(load(streams))
            rows.append(
                Row(
                    part="served",
                    case=f"{streams} streams",
                    model=name,
                    contender=f"{target} {precision}",
                    value=point.tokens_per_s,
                    unit="tokens/s",
                    runs=point.requests,
                    note=f"first token p50 {point.first_p50_ms:.0f} ms, p99 {point.first_p99_ms:.0f} ms",
                )
            )
    return rows
