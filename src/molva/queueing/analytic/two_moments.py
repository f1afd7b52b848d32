"""G/G/n/q where nothing exact is known: approximations from two moments, with their error.

Of the gaps and the service times only mean and scv are used. The wait is that of M/M/n/inf
times the mean of the two scv (Allen and Cunneen), corrected for gaps that are not Poisson's
(Kraemer and Langenbach-Belz). The loss is that of M/M/n/q on the scale on which the flows
vary (Hayward).
"""

import math
from typing import Final

from molva.queueing.analytic.erlang import erlang_b
from molva.queueing.errors import ParameterError, UnstableError
from molva.queueing.model import Bulk, Model, Recorded, Renewal
from molva.queueing.result import APPROXIMATION, Flow, SteadyState, Tail, nothing_waits

__all__ = [
    "METHOD",
    "allen_cunneen",
    "applies",
    "daley_bound",
    "kingman_bound",
    "kraemer_langenbach_belz",
    "sakasegawa",
    "solve",
]

METHOD: Final = "two-moments"
_SOURCE: Final = (
    "Allen-Cunneen with the correction of Kraemer and Langenbach-Belz (1976); finite rooms by "
    "Hayward's equivalence, Fredericks, Bell System Technical Journal 59 (1980)"
)

# What these were off by, at most, on the cases in tests/queueing/test_reference_cases.py.
_ERROR_OF_WAIT: Final = (
    "mean wait within 14 %, its percentiles from p90 on within 19 %, probability of waiting "
    "within 28 % in 16 exact cases of ρ 0.7 to 0.91 and scv up to 4"
)
_ERROR_OF_LOSS: Final = (
    "loss within 12 %, mean wait within 4 % in 4 exact or simulated cases of ρ 0.9 to 1.1"
)


# Variability below which a flow is not scaled further, and servers that a scaled station has
# at most: beyond, Erlang's recursion takes seconds, for digits that an approximation lacks.
_LEAST_SCALE: Final = 0.01
_MOST_SERVERS: Final = 1e6

# Distance from ρ = 1, and exponent of ρ^q, at which closed forms are left.
_NEXT_TO_ONE: Final = 1e-5
_OVERFLOWS: Final = 600.0


def applies(model: Model) -> bool:
    """Whether jobs come one by one with gaps of known moments, to a finite number of servers."""
    arrivals = model.arrivals
    single = isinstance(arrivals, Recorded) or (
        isinstance(arrivals, Renewal) and arrivals.batch == 1
    )
    return single and model.servers is not None and not isinstance(model.service, Bulk)


def solve(model: Model) -> SteadyState:
    """Return an approximate steady state of G/G/n/q.

    Raises:
        UnstableError: All can wait, and λ ≥ nμ.
    """
    arrivals, service, n = model.arrivals, model.service, model.servers
    assert isinstance(arrivals, Renewal | Recorded)
    assert not isinstance(service, Bulk)
    assert n is not None
    gap_scv, service_scv = float(arrivals.gap.scv), float(service.scv)
    arrival, mean = model.arrival_rate, float(service.mean)
    if model.waiting is not None:
        return _bounded(model, n, model.waiting, (gap_scv + service_scv) / 2)
    load = arrivals.rate * service.mean
    if load >= n:
        raise UnstableError(str(model), arrival_rate=arrival, capacity=n / mean)
    mean_wait = kraemer_langenbach_belz(arrival, mean, gap_scv, service_scv, n)
    a = float(load)
    waiting = _erlang_c(a, n)
    return SteadyState(
        model=model,
        road=APPROXIMATION,
        error=_ERROR_OF_WAIT,
        method=METHOD,
        source=_SOURCE,
        utilisation=a / n,
        loss_probability=0.0,
        probability_of_waiting=min(1.0, waiting),
        throughput=arrival,
        mean_wait=mean_wait,
        mean_time_in_system=mean_wait + mean,
        mean_waiting=arrival * mean_wait,
        mean_in_system=arrival * mean_wait + a,
        # In heavy traffic the wait of those who wait is exponential.
        wait=Tail(lambda t: waiting * math.exp(-t * waiting / mean_wait), mean_wait)
        if mean_wait > 0 and model.discipline == "fifo"
        else None,
        output=Flow(arrival),
    )


def _bounded(model: Model, n: int, q: int, variability: float) -> SteadyState:
    """Return what M/M/n/q does on the scale on which the flows vary.

    A flow whose counts vary v times as much as Poisson's fills n servers and q places as
    Poisson's fills n/v and q/v, with every job standing for v of them (Hayward's equivalence).
    """
    arrival, a, mean = model.arrival_rate, model.offered_load, float(model.service.mean)
    rho = a / n
    scale = max(variability, _LEAST_SCALE, n / _MOST_SERVERS)
    loss, mean_waiting = _scaled(a / scale, n / scale, q / scale)
    mean_waiting = min(float(q), mean_waiting * scale)
    throughput = arrival * (1 - loss)
    mean_wait = mean_waiting / throughput
    return SteadyState(
        model=model,
        road=APPROXIMATION,
        error=_ERROR_OF_LOSS,
        method=METHOD,
        source=_SOURCE,
        utilisation=rho * (1 - loss),
        loss_probability=loss,
        probability_of_waiting=None if q else 0.0,
        throughput=throughput,
        mean_wait=mean_wait,
        mean_time_in_system=mean_wait + mean,
        mean_waiting=mean_waiting,
        mean_in_system=mean_waiting + a * (1 - loss),
        wait=None if q else nothing_waits(),
        output=Flow(throughput),
        refusals=Flow(arrival * loss),
    )


def _scaled(load: float, servers: float, places: float) -> tuple[float, float]:
    """Return loss and mean number waiting of M/M/n/q for real n and q."""
    rho = load / servers
    # Next to 1 the closed forms divide 0 by 0. What moving away costs is far below the error.
    if abs(rho - 1) < _NEXT_TO_ONE:
        rho = 1 + _NEXT_TO_ONE
    inverse = 1 / erlang_b(load, servers)
    if places * math.log(rho) > _OVERFLOWS:
        return 1 - 1 / rho, places - 1 / (rho - 1)
    power = rho**places
    total = inverse + rho * (1 - power) / (1 - rho)
    waiting = rho * (1 - (places + 1) * power + places * power * rho) / (1 - rho) ** 2
    return power / total, waiting / total


def _erlang_c(load: float, servers: int) -> float:
    b = erlang_b(load, servers)
    return servers * b / (servers - load * (1 - b))


def _checked(arrival_rate: float, mean_service: float, servers: int) -> float:
    """Return ρ, which must be below 1."""
    rho = arrival_rate * mean_service / servers
    if not 0 < rho < 1:
        raise ParameterError(f"a mean wait needs a utilisation between 0 and 1; it is {rho:.6g}")
    return rho


def allen_cunneen(
    arrival_rate: float, mean_service: float, gap_scv: float, service_scv: float, servers: int = 1
) -> float:
    """Return the mean wait of G/G/n/inf by Allen and Cunneen: M/M/n's times the mean scv."""
    rho = _checked(arrival_rate, mean_service, servers)
    waiting = _erlang_c(arrival_rate * mean_service, servers)
    base = waiting * mean_service / (servers * (1 - rho))
    return base * (gap_scv + service_scv) / 2


def kraemer_langenbach_belz(
    arrival_rate: float, mean_service: float, gap_scv: float, service_scv: float, servers: int = 1
) -> float:
    """Return Allen and Cunneen's mean wait, corrected for gaps that are not Poisson's."""
    rho = _checked(arrival_rate, mean_service, servers)
    if gap_scv + service_scv == 0:
        return 0.0
    if gap_scv <= 1:
        exponent = 2 * (1 - rho) / (3 * rho) * (1 - gap_scv) ** 2 / (gap_scv + service_scv)
    else:
        exponent = (1 - rho) * (gap_scv - 1) / (gap_scv + 4 * service_scv)
    plain = allen_cunneen(arrival_rate, mean_service, gap_scv, service_scv, servers)
    return plain * math.exp(-exponent)


def sakasegawa(
    arrival_rate: float, mean_service: float, gap_scv: float, service_scv: float, servers: int = 1
) -> float:
    """Return the mean wait of G/G/n/inf by Sakasegawa (1977), without Erlang's formula."""
    rho = _checked(arrival_rate, mean_service, servers)
    power = math.pow(rho, math.sqrt(2 * (servers + 1)) - 1)
    return mean_service * power / (servers * (1 - rho)) * (gap_scv + service_scv) / 2


def kingman_bound(
    arrival_rate: float, mean_service: float, gap_scv: float, service_scv: float
) -> float:
    """Return a mean wait that G/G/1/inf never exceeds, Kingman (1962)."""
    rho = _checked(arrival_rate, mean_service, 1)
    variance = gap_scv / arrival_rate**2 + service_scv * mean_service**2
    return arrival_rate * variance / (2 * (1 - rho))


def daley_bound(
    arrival_rate: float, mean_service: float, gap_scv: float, service_scv: float
) -> float:
    """Return a mean wait that G/G/1/inf never exceeds, Daley (1977)."""
    rho = _checked(arrival_rate, mean_service, 1)
    gaps = (2 - rho) * gap_scv / arrival_rate
    return (gaps + arrival_rate * service_scv * mean_service**2) / (2 * (1 - rho))
