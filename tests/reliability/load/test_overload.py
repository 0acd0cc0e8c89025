"""Three times the capacity, open loop, encoders and LLM together: the accepted are in time, the rest is told.

`make soak OVERLOAD_SECONDS=20` is the short form; 120 seconds is the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from load_figures import Report, lost, milliseconds, outcomes, print_table, rounded, trend, work_rate
from load_generator import ANSWERED, REFUSED, REJECTED, RETRYABLE, Record, Result
from load_observer import GENERATOR, QUEUES, SERVER, Observer
from load_plan import CAPACITY_S, Capacity, Range
from load_served import DEADLINE_MS, MAX_SIZE, MODELS
from load_work import HIGH, USUAL

from client.bench.machine import cores

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1800)]

TIMES = 3.0
HIGH_SHARE = 0.15
LIGHT = 0.1
NORMAL_S = AFTER_S = 15.0
RECOVERED_S = 5.0
# Before this the queues fill, which is no state to measure a throughput in.
SETTLED_S = 3.0
KEPT_SHARE = 0.9
LOST_HIGH = 0.01
# A rejection "at once": what the server needs to say so while every core is busy with answers.
AT_ONCE_MS = 250.0
AT_ARRIVAL = RETRYABLE[:2]
# A generator that sent later than this measured itself.
LATE_MS = 100.0
UNREADABLE_PER_S, UNREADABLE_S = 100.0, 6.0


@dataclass(frozen=True, slots=True)
class Overload:
    """One run: light load, overload between `begin` and `end`, light load again; the capacity before it, and
    once more behind it, for the machine may not be ours alone."""

    field: Range
    capacity: Capacity
    again: Capacity
    result: Result
    seen: Observer
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def between(self, begin: float, end: float) -> list[Record]:
        """Those that were meant to be sent then."""
        return [record for record in self.result.records if begin <= record.at < end]

    @property
    def records(self) -> list[Record]:
        return self.between(self.begin, self.end)

    def cpu_s(self, process: str) -> float:
        began = self.result.began
        return self.seen.cpu_s(process, began + self.begin, began + self.end)


@pytest.fixture(scope="module")
def overload(field: Range, capacity: Capacity, overload_s: float) -> Overload:
    begin, end = NORMAL_S, NORMAL_S + overload_s
    light = {model: LIGHT * rate for model, rate in capacity.requests.items()}
    heavy = {model: TIMES * rate for model, rate in capacity.requests.items()}
    usual, mixed = {"usual": 1.0}, {"usual": 1 - HIGH_SHARE, "urgent": HIGH_SHARE}
    arrivals = field.arrivals(light, 0, begin, kinds=usual, seed=1)
    arrivals += field.arrivals(heavy, begin, end, kinds=mixed, seed=2)
    # The very requests of before, so that only the server's state can make them slower.
    arrivals += field.arrivals(light, end, end + AFTER_S, kinds=usual, seed=1)
    with field.observer() as seen:
        result = field.open(arrivals).result()
    return Overload(field, capacity, field.capacity(CAPACITY_S), result, seen, begin, end)


def test_accepted_requests_keep_the_deadline_and_the_rest_is_rejected_at_once(overload: Overload) -> None:
    report = Report("overload")
    hold_schedule(report, overload)
    hold_answers(report, overload)
    hold_rejections(report, overload)
    hold_throughput(report, overload)
    hold_queues(report, overload)
    hold_recovery(report, overload)
    report.figures |= {"capacity": capacity_figures(overload.capacity), "models": model_figures(overload)}
    report.figures["capacity_behind"] = capacity_figures(overload.again)
    report.figures["rejecting"] = rejecting = rejection_cost(overload)
    show(overload, rejecting)
    report.finish()


def test_high_priority_requests_lose_less_than_a_percent(overload: Overload) -> None:
    report = Report("priorities")
    for model in MODELS:
        records = overload.field.of(overload.records, model)
        high, usual = (level_of(overload.field, records, level) for level in (HIGH, USUAL))
        text = f"{lost(high):.2%} of {len(high)} (usual priority: {lost(usual):.0%} of {len(usual)})"
        report.hold(f"{model}: high priority loses less than {LOST_HIGH:.0%}", text, lost(high) < LOST_HIGH)
        report.figures[model] = {"high": [len(high), lost(high)], "usual": [len(usual), lost(usual)]}
    report.finish()


def level_of(field: Range, records: Sequence[Record], level: int) -> list[Record]:
    return [record for record in records if field.shots[record.shot].priority == level]


def hold_schedule(report: Report, run: Overload) -> None:
    """The generator kept its schedule; else the run measured the generator."""
    records = run.records
    late = milliseconds((record.sent for record in records), 0.99)
    per_request = run.result.cpu_s / len(run.result.records) * 1e6
    offered = len(records) / run.seconds
    report.figures["generator"] = {
        "late_p50_ms": round(milliseconds((record.sent for record in records), 0.5), 3),
        "late_p99_ms": round(late, 3),
        "cpu_us_per_request": round(per_request, 1),
        "cpu_share": round(run.cpu_s(GENERATOR) / run.seconds / cores(), 4),
        "offered_per_s": round(offered, 2),
        "offered_times_capacity": round(offered / sum(run.capacity.requests.values()), 3),
    }
    report.hold(f"the generator is on time: p99 under {LATE_MS:.0f} ms", f"{late:.1f} ms", late < LATE_MS)


def hold_answers(report: Report, run: Overload) -> None:
    found = outcomes(run.result.records)
    others = {text: n for text, n in found.items() if text != ANSWERED and not text.startswith(REJECTED)}
    text = f"{sum(others.values())} of {len(run.result.records)}"
    worst = f": {max(others, key=others.__getitem__)}" if others else ""
    report.hold("no error, no wrong answer, no hang", text + worst, not others)
    for model in MODELS:
        accepted = [r for r in run.field.of(run.records, model) if r.outcome == ANSWERED]
        p99 = milliseconds((record.first for record in accepted), 0.99)
        limit = DEADLINE_MS[model]
        text = f"{p99:.0f} ms of {len(accepted)} accepted"
        report.hold(f"{model}: p99 within its deadline, {limit} ms", text, p99 <= limit)


def hold_rejections(report: Report, run: Overload) -> None:
    rejected = [record for record in run.records if record.outcome.startswith(REJECTED)]
    arriving = [r for r in rejected if r.outcome.removeprefix(REJECTED) in AT_ARRIVAL]
    report.figures["rejections"] = dict(outcomes(rejected))
    p99 = milliseconds((record.done for record in arriving), 0.99)
    text = f"{p99:.0f} ms of {len(arriving)}; {len(rejected) - len(arriving)} had waited"
    at_once = bool(rejected) and p99 <= AT_ONCE_MS
    report.hold(f"rejected at once: p99 within {AT_ONCE_MS:.0f} ms", text, at_once)
    late = [r for r in rejected if r.done * 1e3 > DEADLINE_MS[run.field.model(r)] + AT_ONCE_MS]
    report.hold("nothing is rejected later than its deadline", f"{len(late)} of {len(rejected)}", not late)
    slow = trend([r.at for r in arriving], [r.done for r in arriving]) if len(arriving) > 1 else None
    grown = slow.per_hour / 3600 * run.seconds * 1e3 if slow else 0.0
    report.hold("rejections do not slow down", f"{grown:+.0f} ms from begin to end", grown < AT_ONCE_MS / 2)


def work_rates(run: Overload) -> dict[str, float]:
    begin = run.begin + SETTLED_S
    return {m: work_rate(run.field.of(run.result.records, m), run.field.work, begin, run.end) for m in MODELS}


def hold_throughput(report: Report, run: Overload) -> None:
    rates = work_rates(run)
    before, after = run.capacity.share(rates), run.again.share(rates)
    left = cores_left(run)
    share = (before + after) / 2 / left
    text = f"{share:.1%}, for the generator left {left:.1%} of the cores that it leaves the capacity; "
    text += f"{before:.0%} of the capacity before, {after:.0%} of that behind"
    figures = {"share": share, "cores_left": left, "before": before, "behind": after}
    report.figures["throughput"] = rounded(figures, 4)
    report.hold(f"throughput at {KEPT_SHARE:.0%} of the capacity or better", text, share >= KEPT_SHARE)


def cores_left(run: Overload) -> float:
    """What the generator leaves of the server's cores, as a share of what it leaves while capacity is
    measured: clients of a real server have cores of their own."""
    usual = (run.capacity.cpu[GENERATOR] + run.again.cpu[GENERATOR]) / 2
    return (cores() - run.cpu_s(GENERATOR) / run.seconds) / (cores() - usual)


def hold_queues(report: Report, run: Overload) -> None:
    began = run.result.began
    for model in MODELS:
        ours, tritons = (run.seen.queue(gauge, model, began + run.begin, began + run.end) for gauge in QUEUES)
        most, limit = max(ours, default=0.0), MAX_SIZE[model]
        report.hold(f"{model}: its queue stays within {limit}", f"{most:.0f} at most", 0 < most <= limit)
        half = len(tritons) // 2
        early, later = max(tritons[:half], default=0.0), max(tritons[half:], default=0.0)
        text = f"{early:.0f} at most in the first half, {later:.0f} in the second"
        # Requests that Triton has not handed to the model yet: a hidden queue, were there one.
        report.hold(f"{model}: Triton's own does not grow", text, later <= early + limit / 4)


def hold_recovery(report: Report, run: Overload) -> None:
    """Back to normal: no request that is sent later takes half again as long as the slowest one before."""
    for model in MODELS:
        before, after = (
            [r for r in run.field.of(run.between(begin, end), model) if r.outcome == ANSWERED]
            for begin, end in ((0.0, run.begin), (run.end, run.end + AFTER_S))
        )
        normal = max((record.first for record in before), default=0.0)
        slow = [r.at - run.end for r in after if r.first > 1.5 * normal]
        back = max(slow, default=0.0)
        text = f"{back:.1f} s, {milliseconds((r.first for r in before), 0.5):.0f} ms before and "
        text += f"{milliseconds((r.first for r in after if r.at > run.end + RECOVERED_S), 0.5):.0f} ms after"
        promised = f"{model}: normal latency within {RECOVERED_S:.0f} s"
        report.hold(promised, text, bool(after) and back <= RECOVERED_S)


def rejection_cost(run: Overload) -> dict[str, Any]:
    """Processor time of a rejection, and by that the share of all cores that those of the overload took.

    Measured while nothing else runs, on requests that are refused for a priority that there is not: they take
    the same way as rejected ones, which an idle server has none of.
    """
    found: dict[str, Any] = {}
    for model in MODELS:
        rates = {model: UNREADABLE_PER_S}
        arrivals = run.field.arrivals(rates, 0, UNREADABLE_S, kinds={"unreadable": 1.0}, seed=4)
        with run.field.observer() as seen:
            result = run.field.open(arrivals).result()
        span = result.began, result.began + result.seconds
        server = (seen.cpu_s(SERVER, *span) + seen.cpu_s(model, *span)) / len(arrivals)
        rejected = sum(r.outcome.startswith(REJECTED) for r in run.field.of(run.records, model)) / run.seconds
        found[model] = {
            "rejected_per_s": round(rejected, 2),
            "server_us": round(server * 1e6, 1),
            "generator_us": round(result.cpu_s / len(arrivals) * 1e6, 1),
            "server_share": round(rejected * server / cores(), 4),
        }
        assert set(outcomes(result.records)) == {REFUSED}
    found["server_share"] = round(sum(found[model]["server_share"] for model in MODELS), 4)
    return found


def capacity_figures(capacity: Capacity) -> dict[str, Any]:
    return {
        "requests_per_s": rounded(capacity.requests),
        "tokens_per_s": rounded(capacity.work, 1),
        "p50_ms": rounded(capacity.p50_ms, 1),
        "cpu": rounded(capacity.cpu),
        "rejected": capacity.rejected,
    }


def model_figures(run: Overload) -> dict[str, Any]:
    rates = work_rates(run)
    found = {}
    for model in MODELS:
        records = run.field.of(run.records, model)
        accepted = [record.first for record in records if record.outcome == ANSWERED]
        found[model] = {
            "offered_per_s": round(len(records) / run.seconds, 2),
            "accepted_per_s": round(len(accepted) / run.seconds, 2),
            "tokens_per_s": round(rates[model], 1),
            **{f"p{p}_ms": round(milliseconds(accepted, p / 100), 1) for p in (50, 90, 99)},
            "cpu": round(run.cpu_s(model) / run.seconds, 3),
        }
    return found


def show(run: Overload, rejecting: dict[str, Any]) -> None:
    rows = [
        (
            model,
            f"{run.capacity.requests[model]:.1f}",
            f"{figures['offered_per_s']:.1f}",
            f"{figures['accepted_per_s']:.1f}",
            f"{figures['p50_ms']:.0f} / {figures['p99_ms']:.0f}",
            f"{rejecting[model]['server_us']:.0f}",
        )
        for model, figures in model_figures(run).items()
    ]
    head = ("model", "capacity/s", "offered/s", "accepted/s", "p50 / p99 ms", "us a rejection")
    print_table(head, rows)
    generator = run.cpu_s(GENERATOR) / run.seconds / cores()
    server = run.cpu_s(SERVER) / run.seconds / cores()
    print(
        f"  of all cores: rejecting {rejecting['server_share']:.1%}, tritonserver {server:.1%}, "
        f"generator {generator:.1%}"
    )
