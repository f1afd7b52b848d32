"""From the sums of all replications to the result: which quantity is which function of them."""

from typing import Final

import numpy as np

from molva.queueing.distributions import General
from molva.queueing.errors import ParameterError
from molva.queueing.model import Model, Priority, Renewal
from molva.queueing.simulate.draws import Floats
from molva.queueing.simulate.estimate import (
    ClassOfJobs,
    Estimate,
    SimulatedFlow,
    Simulation,
)
from molva.queueing.simulate.intervals import (
    Histogram,
    Quantity,
    interval,
    lag_correlation,
    pseudo_values,
)
from molva.queueing.simulate.replication import Replication
from molva.queueing.simulate.station import is_first_come
from molva.queueing.simulate.tally import BINS, Sum, bin_edges, least_bin
from molva.queueing.simulate.units import Clock

__all__ = ["MEASURES", "batches_of", "measured", "summarised"]

# Batches of all replications together. Fewer, and the interval is wider than it need be;
# more, and they are shorter, so that neighbours are more alike.
_BATCHES: Final = 24

# Below, an interval of Student's t says little more than a guess.
_LEAST_BATCHES: Final = 6

# Correlation of neighbours, in standard errors, beyond which batches are too short: one such
# run in twenty is mistaken for one.
_MOST_CORRELATED: Final = 1.645

# Refusals that none in N jobs cannot exclude: more than 3.7 expected would have shown one, in
# 97.5 % of such runs.
_UNSEEN: Final = 3.689


# Where the numbers are from, as reports print it.
_INTERVALS: Final = "intervals by batch means and the jackknife (Miller, 1974)"
_LINE: Final = f"played by the recursion of Kiefer and Wolfowitz (1955); {_INTERVALS}"
_EVENTS: Final = f"played event by event; {_INTERVALS}"


def _ratio(above: int, below: int, scale: float = 1.0) -> Quantity:
    def ratio(sums: Floats) -> Floats:
        part: Floats = sums[..., above] / sums[..., below] * scale
        return part

    return ratio


def _gap_scv(first: int) -> Quantity:
    def scv(sums: Floats) -> Floats:
        mean = sums[..., first + 1] / sums[..., first]
        value: Floats = sums[..., first + 2] / sums[..., first] / mean**2 - 1
        return value

    return scv


def _served(sums: Floats) -> Floats:
    per_unit: Floats = (sums[..., Sum.LEFT] - sums[..., Sum.ABANDONED]) / sums[..., Sum.TIME]
    return per_unit


_LOSS: Final = _ratio(Sum.REFUSED, Sum.ARRIVED)
_WAITING: Final = _ratio(Sum.WAITED, Sum.LEFT)
_WAIT: Final = _ratio(Sum.WAIT, Sum.LEFT)
_STAY: Final = _ratio(Sum.STAY, Sum.LEFT)

# What a precision can be asked of.
MEASURES: Final[dict[str, Quantity]] = {
    "mean_wait": _WAIT,
    "mean_time_in_system": _STAY,
    "loss_probability": _LOSS,
    "probability_of_waiting": _WAITING,
}


def batches_of(runs: list[Replication], measure: str) -> Floats:
    """Return sums of batches that are long enough for ``measure``, (batches, sums)."""
    return _joined(runs, _batches_each(runs, MEASURES[measure]))


def measured(batches: Floats, measure: str) -> Estimate | None:
    """Return the estimate of ``measure``, a name of ``MEASURES``."""
    return interval(batches, MEASURES[measure])


def summarised(
    model: Model,
    clock: Clock,
    seed: int,
    runs: list[Replication],
    reached: bool | None,
    notes: tuple[str, ...],
) -> Simulation:
    """Return the result of replications that have ended."""
    waits = model.servers is not None and model.waiting != 0
    each = _batches_each(runs, _STAY if not waits else _WAIT)
    sums = _joined(runs, each)
    correlation = _correlation(runs, each, _WAIT if waits else _LOSS)
    if correlation > 2 * _MOST_CORRELATED:
        notes += (
            "neighbouring batches are alike, so the intervals are too narrow: play more jobs",
        )
    if _has_only_moments(model):
        notes += ("G was played as a gamma distribution; others with its moments differ",)
    unit = float(clock.unit)
    servers = model.servers
    loss = _must(interval(sums, _LOSS))
    if loss.value == 0 and model.waiting is not None and servers is not None:
        loss = Estimate(0.0, 0.0, min(1.0, _UNSEEN / float(sums[:, Sum.ARRIVED].sum())))
    some_left = float(sums[:, Sum.LEFT].sum()) > 0
    throughput = _must(interval(sums, _scaled(_served, 1 / unit)))
    return Simulation(
        model=model,
        source=_LINE if is_first_come(model) else _EVENTS,
        seed=seed,
        jobs=sum(run.jobs for run in runs),
        warm_up=sum(run.warm_up for run in runs),
        replications=len(runs),
        batches=len(sums),
        reached=reached,
        notes=notes,
        utilisation=None
        if servers is None
        else _share(interval(sums, _ratio(Sum.WORK, Sum.TIME, 1 / servers))),
        loss_probability=_must(_share(loss)),
        abandonment_probability=None
        if model.patience is None
        else _share(interval(sums, _ratio(Sum.ABANDONED, Sum.ARRIVED))),
        probability_of_waiting=_share(interval(sums, _WAITING)),
        throughput=throughput,
        mean_wait=_positive(interval(sums, _scaled(_WAIT, unit))),
        mean_squared_wait=_positive(
            interval(sums, _ratio(Sum.WAIT_SQUARED, Sum.LEFT, unit * unit))
        ),
        mean_time_in_system=_positive(interval(sums, _scaled(_STAY, unit))),
        mean_waiting=_must(_positive(interval(sums, _ratio(Sum.WAIT, Sum.TIME)))),
        mean_in_system=_must(_positive(interval(sums, _ratio(Sum.STAY, Sum.TIME)))),
        wait=_law(runs, each, "waits", model, clock) if some_left else None,
        time_in_system=_law(runs, each, "stays", model, clock) if some_left else None,
        output=SimulatedFlow(throughput, _positive(interval(sums, _gap_scv(Sum.OUTPUT_GAPS)))),
        refusals=None
        if model.waiting is None or servers is None
        else SimulatedFlow(
            _must(_positive(interval(sums, _ratio(Sum.REFUSED, Sum.TIME, 1 / unit)))),
            _positive(interval(sums, _gap_scv(Sum.REFUSAL_GAPS))),
        ),
        classes=_classes(model, sums, unit),
        pseudo={
            "mean_wait": pseudo_values(sums, _scaled(_WAIT, unit)),
            "mean_time_in_system": pseudo_values(sums, _scaled(_STAY, unit)),
            "loss_probability": pseudo_values(sums, _LOSS),
            "probability_of_waiting": pseudo_values(sums, _WAITING),
        },
    )


def _has_only_moments(model: Model) -> bool:
    gap = model.arrivals.gap if isinstance(model.arrivals, Renewal) else None
    laws = (gap, model.service, model.patience)
    return any(isinstance(law, General) and law.scv > 0 for law in laws)


def _batches_each(runs: list[Replication], quantity: Quantity) -> int:
    """Return how many batches the cells of each replication are joined to.

    As many as make some 24 together; half as many, and so on, while neighbours are alike.
    """
    cells = len(runs[0].cells)
    choices = [number for number in range(cells, 0, -1) if cells % number == 0]
    most = max(_BATCHES / len(runs), 1.0)
    least = min(_LEAST_BATCHES / len(runs), float(cells))
    fitting = [number for number in choices if number <= most * 1.5] or choices[-1:]
    chosen = fitting[0]
    for number in fitting:
        if number < least:
            break
        chosen = number
        if _correlation(runs, number, quantity) <= _MOST_CORRELATED:
            break
    return chosen


def _correlation(runs: list[Replication], each: int, quantity: Quantity) -> float:
    values = pseudo_values(_joined(runs, each), quantity).reshape(len(runs), each)
    return lag_correlation(values) if np.isfinite(values).all() else 0.0


def _joined(runs: list[Replication], each: int) -> Floats:
    """Return the sums of ``each`` batches of every replication, one after the other."""
    rows = [
        np.stack([cell.sums for cell in run.cells]).reshape(each, -1, run.cells[0].sums.size)
        for run in runs
    ]
    sums: Floats = np.concatenate([row.sum(axis=1) for row in rows])
    return sums


def _law(runs: list[Replication], each: int, which: str, model: Model, clock: Clock) -> Histogram:
    counts = np.zeros((len(runs) * each, BINS), np.int64)
    for number, run in enumerate(runs):
        size = len(run.cells) // each
        for at, cell in enumerate(run.cells):
            counts[number * each + at // size] += getattr(cell, which)
    edges = bin_edges(least_bin(clock.units(model.service.mean)))
    return Histogram(counts, edges, float(clock.unit), is_exact=clock.is_exact)


def _classes(model: Model, sums: Floats, unit: float) -> tuple[ClassOfJobs, ...]:
    if not isinstance(model.discipline, Priority):
        return ()
    return tuple(
        ClassOfJobs(
            float(share),
            _positive(
                interval(sums, _ratio(Sum.CLASSES + 2 * rank + 1, Sum.CLASSES + 2 * rank, unit))
            ),
        )
        for rank, share in enumerate(model.discipline.shares)
    )


def _scaled(quantity: Quantity, scale: float) -> Quantity:
    return lambda sums: quantity(sums) * scale


def _share(estimate: Estimate | None) -> Estimate | None:
    """Return ``estimate`` with its interval within 0 and 1."""
    if estimate is None:
        return None
    # A server that ends its work behind the last arrival would make more than all of a share.
    value = min(estimate.value, 1.0)
    return Estimate(value, max(estimate.low, 0.0), min(estimate.high, 1.0))


def _positive(estimate: Estimate | None) -> Estimate | None:
    """Return ``estimate`` with its interval above 0."""
    if estimate is None:
        return None
    return Estimate(estimate.value, max(estimate.low, 0.0), estimate.high)


def _must(estimate: Estimate | None) -> Estimate:
    if estimate is None:
        raise ParameterError("the run is too short to say anything: play more jobs")
    return estimate
