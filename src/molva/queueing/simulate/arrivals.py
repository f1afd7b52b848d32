"""Arrivals as gaps between one job and the next, in units of the model's clock.

A source measures a run in a unit of its own: jobs, or whole periods where the rate rises and
falls, because a mean over half a day says nothing of a day.
"""

import math
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from molva.queueing.distributions import Trace, as_deterministic
from molva.queueing.model import Model, RandomRate, Recorded, Renewal, Sinusoid
from molva.queueing.simulate.draws import Floats, fill_of
from molva.queueing.simulate.streams import Role, Streams
from molva.queueing.simulate.units import Clock

__all__ = ["Source", "source_of"]


class Source(Protocol):
    """A flow of arrivals.

    Attributes:
        jobs_each: Mean jobs in one unit of the measure: 1, or those of a period.
    """

    jobs_each: float

    def take(self, measure: int, most: int) -> tuple[Floats, int]:
        """Return the next gaps, and how much of ``measure`` they are.

        Args:
            measure: Jobs, or periods, that are wanted; at least 1.
            most: Jobs for which there is room. Of periods there may come a few more.
        """


def source_of(model: Model, clock: Clock, streams: Streams, *, moved: bool) -> Source:
    """Return the arrivals of ``model``.

    Args:
        model: What is played.
        clock: Its unit of time.
        streams: Of the replication.
        moved: Whether a trace starts at a place drawn by lot, not with its first instant.
    """
    arrivals, generators = model.arrivals, streams.of(Role.ARRIVALS)
    if isinstance(arrivals, Sinusoid):
        return _Waves(arrivals, clock, generators)
    if isinstance(arrivals, Recorded):
        return _Replay(arrivals, clock, generators[0] if moved else None)
    return _Renewals(arrivals, clock, generators)


class _Renewals:
    """Independent gaps; the jobs of one instant follow one another with gaps of 0."""

    jobs_each = 1.0

    def __init__(
        self, arrivals: Renewal, clock: Clock, generators: list[np.random.Generator]
    ) -> None:
        self._fill = fill_of(arrivals.gap, clock, generators)
        self._batch = arrivals.batch
        # Where all is constant the first job comes at once: a schedule starts at 0.
        self._at_once = as_deterministic(arrivals.gap) is not None
        self._place = 0  # of the next job among those of its instant
        self._started = False

    def take(self, measure: int, most: int) -> tuple[Floats, int]:
        jobs = min(measure, most)
        gaps = np.zeros(jobs)
        if self._batch == 1:
            self._fill(gaps)
        else:
            first = -self._place % self._batch
            heads = np.empty(len(range(first, jobs, self._batch)))
            self._fill(heads)
            gaps[first :: self._batch] = heads
            self._place = (self._place + jobs) % self._batch
        if self._at_once and not self._started:
            gaps[0] = 0.0
        self._started = True
        return gaps, jobs


class _Replay:
    """The gaps of a trace, over and over; after its last instant comes a mean gap."""

    jobs_each = 1.0

    def __init__(
        self, arrivals: Recorded, clock: Clock, generator: np.random.Generator | None
    ) -> None:
        assert isinstance(arrivals.instants, Trace)
        instants = clock.round(arrivals.instants.values)
        gaps = np.diff(instants)
        mean = float(gaps.mean())
        self._gaps = np.append(gaps, np.rint(mean) if clock.is_exact else mean)
        self._at = 0 if generator is None else int(generator.integers(self._gaps.size))
        self._started = generator is not None

    def take(self, measure: int, most: int) -> tuple[Floats, int]:
        jobs = min(measure, most)
        places = (self._at + np.arange(jobs)) % self._gaps.size
        self._at = (self._at + jobs) % self._gaps.size
        if self._started:
            return self._gaps[places], jobs
        # The first instant is where the run begins; the gaps follow.
        self._started = True
        self._at = (self._at - 1) % self._gaps.size
        return np.concatenate([[0.0], self._gaps[places[:-1]]]), jobs


# Jobs in a slice of a period. More, and memory grows with the period; fewer, and drawing costs
# more for the slice than for the jobs.
_SLICE_JOBS: Final = 8192


class _Waves:
    """Poisson arrivals at level + amplitude · sin(2πt/period + phase), slice by slice.

    A slice is a whole period, or a part of one that has too many jobs. The number of points
    that are candidates in it is a Poisson number at the highest rate there can be; they lie
    anywhere in it and are kept with the probability rate over highest rate (Lewis and Shedler,
    1979). So no instant depends on a sum of gaps, and a period ends where it ends.
    """

    def __init__(
        self, arrivals: Sinusoid, clock: Clock, generators: list[np.random.Generator]
    ) -> None:
        self._level = float(arrivals.level * clock.unit)
        self._phase = float(arrivals.phase)
        unit = clock.unit
        self._amplitude = _Drawn(arrivals.amplitude, float(unit), generators[0])
        self._period = _Drawn(arrivals.period, float(1 / unit), generators[0])
        self._counts, self._places, self._lots = generators[1:4]
        mean = arrivals.period
        seconds = (mean.low + mean.high) / 2 if isinstance(mean, RandomRate) else mean
        self.jobs_each = float(seconds * arrivals.level)
        self._parts = max(1, math.ceil(self.jobs_each / _SLICE_JOBS))
        self._part = 0  # of the present period, that comes next
        self._present = (0.0, 0.0)  # its amplitude and length
        self._silence = 0.0  # since the last job

    def take(self, measure: int, most: int) -> tuple[Floats, int]:
        if self._parts > 1:
            return self._one_part()
        periods = max(1, min(measure, int(most / max(self.jobs_each, 1e-9))))
        amplitudes, lengths = self._drawn(periods)
        starts = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
        end = float(starts[-1] + lengths[-1])
        instants = self._points(starts, lengths, amplitudes, np.zeros(periods), lengths)
        return self._gaps(instants, end), periods

    def _drawn(self, periods: int) -> tuple[Floats, Floats]:
        """Return amplitude and length of the next periods."""
        both = np.empty((periods, 2))
        for row in both:
            row[0] = self._amplitude.next()
            row[1] = self._period.next()
        return both[:, 0], both[:, 1]

    def _one_part(self) -> tuple[Floats, int]:
        if self._part == 0:
            self._present = (self._amplitude.next(), self._period.next())
        amplitude, length = self._present
        share = length / self._parts
        offset = np.array([self._part * share])
        instants = self._points(
            np.zeros(1), np.array([share]), np.array([amplitude]), offset, np.array([length])
        )
        self._part = (self._part + 1) % self._parts
        return self._gaps(instants, share), int(self._part == 0)

    def _points(
        self, starts: Floats, widths: Floats, amplitudes: Floats, offsets: Floats, periods: Floats
    ) -> Floats:
        """Return the instants in slices, ascending.

        Args:
            starts: When each slice starts.
            widths: How long it is.
            amplitudes: Of its period.
            offsets: Time from the start of its period to that of the slice.
            periods: How long its period is.
        """
        counts = self._counts.poisson((self._level + amplitudes) * widths)
        total = int(counts.sum())
        of: NDArray[np.intp] = np.repeat(np.arange(starts.size), counts)
        inside = self._places.random(total) * widths[of]
        angle = (offsets[of] + inside) * (2 * math.pi / periods[of]) + self._phase
        rate = self._level + amplitudes[of] * np.sin(angle)
        kept = self._lots.random(total) * (self._level + amplitudes[of]) < rate
        return np.sort(starts[of[kept]] + inside[kept])

    def _gaps(self, instants: Floats, end: float) -> Floats:
        if not instants.size:
            self._silence += end
            return instants
        gaps = np.diff(instants, prepend=0.0)
        gaps[0] += self._silence
        self._silence = end - float(instants[-1])
        return gaps


class _Drawn:
    """A number of a sinusoid: fixed, or drawn anew for each period."""

    def __init__(self, number: object, scale: float, generator: np.random.Generator) -> None:
        self._generator = generator
        if isinstance(number, RandomRate):
            self._low, self._width = float(number.low) * scale, float(number.high - number.low)
            self._width *= scale
        else:
            self._low, self._width = float(number) * scale, 0.0  # type: ignore[arg-type]

    def next(self) -> float:
        """Return it for the next period."""
        if not self._width:
            return self._low
        return self._low + self._width * float(self._generator.random())
