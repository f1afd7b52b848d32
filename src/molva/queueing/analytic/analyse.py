"""The choice of the road: the first method that is right for a model computes it.

Exact methods stand before approximations, closed forms before numerical ones. ``method=``
forces one, to compare two roads to one number.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from molva.queueing.analytic import (
    batch_arrivals,
    birth_death,
    bulk_service,
    constant_service,
    finite_single_server,
    insensitive,
    periodic,
    renewal_arrivals,
    schedule,
    single_server,
    two_moments,
)
from molva.queueing.errors import MissingLibraryError, NoAnalysisError, ParameterError
from molva.queueing.model import Model, Priority
from molva.queueing.result import SteadyState

__all__ = ["METHODS", "analyse", "libraries_named"]


class _Method(NamedTuple):
    name: str
    models: str
    applies: Callable[[Model], bool]
    solve: Callable[[Model], SteadyState]


_METHODS: Final = (
    _Method(schedule.METHOD, "D/D/n/q", schedule.applies, schedule.solve),
    _Method(birth_death.METHOD, "M/M/n/q, M/M/inf", birth_death.applies, birth_death.solve),
    _Method(insensitive.METHOD, "M/G/n, G/G/inf", insensitive.applies, insensitive.solve),
    _Method(renewal_arrivals.METHOD, "G/M/n/inf", renewal_arrivals.applies, renewal_arrivals.solve),
    _Method(constant_service.METHOD, "M/D/n/inf", constant_service.applies, constant_service.solve),
    _Method(single_server.METHOD, "M/G/1/inf", single_server.applies, single_server.solve),
    _Method(
        finite_single_server.METHOD,
        "M/G/1/q",
        finite_single_server.applies,
        finite_single_server.solve,
    ),
    _Method(batch_arrivals.METHOD, "k*M/M/n/q", batch_arrivals.applies, batch_arrivals.solve),
    _Method(bulk_service.METHOD, "M/bulk/1/q", bulk_service.applies, bulk_service.solve),
    _Method(periodic.METHOD, "sin/M/inf, sin/M/n/q, sin/M/n/inf", periodic.applies, periodic.solve),
    _Method(two_moments.METHOD, "G/G/n/q", two_moments.applies, two_moments.solve),
)

# Utilisation offered to a bounded station, beyond which the share that is admitted is lost in
# rounding.
_MOST_OVERLOAD: Final = 1e9

# Not an analysis, but a road that can be asked for: it is never the best, and takes a second.
_SIMULATION: Final = "simulation"

# Name of each method to the models that it is for, best road first.
METHODS: Final = {each.name: each.models for each in _METHODS} | {_SIMULATION: "any model"}


def analyse(model: Model | str, *, method: str | None = None) -> SteadyState:
    """Return the steady state of ``model`` by the best road there is.

    Args:
        model: A model, or its notation.
        method: One of ``METHODS``, to be used and no other.

    Raises:
        UnstableError: All can wait, and more arrives than can be served.
        NoAnalysisError: No method computes this model, or ``method`` does not.
        ParameterError: It is offered so much that no digit of an answer would be right.
        MissingLibraryError: It is computed numerically, and the extra is not installed.

    Example:
        Two workers take 0.2 s a rating; eight ratings arrive each second.

        >>> state = analyse("M(8/s)/M(200ms)/2/inf")
        >>> state.road, round(state.utilisation, 3), round(state.mean_wait, 3)
        ('closed form', 0.8, 0.356)
    """
    if isinstance(model, str):
        model = Model.parse(model)
    if model.servers is not None and model.waiting is not None:
        overload = model.offered_load / model.servers
        if overload > _MOST_OVERLOAD:
            raise ParameterError(f"{model} is offered {overload:.3g} times what it can serve")
    if method == _SIMULATION:
        from molva.queueing.simulate import simulate

        return simulate(model).steady_state()
    for each in _chosen(method):
        if each.applies(model) and not _has_classes_or_patience(model):
            with libraries_named():
                return each.solve(model)
    if method is not None:
        raise NoAnalysisError(f"the method {method!r} is for {METHODS[method]}, not for {model}")
    raise NoAnalysisError(f"no analysis computes {model}; simulate it, or take one of {_known()}")


@contextlib.contextmanager
def libraries_named() -> Iterator[None]:
    """Say which extra to install where numpy or scipy is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("numpy", "scipy"):
            raise
        raise MissingLibraryError(error.name) from error


def _has_classes_or_patience(model: Model) -> bool:
    """Whether jobs differ in urgency, or leave unserved: no method here knows of either."""
    return model.patience is not None or isinstance(model.discipline, Priority)


def _known() -> str:
    return ", ".join(each.models for each in _METHODS)


def _chosen(method: str | None) -> Iterator[_Method]:
    if method is not None and method not in METHODS:
        close = difflib.get_close_matches(method, METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise NoAnalysisError(f"unknown method {method!r}, known are {', '.join(METHODS)}{hint}")
    return (each for each in _METHODS if method in (None, each.name))
