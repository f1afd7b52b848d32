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
    Uniform,
    as_deterministic,
)

__all__ = ["integral", "residual_tail", "residual_transform", "shortest_residual"]

# |s| E[T] below which the series is taken. Larger, and eleven terms are too few; smaller,
# and the quotient above it loses more than two digits.
_SMALL: Final = 0.05

# The double exponential rule: steps on each side of the middle, and their length. Half as long
# ones change no digit.
_STEPS: Final = 100
_STEP: Final = 0.035


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


def residual_tail(service: Distribution) -> Callable[[float], float] | None:
    """Return P(residual > t) = E[(S − t)⁺]/E[S]; None where it is not determined."""
    mean = float(service.mean)
    if as_deterministic(service) is not None:
        return lambda t: max(0.0, 1 - t / mean)
    match service:
        case Exponential():
            return lambda t: math.exp(-t / mean)
        case Erlang():
            return lambda t: _erlang_residual(service.phases, t * service.phases / mean)
        case Hyperexponential():
            parts = [(p * m / mean, m) for p, m in service.branches]
            return lambda t: sum(share * math.exp(-t / m) for share, m in parts)
        case LogNormal():
            return lambda t: _lognormal_residual(service, t)
        case Uniform():
            low, high = float(service.low), float(service.high)

            def of_uniform(t: float) -> float:
                if t <= low:
                    return 1 - t / mean
                return max(0.0, high - t) ** 2 / (2 * (high - low) * mean)

            return of_uniform
        case Trace():
            values = service.values
            return lambda t: math.fsum(v - t for v in values if v > t) / len(values) / mean
    return None


def _erlang_residual(phases: int, x: float) -> float:
    """Return the tail at x phases: those that are left are 1, 2 … or all, each as likely."""
    if x == 0:
        return 1.0
    # Phase j has not come by x with the probability of fewer than j events: summed over j.
    log_x = math.log(x)
    return (
        math.fsum(
            (phases - i) * math.exp(i * log_x - x - math.lgamma(i + 1)) for i in range(phases)
        )
        / phases
    )


def _lognormal_residual(service: LogNormal, t: float) -> float:
    if t == 0:
        return 1.0
    sigma, mean = service.sigma, float(service.mean)
    z = math.log(mean / t) / sigma
    weighted = math.erfc(-(z + sigma / 2) / math.sqrt(2)) / 2  # E[S; S > t]/E[S]
    return max(0.0, weighted - t / mean * math.erfc(-(z - sigma / 2) / math.sqrt(2)) / 2)


def shortest_residual(service: Distribution, count: int) -> float | None:
    """Return the mean of the smallest of ``count`` independent residual times, in seconds."""
    tail = residual_tail(service)
    if tail is None:
        return None
    mean = float(service.mean)
    if as_deterministic(service) is not None:
        return mean / (count + 1)
    if isinstance(service, Exponential):
        return mean / count
    edges = [0.0]
    if isinstance(service, Uniform):
        edges += [float(service.low)] if service.low else []
        edges.append(float(service.high))
    elif isinstance(service, Trace):
        edges += sorted({value for value in service.values if value > 0})
    pieces = zip(edges, [*edges[1:], math.inf], strict=True)
    return math.fsum(
        integral(lambda t: tail(t) ** count, low, high, mean / count)
        for low, high in pieces
        if tail(low) > 0
    )


def integral(f: Callable[[float], float], low: float, high: float, scale: float) -> float:
    """Return ∫ f from ``low`` to ``high``, which may be infinite, for f analytic inside.

    Where the range is infinite, f falls on a scale of ``scale`` beyond ``low``.

    Source:
        Takahasi and Mori, Double exponential formulas for numerical integration (1974).
    """
    half = (high - low) / 2
    total = 0.0
    for k in range(-_STEPS, _STEPS + 1):
        u = k * _STEP
        if high == math.inf:
            at = scale * math.exp(2 * math.sinh(u))
            weight = at * 2 * math.cosh(u)
            point = low + at
        else:
            s = math.pi / 2 * math.sinh(u)
            weight = half * math.pi / 2 * math.cosh(u) / math.cosh(s) ** 2
            # The distance to the nearer end, which a difference would round away.
            near = half * math.exp(-abs(s)) / math.cosh(s)
            point = low + near if s < 0 else high - near
        if weight > 0:
            total += f(point) * weight
    return total * _STEP


def _residual_of_nodes(service: LogNormal | Trace) -> Callable[[complex], complex]:
    import numpy

    times, weights = service.nodes()
    mean = float(weights @ times)

    def residual(s: complex) -> complex:
        return complex(weights @ -numpy.expm1(-s * times)) / (s * mean)

    return residual
