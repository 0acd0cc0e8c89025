"""A long mixed load: encoders, streams, clients that leave, bad requests, bursts. Nothing fails or grows.

`make soak SECONDS=180` is the short form; half an hour is the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
from load_figures import Report, milliseconds, outcomes, print_table, trend
from load_generator import ANSWERED, LEFT, REFUSED, Record
from load_observer import Observer, Sample
from load_plan import Arrivals, Capacity, Kind, Range
from load_served import ENCODERS, LLM, MODELS

pytestmark = [pytest.mark.serving, pytest.mark.timeout(3600)]

SHARE = 0.4  # of the capacity, beside the bursts
BURST_EVERY_S, BURST_OF = 15.0, 40
REFUSED_PER_S = 1.0
FLAT = 0.02
SAMPLES_EVERY_S = 2.0
LEFT_SHARE = 0.2
# What is allocated once: caches, buffers of the largest batch, memory that the allocator then keeps.
WARM_UP_SHARE, LEAST_WARM_UP_S = 0.2, 45.0


@pytest.fixture(scope="module")
def arrivals(field: Range, capacity: Capacity, soak_s: float) -> Arrivals:
    rates = {model: SHARE * capacity.requests[model] for model in MODELS}
    encoders = {model: rates[model] for model in ENCODERS}
    mixed: Mapping[Kind, float] = {"usual": 0.8, "urgent": 0.2}
    streams: Mapping[Kind, float] = {"usual": 0.8 - LEFT_SHARE, "urgent": 0.2, "left": LEFT_SHARE}
    found = field.arrivals(encoders, 0, soak_s, kinds=mixed, seed=11)
    found += field.arrivals({LLM: rates[LLM]}, 0, soak_s, kinds=streams, seed=12)
    bad = sorted({shot.model for shot in field.shots if ("refused", shot.model) in field.places})
    each = {model: REFUSED_PER_S / len(bad) for model in bad}
    found += field.arrivals(each, 0, soak_s, kinds={"refused": 1.0}, seed=13)
    return found + bursts(field, soak_s)


def bursts(field: Range, seconds: float) -> Arrivals:
    """So many requests of one model in one moment, the models in turn."""
    found: Arrivals = []
    for number in range(int(seconds / BURST_EVERY_S)):
        places = field.places["usual", MODELS[number % len(MODELS)]]
        found += [((number + 0.5) * BURST_EVERY_S, places[i % len(places)]) for i in range(BURST_OF)]
    return found


def test_nothing_fails_and_nothing_grows(field: Range, arrivals: Arrivals, soak_s: float) -> None:
    report = Report("soak")
    with Observer(field.server, SAMPLES_EVERY_S, every_minute(soak_s)) as seen:
        result = field.open(arrivals, retries=True).result()
    hold_outcomes(report, field, result.records)
    late = milliseconds((record.sent for record in result.records), 0.99)
    report.figures["generator"] = {
        "late_p99_ms": round(late, 2),
        "cpu_us_per_request": round(result.cpu_s / len(result.records) * 1e6, 1),
    }
    warm = result.began + max(WARM_UP_SHARE * soak_s, min(LEAST_WARM_UP_S, soak_s / 2))
    samples = [sample for sample in seen.samples if warm <= sample.at <= result.began + soak_s]
    hold_flat(report, samples)
    hold_idle(report, seen.samples[-1])
    report.finish()


def hold_outcomes(report: Report, field: Range, records: list[Record]) -> None:
    """Each ended as its kind must; a rejected one was sent again, as a client does, and then answered."""
    allowed = {"refused": {REFUSED}, "left": {LEFT, ANSWERED}}
    kind_of = {place: kind for (kind, _), places in field.places.items() for place in places}
    wrong = [r for r in records if r.outcome not in allowed.get(kind_of[r.shot], {ANSWERED})]
    worst = f"; most often {outcomes(wrong).most_common(1)[0][0]!r}" if wrong else ""
    text = f"{len(wrong)} of {len(records)} requests{worst}"
    report.hold("no error, every answer the expected one", text, not wrong and bool(records))
    again = sum(record.tries > 1 for record in records)
    report.figures["outcomes"] = dict(outcomes(records))
    report.figures["sent_again"] = again
    rows = []
    for model in MODELS:
        mine = [r.first for r in field.of(records, model) if r.outcome == ANSWERED]
        times = f"{milliseconds(mine, 0.5):.0f} / {milliseconds(mine, 0.99):.0f}"
        rows.append((model, str(len(mine)), times))
    print_table(("model", "answered", "p50 / p99 ms"), rows)
    found = outcomes(records)
    print(f"  {found[REFUSED]} bad requests refused, {found[LEFT]} streams left, {again} requests sent again")


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    unit: str
    of: Callable[[Sample], float]


FLAT_SERIES = (
    Series("resident memory", "MiB", lambda sample: sum(sample.resident_mib.values())),
    Series("shared memory", "MiB", lambda sample: sample.shared_mib),
    Series("descriptors", "", lambda sample: sum(sample.descriptors.values())),
)


def hold_flat(report: Report, samples: list[Sample]) -> None:
    times = [sample.at for sample in samples]
    for series in FLAT_SERIES:
        found = trend(times, [series.of(sample) for sample in samples])
        text = f"{found.median:.1f} {series.unit}".strip()
        text += f", at most {found.spread:.2%} from it, {found.drift:+.2%} by the line "
        text += f"({found.per_hour:+.2f} an hour)"
        kept = found.spread <= FLAT and abs(found.drift) <= FLAT
        report.hold(f"{series.name} flat within {FLAT:.0%}", text, kept)
    report.figures["resident_mib"] = {
        name: {
            "first": round(samples[0].resident_mib[name], 1),
            "last": round(samples[-1].resident_mib[name], 1),
            "per_hour": round(trend(times, [s.resident_mib[name] for s in samples]).per_hour, 2),
        }
        for name in samples[0].resident_mib
    }
    report.figures["series"] = [
        [round(s.at - times[0], 1), *(round(series.of(s), 2) for series in FLAT_SERIES)] for s in samples
    ]


def hold_idle(report: Report, last: Sample) -> None:
    waiting = {f"{gauge} {model}": n for (gauge, model), n in last.queues.items() if n}
    report.hold("nothing waits when the load is over", str(waiting or "nothing"), not waiting)


def every_minute(seconds: float) -> Callable[[Sample], None]:
    """A line a minute, so that half an hour is not silent."""
    began, told = time.monotonic(), [0]

    def tell(sample: Sample) -> None:
        minute = int((sample.at - began) // 60)
        if minute > told[0]:
            told[0] = minute
            resident, opened = sum(sample.resident_mib.values()), sum(sample.descriptors.values())
            print(
                f"  minute {minute} of {seconds / 60:.0f}: resident {resident:.0f} MiB, "
                f"shared {sample.shared_mib:.1f} MiB, {opened} descriptors",
                flush=True,
            )

    return tell
