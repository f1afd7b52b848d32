"""Timing diagrams: who arrives when, waits in which place, is served by whom, leaves or is refused.

A ``Timeline`` is a list of jobs and a window of time. Where everything is determined, jobs
are played here in exact fractions of a second, so instants that should meet do meet; where
something is drawn by lot, the simulator plays them. Jobs that were recorded elsewhere can be
drawn too.

    jobs ──▶ Timeline ──▶ bars, stays, arrivals, refusals, departures ──▶ text, PNG, SVG

Only numbers are made here; ``drawing/`` makes pictures of them.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final, final

from molva.queueing.distributions import Trace, as_deterministic
from molva.queueing.errors import NoAnalysisError, ParameterError
from molva.queueing.model import Bulk, Model, Recorded, Renewal, Service
from molva.queueing.quantities import time_text

__all__ = ["EXACT", "Bar", "Job", "Stay", "Timeline", "is_determined"]

# The road of a timeline in which nothing is drawn by lot.
EXACT: Final = "exact"

# Jobs that arrive in a window for which no length is given: enough to see what repeats, few
# enough that each of them is seen.
_USUAL_JOBS: Final = 8

# Jobs that are played for one picture, a few seconds of work. More are no longer seen.
_MOST_JOBS: Final = 100_000


@final
@dataclass(frozen=True, slots=True)
class Job:
    """One job. Instants are seconds, exact; None is what never happened to it.

    Attributes:
        number: From 1, in the order of arrival.
        arrival: When it came.
        start: When a server took it; None where it was refused.
        departure: When it was done.
        server: Who served it, from 1.
    """

    number: int
    arrival: Fraction
    start: Fraction | None = None
    departure: Fraction | None = None
    server: int | None = None

    @property
    def is_refused(self) -> bool:
        """Whether it found no server and no place."""
        return self.start is None


@final
@dataclass(frozen=True, slots=True)
class Bar:
    """A server at work: on one job, or on several that it took in bulk.

    Attributes:
        server: From 1.
        begin: Seconds.
        end: Seconds.
        jobs: Their numbers, ascending.
    """

    server: int
    begin: Fraction
    end: Fraction
    jobs: tuple[int, ...]

    @property
    def name(self) -> str:
        """What a drawing writes on it: 7, 7–9, or 7+2 where others came in between."""
        first, last, count = self.jobs[0], self.jobs[-1], len(self.jobs)
        if count == 1:
            return str(first)
        return f"{first}–{last}" if last - first == count - 1 else f"{first}+{count - 1}"


@final
@dataclass(frozen=True, slots=True)
class Stay:
    """A job in a waiting place, the lowest that was free when it came.

    Attributes:
        place: From 1.
        begin: Seconds, its arrival.
        end: Seconds, the start of its service.
        job: Its number.
    """

    place: int
    begin: Fraction
    end: Fraction
    job: int


@final
@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened at a station between two instants.

    The window lies after the departures at ``begin`` and before the arrivals at ``end``: at
    the same instant a departure comes before an arrival, and the cut is between the two.

    Attributes:
        model: The station.
        jobs: In the order of arrival, from an empty station on; each is played to its end.
        begin: Seconds.
        end: Seconds, after ``begin``.
        road: ``exact``, or from which simulation.
    """

    model: Model
    jobs: tuple[Job, ...]
    begin: Fraction
    end: Fraction
    road: str = EXACT

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ParameterError(
                f"a timeline begins at 0 or later and ends after it began; it is to go from "
                f"{time_text(self.begin)} to {time_text(self.end)}"
            )
        for job in self.jobs:
            _require_possible(job)

    @classmethod
    def of(
        cls,
        model: Model | str,
        *,
        begin: Fraction | int = 0,
        duration: Fraction | int | None = None,
    ) -> "Timeline":
        """Return what happens at ``model``, which is empty at 0 s.

        The first jobs arrive at 0 s where gaps are constant, and where they are recorded.

        Args:
            model: A model, or its notation.
            begin: Seconds after which to look.
            duration: Seconds to look; without it, as long as some eight jobs take to come.

        Raises:
            NoAnalysisError: Something is drawn by lot.
            ParameterError: The window is none, or holds more jobs than can be seen.

        Example:
            Two requests at each millisecond, half a millisecond to serve one, no place to wait.

            >>> adder = Timeline.of("2*D(1ms)/D(0.5ms)/1", duration=Fraction("0.003"))
            >>> [job.number for job in adder.jobs if job.is_refused]
            [2, 4, 6]
        """
        if isinstance(model, str):
            model = Model.parse(model)
        first = Fraction(begin)
        last = first + (_usual_duration(model) if duration is None else Fraction(duration))
        _require_few(model, last)
        if not is_determined(model):
            raise NoAnalysisError(f"{model} draws by lot, so its timeline comes from a simulation")
        return cls(model, tuple(_play(model, last)), first, last)

    @property
    def bars(self) -> tuple[Bar, ...]:
        """The work of the servers within the window, by server and time; cut at its edges."""
        together: dict[tuple[int, Fraction, Fraction], list[int]] = {}
        for job in self.jobs:
            if job.start is not None and job.departure is not None and job.server is not None:
                together.setdefault((job.server, job.start, job.departure), []).append(job.number)
        return tuple(
            Bar(server, max(start, self.begin), min(end, self.end), tuple(numbers))
            for (server, start, end), numbers in sorted(together.items())
            if end > self.begin and start < self.end
        )

    @property
    def stays(self) -> tuple[Stay, ...]:
        """Who waits where within the window, by place and time; cut at its edges."""
        return tuple(
            Stay(stay.place, max(stay.begin, self.begin), min(stay.end, self.end), stay.job)
            for stay in sorted(_stays(self.jobs), key=lambda stay: (stay.place, stay.begin))
            if stay.end > self.begin and stay.begin < self.end
        )

    @property
    def arrivals(self) -> tuple[Fraction, ...]:
        """Instants at which a job comes, ascending; one for each job."""
        return tuple(job.arrival for job in self.jobs if self.begin <= job.arrival < self.end)

    @property
    def refusals(self) -> tuple[Fraction, ...]:
        """Instants at which a job is refused, ascending; one for each job."""
        refused = (job.arrival for job in self.jobs if job.is_refused)
        return tuple(at for at in refused if self.begin <= at < self.end)

    @property
    def departures(self) -> tuple[Fraction, ...]:
        """Instants at which a job leaves served, ascending; one for each job."""
        ends = sorted(job.departure for job in self.jobs if job.departure is not None)
        return tuple(at for at in ends if self.begin < at <= self.end)

    @property
    def present(self) -> tuple[Job, ...]:
        """Jobs that were there within the window, or were refused in it, as they came."""
        return tuple(
            job
            for job in self.jobs
            if job.arrival < self.end
            and (self.begin <= job.arrival or (job.departure or self.begin) > self.begin)
        )

    @property
    def duration(self) -> Fraction:
        """Seconds from begin to end."""
        return self.end - self.begin

    @property
    def busy_shares(self) -> tuple[Fraction, ...]:
        """Share of the window that each server works, from server 1 on."""
        busy = [Fraction(0)] * self.servers
        for bar in self.bars:
            busy[bar.server - 1] += bar.end - bar.begin
        return tuple(each / self.duration for each in busy)

    @property
    def servers(self) -> int:
        """How many there are; of any number, how many had work."""
        if self.model.servers is not None:
            return self.model.servers
        return max((job.server for job in self.jobs if job.server is not None), default=0)

    def text(self, width: int = 80) -> str:
        """Return the drawing for a terminal of ``width`` columns, lines without ends."""
        from molva.queueing.drawing import timeline_text

        return timeline_text.drawn(self, width)

    def save(self, path: str | Path) -> None:
        """Write the picture to ``path``: .png, .svg or .txt.

        Raises:
            ParameterError: The ending is none of these, or the file cannot be written.
            MissingLibraryError: PNG and SVG need matplotlib, the extra ``plot``.
        """
        from molva.queueing.drawing import files, timeline_figure

        files.save(path, text=self.text, figure=lambda: timeline_figure.drawn(self))


def is_determined(model: Model) -> bool:
    """Whether nothing is drawn by lot: constant or recorded gaps, constant service, no lottery."""
    arrivals = model.arrivals
    gaps_known = isinstance(arrivals, Recorded) or (
        isinstance(arrivals, Renewal) and as_deterministic(arrivals.gap) is not None
    )
    service_known = isinstance(model.service, Bulk) or as_deterministic(model.service) is not None
    return gaps_known and service_known and model.discipline != "random"


def _require_possible(job: Job) -> None:
    """Refuse a job that ends before it begins, or is served by nobody."""
    if job.start is None:
        if job.departure is not None or job.server is not None:
            raise ParameterError(f"job {job.number} has no start, but a departure or a server")
        return
    if job.departure is None or job.server is None or job.server < 1:
        raise ParameterError(f"job {job.number} starts, so it needs a departure and a server ≥ 1")
    if not job.arrival <= job.start <= job.departure:
        raise ParameterError(
            f"job {job.number} arrives at {time_text(job.arrival)}, starts at "
            f"{time_text(job.start)} and departs at {time_text(job.departure)}, which is no order"
        )


def _usual_duration(model: Model) -> Fraction:
    """Return the seconds in which some eight jobs come, or two are served; whole gaps."""
    arrivals, service = model.arrivals, model.service
    gap = arrivals.gap.mean if isinstance(arrivals, Renewal) else 1 / arrivals.rate
    long = service.time(service.limit) if isinstance(service, Bulk) else service.mean
    return max(math.ceil(_USUAL_JOBS / arrivals.rate / gap), math.ceil(2 * long / gap)) * gap


def _require_few(model: Model, until: Fraction) -> None:
    expected = until * model.arrivals.rate
    if expected > _MOST_JOBS:
        raise ParameterError(
            f"some {float(expected):.3g} jobs arrive until {time_text(until)}; a timeline is "
            f"played for at most {_MOST_JOBS}"
        )


def _stays(jobs: Iterable[Job]) -> Iterator[Stay]:
    """Give each job that waits the lowest place that is free when it comes."""
    free: list[int] = []
    taken: list[tuple[Fraction, int]] = []
    for job in jobs:
        if job.start is None or job.start == job.arrival:
            continue
        while taken and taken[0][0] <= job.arrival:
            heapq.heappush(free, heapq.heappop(taken)[1])
        place = heapq.heappop(free) if free else len(taken) + 1
        heapq.heappush(taken, (job.start, place))
        yield Stay(place, job.arrival, job.start, job.number)


# What is determined, played.


def _play(model: Model, until: Fraction) -> list[Job]:
    """Return the jobs that arrive before ``until``, each played to its end."""
    station = _Station(model)
    for at in _instants(model):
        if at >= until:
            break
        station.arrive(at)
    station.finish()
    return station.jobs


def _instants(model: Model) -> Iterator[Fraction]:
    """Yield the instants of arrivals, from 0 s on; one for each job."""
    arrivals = model.arrivals
    if isinstance(arrivals, Recorded):
        # A trace holds decimals. Its doubles, as often a product with a unit, are a rounding
        # away from them, which 15 digits do not show.
        assert isinstance(arrivals.instants, Trace)
        instants = [Fraction(f"{value:.15g}") for value in arrivals.instants.values]
        yield from (at - instants[0] for at in instants)
        return
    assert isinstance(arrivals, Renewal)
    index = 0
    while True:
        for _ in range(arrivals.batch):
            yield index * arrivals.gap.mean
        index += 1


class _Station:
    """Servers and waiting places; ``jobs`` are those that have come."""

    def __init__(self, model: Model) -> None:
        self.servers, self.waiting = model.servers, model.waiting
        self.lifo = model.discipline == "lifo"
        self.service: Service = model.service
        self.jobs: list[Job] = []
        self.line: deque[int] = deque()  # indexes into jobs
        self.busy: list[tuple[Fraction, int]] = []  # when a server is done, and which
        self.idle: list[int] = []  # servers that have worked and are free, as a heap
        self.used = 0  # servers that have ever worked

    def arrive(self, at: Fraction) -> None:
        self.pass_time(at)
        self.jobs.append(Job(len(self.jobs) + 1, at))
        self.line.append(len(self.jobs) - 1)
        server = self.free_server()
        if server is not None:
            self.serve(server, at)
        elif self.waiting is not None and len(self.line) > self.waiting:
            self.line.pop()  # refused: it keeps no start

    def finish(self) -> None:
        while self.busy:
            self.pass_time(self.busy[0][0])

    def pass_time(self, now: Fraction) -> None:
        """Let all depart that are done by ``now``, and those behind them begin."""
        while self.busy and self.busy[0][0] <= now:
            end, server = heapq.heappop(self.busy)
            if self.line:
                self.serve(server, end)
            else:
                heapq.heappush(self.idle, server)

    def free_server(self) -> int | None:
        if self.idle:
            return heapq.heappop(self.idle)
        if self.servers is None or self.used < self.servers:
            self.used += 1
            return self.used
        return None

    def serve(self, server: int, at: Fraction) -> None:
        """Let ``server`` take who is next; in bulk, who are."""
        limit = self.service.limit if isinstance(self.service, Bulk) else 1
        count = min(limit, len(self.line))
        time = self.service.time(count) if isinstance(self.service, Bulk) else self.service.mean
        for _ in range(count):
            index = self.line.pop() if self.lifo else self.line.popleft()
            job = self.jobs[index]
            self.jobs[index] = Job(job.number, job.arrival, at, at + time, server)
        heapq.heappush(self.busy, (at + time, server))
