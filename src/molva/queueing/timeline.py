"""Timing diagrams: who arrives when, waits in which place, is served by whom, leaves or is refused.

A ``Timeline`` is a list of jobs and a window of time. The jobs are those of a short run: exact
fractions of a second where nothing is drawn by lot, so that instants that should meet do meet.
Jobs that were recorded elsewhere can be drawn too.

    jobs ──▶ Timeline ──▶ bars, stays, arrivals, refusals, departures ──▶ text, PNG, SVG

Only numbers are made here; ``drawing/`` makes pictures of them.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final, final

from molva.queueing.distributions import as_deterministic
from molva.queueing.errors import ParameterError
from molva.queueing.model import Bulk, Model, Priority, Recorded, Renewal
from molva.queueing.quantities import time_text
from molva.queueing.simulate import Fate, Job, events

__all__ = ["EXACT", "Bar", "Stay", "Timeline", "is_determined"]

# The road of a timeline in which nothing is drawn by lot.
EXACT: Final = "exact"

# Jobs that arrive in a window for which no length is given: enough to see what repeats, few
# enough that each of them is seen. Where lots are drawn, more are needed to see anything.
_USUAL_JOBS: Final = 8
_DRAWN_JOBS: Final = 24

# Jobs that are played for one picture, a few seconds of work. More are no longer seen.
_MOST_JOBS: Final = 100_000

# Jobs beyond those expected in a window that are played at first: five standard deviations of
# a Poisson flow, and some.
_SPREAD: Final = 5
_AT_LEAST: Final = 16


@final
@dataclass(frozen=True, slots=True)
class Bar:
    """A server at work: on one job, or on several that it took in bulk.

    Attributes:
        server: From 1.
        begin: Seconds.
        end: Seconds.
        jobs: Their numbers, from 1, ascending.
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
        end: Seconds, when it is served or has waited long enough.
        job: Its number, from 1.
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
        jobs: In the order of arrival, each to its end.
        begin: Seconds.
        end: Seconds, after ``begin``.
        road: ``exact``, or of which simulation.
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
        seed: int = 0,
    ) -> "Timeline":
        """Return what happens at ``model``, which is empty at 0 s.

        The first jobs arrive at 0 s where gaps are constant or recorded.

        Args:
            model: A model, or its notation.
            begin: Seconds after which to look.
            duration: Seconds to look; without it, as long as some jobs take to come.
            seed: Decides what is drawn by lot. The same gives the same run.

        Raises:
            ParameterError: The window is none, or holds more jobs than can be seen.
            MissingLibraryError: numpy is not installed.

        Example:
            Two requests at each millisecond, half a millisecond to serve one, no place to wait.

            >>> adder = Timeline.of("2*D(1ms)/D(0.5ms)/1", duration=Fraction("0.003"))
            >>> [job.index for job in adder.jobs if job.fate == "refused"]
            [1, 3, 5]
        """
        if isinstance(model, str):
            model = Model.parse(model)
        first = Fraction(begin)
        last = first + (_usual_duration(model) if duration is None else Fraction(duration))
        road = EXACT if is_determined(model) else f"simulation, seed {seed}"
        return cls(model, tuple(_jobs_until(model, last, seed)), first, last, road)

    @property
    def bars(self) -> tuple[Bar, ...]:
        """The work of the servers within the window, by server and time; cut at its edges."""
        together: dict[tuple[int, Fraction, Fraction], list[int]] = {}
        for job in self.jobs:
            for part in job.stretches:
                work = (part.server + 1, Fraction(part.begin), Fraction(part.end))
                together.setdefault(work, []).append(job.index + 1)
        return tuple(
            Bar(server, max(begin, self.begin), min(end, self.end), tuple(numbers))
            for (server, begin, end), numbers in sorted(together.items())
            if end > self.begin and begin < self.end
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
        return self._instants(job.arrival for job in self.jobs)

    @property
    def refusals(self) -> tuple[Fraction, ...]:
        """Instants at which a job is refused, ascending; one for each job."""
        return self._instants(job.arrival for job in self.jobs if job.fate == "refused")

    @property
    def departures(self) -> tuple[Fraction, ...]:
        """Instants at which a job leaves served, ascending; one for each job."""
        return self._leaving("served")

    @property
    def abandonments(self) -> tuple[Fraction, ...]:
        """Instants at which a job has waited long enough and goes, ascending."""
        return self._leaving("abandoned")

    @property
    def present(self) -> tuple[Job, ...]:
        """Jobs that were there within the window, or were refused in it, as they came."""
        return tuple(
            job
            for job in self.jobs
            if job.arrival < self.end
            and (job.arrival >= self.begin or (job.departure or self.begin) > self.begin)
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
        return max((bar.server for bar in self.bars), default=0)

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

    def _instants(self, times: Iterable[Fraction | float]) -> tuple[Fraction, ...]:
        """Return those of arrivals within the window."""
        return tuple(Fraction(at) for at in times if self.begin <= at < self.end)

    def _leaving(self, fate: Fate) -> tuple[Fraction, ...]:
        """Return those of departures: one at the end belongs to the window, one at begin not."""
        left = (job.departure for job in self.jobs if job.fate == fate)
        ends = sorted(Fraction(at) for at in left if at is not None)
        return tuple(at for at in ends if self.begin < at <= self.end)


def is_determined(model: Model) -> bool:
    """Whether nothing is drawn by lot: gaps, service, patience, and who is next."""
    arrivals = model.arrivals
    gaps_known = isinstance(arrivals, Recorded) or (
        isinstance(arrivals, Renewal) and as_deterministic(arrivals.gap) is not None
    )
    service_known = isinstance(model.service, Bulk) or as_deterministic(model.service) is not None
    patience_known = model.patience is None or as_deterministic(model.patience) is not None
    next_known = model.discipline != "random" and not isinstance(model.discipline, Priority)
    return gaps_known and service_known and patience_known and next_known


def _require_possible(job: Job) -> None:
    """Refuse a job whose instants do not ascend, or that is served and never leaves."""
    times = [job.arrival]
    for part in job.stretches:
        times += [part.begin, part.end]
    if job.departure is not None:
        times.append(job.departure)
    if any(later < earlier for earlier, later in itertools.pairwise(times)):
        shown = ", ".join(f"{float(at):.6g} s" for at in times)
        raise ParameterError(
            f"the instants of job {job.index + 1} do not ascend: it arrives, is served and "
            f"leaves at {shown}"
        )
    if job.fate == "refused" and len(times) > 1:
        raise ParameterError(f"job {job.index + 1} is refused, so it is not served and leaves not")
    if job.fate != "refused" and job.departure is None:
        raise ParameterError(f"job {job.index + 1} is {job.fate}, so it needs a departure")


def _usual_duration(model: Model) -> Fraction:
    """Return the seconds in which some jobs come, or two are served; whole gaps."""
    arrivals, service = model.arrivals, model.service
    gap = arrivals.gap.mean if isinstance(arrivals, Renewal) else 1 / arrivals.rate
    long = service.time(service.limit) if isinstance(service, Bulk) else service.mean
    jobs = _USUAL_JOBS if is_determined(model) else _DRAWN_JOBS
    return max(math.ceil(jobs / arrivals.rate / gap), math.ceil(2 * long / gap)) * gap


def _jobs_until(model: Model, end: Fraction, seed: int) -> list[Job]:
    """Return all jobs that arrive before ``end``, each to its end."""
    expected = float(end * model.arrivals.rate)
    if expected > _MOST_JOBS:
        raise ParameterError(
            f"some {expected:.3g} jobs arrive until {float(end):.6g} s; a timeline is played for "
            f"at most {_MOST_JOBS}"
        )
    count = _AT_LEAST + math.ceil(expected + _SPREAD * math.sqrt(expected))
    while True:
        jobs = events(model, count, seed)
        if jobs[-1].arrival >= end:
            return [job for job in jobs if job.arrival < end]
        if count > 2 * _MOST_JOBS:
            raise ParameterError(f"more than {_MOST_JOBS} jobs arrive until {float(end):.6g} s")
        count *= 2


def _stays(jobs: Iterable[Job]) -> Iterator[Stay]:
    """Give each job that waits the lowest place that is free when it begins to."""
    free: list[int] = []
    taken: list[tuple[Fraction, int]] = []
    for begin, end, number in sorted(_waits(jobs)):
        while taken and taken[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(taken)[1])
        place = heapq.heappop(free) if free else len(taken) + 1
        heapq.heappush(taken, (end, place))
        yield Stay(place, begin, end, number)


def _waits(jobs: Iterable[Job]) -> Iterator[tuple[Fraction, Fraction, int]]:
    """Yield from when to when which job waited; one that is interrupted waits again."""
    for job in jobs:
        since = job.arrival
        for part in job.stretches:
            if part.begin > since:
                yield Fraction(since), Fraction(part.begin), job.index + 1
            since = part.end
        if job.fate == "abandoned" and job.departure is not None:
            yield Fraction(since), Fraction(job.departure), job.index + 1
