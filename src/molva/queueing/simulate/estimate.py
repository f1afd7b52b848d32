"""What a simulation answers: every number with the interval that it lies in.

A run is cut into batches, which are so long that their means are as good as independent. The
width of an interval is that of Student's t over them. Of one hundred such intervals,
ninety-five contain the number that is estimated; five do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, final

from molva.queueing.errors import ParameterError
from molva.queueing.model import Model
from molva.queueing.result import Flow, SteadyState

if TYPE_CHECKING:
    from molva.queueing.simulate.draws import Floats

__all__ = ["SIMULATION", "ClassOfJobs", "Estimate", "SampledLaw", "SimulatedFlow", "Simulation"]

# The road to a number, as reports print it.
SIMULATION: Final = "simulation, 95 % interval"


@final
@dataclass(frozen=True, slots=True)
class Estimate:
    """A simulated number.

    Attributes:
        value: What came out.
        low: Lower end of the 95 % interval.
        high: Upper end of it.
    """

    value: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        """Half of the interval's width over the value; infinite where the value is 0."""
        half = (self.high - self.low) / 2
        if half == 0:
            return 0.0
        return half / abs(self.value) if self.value else float("inf")


class SampledLaw(Protocol):
    """The distribution of a wait or of a time in system, from a histogram.

    Bins are 0.8 % wide: so far are percentiles from those of the jobs that were played, at
    most. Where all times are constant they are exact up to 256 common ticks.
    """

    def percentile(self, share: float) -> Estimate | None:
        """Return what ``share`` of the jobs do not exceed, in seconds.

        None where the run is too short to say: its interval would have no upper end.
        """

    def tail(self, t: float) -> Estimate:
        """Return P(T > t), t ≥ 0 in seconds."""

    def sampled(self, share: float) -> float:
        """Return what ``share`` of the jobs that were played did not exceed, in seconds."""


@final
@dataclass(frozen=True, slots=True)
class _WithoutInterval:
    """A sampled distribution as that of an analysis: values alone."""

    law: SampledLaw

    def tail(self, t: float) -> float:
        """Return P(T > t)."""
        return self.law.tail(t).value

    def percentile(self, share: float) -> float:
        """Return the smallest t with P(T ≤ t) ≥ share."""
        return self.law.sampled(share)


@final
@dataclass(frozen=True, slots=True)
class SimulatedFlow:
    """A stream of jobs: those served, or those refused.

    Attributes:
        rate: Jobs per second.
        scv: Squared coefficient of variation of the gaps; None where there were too few.
    """

    rate: Estimate
    scv: Estimate | None = None


@final
@dataclass(frozen=True, slots=True)
class ClassOfJobs:
    """The jobs of one class, where a model has priorities.

    Attributes:
        share: Of the arrivals.
        mean_wait: Seconds; None where none of them left.
    """

    share: float
    mean_wait: Estimate | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Long-run behaviour of a station, simulated. Times are seconds, rates per second.

    Waits and times in system are those of jobs that are admitted, zero waits among them; a
    job that runs out of patience is one of them, and its wait ends when it leaves.

    Attributes:
        model: What was simulated.
        road: ``simulation, 95 % interval``.
        source: How it was played, and where that and the intervals are from.
        seed: The same seed, jobs and replications give the same numbers.
        jobs: Arrivals that were played, in all replications together.
        warm_up: Of them, those at the beginning that were not counted.
        replications: Runs that have nothing in common but the model.
        batches: Over which the intervals are taken.
        reached: Whether the precision that was asked for was reached; None where none was.
        notes: What should be known before these numbers are trusted, a sentence each.
        utilisation: Share of the servers that is busy; None where n is infinite.
        loss_probability: Share of the arrivals that is refused.
        abandonment_probability: Share of the arrivals that runs out of patience; None where
            the model has no patience.
        probability_of_waiting: Share of those admitted that waits at all.
        throughput: Jobs per second that are served.
        mean_wait: From arrival to the start of service, or until patience ends.
        mean_squared_wait: E[W²], in seconds².
        mean_time_in_system: From arrival to departure.
        mean_waiting: Jobs that wait, in the mean over time.
        mean_in_system: Jobs that wait or are served, in the mean over time.
        wait: The whole distribution of the wait; None where nobody was admitted.
        time_in_system: The whole distribution of the time in system.
        output: The flow of jobs that leave served.
        refusals: The flow of jobs that are refused; None where nobody ever can be.
        classes: By class, the most urgent first; empty where there are no priorities.
        pseudo: What each batch says of a quantity, by name; the intervals are taken of these.
    """

    model: Model
    source: str
    seed: int
    jobs: int
    warm_up: int
    replications: int
    batches: int
    reached: bool | None
    notes: tuple[str, ...]
    utilisation: Estimate | None
    loss_probability: Estimate
    abandonment_probability: Estimate | None
    probability_of_waiting: Estimate | None
    throughput: Estimate
    mean_wait: Estimate | None
    mean_squared_wait: Estimate | None
    mean_time_in_system: Estimate | None
    mean_waiting: Estimate
    mean_in_system: Estimate
    wait: SampledLaw | None
    time_in_system: SampledLaw | None
    output: SimulatedFlow
    refusals: SimulatedFlow | None
    classes: tuple[ClassOfJobs, ...] = ()
    road: str = SIMULATION
    pseudo: "Mapping[str, Floats]" = field(default_factory=dict, repr=False, compare=False)

    def wait_percentile(self, share: float) -> Estimate | None:
        """Return the wait that ``share`` of the admitted jobs do not exceed, in seconds."""
        return None if self.wait is None else self.wait.percentile(share)

    def time_in_system_percentile(self, share: float) -> Estimate | None:
        """Return the time in system that ``share`` do not exceed, in seconds."""
        return None if self.time_in_system is None else self.time_in_system.percentile(share)

    def minus(self, other: "Simulation", quantity: str) -> Estimate:
        """Return by how much ``quantity`` differs from that of ``other``, with its interval.

        Under one seed both models get the same jobs, so chance moves both the same way and
        the interval of the difference is narrower than those of the two.

        Args:
            other: Of the same jobs, warm-up and replications; give ``warm_up=`` to both.
            quantity: ``mean_wait``, ``mean_time_in_system``, ``loss_probability`` or
                ``probability_of_waiting``.

        Raises:
            ParameterError: The two runs cannot be compared.
        """
        mine, its = self.pseudo.get(quantity), other.pseudo.get(quantity)
        if mine is None or its is None:
            raise ParameterError(
                f"a difference is of {', '.join(self.pseudo)}, not of {quantity!r}"
            )
        if len(mine) != len(its) or (self.jobs, self.warm_up) != (other.jobs, other.warm_up):
            raise ParameterError(
                "a difference is that of runs with the same jobs, warm-up and replications"
            )
        from molva.queueing.simulate.intervals import half_width

        apart = mine - its
        value, half = float(apart.mean()), half_width(apart)
        return Estimate(value, value - half, value + half)

    def steady_state(self) -> SteadyState:
        """Return the values alone, as those of an analysis; ``error`` says how wide they are."""
        wait = self.mean_wait or self.loss_probability
        what = "mean wait" if self.mean_wait else "loss"
        return SteadyState(
            model=self.model,
            road=self.road,
            method="simulation",
            source=self.source,
            error=f"{what} from {wait.low:.6g} to {wait.high:.6g}",
            utilisation=_value(self.utilisation),
            loss_probability=self.loss_probability.value,
            probability_of_waiting=_value(self.probability_of_waiting),
            throughput=self.throughput.value,
            mean_wait=_value(self.mean_wait),
            mean_squared_wait=_value(self.mean_squared_wait),
            mean_time_in_system=_value(self.mean_time_in_system),
            mean_waiting=self.mean_waiting.value,
            mean_in_system=self.mean_in_system.value,
            wait=None if self.wait is None else _WithoutInterval(self.wait),
            time_in_system=None
            if self.time_in_system is None
            else _WithoutInterval(self.time_in_system),
            output=Flow(self.output.rate.value, _value(self.output.scv)),
            refusals=None
            if self.refusals is None
            else Flow(self.refusals.rate.value, _value(self.refusals.scv)),
        )


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value
