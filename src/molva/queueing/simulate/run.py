"""Runs: how many jobs, on how many cores, and when to stop.

Four replications by default, so that a run uses more than one core and the intervals rest on
runs that have nothing in common; what comes out depends on their number, never on that of the
cores. Each is cut into cells, and cells are joined to batches until neighbours no longer
resemble one another.
"""

import importlib.util
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from molva.queueing.distributions import as_deterministic
from molva.queueing.errors import ParameterError, UnstableError
from molva.queueing.model import Bulk, Model, Renewal
from molva.queueing.simulate.estimate import Simulation
from molva.queueing.simulate.replication import Replication
from molva.queueing.simulate.summary import MEASURES, batches_of, measured, summarised
from molva.queueing.simulate.units import clock_of
from molva.queueing.simulate.warm_up import MEMORIES_LEFT_OUT, memory_in_jobs

__all__ = ["ENGINES", "Plan", "Progress", "Wanted", "plan_of", "simulated"]

# Called with the share of a run that is done, from 0 to 1.
Progress = Callable[[float], None]

# Cells of each replication: of a run with a fixed number of jobs, fewer where it is short, and
# of the first stage of one with a wanted precision. Numbers with many divisors, because cells
# are joined to batches.
_CELLS: Final = (24, 16, 12, 8, 6, 4, 2)
_FIRST_CELLS: Final = 16

# By what a run grows when it is not yet precise enough. Less, and it stops by chance more often
# when the interval happens to be narrow; more, and it overshoots.
_GROWTH: Final = 1.5

# Jobs of a replication at the first stage, at least.
_FIRST_JOBS: Final = 16_384

# Relaxation times that a batch of a precise run has at least.
_MEMORIES_IN_CELL: Final = 3

# Share of a run that may be left out at its beginning.
_MOST_WARM_UP: Final = 0.2

# Jobs from which on loading the compiler is worth its half second.
_JOBS_FOR_COMPILER: Final = 300_000

# Jobs a second that are surely played, on any machine and of any model: so many a precise run
# may begin with. More, and it exceeds its time before it can look; fewer, and runs give up that
# would have ended.
_SURELY: Final = 5_000_000
_SURELY_PLAIN: Final = 100_000

# Jobs of a replication. Fewer, and there is nothing to cut into batches.
_LEAST_JOBS: Final = 100

ENGINES: Final = ("auto", "compiled", "plain")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is made of, in the measure of its source: jobs or periods.

    Attributes:
        warm_up: Left out at the beginning of each replication.
        cell_size: Of each cell.
        cells: Of each replication.
        notes: What should be known of a run that is this short.
    """

    warm_up: int
    cell_size: int
    cells: int
    notes: tuple[str, ...]

    def jobs(self, replications: int, jobs_each: float) -> float:
        """Return how many arrivals that is, with ``jobs_each`` in one unit of the measure."""
        return (self.warm_up + self.cells * self.cell_size) * jobs_each * replications


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked of a run; ``molva.queueing.simulate`` says what each means."""

    jobs: int | None
    precision: float | None
    of: str | None
    seed: int
    replications: int
    warm_up: int | None
    most_jobs: int
    most_seconds: float
    engine: str

    def check(self) -> None:
        """Raise ParameterError where something is outside its range."""
        jobs, warm_up, runs = self.jobs, self.warm_up, self.replications
        if (jobs is None) == (self.precision is None):
            raise ParameterError("a run has either a number of jobs or a precision, not both")
        if not 1 <= runs <= 1000:
            raise ParameterError(f"a run has from 1 to 1000 replications, not {runs}")
        if jobs is not None and jobs < _LEAST_JOBS * runs:
            raise ParameterError(
                f"{runs} replications need at least {_LEAST_JOBS * runs} jobs, not {jobs}"
            )
        if warm_up is not None and (warm_up < 0 or (jobs is not None and warm_up >= jobs)):
            raise ParameterError(f"a warm-up is shorter than its run, and not below 0: {warm_up}")
        if self.precision is not None and not 0 < self.precision < 1:
            raise ParameterError(
                f"a precision is a share of the value, as 0.01 for ±1 %; it is {self.precision:g}"
            )
        if self.of is not None and self.of not in MEASURES:
            raise ParameterError(f"a precision is of {', '.join(MEASURES)}, not of {self.of!r}")
        if self.engine not in ENGINES:
            raise ParameterError(f"an engine is one of {', '.join(ENGINES)}, not {self.engine!r}")
        if self.seed < 0:
            raise ParameterError(f"a seed is at least 0, not {self.seed}")


def simulated(model: Model, wanted: Wanted, progress: Progress | None) -> Simulation:
    """Return the simulation of ``model``; see ``molva.queueing.simulate``."""
    wanted.check()
    _check_stable(model)
    clock = clock_of(model)
    compiled = _compiled(wanted.engine, wanted.jobs or wanted.most_jobs)
    runs = [
        Replication(model, clock, wanted.seed, number, compiled=compiled)
        for number in range(wanted.replications)
    ]
    if wanted.precision is None:
        notes = _play_jobs(runs, model, wanted, progress)
        return summarised(model, clock, wanted.seed, runs, None, notes)
    reached, notes = _play_until_precise(
        runs, model, wanted, progress, wanted.precision, is_exact=clock.is_exact
    )
    return summarised(model, clock, wanted.seed, runs, reached, notes)


def _play_jobs(
    runs: list[Replication], model: Model, wanted: Wanted, progress: Progress | None
) -> tuple[str, ...]:
    """Play as many jobs as are wanted; return what should be known of the run."""
    plan = plan_of(model, runs[0].jobs_each, wanted.jobs, len(runs), wanted.warm_up)
    _on_all_cores(runs, lambda run: run.warm(plan.warm_up))
    # All at once, unless somebody watches.
    for cells in range(1 if progress else plan.cells, plan.cells + 1):
        _extend(runs, cells, plan.cell_size)
        if progress:
            progress(cells / plan.cells)
    return plan.notes


def _play_until_precise(
    runs: list[Replication],
    model: Model,
    wanted: Wanted,
    progress: Progress | None,
    precision: float,
    *,
    is_exact: bool,
) -> tuple[bool, tuple[str, ...]]:
    """Play ever more; return whether that is precise, and what should be known of the run."""
    began = time.monotonic()
    measure = wanted.of or _usual_measure(model)
    plan = _first_stage(runs, model, wanted)
    _on_all_cores(runs, lambda run: run.warm(plan.warm_up))
    cells = plan.cells
    while True:
        _extend(runs, cells, plan.cell_size)
        width = _width(runs, measure, is_exact=is_exact)
        # A run that has not settled may look precise, and is not.
        reached = width <= precision and not plan.notes
        if progress:
            progress(1.0 if reached else min((precision / width) ** 2, 0.99))
        # The next stage takes half as long as all so far.
        seconds = (time.monotonic() - began) * _GROWTH
        jobs = sum(run.jobs for run in runs) * _GROWTH
        if reached:
            return True, ()
        if plan.notes or seconds > wanted.most_seconds or jobs > wanted.most_jobs:
            known = f"known to ±{width:.3g} of its value" if width < math.inf else "not known"
            return False, (
                *plan.notes,
                f"{measure} is {known}, not to the ±{precision:g} asked for: a longer run would "
                f"exceed {wanted.most_seconds:g} s or {wanted.most_jobs} jobs",
            )
        cells = math.ceil(len(runs[0].cells) * _GROWTH / 2) * 2


def _first_stage(runs: list[Replication], model: Model, wanted: Wanted) -> Plan:
    """Return the first stage of a precise run, or what can be played where that is too long."""
    jobs_each, number = runs[0].jobs_each, len(runs)
    plan = plan_of(model, jobs_each, None, number, wanted.warm_up)
    a_second = _SURELY if runs[0].compiled else _SURELY_PLAIN
    limit = min(wanted.most_jobs, wanted.most_seconds * a_second)
    if plan.jobs(number, jobs_each) <= limit:
        return plan
    jobs = max(_LEAST_JOBS * number, int(limit))
    return plan_of(model, jobs_each, jobs, number, wanted.warm_up)


def plan_of(
    model: Model, jobs_each: float, jobs: int | None, replications: int, warm_up: int | None
) -> Plan:
    """Return how a run is cut."""
    memory = memory_in_jobs(model) / jobs_each
    settled = math.ceil(MEMORIES_LEFT_OUT * memory)
    if jobs is None:
        left_out = settled if warm_up is None else math.ceil(warm_up / jobs_each)
        cell = math.ceil(max(_MEMORIES_IN_CELL * memory, _FIRST_JOBS / jobs_each / _FIRST_CELLS, 1))
        return Plan(left_out, cell, _FIRST_CELLS, ())
    each = jobs / replications / jobs_each
    notes = []
    if warm_up is not None:
        left_out = math.ceil(warm_up / replications / jobs_each)
    else:
        left_out = min(settled, math.ceil(each * _MOST_WARM_UP))
        if left_out < settled:
            need = settled * jobs_each / _MOST_WARM_UP * replications
            notes.append(
                f"the run is short for this load, so the intervals may be too narrow: "
                f"{need:.1g} jobs would do"
            )
    cells = next((number for number in _CELLS if number <= each - left_out), 2)
    cell = max(1, math.ceil((each - left_out) / cells))
    return Plan(left_out, cell, cells, tuple(notes))


def _check_stable(model: Model) -> None:
    """Raise UnstableError where all can wait and more arrives than can be served."""
    if model.servers is None or model.waiting is not None or model.patience is not None:
        return
    load = model.arrivals.rate * model.service.mean
    constant = (
        isinstance(model.arrivals, Renewal)
        and as_deterministic(model.arrivals.gap) is not None
        and (isinstance(model.service, Bulk) or as_deterministic(model.service) is not None)
    )
    # At exactly full load a schedule repeats itself, but a line of random jobs grows.
    if load > model.servers or (load == model.servers and not constant):
        raise UnstableError(
            str(model),
            arrival_rate=model.arrival_rate,
            capacity=model.servers * model.service_rate,
        )


def _usual_measure(model: Model) -> str:
    if model.servers is None:
        return "mean_time_in_system"
    return "loss_probability" if model.waiting == 0 else "mean_wait"


def _compiled(engine: str, jobs: int) -> bool:
    installed = importlib.util.find_spec("numba") is not None
    if engine == "compiled" and not installed:
        raise ParameterError("the compiled engine needs numba: pip install 'molva[fast]'")
    return engine == "compiled" or (engine == "auto" and installed and jobs >= _JOBS_FOR_COMPILER)


def _extend(runs: list[Replication], cells: int, cell_size: int) -> None:
    _on_all_cores(runs, lambda run: run.extend(cells, cell_size))


def _on_all_cores(runs: list[Replication], play: Callable[[Replication], None]) -> None:
    """Let all replications ``play``, as many at a time as there are cores.

    Threads, because drawing and the compiled kernels hold no lock. In plain Python they take
    turns, which costs nothing.
    """
    if len(runs) == 1:
        play(runs[0])
        return
    with ThreadPoolExecutor(min(len(runs), os.cpu_count() or 1)) as pool:
        try:
            for done in [pool.submit(play, run) for run in runs]:
                done.result()
        except BaseException:
            # Whoever is interrupted does not wait for a billion jobs.
            for run in runs:
                run.stopped = True
            raise


def _width(runs: list[Replication], measure: str, *, is_exact: bool) -> float:
    estimate = measured(batches_of(runs, measure), measure)
    # What has not been seen yet is not known, unless nothing is left to chance.
    if estimate is None or (estimate.value == 0 and not is_exact):
        return math.inf
    return estimate.relative_width
