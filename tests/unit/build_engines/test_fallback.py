"""The fallback returns the fewest layers that pass, asks rarely, and gives up with everything it tried."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engines.errors import GateError
from build_engines.fallback import Modes, find_passing_modes
from build_engines.gates import Check, GateReport
from build_engines.quantize import Linear
from build_engines.quantize.quantizer import Mode

LEVEL = {"int8": 0, "int8-weights": 1, "float": 2}


def report(value: float) -> GateReport:
    return GateReport((Check("agreement", value, 1.0, "at least"),), samples=10)


def layers(count: int) -> list[Linear]:
    return [Linear(f"layers.{i}", f"x{i}", f"layers.{i}.weight", 4, i + 1) for i in range(count)]


class Judge:
    """Passes exactly when every layer in `needs` has at least the level asked for; counts."""

    def __init__(self, needs: dict[str, int]) -> None:
        self.needs = needs
        self.asked: list[Modes] = []

    def __call__(self, modes: Modes) -> GateReport:
        self.asked.append(modes)
        met = [LEVEL[modes[name]] >= level for name, level in self.needs.items()]
        return report(sum(met) / len(met) if met else 1.0)


def ladder(sensitivity: dict[str, float], start: Mode) -> list[tuple[str, Mode]]:
    names = sorted(sensitivity, key=lambda name: (-sensitivity[name], name))
    rungs: list[Mode] = ["int8-weights", "float"] if start == "int8" else ["float"]
    return [(name, rung) for rung in rungs for name in names]


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, Mode, dict[str, float], dict[str, int]]:
    count = draw(st.integers(1, 40))
    names = [f"layers.{i}" for i in range(count)]
    start: Mode = draw(st.sampled_from(["int8", "int8-weights"]))
    errors = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    needs = draw(st.dictionaries(st.sampled_from(names), st.integers(1, 2), max_size=count))
    return count, start, dict(zip(names, errors, strict=True)), needs


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_fewest_steps_that_pass(problem: tuple[int, Mode, dict[str, float], dict[str, int]]) -> None:
    count, start, sensitivity, needs = problem
    judge = Judge(needs)
    steps = ladder(sensitivity, start)
    # Brute force: the first prefix of the ladder that passes, short of leaving nothing in INT8.
    first: Modes = {f"layers.{i}": start for i in range(count)}
    prefixes = [{**first, **dict(steps[:taken])} for taken in range(len(steps))]
    expected = next((modes for modes in prefixes if Judge(needs)(modes).passed), None)
    if expected is None:
        with pytest.raises(GateError):
            find_passing_modes(layers(count), start, judge, lambda: sensitivity)
    else:
        outcome = find_passing_modes(layers(count), start, judge, lambda: sensitivity)
        assert outcome.modes == expected
        assert outcome.report.passed
        assert any(mode != "float" for mode in outcome.modes.values())
    assert len(judge.asked) <= 2 * math.ceil(math.log2(len(steps) + 1)) + 2
    assert len({tuple(sorted(modes.items())) for modes in judge.asked}) == len(judge.asked)


def test_sensitivity_is_measured_only_when_the_gate_failed() -> None:
    def unexpected() -> dict[str, float]:
        raise AssertionError("nothing failed")

    outcome = find_passing_modes(layers(4), "int8", Judge({}), unexpected)
    assert set(outcome.modes.values()) == {"int8"}
    assert outcome.as_dict(layers(4))["returned"] == []


def failing(value: float) -> Callable[[Modes], GateReport]:
    return lambda modes: report(value)


@pytest.mark.parametrize("start", ["int8", "int8-weights"])
def test_when_nothing_helps_the_error_holds_the_table(start: Mode) -> None:
    sensitivity = {f"layers.{i}": float(i) for i in range(4)}
    with pytest.raises(GateError) as caught:
        find_passing_modes(layers(4), start, failing(0.5), lambda: sensitivity)
    text = str(caught.value)
    assert "no engine was published" in text
    assert text.count("agreement 0.50000, at least 1 [FAILED]") >= 3
    assert "0 steps back" in text
    # The last step tried leaves one layer in INT8: without any, it would be no INT8 engine.
    assert f"{7 if start == 'int8' else 3} steps back" in text


def test_the_report_says_which_layers_and_what_each_cost() -> None:
    sensitivity = {"layers.0": 0.1, "layers.1": 0.9, "layers.2": 0.2}
    outcome = find_passing_modes(layers(3), "int8", Judge({"layers.1": 2}), lambda: sensitivity)
    data = outcome.as_dict(layers(3))
    # Every layer gives its activations back first, which costs no memory; then one returns to float.
    assert data["returned"] == [
        {"layer": "layers.1", "mode": "float", "sensitivity": 0.9, "extra_bytes": 8},
        {"layer": "layers.2", "mode": "int8-weights", "sensitivity": 0.2, "extra_bytes": 0},
        {"layer": "layers.0", "mode": "int8-weights", "sensitivity": 0.1, "extra_bytes": 0},
    ]
    assert [step["steps_back"] for step in data["steps"]] == [0, 1, 2, 3, 4]
    assert [step["passed"] for step in data["steps"]] == [False, False, False, False, True]


@pytest.mark.parametrize("start", ["int8", "int8-weights"])
def test_one_layer_alone_cannot_be_given_back_entirely(start: Mode) -> None:
    judge = Judge({"layers.0": 2})
    with pytest.raises(GateError):
        find_passing_modes(layers(1), start, judge, lambda: {"layers.0": 1.0})
