"""`build-engines`: the commands, composed from the stages; no logic of its own."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from build_engines import __version__
from build_engines.cli_checks import doctor, inspect, verify_digests
from build_engines.console import CleanErrors, StageLines, console, print_json, wide_console
from build_engines.options import build_dir_option, json_option, load, offline_option, stack_argument

if TYPE_CHECKING:
    from build_engines.stack import Stack


@click.group(cls=CleanErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Compile a language stack for one card: plan, fetch, build, inspect.

    \b
    Example:
      build-engines plan stacks/demo.toml
      build-engines build stacks/demo.toml
    """


for _command in (inspect, doctor, verify_digests):
    main.add_command(_command)


@main.command()
@stack_argument
@build_dir_option
@json_option
def plan(stack: Path, build_dir: Path | None, as_json: bool) -> None:
    """Does the stack fit the card? Needs no model library and no GPU; one that is here is shown beside it.

    \b
    Example:
      build-engines plan stacks/korean-reviews.toml --json
    """
    from build_engines.gpu_here import find_gpu
    from build_engines.plan import plan_stack, render_plan, require_fit

    found, gpu = plan_stack(load(stack, build_dir)), find_gpu()
    if as_json:
        print_json({**found.as_dict(), "gpu": gpu.as_dict() if gpu else None})
    else:
        wide_console().print(render_plan(found))
        for line in gpu.compared(found) if gpu else ():
            wide_console().print(line, markup=False, highlight=False)
    require_fit(found)


@main.command()
@stack_argument
@build_dir_option
@offline_option
def fetch(stack: Path, build_dir: Path | None, offline: bool) -> None:
    """Download the checkpoints that the stack names by hub id; resumes, safetensors only.

    A private model needs its token in the environment variable HF_TOKEN.

    \b
    Example:
      HF_TOKEN=... build-engines fetch stacks/korean-reviews.toml
    """
    _fetch(load(stack, build_dir), offline=offline)


@main.command()
@stack_argument
@build_dir_option
@offline_option
@click.option("--model", "models", multiple=True, help="Only this model (may be given several times).")
@click.option("--target", "targets", multiple=True, help="Only this target (may be given several times).")
@json_option
def build(
    stack: Path,
    build_dir: Path | None,
    offline: bool,
    models: tuple[str, ...],
    targets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Plan, fetch, export, calibrate, quantize, verify and compile every engine of the stack.

    What did not change since the last run is skipped; an interrupted run goes on where it stopped.

    \b
    Example:
      build-engines build stacks/demo.toml --model sentiment --target onnxruntime
    """
    from build_engines.pipeline import build_stack
    from build_engines.plan import plan_stack, require_fit, resolve_open

    whole = load(stack, build_dir)
    _check_names("model", models, list(whole.models))
    _check_names("target", targets, list(whole.targets))
    names = models or tuple(whole.models)
    loaded = _only(whole, names)  # the others need not be fetched, not even to plan
    _fetch(loaded, offline=offline)
    if any(model.is_open for model in loaded.models.values()):
        # How many slots there are depends on what else is on the card.
        loaded = _only(resolve_open(whole), names)
    require_fit(plan_stack(loaded))
    with StageLines() as lines:
        engines = build_stack(loaded, lines, targets=targets or None)
    if as_json:
        print_json(
            [
                {"folder": str(engine.folder), "skipped": engine.skipped, **engine.manifest}
                for engine in engines
            ]
        )
    else:
        made = sum(not engine.skipped for engine in engines)
        folder = loaded.build_dir / "engines"
        console.print(f"{len(engines)} engines in {folder}, {made} of them made now", soft_wrap=True)


@main.command("demo-models")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def demo_models(folder: Path) -> None:
    """Train the demo's classifier, reranker and LLM on the bundled texts; about five minutes on two cores.

    \b
    Example:
      build-engines demo-models build/demo/models
    """
    from build_engines.demo import write_demo_models

    # The encoders are trained at the same time and report from threads of their own: the bar shows the one
    # that is behind. The LLM has both cores afterwards.
    fractions: dict[str, float] = {}
    started = time.monotonic()
    with StageLines() as lines:
        lines.start("demo models", "train")

        def advance(model: str, fraction: float) -> None:
            if model == "assistant":
                lines.progress("assistant", round(100 * fraction), 100)
                return
            fractions[model] = fraction
            lines.progress("classifier and reranker", round(100 * min(fractions.values())), 100)

        write_demo_models(folder, progress=advance)
        lines.done(f"{time.monotonic() - started:.1f} s", str(folder))


@main.command()
@stack_argument
@build_dir_option
@json_option
def measure(stack: Path, build_dir: Path | None, as_json: bool) -> None:
    """Time the stack's ONNX Runtime engines against PyTorch FP32 and BF16 in one run.

    Encoders at fixed shapes; LLMs to the first token and decoding 1, 4 and 8 sequences at once.

    \b
    Example:
      build-engines measure stacks/demo.toml
    """
    from build_engines.measure import measure_stack, measured_models, render_measurements
    from build_engines.measure_decoder import measure_decoder, render_decoder

    loaded = load(stack, build_dir)
    models = measured_models(loaded)
    for name in loaded.models.keys() - models.keys():
        console.print(f"{name} is left out: TensorRT-LLM serves it, on a card", markup=False)
    with StageLines() as lines:
        lines.start("engines", "against PyTorch")
        found = measure_stack(loaded, lines.progress)
        decoders = {
            name: measure_decoder(loaded, model, lines.progress)
            for name, model in models.items()
            if model.task == "generate"
        }
    if as_json:
        print_json({**found, "models": {**found["models"], **decoders}})
        return
    if found["models"]:
        wide_console().print(render_measurements(found))
    for name, measured in decoders.items():
        wide_console().print(render_decoder(name, measured))


@main.command("random-model")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--llm", is_flag=True, help="A Llama of 189 million parameters instead.")
def random_model(folder: Path, llm: bool) -> None:
    """Write a BERT-base-sized embedder with random weights, for measuring what a larger engine gains.

    \b
    Example:
      build-engines random-model build/bert-base/models/encoder
      build-engines random-model --llm build/llama-189m/models/llama
    """
    from build_engines.random_model import write_random_llm, write_random_model

    if llm:
        write_random_llm(folder)
    else:
        write_random_model(folder)


@main.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--layers",
    type=click.IntRange(1, 48),
    default=48,
    show_default=True,
    help="Fewer, for a smaller run.",
)
@json_option
def flagship(folder: Path, layers: int, as_json: bool) -> None:
    """Build a random model of EEVE-10.8B's shape to an INT8 engine; print time and memory of each step.

    Needs 45 GB of disk in FOLDER, and keeps there what it made.

    \b
    Example:
      build-engines flagship build/flagship
    """
    from build_engines.flagship import EEVE, render_steps, run_flagship

    steps = run_flagship(folder, replace(EEVE, layers=layers))
    if as_json:
        print_json([step.as_dict() for step in steps])
    else:
        wide_console().print(render_steps(steps, folder))


@main.command("bench-gpu")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=Path("build/gpu"))
@click.option(
    "--minutes",
    type=click.FloatRange(min=1),
    default=9,
    show_default=True,
    help="What would begin later is left out.",
)
@click.option(
    "--memory-mib",
    type=click.IntRange(min=2048),
    default=16_303,
    show_default=True,
    help="On a larger card, hold all engines inside the memory of one of this size.",
)
@json_option
def bench_gpu(folder: Path, minutes: float, memory_mib: int, as_json: bool) -> None:
    """Measure engines on this machine's GPU against Transformers, its limits, and the plan's memory.

    Random models of BERT-base's size and an LLM of one billion parameters; no hub and no index is asked. What
    is missing here or fails is a row with its reason. FOLDER keeps models, engines, bench.json and bench.txt.

    \b
    Example:
      build-engines bench-gpu build/gpu --minutes 20
    """
    from build_engines.gpu.command import run_bench
    from build_engines.gpu.report import document, render
    from build_engines.gpu.settings import Settings

    settings = Settings(folder=folder, minutes=minutes, memory_mib=memory_mib)
    found = run_bench(settings, lambda text: console.print(f"  {text}", markup=False))
    if as_json:
        print_json(document(found))
    else:
        wide_console().print(render(found))


def _only(stack: Stack, names: tuple[str, ...]) -> Stack:
    return replace(stack, models={name: stack.models[name] for name in names})


def _fetch(stack: Stack, *, offline: bool) -> None:
    from build_engines.fetch import fetch_model

    with StageLines() as lines:
        for name, model in stack.models.items():
            lines.start(name, "fetch")
            found = fetch_model(model, stack.fetched_dir(name), offline=offline, progress=lines.progress)
            lines.done(found.origin, f"{found.size / 2**20:.1f} MiB at {found.path}")


def _check_names(kind: str, given: tuple[str, ...], known: list[str]) -> None:
    from build_engines.errors import StackError

    for name in given:
        if name not in known:
            raise StackError(
                f"the stack has no {kind} called {name!r}", next_step=f"one of: {', '.join(known)}"
            )


if __name__ == "__main__":
    main()
