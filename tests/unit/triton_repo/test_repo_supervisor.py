"""When a dead server is started again, and when not any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_engines.errors import ServerError
from triton_repo import supervisor
from triton_repo.server import Server
from triton_repo.supervisor import CrashBudget, Restart, RestartPolicy, Supervisor

POLICIES = st.builds(
    RestartPolicy,
    crashes=st.integers(1, 8),
    window_s=st.floats(1, 1000),
    first_delay_s=st.floats(0.01, 2),
    most_delay_s=st.floats(2, 20),
)
GAPS = st.lists(st.floats(0, 2000), min_size=1, max_size=40)


def times(gaps: list[float]) -> list[float]:
    return [sum(gaps[: count + 1]) for count in range(len(gaps))]


@given(POLICIES, GAPS)
def test_it_gives_up_exactly_when_the_window_holds_as_many_crashes_as_allowed(
    policy: RestartPolicy, gaps: list[float]
) -> None:
    budget, crashes = CrashBudget(policy), times(gaps)
    for count, now in enumerate(crashes):
        delay = budget.crashed(now)
        within = sum(now - then <= policy.window_s for then in crashes[: count + 1])
        assert budget.spent == within
        assert (delay is None) == (within >= policy.crashes)


@given(POLICIES, GAPS)
def test_the_first_start_is_immediate_and_delays_double_up_to_the_most(
    policy: RestartPolicy, gaps: list[float]
) -> None:
    budget = CrashBudget(policy)
    delays: list[float] = []
    for now in times(gaps):
        delay = budget.crashed(now)
        if delay is None:
            continue
        assert 0 <= delay <= policy.most_delay_s
        if budget.spent == 1:
            assert delay == 0
            delays = []
        elif budget.spent == len(delays) + 1:
            assert delay == pytest.approx(
                min(policy.first_delay_s * 2 ** (budget.spent - 2), policy.most_delay_s)
            )
        delays.append(delay)


def test_the_default_brings_the_first_four_of_ten_minutes_back_within_four_seconds() -> None:
    budget = CrashBudget(RestartPolicy())
    assert [budget.crashed(second) for second in (0.0, 1.0, 2.0, 3.0, 4.0)] == [0, 0.5, 1, 2, None]
    assert budget.crashed(700.0) == 0


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Dying:
    """As much of a server as a supervisor sees: it starts as often as told, and takes a second for it."""

    log = Path("build/x/tritonserver.log")

    def __init__(self, time: Time, *failures: ServerError | None) -> None:
        self._time = time
        self._failures = list(failures)
        self.lives = True
        self.stops: list[float | None] = []

    def fault(self) -> None:
        return None

    def answers(self) -> bool:
        return self.lives

    def stop(self, within_s: float | None) -> None:
        self.stops.append(within_s)

    def restart(self) -> None:
        self._time.now += 1
        if failure := self._failures.pop(0):
            raise failure


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(supervisor, "time", clock)
    return clock


def supervised(server: Any, **policy: Any) -> tuple[Supervisor, list[Restart]]:
    told: list[Restart] = []
    return Supervisor(cast(Server, server), told.append, RestartPolicy(**policy)), told


def test_a_start_that_fails_is_a_crash_too_and_the_next_one_waits_longer(clock: Time) -> None:
    server = Dying(clock, ServerError("a port was taken"), ServerError("a port was taken"), None)
    keeper, told = supervised(server, crashes=4)
    keeper.recover(ServerError("tritonserver ended by itself (signal SIGSEGV)"))
    assert [(step.number, step.delay_s, step.fault.message) for step in told[:3]] == [
        (1, 0, "tritonserver ended by itself (signal SIGSEGV)"),
        (2, 0.5, "a port was taken"),
        (3, 1, "a port was taken"),
    ]
    assert (told[3].ready_s, told[3].down_s) == (1, 4.5)
    assert server.stops == [None]


def test_it_gives_up_with_the_last_reason_and_the_logs(clock: Time) -> None:
    broken = ServerError("tritonserver could not load vector", cause="engine refused")
    keeper, told = supervised(Dying(clock, broken, broken), crashes=3)
    with pytest.raises(ServerError) as given_up:
        keeper.recover(ServerError("gone"))
    assert [step.ready_s for step in told] == [None, None]
    text = str(given_up.value)
    assert "given up after 3 crashes within 600 s; the last: tritonserver could not load vector" in text
    assert "cause: engine refused" in text
    assert "tritonserver.log.1" in text


def test_the_silence_of_a_long_start_counts_for_nothing(clock: Time) -> None:
    server = Dying(clock)
    keeper, _ = supervised(server, silent_s=10.0)
    clock.now += 300  # its models are loaded meanwhile
    server.lives = False
    assert keeper.fault() is None
    clock.now += 9
    assert keeper.fault() is None
    clock.now += 1
    assert keeper.fault() is not None


def test_a_server_that_is_silent_for_long_is_a_fault_and_gets_no_time_to_drain(clock: Time) -> None:
    server = Dying(clock, None)
    keeper, _ = supervised(server, silent_s=10.0)
    clock.now += 8
    assert keeper.fault() is None
    server.lives = False
    clock.now += 8
    assert keeper.fault() is None
    clock.now += 2
    fault = keeper.fault()
    assert fault is not None
    assert "has not answered for 10 s" in fault.message
    keeper.recover(fault)
    assert server.stops == [0]
    assert keeper.fault() is None
