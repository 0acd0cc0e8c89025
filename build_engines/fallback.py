"""When a gate fails: give layers their precision back, most sensitive first, until it passes.

A layer in static INT8 first keeps its INT8 weights and gets float activations back ("int8-weights"), which
costs no memory; only when all have done that do layers return to float altogether. Quality grows with the
number of steps taken, so the smallest number that passes is found by doubling and bisection instead of one
by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from build_engines.errors import GateError
from build_engines.gates import GateReport
from build_engines.quantize import Linear
from build_engines.quantize.quantizer import Mode

Modes = dict[str, Mode]
Judge = Callable[[Modes], GateReport]


class Layer(Protocol):
    """Anything with a name that can be computed in more than one way."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """The modes that passed and how they were found.

    `tried`: (steps taken, report) in the order tried; the report of `modes` is `report`. `sensitivity`:
    relative error of the model's answers when only that layer is quantized; empty if the first attempt
    passed.
    """

    start: Mode
    modes: Modes
    report: GateReport
    tried: tuple[tuple[int, GateReport], ...]
    sensitivity: Mapping[str, float]

    def as_dict(self, linears: Sequence[Linear]) -> dict[str, Any]:
        """For the manifest: the layers returned, what each cost, and the gate's figures at every step."""
        saving = {linear.name: linear.int8_saving for linear in linears}
        returned = [
            {
                "layer": name,
                "mode": self.modes[name],
                "sensitivity": error,
                "extra_bytes": saving[name] if self.modes[name] == "float" else 0,
            }
            for name, error in _most_sensitive_first(self.sensitivity)
            if self.modes[name] != self.start
        ]
        steps = [{"steps_back": steps, **report.as_dict()} for steps, report in self.tried]
        return {"returned": returned, "steps": steps}


def find_passing_modes(
    linears: Sequence[Layer],
    start: Mode,
    judge: Judge,
    measure_sensitivity: Callable[[], Mapping[str, float]],
) -> Outcome:
    """The modes with the fewest steps back that pass.

    `judge` evaluates a choice of modes; `measure_sensitivity` is called once, and only if the first attempt
    fails.

    Raises:
        GateError: with the table of everything tried, when no quantized layer is left that could return.
    """
    first: Modes = {linear.name: start for linear in linears}
    report = judge(first)
    if report.passed:
        return Outcome(start, first, report, ((0, report),), {})
    sensitivity = measure_sensitivity()
    ladder = _ladder([name for name, _ in _most_sensitive_first(sensitivity)], start)
    reports = {0: report}

    def passes(steps: int) -> bool:
        if steps not in reports:
            reports[steps] = judge(_climb(first, ladder, steps))
        return reports[steps].passed

    # With every layer back in float nothing would be INT8 any more: that is no INT8 engine.
    top = len(ladder) - 1
    failing, passing = 0, 1
    while passing < top and not passes(passing):
        failing, passing = passing, passing * 2
    passing = min(passing, top)
    if not passes(passing):
        raise _nothing_left(start, reports)
    while passing - failing > 1:
        middle = (failing + passing) // 2
        failing, passing = (failing, middle) if passes(middle) else (middle, passing)
    modes = _climb(first, ladder, passing)
    return Outcome(start, modes, reports[passing], tuple(sorted(reports.items())), sensitivity)


def _most_sensitive_first(sensitivity: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(sensitivity.items(), key=lambda item: (-item[1], item[0]))


def _ladder(names: Sequence[str], start: Mode) -> list[tuple[str, Mode]]:
    rungs: list[Mode] = ["int8-weights", "float"] if start == "int8" else ["float"]
    return [(name, mode) for mode in rungs for name in names]


def _climb(first: Modes, ladder: Sequence[tuple[str, Mode]], steps: int) -> Modes:
    return {**first, **dict(ladder[:steps])}


def _nothing_left(start: Mode, reports: Mapping[int, GateReport]) -> GateError:
    table = "\n".join(
        f"  {steps} steps back:\n" + "\n".join(f"    {line}" for line in report.summary().splitlines())
        for steps, report in sorted(reports.items())
    )
    return GateError(
        f"no choice of layers in {start} passes the accuracy gates; no engine was published\n{table}",
        cause="the graph differs from the checkpoint beyond quantization, the calibration texts are unlike "
        "the evaluation texts, or the gates ask for more than INT8 can give",
        next_step="calibrate on texts of your own domain, loosen [models.<name>.gates], or use fp16",
    )
