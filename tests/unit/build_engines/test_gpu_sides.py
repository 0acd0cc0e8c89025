"""Contenders in processes of their own: whatever happens there is a reason here; the next call works."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_engines.errors import CompileError
from build_engines.gpu.results import Clock, Failed, Results, Row, Skipped, said
from build_engines.gpu.sides import Side


def answer(value: int) -> tuple[int, int]:
    print("said on standard output")
    return value + 1, os.getpid()


def break_with(kind: str) -> None:
    if kind == "error":
        raise CompileError("the graph is bad", cause="a layer")
    if kind == "skip":
        raise Skipped("no such library")
    if kind == "hang":
        time.sleep(60)
    if kind == "crash":
        os.write(2, b"free(): invalid pointer\n")
        os.kill(os.getpid(), signal.SIGSEGV)


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    with Side("test", tmp_path / "side.log") as found:
        yield found


def test_a_function_runs_over_there_and_what_it_prints_goes_to_the_log(side: Side, tmp_path: Path) -> None:
    first = side.call(answer, 1, seconds=30)
    second = side.call(answer, 2, seconds=30)
    assert (first[0], second[0]) == (2, 3)
    assert first[1] == second[1] == side.pid != os.getpid()
    assert "said on standard output" in (tmp_path / "side.log").read_text()


def test_errors_keep_their_words_and_the_process(side: Side) -> None:
    pid = side.call(answer, 1, seconds=30)[1]
    with pytest.raises(Failed, match=r"the graph is bad \(cause: a layer\)"):
        side.call(break_with, "error", seconds=30)
    with pytest.raises(Skipped, match="no such library"):
        side.call(break_with, "skip", seconds=30)
    assert side.call(answer, 1, seconds=30)[1] == pid
    assert side.lost == 0


def test_a_crash_names_the_signal_and_the_last_words(side: Side) -> None:
    with pytest.raises(Failed, match=r"SIGSEGV.*free\(\): invalid pointer"):
        side.call(break_with, "crash", seconds=30)
    assert side.call(answer, 1, seconds=30)[0] == 2
    assert side.lost == 1


def test_what_hangs_is_ended(side: Side) -> None:
    side.call(answer, 1, seconds=30)
    pid = side.pid
    with pytest.raises(Failed, match="not finished after 0 s"):
        side.call(break_with, "hang", seconds=0.2)
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert side.call(answer, 1, seconds=30)[0] == 2


def test_a_case_that_fails_or_is_skipped_is_a_row_and_the_run_goes_on() -> None:
    results = Results(lambda text: None)
    for _ in range(2):  # the same in every round is one row
        with results.case("encoders", "1 x 8", contender="engine"):
            raise RuntimeError("CUDA error:\n  out of memory")
        with results.case("encoders", "1 x 8", contender="other") as outcome:
            raise Skipped("not installed")
        assert outcome.status == "skipped"
    results.add(Row(part="encoders", case="1 x 8", contender="torch", value=2.0, unit="ms", limit=1.0))
    assert [(row.status, row.reason) for row in results.rows] == [
        ("failed", "RuntimeError: CUDA error: out of memory"),
        ("skipped", "not installed"),
        ("measured", ""),
    ]
    with pytest.raises(KeyboardInterrupt), results.case("encoders", "1 x 8"):
        raise KeyboardInterrupt


def test_the_share_of_the_limit_of_times_and_of_rates() -> None:
    assert Row(part="encoders", case="a", value=4.0, unit="ms", limit=1.0).share == 0.25
    assert Row(part="decoders", case="a", value=30.0, unit="tokens/s", limit=120.0).share == 0.25
    assert Row(part="encoders", case="a", value=4.0, unit="ms").share is None


def test_long_reasons_are_cut() -> None:
    assert len(said(ValueError("x" * 5000))) <= 300


def test_a_part_gets_no_more_time_than_is_left() -> None:
    clock = Clock(5)
    assert clock.part(60).left <= 5
    with pytest.raises(Skipped, match="time for this part is over"):
        clock.part(-1).need()
