"""The LLM: a prompt's tokens per second, the time to its first token, and decoding at several batches.

"host": engines are called as the scheduler calls them, tokens from the host, logits to the host; Transformers
chooses its token on the GPU and brings that, which favours it a little. "device": a step whose result stays
on the GPU. Transformers' cache is only as long as the run needs, the engine's is a whole slot. What no engine
can beat while decoding is the memory: each step
reads every weight once, and the keys and values of each sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from build_engines.gpu import baselines, contenders
from build_engines.gpu.building import build_engine, write_checkpoint
from build_engines.gpu.ceilings import TORCH
from build_engines.gpu.encoders import COMPILE_LEAST_S, COMPILE_S, LOAD_S, WAYS, all_of, release
from build_engines.gpu.models import LLM, Sizes
from build_engines.gpu.results import Clock, Row
from build_engines.gpu.settings import Race, Run
from build_engines.gpu.timing import summary

_PROMPT: Final = 0  # the batch that stands for the prompt itself


@dataclass(slots=True)
class _Contender:
    """One of those that race. `weight`: bytes of one weight of a Linear."""

    name: str
    side: str
    time_prompt: Callable[[str, int, float], list[float]] | None
    time_decode: Callable[[str, str, int, int, int], list[float]]
    batches: Sequence[int]
    weight: int = 2
    note: str = ""
    ways: list[str] = field(default_factory=lambda: list(WAYS))
    times: dict[tuple[int, str], list[float]] = field(default_factory=dict)


def measure_decoders(run: Run, targets: Sequence[str], clock: Clock, race: Race) -> None:
    """Rows for the LLM."""
    with run.results.case("decoders", all_of("batches", race), model=LLM):
        clock.need(10 if run.settings.on_gpu else 1)
        if write_checkpoint(run, clock, LLM):
            _measure(run, targets, clock, race)


def _measure(run: Run, targets: Sequence[str], clock: Clock, race: Race) -> None:
    sizes, racing = run.settings.sizes, list[_Contender]()
    for target in targets:
        racing += _engines(run, target, clock)
        if racing and not race.every:
            break
    try:
        racing += _torch(run, clock, compiled=race.compiled)
        for turn in range(1 + run.settings.rounds):  # the first does not count, as with encoders
            if turn > 1 and not clock.left:
                break
            for batch in (_PROMPT, *sizes.batches):
                for contender in list(racing):
                    if not _timed(run, contender, batch, counts=turn > 0):
                        racing.remove(contender)
    finally:
        release(run, targets)
    for contender in racing:
        _report(run, contender)


def _torch(run: Run, clock: Clock, *, compiled: bool) -> list[_Contender]:
    settings, side, found = run.settings, run.side(TORCH), list[_Contender]()
    sizes = settings.sizes
    assert run.stack is not None
    load = (baselines.load_llm, run.stack.checkpoint_dir(run.stack.models[LLM]), settings.device)
    with run.results.case("decoders", "load", model=LLM, contender=baselines.EAGER):
        side.call(*load, seconds=LOAD_S)
        found.append(
            _Contender(baselines.EAGER, TORCH, baselines.time_prompt, baselines.time_decode, sizes.batches)
        )
    if not found or not compiled:
        return found
    modes: dict[int, str] = {}
    for batch in sizes.batches:
        with run.results.case("decoders", step(batch), model=LLM, contender=baselines.COMPILED) as outcome:
            limit = min(COMPILE_S, clock.need(COMPILE_LEAST_S))
            modes[batch] = side.call(baselines.compile_llm, batch, sizes.prompt, sizes.new, seconds=limit)
        if not outcome.measured:
            break
    if side.lost:
        with run.results.case("decoders", "load again", model=LLM, contender=baselines.EAGER) as outcome:
            side.call(*load, seconds=LOAD_S)
        return found if outcome.measured else []
    if modes:
        note = f"static cache, torch.compile, mode {', '.join(sorted(set(modes.values())))}"
        found.append(
            _Contender(baselines.COMPILED, TORCH, None, baselines.time_decode, list(modes), note=note)
        )
    return found


def _engines(run: Run, target: str, clock: Clock) -> list[_Contender]:
    sizes, found = run.settings.sizes, list[_Contender]()
    for precision in sizes.llm_precisions:
        folder = build_engine(run, clock, LLM, precision, target)
        if folder is None:
            continue
        contender = f"{target} {precision}"
        with run.results.case("decoders", "load", model=LLM, contender=contender):
            seconds = run.side(target).call(contenders.load_decoder, contender, folder, seconds=LOAD_S)
            run.results.add(_opened(contender, seconds))
            found.append(
                _Contender(
                    contender,
                    target,
                    contenders.time_prompt,
                    contenders.time_decode,
                    [batch for batch in sizes.batches if batch <= sizes.slots],
                    weight=1 if precision.startswith("int8") else 2,
                )
            )
    return found


def _opened(contender: str, seconds: float) -> Row:
    return Row(part="decoders", case="open", model=LLM, contender=contender, value=seconds, unit="s")


def _timed(run: Run, contender: _Contender, batch: int, *, counts: bool) -> bool:
    """The prompt, or a run of steps in each way; False when this contender is out."""

    def keep(way: str, times: list[float]) -> None:
        if counts:
            contender.times.setdefault((batch, way), []).extend(times)

    sizes, side = run.settings.sizes, run.side(contender.side)
    if batch == _PROMPT:
        if contender.time_prompt is None:
            return True
        with run.results.case("decoders", _prompt(sizes), model=LLM, contender=contender.name) as outcome:
            given = (contender.name, sizes.prompt, run.settings.block)
            times = side.call(contender.time_prompt, *given, seconds=LOAD_S)
            keep("host", times)
        return outcome.status != "failed"
    for way in tuple(contender.ways) if batch in contender.batches else ():
        with run.results.case("decoders", step(batch), model=LLM, contender=contender.name) as outcome:
            steps = (contender.name, way, batch, sizes.prompt, sizes.new)
            times = side.call(contender.time_decode, *steps, seconds=LOAD_S)
            keep(way, times)
        if outcome.status == "skipped":
            contender.ways.remove(way)
        elif outcome.status == "failed":
            return False
    return True


def _report(run: Run, contender: _Contender) -> None:
    sizes = run.settings.sizes
    for (batch, way), times in contender.times.items():
        least = _least(run, contender.weight, batch)
        middle, (low, high) = summary(times)
        tokens = sizes.prompt if batch == _PROMPT else batch
        rate = Row(
            part="decoders",
            case=_prompt(sizes) if batch == _PROMPT else step(batch),
            model=LLM,
            contender=contender.name,
            way=way,
            value=tokens / middle,
            unit="tokens/s",
            limit=None if least is None else tokens / least,
            spread=(tokens / high, tokens / low),
            runs=len(times),
            note=contender.note,
        )
        if batch == _PROMPT:
            first = replace(rate, case="first token", value=1e3 * middle, unit="ms")
            limit = None if least is None else 1e3 * least
            run.results.add(replace(first, limit=limit, spread=(1e3 * low, 1e3 * high)))
        run.results.add(rate)


def _least(run: Run, weight: int, batch: int) -> float | None:
    """Seconds that the hardware needs at least: for the prompt, or for a decode step in mid-run.

    Weights multiply in FP16 in every precision (`int8-weights` stores them in a byte): its rate counts.
    """
    sizes, llm = run.settings.sizes, run.settings.sizes.llm
    linear, head = parameters(sizes)
    cached = 2 * llm.layers * llm.kv_heads * (llm.hidden // llm.heads) * 2
    if batch == _PROMPT:
        # Only the last token goes through the head; attention's two products over a triangle.
        attention = 2 * llm.layers * sizes.prompt * sizes.prompt * llm.hidden
        operations = 2.0 * (linear * sizes.prompt + head) + attention
        return run.ceilings.seconds(operations=operations, moved=weight * (linear + head))
    length = sizes.prompt + sizes.new / 2
    moved = weight * (linear + head) + batch * length * cached
    return run.ceilings.seconds(operations=2.0 * batch * (linear + head), moved=moved)


def parameters(sizes: Sizes) -> tuple[int, int]:
    """Weights of all layers' Linears, and of the output projection."""
    llm = sizes.llm
    narrow = llm.hidden // llm.heads * llm.kv_heads
    layer = 2 * llm.hidden * llm.hidden + 2 * llm.hidden * narrow + 3 * llm.hidden * llm.ffn
    return llm.layers * layer, llm.vocabulary * llm.hidden


def _prompt(sizes: Sizes) -> str:
    return f"prompt of {sizes.prompt}"


def step(batch: int) -> str:
    return f"decode, {batch} at once"
