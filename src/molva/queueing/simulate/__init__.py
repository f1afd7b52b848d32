"""Simulation of any model of the notation: every number with the interval that it lies in.

Importing this loads no numpy; simulating does.
"""

from collections.abc import Callable
from typing import Final

from molva.queueing.analytic.analyse import libraries_named
from molva.queueing.model import Model
from molva.queueing.simulate.estimate import (
    SIMULATION,
    ClassOfJobs,
    Estimate,
    SampledLaw,
    SimulatedFlow,
    Simulation,
)
from molva.queueing.simulate.job import Fate, Job, Stretch

__all__ = [
    "SIMULATION",
    "ClassOfJobs",
    "Estimate",
    "Fate",
    "Job",
    "SampledLaw",
    "SimulatedFlow",
    "Simulation",
    "Stretch",
    "events",
    "simulate",
]


# Jobs of a run where neither their number nor a precision is given: a second in plain Python.
_JOBS: Final = 1_000_000

# Where a run that is to be precise ends at the latest.
_MOST_JOBS: Final = 100_000_000_000
_MOST_SECONDS: Final = 60.0


def simulate(
    model: Model | str,
    *,
    jobs: int | None = None,
    precision: float | None = None,
    of: str | None = None,
    seed: int = 0,
    replications: int = 4,
    warm_up: int | None = None,
    most_jobs: int = _MOST_JOBS,
    most_seconds: float = _MOST_SECONDS,
    engine: str = "auto",
    progress: Callable[[float], None] | None = None,
) -> Simulation:
    """Return the long-run behaviour of ``model``, simulated, with 95 % intervals.

    The same model, seed, jobs, replications and warm-up give the same numbers on any number
    of cores, with and without the compiler. This blocks, and may be called from any thread.

    Args:
        model: A model, or its notation.
        jobs: Arrivals to play in all replications together; a few more where a rate rises
            and falls, because then a run has whole periods. Default 1,000,000.
        precision: Instead of ``jobs``: half the width of the interval over the value, as
            0.01. The run grows by half until that is reached.
        of: What is to be so precise: ``mean_wait``, ``mean_time_in_system``,
            ``loss_probability`` or ``probability_of_waiting``. Default: the first, and
            ``loss_probability`` where nobody can wait.
        seed: Of all random numbers, at least 0. Two models under one seed get the same jobs.
        replications: Independent runs, from 1 to 1,000; they share the cores.
        warm_up: Arrivals at the beginning of all replications together that are not counted.
            Default: ten relaxation times, at most a fifth of the run.
        most_jobs: Where a precise run gives up; the result says how precise it is.
        most_seconds: The same, in time.
        engine: ``compiled`` (needs the extra ``fast``), ``plain``, or ``auto``.
        progress: Called now and then with the share of the run that is done.

    Raises:
        UnstableError: All can wait, and more arrives than can be served.
        ParameterError: An argument is outside its range.
        MissingLibraryError: numpy is not installed.

    Example:
        >>> result = simulate("M(8/s)/M(200ms)/2/inf", jobs=100_000)
        >>> wait = result.mean_wait  # 0.3556 s, says the formula
        >>> wait.low < 0.3556 < wait.high
        True
    """
    if isinstance(model, str):
        model = Model.parse(model)
    with libraries_named():
        from molva.queueing.simulate import run

        wanted = run.Wanted(
            jobs=_JOBS if jobs is None and precision is None else jobs,
            precision=precision,
            of=of,
            seed=seed,
            replications=replications,
            warm_up=warm_up,
            most_jobs=most_jobs,
            most_seconds=most_seconds,
            engine=engine,
        )
        return run.simulated(model, wanted, progress)


def events(model: Model | str, jobs: int, seed: int = 0) -> list[Job]:
    """Return the first ``jobs`` jobs of the run with this seed, in order of arrival.

    Each says when it arrived, was served, by which server, and left, or that it was refused
    or ran out of patience. Times are exact fractions where all times of the model are
    constant, and floats where any is drawn. A trace starts with its first instant. The run
    ends when the last job has left.

    Args:
        model: A model, or its notation.
        jobs: From 1 to 1,000,000.
        seed: The same gives the same run.

    Raises:
        ParameterError: ``jobs`` is outside its range.
        MissingLibraryError: numpy is not installed.

    Example:
        >>> first, second = events("2*D(1ms)/D(0.5ms)/1/1", jobs=2)
        >>> float(first.start), float(second.start), second.server, second.fate
        (0.0, 0.0005, 0, 'served')
    """
    with libraries_named():
        from molva.queueing.simulate import history

        return history.events(model, jobs, seed)
