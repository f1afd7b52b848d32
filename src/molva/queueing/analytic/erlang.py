"""Erlang's two formulas, for any number of servers, real numbers and millions among them."""

import math
from typing import Final

from molva.queueing.errors import ParameterError

__all__ = ["erlang_b", "erlang_c", "far_below", "load_at_loss"]

# Terms of a continued fraction that are enough for a load ≥ 1: some 60 are used at 1.
_TERMS: Final = 10_000

# Servers up to which the recursion takes some seconds, where nearly all of them are idle.
_MOST_SERVERS: Final = 20_000_000


def erlang_b(load: float, servers: float) -> float:
    """Return the share of jobs that M/G/n/0 refuses, Erlang's B.

    Args:
        load: Offered load a = λ/μ in erlangs, a > 0.
        servers: n ≥ 0; between whole numbers, the analytic continuation.

    Raises:
        ParameterError: A number is out of its range.

    Example:
        >>> round(erlang_b(load=2.0, servers=6), 6)
        0.012085

    Source:
        The inverse recursion 1/B(n) = 1 + n/(a B(n−1)), which never subtracts: one unit in
        the last place at n = 10⁶, where aⁿ/n! overflows at n = 171. Its start between whole
        numbers is Jagerman, "Some properties of the Erlang loss function" (1974).
    """
    if not (load > 0 and math.isfinite(load)):
        raise ParameterError(f"an offered load is above 0 and finite; it is {load}")
    if not (servers >= 0 and math.isfinite(servers)):
        raise ParameterError(f"a number of servers is at least 0 and finite; it is {servers}")
    if servers > _MOST_SERVERS:
        raise ParameterError(f"at most {_MOST_SERVERS:,} servers are computed, not {servers:,}")
    whole = math.floor(servers)
    fraction = servers - whole
    first = max(0, math.floor(far_below(min(load, servers))))
    if first:
        # A start that is off by a factor is off by 1e-31 of it at the end.
        inverse = load / (load - first)
    else:
        inverse = _inverse_below_one(load, fraction) if fraction else 1.0
    for k in range(first + 1, whole + 1):
        inverse = 1 + (k + fraction) / load * inverse
        if inverse == math.inf:
            return 0.0
    return 1 / inverse


def far_below(mean: float) -> float:
    """Return a number of busy servers that a station busy with ``mean`` never falls to.

    Twelve standard deviations below, with a margin for small means: a recursion over the
    servers that starts there has forgotten its start to the last bit when it arrives.
    """
    return mean - 12 * math.sqrt(mean) - 100


def _inverse_below_one(load: float, n: float) -> float:
    """Return 1/B(n) for 0 < n < 1, which is e^a a^−n Γ(n+1, a)."""
    if load < 1:
        term = total = 1 / (n + 1)
        k = 0
        while abs(term) > 1e-18 * abs(total):
            k += 1
            term *= load / (n + 1 + k)
            total += term
        # Γ(n+1, a) = Γ(n+1) − a^(n+1) e^−a Σ aᵏ/((n+1)…(n+1+k))
        return math.exp(load - n * math.log(load)) * math.gamma(n + 1) - load * total
    # Legendre's continued fraction of Γ(n+1, a), by Lentz's method.
    b = load - n
    c, d = math.inf, 1 / b
    value = d
    for k in range(1, _TERMS):
        a = -k * (k - n - 1)
        b += 2
        d = 1 / (a * d + b)
        c = b + a / c
        step = c * d
        value *= step
        if abs(step - 1) < 1e-16:
            break
    return load * value


def erlang_c(load: float, servers: float) -> float:
    """Return the share of jobs that waits in M/M/n/inf, Erlang's C.

    Args:
        load: Offered load a = λ/μ in erlangs, 0 < a < n.
        servers: n, whole or between.

    Example:
        >>> round(erlang_c(load=1.8, servers=4), 4)
        0.1285
    """
    if load >= servers:
        raise ParameterError(f"Erlang's C needs a load below {servers} servers; it is {load}")
    b = erlang_b(load, servers)
    return servers * b / (servers - load * (1 - b))


def load_at_loss(loss: float, servers: float) -> float:
    """Return the offered load at which M/G/n/0 refuses the share ``loss``, in erlangs.

    Example:
        >>> round(load_at_loss(loss=0.01, servers=15), 3)
        8.108
    """
    if not 0 < loss < 1:
        raise ParameterError(f"a loss is a share between 0 and 1; it is {loss}")
    low, high = 0.0, 1.0
    while erlang_b(high, servers) < loss:
        low, high = high, 2 * high
    # Halving, not a secant: B is flat to within 1e-300 far below the knee.
    while high - low > 4e-16 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if erlang_b(middle, servers) < loss:
            low = middle
        else:
            high = middle
    return high
