"""The output of M/D/n/inf: gaps between departures, of which only the scv is given.

A departure is a start one service time earlier. Whether some job starts in (t, t+x), x at most a
service time, depends on how many are present at t and on whether one departs in (t, t+x); and
that, one service time before, on the same again: a linear system.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from molva.queueing.analytic.flows import scv_from_next

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

__all__ = ["departure_gap_scv"]

# Jobs that wait, beyond which the system takes more than a second.
_MOST_WAITING: Final = 1500

# Nodes of Gauss-Legendre over a service time: the integrand is as smooth as Poisson's
# probabilities are, on a scale of the share 1/√n of it.
_NODES: Final = 40

# Probability of more jobs waiting that is left out.
_LEFT_OUT: Final = 1e-13


def departure_gap_scv(load: float, n: int, beyond: Callable[[int], float]) -> float | None:
    """Return the scv of the gaps between departures; None where too many jobs wait.

    Args:
        load: Arrivals in the mean of a service time.
        n: Servers.
        beyond: P(more than so many jobs wait).
    """
    size = 8
    while beyond(size) > _LEFT_OUT:
        size *= 2
        if size > _MOST_WAITING:
            return None
    import numpy
    from scipy.linalg import lu_factor, lu_solve
    from scipy.special import gammaln, xlogy

    def poisson(count: "Vector", mean: float) -> "Vector":
        at = numpy.maximum(count, 0.0)
        chance: Vector = numpy.where(
            count >= 0, numpy.exp(xlogy(at, mean) - mean - gammaln(at + 1)), 0.0
        )
        return chance

    # States n + i, i waiting. All of them but i = 0 hold up a start until a departure.
    waiting = numpy.arange(size + 1.0)
    steps = poisson(waiting[:, None] - waiting[None, :] + n, load)
    steps[:, 0] = 0.0
    factors = lu_factor(numpy.eye(size + 1) - steps)
    whole = lu_solve(factors, poisson(waiting + n, load))
    few = 1 - beyond(0)  # at most n are present

    def quiet(x: float) -> float:
        """Return P(no departure within x service times), x ≤ 1."""
        none = float(numpy.exp(-load * x))  # arrives
        rest = lu_solve(factors, none * poisson(waiting + n, load * (1 - x)))
        # With n present nobody starts unless one arrives and one departs.
        at_n = few * rest[0] / (1 - whole[0] + rest[0])
        held = few * rest + at_n * (whole - rest)
        return float(few * none + at_n * (1 - none) + held[1:].sum())

    x, w = numpy.polynomial.legendre.leggauss(_NODES)
    inside = sum(each / 2 * quiet((at + 1) / 2) for at, each in zip(x, w, strict=True))
    # Nobody departs in a whole service time and more: nobody is there, and then nobody comes.
    empty = few * float(numpy.exp(-load)) / load
    return scv_from_next(load, float(inside) + empty)
