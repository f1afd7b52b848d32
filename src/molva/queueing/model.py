"""The model of a station, A/B/n/q: what arrives, how it is served, by how many, who may wait.

``A/B/n`` has no waiting room; ``q`` counts waiting places, and ``inf`` is written out. This
is not the other common habit, where ``M/M/1`` waits without bound and the fourth letter
counts everybody in the system: ``Model.from_kendall`` reads that one.

A departure comes before an arrival at the same instant, so a job that ends at 1 s makes room
for one that arrives at 1 s.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, get_args

from molva.queueing.distributions import Distribution
from molva.queueing.errors import ParameterError
from molva.queueing.quantities import LARGEST, number_text, rate_text, time_text

__all__ = [
    "DISCIPLINES",
    "MOST_CLASSES",
    "Arrivals",
    "Bulk",
    "Discipline",
    "Model",
    "Priority",
    "RandomRate",
    "Recorded",
    "Renewal",
    "Service",
    "Sinusoid",
]

Discipline = Literal["fifo", "lifo", "random"]
DISCIPLINES: Final[tuple[Discipline, ...]] = get_args(Discipline)

# Classes of a model with priorities. Nobody tells more apart, and each costs a simulation a
# line of its own.
MOST_CLASSES: Final = 64


@dataclass(frozen=True, slots=True)
class Renewal:
    """Arrivals with independent gaps of one distribution, ``batch`` jobs at each instant."""

    gap: Distribution
    batch: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ParameterError(f"at least 1 job arrives at an instant; it is {self.batch}")

    @property
    def rate(self) -> Fraction:
        """Jobs per second."""
        return self.batch / self.gap.mean

    def __str__(self) -> str:
        return str(self.gap) if self.batch == 1 else f"{self.batch}*{self.gap}"


@dataclass(frozen=True, slots=True)
class Recorded:
    """Arrivals at the instants of a trace, replayed; its rate is that between first and last."""

    instants: "Distribution"
    gap: "Distribution"

    @property
    def rate(self) -> Fraction:
        """Jobs per second."""
        return 1 / self.gap.mean

    def __str__(self) -> str:
        return str(self.instants)


@dataclass(frozen=True, slots=True)
class RandomRate:
    """A number drawn anew for each period, uniform between two: an amplitude or a period.

    Attributes:
        low: Jobs per second, or seconds.
        high: The same unit, above ``low``.
    """

    low: Fraction
    high: Fraction

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ParameterError(
                "U goes from the smaller number to the larger, none below 0; it is given "
                f"{number_text(self.low)} and {number_text(self.high)}"
            )


@dataclass(frozen=True, slots=True)
class Sinusoid:
    """Poisson arrivals at the rate level + amplitude · sin(2πt/period + phase).

    Attributes:
        level: Jobs per second in the mean, above 0.
        amplitude: Jobs per second, or drawn for each period; at most ``level``, because a
            rate is never negative.
        period: Seconds, or drawn for each period; above 0.
        phase: Radians.
    """

    level: Fraction
    amplitude: Fraction | RandomRate
    period: Fraction | RandomRate
    phase: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        if self.level <= 0:
            raise ParameterError(f"a level must be above 0; it is {rate_text(self.level)}")
        if not 1 / LARGEST <= self.level <= LARGEST:
            raise ParameterError("a level lies between 1e-60/s and 1e60/s")
        high = self.amplitude.high if isinstance(self.amplitude, RandomRate) else self.amplitude
        if isinstance(self.amplitude, Fraction) and self.amplitude < 0:
            raise ParameterError(f"an amplitude is at least 0; it is {rate_text(self.amplitude)}")
        if high > self.level:
            raise ParameterError(
                f"the amplitude {rate_text(high)} is above the level {rate_text(self.level)}: "
                "the rate of arrivals would fall below 0"
            )
        low = self.period.low if isinstance(self.period, RandomRate) else self.period
        if low <= 0:
            raise ParameterError(f"a period must be above 0; it is {time_text(low)}")
        if not 1 / LARGEST <= low <= LARGEST:
            raise ParameterError("a period lies between 1e-60 s and 1e60 s")

    @property
    def rate(self) -> Fraction:
        """Jobs per second, over whole periods."""
        return self.level

    @property
    def is_random(self) -> bool:
        """Whether amplitude or period is drawn for each period."""
        return isinstance(self.amplitude, RandomRate) or isinstance(self.period, RandomRate)

    def __str__(self) -> str:
        amplitude, period = self.amplitude, self.period
        amplitude_text = (
            f"U({rate_text(amplitude.low)},{rate_text(amplitude.high)})"
            if isinstance(amplitude, RandomRate)
            else rate_text(amplitude)
        )
        period_text = (
            f"U({time_text(period.low)},{time_text(period.high)})"
            if isinstance(period, RandomRate)
            else time_text(period)
        )
        return (
            f"sin(level={rate_text(self.level)},amplitude={amplitude_text},"
            f"period={period_text},phase={number_text(self.phase)})"
        )


@dataclass(frozen=True, slots=True)
class Bulk:
    """Service in bulk: a free server takes what waits, up to ``limit``, as one.

    It takes the first ``limit`` jobs that wait, begins with a single one where there is no
    other, and serves k of them in ``base + per_job · k``. That is how a worker behaves that
    commits what has piled up in one transaction.

    Attributes:
        limit: Jobs in one bulk, at least 1.
        base: Seconds for each bulk, at least 0.
        per_job: Seconds for each job in it, at least 0; one of the two is above 0.
    """

    limit: int
    base: Fraction
    per_job: Fraction

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ParameterError(f"a bulk holds at least 1 job; it is given {self.limit}")
        if self.base < 0 or self.per_job < 0 or self.base + self.per_job == 0:
            raise ParameterError(
                f"a bulk takes a positive time; it is given {time_text(self.base)} and "
                f"{time_text(self.per_job)} for each job"
            )
        if not 1 / LARGEST <= self.base + self.per_job <= LARGEST:
            raise ParameterError("the time of a bulk lies between 1e-60 s and 1e60 s")

    def time(self, jobs: int) -> Fraction:
        """Return the seconds that ``jobs`` take together."""
        return self.base + self.per_job * jobs

    @property
    def mean(self) -> Fraction:
        """Seconds a job costs a server that is always full."""
        return self.time(self.limit) / self.limit

    def __str__(self) -> str:
        return f"bulk({self.limit},{time_text(self.base)} + {time_text(self.per_job)}*k)"


@dataclass(frozen=True, slots=True)
class Priority:
    """Jobs of several classes: those of the first class go first, then those of the second.

    Which class an arriving job is of is drawn by lot. Within a class the first to come goes
    first.

    Attributes:
        shares: Of the arrivals, for each class, the most urgent first; they sum to 1.
        preemptive: Whether a job in service makes way for a more urgent one. It goes on later
            where it was interrupted, before the others of its class.
    """

    shares: tuple[Fraction, ...]
    preemptive: bool = False

    def __post_init__(self) -> None:
        if not 2 <= len(self.shares) <= MOST_CLASSES:
            raise ParameterError(
                f"priorities need 2 to {MOST_CLASSES} classes; {len(self.shares)} are given"
            )
        for share in self.shares:
            if share <= 0:
                raise ParameterError(
                    f"the share of a class is above 0; it is given {number_text(share)}"
                )
        total = sum(self.shares, Fraction(0))
        if total != 1:
            # What is written is a ratio, 3 to 7: one way to hold it, not many.
            object.__setattr__(self, "shares", tuple(share / total for share in self.shares))

    def __str__(self) -> str:
        word = "preemptive" if self.preemptive else "priority"
        return f"{word}({','.join(number_text(share) for share in self.shares)})"


Arrivals = Renewal | Sinusoid | Recorded
Service = Distribution | Bulk


@dataclass(frozen=True, slots=True)
class Model:
    """A station A/B/n/q. ``str`` gives its canonical notation, which ``parse`` reads back.

    Attributes:
        arrivals: A, the flow of jobs.
        service: B, the time that a server needs for one.
        servers: n, at least 1; None for as many as there are jobs.
        waiting: q, the waiting places; None where all can wait.
        discipline: Who is next among those who wait.
        patience: How long a job waits before it leaves unserved; None where it never does.
    """

    arrivals: Arrivals
    service: Service
    servers: int | None = 1
    waiting: int | None = 0
    discipline: Discipline | Priority = "fifo"
    patience: Distribution | None = None

    def __post_init__(self) -> None:
        for what, count in (("servers", self.servers), ("waiting places", self.waiting)):
            if count is not None and not isinstance(count, int):
                raise ParameterError(f"the number of {what} is whole, not {count}")
        if self.servers is not None and self.servers < 1:
            raise ParameterError(f"a station has at least 1 server; it is given {self.servers}")
        if self.waiting is not None and self.waiting < 0:
            raise ParameterError(f"there are at least 0 waiting places, not {self.waiting}")
        if not isinstance(self.discipline, Priority) and self.discipline not in DISCIPLINES:
            raise ParameterError(f"a discipline is one of {', '.join(DISCIPLINES)}")
        if isinstance(self.discipline, Priority) and self.discipline.preemptive:
            if isinstance(self.service, Bulk):
                raise ParameterError("a bulk is not interrupted: write priority, not preemptive")
            if self.patience is not None:
                raise ParameterError(
                    "with patience, a job in service is not interrupted: write priority"
                )
        if self.servers is None:
            # Nobody waits where everybody has a server: one way to write that, not many.
            object.__setattr__(self, "waiting", 0)
            object.__setattr__(self, "discipline", "fifo")
            object.__setattr__(self, "patience", None)

    @classmethod
    def parse(cls, text: str) -> "Model":
        """Return the model that ``text`` describes in the notation A/B/n/q.

        Raises:
            NotationError: It is no model; the error names the position.
            TraceError: A file that it names is of no use.

        Example:
            >>> str(Model.parse("M(8/s) / M(200ms) / 2 / inf"))
            'M(8/s)/M(0.2s)/2/inf'
        """
        from molva.queueing.notation import parse

        return parse(text)

    @classmethod
    def from_kendall(
        cls,
        text: str,
        *,
        arrivals: str | None = None,
        service: str | None = None,
        servers: int | None = None,
        capacity: int | None = None,
    ) -> "Model":
        """Return the model that ``text`` describes in Kendall's habit, A/B/c/K.

        There, ``M/M/1`` waits without bound and K counts everybody in the system.

        Args:
            text: Parameters may stand inside, ``M(8/s)/M(200ms)/1/11``, or be left out.
            arrivals: What belongs between the parentheses of A, as ``8/s``.
            service: The same for B, as ``200ms``.
            servers: What a letter in the third place stands for.
            capacity: What a letter in the fourth place stands for, K ≥ c.

        Example:
            >>> str(Model.from_kendall("M/M/1/K", arrivals="8/s", service="0.1s", capacity=11))
            'M(8/s)/M(0.1s)/1/10'
        """
        from molva.queueing.notation import parse_kendall

        return parse_kendall(
            text, arrivals=arrivals, service=service, servers=servers, capacity=capacity
        )

    @property
    def arrival_rate(self) -> float:
        """Jobs per second that arrive, λ."""
        return float(self.arrivals.rate)

    @property
    def service_rate(self) -> float:
        """Jobs per second that one busy server completes, μ; in bulk, with full bulks."""
        return float(1 / self.service.mean)

    @property
    def offered_load(self) -> float:
        """Servers that would be busy if nobody were refused, a = λ/μ, in erlangs."""
        return float(self.arrivals.rate * self.service.mean)

    def __str__(self) -> str:
        servers = "inf" if self.servers is None else str(self.servers)
        options = "" if self.discipline == "fifo" else f"/{self.discipline}"
        if self.patience is not None:
            options += f"/patience({self.patience})"
        room = "" if self.waiting == 0 and not options else f"/{self._waiting_text}"
        return f"{self.arrivals}/{self.service}/{servers}{room}{options}"

    @property
    def _waiting_text(self) -> str:
        return "inf" if self.waiting is None else str(self.waiting)
