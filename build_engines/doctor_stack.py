"""What a stack relies on: its file, the checkpoints, the plan, the targets, and the engines built so far.

Sizes and records are looked at and no file is read whole, so that the answer comes at once. Whether each byte
is as it was built, whoever uses a file checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from build_engines.doctor import Needs
from build_engines.errors import ArtifactError, CompileError, FetchError, OnecardError, PlanError
from build_engines.fetch import check_folder, present_checkpoint
from build_engines.fetch_hub import read_repository
from build_engines.fetch_rules import needed_files
from build_engines.findings import Finding, refused
from build_engines.plan import Plan, mib, plan_stack, promised_memory, require_fit
from build_engines.stack import Model, Precision, Stack, compiles, load_stack
from build_engines.targets import get_target
from triton_repo.runtime.session import EngineRefused, check_sizes, read_manifest

_MOST_NAMES: Final = 3


@dataclass(frozen=True, slots=True)
class Examined:
    """`stack` and `plan` are None where they cannot be had."""

    findings: list[Finding]
    stack: Stack | None = None
    plan: Plan | None = None
    needs: Needs = field(default_factory=Needs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine that the stack asks for, as far as it is built; `reason`: what is wrong with it."""

    name: str
    target: str
    state: Literal["judged", "not judged", "missing", "damaged"]
    reason: str = ""


def examine_stack(path: Path, build_dir: Path | None, *, online: bool) -> Examined:
    """Every check of a stack; `online` asks the hub for checkpoints that are not here."""
    try:
        stack = load_stack(path, build_dir=build_dir)
    except OnecardError as error:
        return Examined([refused("stack", error)])
    names = ", ".join(f"{name} ({model.task})" for name, model in stack.models.items())
    findings = [Finding("stack", "ok", f"{path}: {names} for {stack.card.title}")]
    findings += [check_source(stack, model, online=online) for model in stack.models.values()]
    finding, plan = check_plan(stack, sources=findings[1:])
    findings.append(finding)
    engines = list(read_engines(stack))
    for target in stack.targets:
        missing = [engine.name for engine in engines if engine.target == target and engine.state == "missing"]
        findings.append(check_target(target, _refusal(target, stack), missing))
    findings.append(check_engines(engines, stack.path))
    return Examined(findings, stack, plan, needs_of(stack) if plan else Needs())


def check_source(stack: Stack, model: Model, *, online: bool) -> Finding:
    """The checkpoint of one model: there and whole in size, or where it comes from."""
    check, fetch = f"source {model.name}", f"build-engines fetch {stack.path}"
    try:
        if model.source_dir is not None:
            sizes = [
                (model.source_dir / name).stat().st_size for name in check_folder(model, model.source_dir)
            ]
            return Finding(check, "ok", f"{model.source_dir}, {mib(sum(sizes))}")
        present = present_checkpoint(model, stack.fetched_dir(model.name))
        if present is not None:
            return Finding(check, "ok", f"{model.source}, fetched, {mib(present.size)}")
        if not online:
            found = f"{model.source} is not fetched yet (--online asks whether the hub has it)"
            return Finding(check, "warning", found, fetch)
        repository = read_repository(model.source, model.revision)
        size = sum(repository.sizes[name] for name in needed_files(model, repository.sizes))
        return Finding(check, "warning", f"{model.source} is not fetched yet; the hub has {mib(size)}", fetch)
    except FetchError as error:
        return refused(check, error)
    except OSError as error:
        found = f"{error.filename or model.source} cannot be read: {error.strerror or error}"
        return Finding(check, "problem", found, f"correct that, or [models.{model.name}] source", FetchError)


def check_plan(stack: Stack, sources: Sequence[Finding]) -> tuple[Finding, Plan | None]:
    """Whether all engines fit the card; skipped while a checkpoint that would tell its sizes is missing."""
    try:
        plan = plan_stack(stack)
    except PlanError as error:
        if any(source.state != "ok" for source in sources):
            return Finding("plan", "skipped", f"sizes are not known: {error.message}"), None
        return refused("plan", error), None
    try:
        require_fit(plan)
    except PlanError as error:
        return Finding("plan", "problem", error.message, f"build-engines plan {stack.path}", PlanError), plan
    return Finding(
        "plan", "ok", f"{mib(plan.used)} of {mib(plan.usable)} that {plan.card.title} leaves"
    ), plan


def check_target(name: str, refusal: CompileError | None, missing: Sequence[str]) -> Finding:
    """Whether a target can compile here; it must only where engines of it are `missing`."""
    check = f"target {name}"
    if refusal is None:
        return Finding(check, "ok", "compiles here")
    if missing:
        return refused(check, refusal)
    return Finding(check, "ok", f"all its engines are built; no more can be here: {refusal.message}")


def check_engines(engines: Sequence[Engine], stack: Path) -> Finding:
    """How many engines are there, whole in size and judged."""
    build = f"build-engines build {stack}"
    count = Counter(engine.state for engine in engines)
    by_state = {state: [engine for engine in engines if engine.state == state] for state in count}
    if damaged := by_state.get("damaged"):
        return Finding("engines", "problem", damaged[0].reason, build, ArtifactError)
    parts = [f"{len(engines) - count['missing']} of {len(engines)} built, {count['judged']} judged"]
    for state in ("missing", "not judged"):
        if state in by_state:
            parts.append(f"{state}: {_some([f'{one.name} {one.target}' for one in by_state[state]])}")
    found = "; ".join(parts)
    if count["missing"]:
        return Finding("engines", "warning", found, build)
    if count["not judged"]:
        return Finding("engines", "warning", found, f"on the machine with the card: {build}")
    return Finding("engines", "ok", found)


def read_engines(stack: Stack) -> Iterator[Engine]:
    """Every engine that the stack asks for, by its manifest and the sizes of its files."""
    for model, precision, target in _wanted(stack):
        folder = stack.build_dir / "engines" / model.name / precision / target
        name = f"{model.name} {precision}"
        if not folder.exists():
            yield Engine(name=name, target=target, state="missing")
            continue
        try:
            manifest = read_manifest(folder)
            check_sizes(folder, manifest)
        except EngineRefused as error:
            yield Engine(name=name, target=target, state="damaged", reason=str(error))
            continue
        # No gate judges what TensorRT-LLM serves: it is the checkpoint itself.
        judged = "engine" in manifest.get("gates", {}) or target == "tensorrt-llm"
        yield Engine(name=name, target=target, state="judged" if judged else "not judged")


def needs_of(stack: Stack) -> Needs:
    """What a build from here on writes, and the memory that serving on the CPU takes, by the plan's weights.

    Checkpoints of encoders have FP32 weights, of LLMs FP16. An encoder's graph is written in FP32 first; each
    typed graph holds the weights once, and each engine in its own way.
    """
    disk = memory = 0
    for model in stack.models.values():
        half = promised_memory(stack, model, "fp16")["weights"]
        is_llm, work = model.task == "generate", stack.build_dir / "work" / model.name
        if not stack.checkpoint_dir(model).is_dir():
            disk += half if is_llm else 2 * half
        if model.target is not None:
            continue
        if not is_llm and not (work / "export").is_dir():
            disk += 2 * half
        for precision in model.precisions:
            weights = 2 * half if precision == "fp32" else promised_memory(stack, model, precision)["weights"]
            if not (work / precision).is_dir():
                disk += weights
            engines = stack.build_dir / "engines" / model.name / precision
            for target in (target for target in stack.targets if compiles(target, model.task, precision)):
                on_cpu = target == "onnxruntime"
                held = _on_cpu(precision, half, weights) if on_cpu else weights
                memory += model.instances * held if on_cpu else 0
                # ONNX Runtime's engine of an LLM shares the graph's file of weights.
                is_shared = is_llm and target.startswith("onnxruntime")
                disk += 0 if is_shared or (engines / target).is_dir() else held
    return Needs(disk=disk, memory=memory)


def _on_cpu(precision: Precision, half: int, weights: int) -> int:
    """Bytes of the weights of an engine for the CPU, where all that is no matrix of INT8 is FP32."""
    if precision in {"fp16", "fp32"}:
        return 2 * half
    tables = max(0, 2 * weights - half)  # with matrices of m bytes: weights = tables + m, half = tables + 2 m
    return weights + tables


def _wanted(stack: Stack) -> Iterator[tuple[Model, Precision, str]]:
    for model in stack.models.values():
        for precision in model.precisions:
            for target in (model.target,) if model.target else stack.targets:
                if model.target or compiles(target, model.task, precision):
                    yield model, precision, target


def _refusal(target: str, stack: Stack) -> CompileError | None:
    try:
        get_target(target, portable=stack.portable).check()
    except CompileError as error:
        return error
    return None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
