"""The residual of a time: how much of it is left when somebody looks at random.

Its transform Rₑ(s) = (1 − R(s))/(s E[T]) carries Pollaczek-Khinchine and the root of G/M/n.
Taken from its definition it loses all digits near s = 0, which is where heavy traffic looks.
"""

import math
from collections.abc import Callable
from typing import Final

from molva.queueing.distributions import (
    Distribution,
    Erlang,
    Exponential,
    Hyperexponential,
    LogNormal,
    Trace,
)

__all__ = ["residual_transform"]

# |s| E[T] below which the series is taken. Larger, and eleven terms are too few; smaller,
# and the quotient above it loses more than two digits.
_SMALL: Final = 0.05


def residual_transform(service: Distribution) -> Callable[[complex], complex]:
    """Return Bₑ(s) = (1 − B(s))/(s E[S]), free of cancellation near 0."""
    mean = float(service.mean)
    match service:
        case Erlang():
            # The residual of k phases is 1, 2 … or k of them, each as likely.
            k, phase = service.phases, mean / service.phases
            return lambda s: sum((1 + s * phase) ** -j for j in range(1, k + 1)) / k
        case Exponential():
            return service.lst
        case Hyperexponential():
            parts = [(p * m / mean, m) for p, m in service.branches]
            return lambda s: sum((share / (1 + s * m) for share, m in parts), 0j)
        case LogNormal() | Trace():
            return _residual_of_nodes(service)
    moments = [service.moment(k) or 0.0 for k in range(12)]

    def residual(s: complex) -> complex:
        if abs(s) * mean < _SMALL:
            return (
                sum(((-s) ** (k - 1) * moments[k] / math.factorial(k) for k in range(1, 12)), 0j)
                / mean
            )
        value = service.lst(s)
        assert value is not None
        return (1 - value) / (s * mean)

    return residual


def _residual_of_nodes(service: LogNormal | Trace) -> Callable[[complex], complex]:
    import numpy

    times, weights = service.nodes()
    mean = float(weights @ times)

    def residual(s: complex) -> complex:
        return complex(weights @ -numpy.expm1(-s * times)) / (s * mean)

    return residual
