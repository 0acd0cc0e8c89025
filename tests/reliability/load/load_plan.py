"""Who sends what when: the shots of a run by kind and model, Poisson arrivals of them, and the capacity that
rates are shares of."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import load_pool as pool
from load_figures import milliseconds, outcomes, work_rate
from load_generator import ANSWERED, Loop, Plan, Record, Result
from load_observer import GENERATOR, SERVER, Observer
from load_served import ENCODERS, LLM, MODELS
from load_work import Shot

from client.bench.loadgen import arrivals as poisson
from triton_repo.server import Server

Kind = Literal["usual", "urgent", "left", "refused", "unreadable"]
Arrivals = list[tuple[float, int]]
Groups = Sequence[tuple[Sequence[int], int]]  # places in the shots, and how many callers take turns at them

# Callers of the closed loop: enough that requests always wait, and few enough that none waits for too long.
_CALLERS = dict.fromkeys(ENCODERS, 8) | {LLM: 12}
_WARM_UP_S = 5.0
CAPACITY_S = 20.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the server answers when callers of every model wait for it together: requests and work per second
    and the median latency by model, seconds of processor time per second by process."""

    requests: Mapping[str, float]
    work: Mapping[str, float]
    p50_ms: Mapping[str, float]
    cpu: Mapping[str, float]
    rejected: int

    def share(self, work: Mapping[str, float]) -> float:
        """Work per second as a share of the capacity: of each model's as its process's share of the cores."""
        total = sum(self.cpu[model] for model in MODELS)
        return sum(self.cpu[model] / total * work[model] / self.work[model] for model in MODELS)


@dataclass(slots=True)
class Range:
    """A server, the generator, and everything that can be sent: `places` by kind and model."""

    server: Server
    submit: Callable[[Plan | Loop], Future[Result]]
    generator_pid: int
    shots: list[Shot] = field(default_factory=list)
    places: dict[tuple[Kind, str], list[int]] = field(default_factory=dict)

    def load(self, seed: int = 5) -> None:
        """Make the shots; takes seconds, since every expected answer is computed here."""
        rng = random.Random(seed)
        for model in MODELS:
            usual = pool.answered(model, rng)
            self._add("usual", usual)
            self._add("urgent", pool.urgent(usual))
            self._add("unreadable", [pool.unreadable(usual[0])])
            self._add("left", pool.left(usual))
        self._add("refused", pool.refused())

    def observer(self) -> Observer:
        """To be entered: looks at the server, and at what the generator takes of its cores."""
        return Observer(self.server, also={GENERATOR: self.generator_pid})

    def model(self, record: Record) -> str:
        return self.shots[record.shot].model

    def work(self, record: Record) -> int:
        return self.shots[record.shot].work

    def of(self, records: Sequence[Record], model: str) -> list[Record]:
        return [record for record in records if self.model(record) == model]

    def open(self, arrivals: Arrivals, *, retries: bool = False) -> Future[Result]:
        """Send at these times, in the generator's process."""
        address = self.server.urls["grpc"]
        ordered = sorted(arrivals)
        return self.submit(Plan(address=address, shots=self.shots, arrivals=ordered, retries=retries))

    def closed(self, groups: Groups, seconds: float, *, once: bool = False) -> Result:
        """Callers that wait for their answers, for so many seconds or until each shot was sent `once`."""
        address = self.server.urls["grpc"]
        loop = Loop(address=address, shots=self.shots, groups=groups, seconds=seconds, once=once)
        return self.submit(loop).result()

    def arrivals(
        self, rates: Mapping[str, float], begin: float, end: float, *, kinds: Mapping[Kind, float], seed: int
    ) -> Arrivals:
        """Poisson arrivals of `rates` requests per second by model; `kinds`: the share of each kind."""
        rng = random.Random(seed)
        found: Arrivals = []
        for number, (model, rate) in enumerate(rates.items()):
            for at in poisson(rate, end - begin, seed * 100 + number):
                kind = rng.choices(list(kinds), list(kinds.values()))[0]
                found.append((begin + at, rng.choice(self.places[kind, model])))
        return found

    def one_by_one(self) -> Result:
        """Every request that must be answered, one at a time: warm-up, and proof of the expected answers."""
        places = [place for model in MODELS for place in self.places["usual", model]]
        places += [self.places["urgent", model][0] for model in MODELS]
        return self.closed([(places, 1)], 600.0, once=True)

    def capacity(self, seconds: float) -> Capacity:
        """Measured over `seconds`, behind a warm-up."""
        groups = [(self.places["usual", model], _CALLERS[model]) for model in MODELS]
        with self.observer() as seen:
            result = self.closed(groups, _WARM_UP_S + seconds)
        begin, end = _WARM_UP_S, _WARM_UP_S + seconds
        records = [record for record in result.records if begin <= record.at + record.done < end]
        answered = {m: [r for r in self.of(records, m) if r.outcome == ANSWERED] for m in MODELS}
        names = (SERVER, *MODELS, GENERATOR)
        return Capacity(
            requests={model: len(found) / seconds for model, found in answered.items()},
            work={m: work_rate(found, self.work, begin, end) for m, found in answered.items()},
            p50_ms={m: milliseconds((r.first for r in found), 0.5) for m, found in answered.items()},
            cpu={n: seen.cpu_s(n, result.began + begin, result.began + end) / seconds for n in names},
            rejected=len(records) - outcomes(records)[ANSWERED],
        )

    def _add(self, kind: Kind, shots: Sequence[Shot]) -> None:
        for shot in shots:
            self.places.setdefault((kind, shot.model), []).append(len(self.shots))
            self.shots.append(shot)
