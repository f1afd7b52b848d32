"""What happens to each job of a short run: for timing diagrams, and to check the kernels.

This plays the same draws as a long run, in plain Python and another way: servers have
numbers, and every job keeps its record. Long runs are for ``run.py``.
"""

import heapq
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from molva.queueing.errors import ParameterError
from molva.queueing.model import Bulk, Model, Priority
from molva.queueing.simulate.arrivals import source_of
from molva.queueing.simulate.demands import demands_of
from molva.queueing.simulate.job import Fate, Job, Stretch, Time
from molva.queueing.simulate.streams import Streams
from molva.queueing.simulate.units import Clock, clock_of

__all__ = ["events"]

# Jobs that are kept one by one. More, and looking through those that wait takes minutes.
_MOST_JOBS: Final = 1_000_000


def events(model: Model | str, jobs: int, seed: int = 0) -> list[Job]:
    """Return the first jobs of a run; see ``molva.queueing.events``."""
    if isinstance(model, str):
        model = Model.parse(model)
    if not 1 <= jobs <= _MOST_JOBS:
        raise ParameterError(f"a run of single jobs has from 1 to {_MOST_JOBS}, not {jobs}")
    clock = clock_of(model)
    station = _Station(model, clock, jobs, seed)
    for index in range(jobs):
        station.arrive(index)
    station.pass_time(math.inf)
    return [station.job(index) for index in range(jobs)]


@dataclass(slots=True)
class _Work:
    """What one server does."""

    end: float
    order: int
    server: int
    jobs: list[int]
    begin: float

    def __lt__(self, other: "_Work") -> bool:
        return (self.end, self.order) < (other.end, other.order)


class _Station:
    """Servers and waiting places, in units of the clock since the start of the run."""

    def __init__(self, model: Model, clock: Clock, jobs: int, seed: int) -> None:
        streams = Streams(seed, 0)
        source = source_of(model, clock, streams, moved=False)
        arrivals: list[float] = []
        now = 0.0
        while len(arrivals) < jobs:
            for gap in source.take(jobs - len(arrivals), jobs - len(arrivals))[0].tolist():
                now += gap
                arrivals.append(now)
        demands = demands_of(model, clock, streams)
        drawn = demands.take(jobs)
        self.model, self.clock = model, clock
        self.arrivals = arrivals[:jobs]
        self.left = drawn.services.tolist()
        self.ranks = drawn.ranks.tolist() or [0] * jobs
        patience = drawn.patience.tolist() or [math.inf] * jobs
        self.deadlines = [at + most for at, most in zip(self.arrivals, patience, strict=True)]
        self.picks = demands.picks
        self.waiting: list[int] = []
        self.busy: list[_Work] = []
        self.idle: list[int] = list(range(model.servers or 0))
        self.servers = model.servers or 0
        self.started = 0
        self.fates: list[Fate] = ["served"] * jobs
        self.departures: list[float | None] = [None] * jobs
        self.stretches: list[list[tuple[float, float, int]]] = [[] for _ in range(jobs)]

    def arrive(self, index: int) -> None:
        now = self.arrivals[index]
        self.pass_time(now)
        model = self.model
        if model.servers is None and not self.idle:
            self.idle, self.servers = [self.servers], self.servers + 1
        if self.idle:
            self.start([index], now)
        elif model.waiting is not None and len(self.waiting) >= model.waiting:
            self.fates[index] = "refused"
        elif (worst := self._interruptible(self.ranks[index])) is not None:
            self.interrupt(worst, now)
            self.start([index], now)
        else:
            self.waiting.append(index)

    def pass_time(self, until: float) -> None:
        """Let everything happen up to ``until``, and at it; a departure goes first."""
        while True:
            end = self.busy[0].end if self.busy else math.inf
            leave = math.inf
            if self.model.patience is not None:
                leave = min((self.deadlines[job] for job in self.waiting), default=math.inf)
            if min(end, leave) > until or (until == min(end, leave) == math.inf):
                return
            if end <= leave:
                self.complete(end)
            else:
                self.abandon(leave)

    def complete(self, now: float) -> None:
        work = heapq.heappop(self.busy)
        for job in work.jobs:
            self.stretches[job].append((work.begin, now, work.server))
            self.departures[job] = now
        heapq.heappush(self.idle, work.server)
        if self.waiting:
            most = self.model.service.limit if isinstance(self.model.service, Bulk) else 1
            taken = [self.next_job() for _ in range(min(most, len(self.waiting)))]
            self.start(taken, now)

    def abandon(self, now: float) -> None:
        leaving = next(job for job in self.waiting if self.deadlines[job] == now)
        self.take(self.waiting.index(leaving))
        self.fates[leaving], self.departures[leaving] = "abandoned", now

    def next_job(self) -> int:
        """Take out the job that is next among those that wait."""
        discipline = self.model.discipline
        place = 0
        if discipline == "lifo":
            place = -1
        elif discipline == "random":
            place = int(self.picks() * len(self.waiting))
        elif isinstance(discipline, Priority):
            # Those that were interrupted have begun, and stand before others of their class.
            place = min(
                range(len(self.waiting)),
                key=lambda at: (self.ranks[self.waiting[at]], not self.stretches[self.waiting[at]]),
            )
        return self.take(place)

    def take(self, place: int) -> int:
        """Take out the job at a place of those that wait."""
        if self.model.discipline == "random":
            # The last moves to its place, as in the kernel: a draw means the same job in both.
            self.waiting[place], self.waiting[-1] = self.waiting[-1], self.waiting[place]
            place = -1
        return self.waiting.pop(place)

    def start(self, jobs: list[int], now: float) -> None:
        service = self.model.service
        if isinstance(service, Bulk):
            time = self.clock.units(service.base) + len(jobs) * self.clock.units(service.per_job)
        else:
            time = self.left[jobs[0]]
        self.started += 1
        server = heapq.heappop(self.idle)
        heapq.heappush(self.busy, _Work(now + time, self.started, server, jobs, now))

    def interrupt(self, work: _Work, now: float) -> None:
        self.busy.remove(work)
        heapq.heapify(self.busy)
        [job] = work.jobs
        self.left[job] = work.end - now
        self.stretches[job].append((work.begin, now, work.server))
        heapq.heappush(self.idle, work.server)
        self.waiting.insert(0, job)

    def _interruptible(self, rank: int) -> _Work | None:
        """Return the work that makes way: of the least urgent class the one that ends last."""
        discipline = self.model.discipline
        if not isinstance(discipline, Priority) or not discipline.preemptive:
            return None
        worst = max(self.busy, key=lambda work: (self.ranks[work.jobs[0]], work.end))
        return worst if self.ranks[worst.jobs[0]] > rank else None

    def job(self, index: int) -> Job:
        departure = self.departures[index]
        return Job(
            index=index,
            arrival=self.seconds(self.arrivals[index]),
            fate=self.fates[index],
            departure=None if departure is None else self.seconds(departure),
            stretches=tuple(
                Stretch(self.seconds(begin), self.seconds(end), server)
                for begin, end, server in self.stretches[index]
            ),
            rank=self.ranks[index],
        )

    def seconds(self, units: float) -> Time:
        exact = Fraction(units) * self.clock.unit
        return exact if self.clock.is_exact else float(exact)
