"""G/G/n/q where nothing exact is known: approximations from two moments, with their error.

Of the gaps and the service times only mean and scv are used. The wait is that of M/M/n/inf
times the mean of the two scv (Allen and Cunneen), corrected for gaps that are not Poisson's
(Kraemer and Langenbach-Belz). The loss is that of M/M/n/q on the scale on which the flows
vary (Hayward).
"""

import itertools
import math
from functools import cache
from typing import Final, TypedDict

from molva.queueing.analytic._residual import integral
from molva.queueing.analytic.erlang import erlang_b
from molva.queueing.analytic.flows import output_of_single_server
from molva.queueing.analytic.places import Places
from molva.queueing.distributions import (
    Distribution,
    General,
    LogNormal,
    Trace,
    Uniform,
    as_deterministic,
)
from molva.queueing.errors import ParameterError, UnstableError
from molva.queueing.model import Bulk, Model, Recorded, Renewal
from molva.queueing.result import (
    APPROXIMATION,
    Flow,
    Shifted,
    SteadyState,
    Tail,
    TimeLaw,
    nothing_waits,
)

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

# What these were off by, on exact phase-type models drawn at random, and their percentiles on
# models that an exact method or a simulation computes. Tests hold them to it.
_ERROR_OF_WAIT: Final = (
    "mean wait within 3 % in half, 12 % in nine tenths and 30 % in all of 108 exact models of "
    "ρ ≥ 0.7, scv 0.25 to 4 and n ≤ 4, probability of waiting within 1, 10 and 22 %, percentiles "
    "from p90 on within 21 %; below ρ = 0.7 the mean wait, small there, within 7, 42 and 78 %"
)
_ERROR_OF_LOSS: Final = (
    "loss, from 0.1 % on, within 4 % in half, 23 % in nine tenths and 55 % in all of 180 exact "
    "models of ρ 0.7 to 1.2, scv 0.25 to 4, n ≤ 4 and q ≤ 20, mean wait within 2, 10 and 41 %, "
    "probability of waiting within 3, 16 and 41 %, percentiles from p90 on within 45 %"
)


# Variability below which a flow is not scaled further, and servers that a scaled station has
# at most: beyond, Erlang's recursion takes seconds, for digits that an approximation lacks.
_LEAST_SCALE: Final = 0.01
_MOST_SERVERS: Final = 1e6

# Places of a bounded room that its distribution is made of at most.
_MOST_PLACES: Final = 2000

# Steps into which a wait is cut before a service is added: each holds so much of the tail of the
# one before. Finer, and nothing changes beside the error.
_STEPS_OF_TAIL: Final = 80
_STEP_OF_TAIL: Final = 0.88

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
        # Where few can wait the loss depends on the service time by little more than its mean,
        # as that of Poisson arrivals does: its scv then counts for 1.
        places = model.waiting / (model.waiting + n)
        felt = service_scv * places + 1 - places
        return _bounded(model, n, model.waiting, (gap_scv + felt) / 2)
    load = arrivals.rate * service.mean
    if load >= n:
        raise UnstableError(str(model), arrival_rate=arrival, capacity=n / mean)
    mean_wait = kraemer_langenbach_belz(arrival, mean, gap_scv, service_scv, n)
    a = float(load)
    waiting = _probability_of_waiting(a, n, gap_scv, service_scv)
    return SteadyState(
        model=model,
        road=APPROXIMATION,
        error=_ERROR_OF_WAIT,
        method=METHOD,
        source=_SOURCE,
        utilisation=a / n,
        loss_probability=0.0,
        probability_of_waiting=waiting,
        throughput=arrival,
        mean_wait=mean_wait,
        mean_time_in_system=mean_wait + mean,
        mean_waiting=arrival * mean_wait,
        mean_in_system=arrival * mean_wait + a,
        output=_output(model, mean_wait),
        **_laws(model, waiting, mean_wait),
    )


class _Laws(TypedDict, total=False):
    wait: TimeLaw
    time_in_system: TimeLaw


def _laws(model: Model, waiting: float, mean_wait: float) -> _Laws:
    """Return the distributions, where the wait of those who wait is taken for exponential."""
    service = model.service
    assert not isinstance(service, Bulk)
    if model.discipline != "fifo" or mean_wait == 0:
        return {}
    drain = waiting / mean_wait
    wait = Tail(lambda t: waiting * math.exp(-drain * t), mean_wait)
    return {"wait": wait, "time_in_system": _followed(wait, waiting, drain, service)}


def _followed(wait: Tail, waiting: float, drain: float, service: Distribution) -> TimeLaw:
    """Return the wait, 0 or exponential with rate ``drain``, and an independent service."""
    constant = as_deterministic(service)
    if constant is not None:
        return Shifted(wait, float(constant.mean))
    if isinstance(service, Trace):
        values = service.values
        return Tail(
            lambda t: (
                math.fsum(1.0 if v > t else waiting * math.exp(-drain * (t - v)) for v in values)
                / len(values)
            ),
            float(service.mean),
        )
    law = _stand_in(service)
    edges = [float(law.low), float(law.high)] if isinstance(law, Uniform) else []

    def ended(t: float) -> float:
        return law.cdf(t) or 0.0

    def tail(t: float) -> float:
        if t == 0:
            return 1.0
        # 1 − F(t) + waiting · E[exp(−drain (t − S)); S ≤ t], the last by parts.
        points = [0.0, *(edge for edge in edges if 0 < edge < t), t]
        past = math.fsum(
            integral(lambda u: ended(u) * math.exp(-drain * (t - u)), low, high, t)
            for low, high in itertools.pairwise(points)
        )
        done = ended(t)
        return 1 - done + waiting * (done - drain * past)

    return Tail(tail, float(law.mean))


def _output(model: Model, mean_wait: float) -> Flow:
    """Return the output: of one server by Marshall's formula, with the approximate wait."""
    arrivals, service = model.arrivals, model.service
    assert isinstance(arrivals, Renewal | Recorded)
    assert not isinstance(service, Bulk)
    gap_scv = float(arrivals.gap.scv)
    if model.servers == 1:
        flow = output_of_single_server(model.arrival_rate, gap_scv, service, mean_wait)
        return Flow(flow.rate, max(0.0, flow.scv or 0.0))
    assert model.servers is not None
    rho = model.offered_load / model.servers
    # Whitt, The queueing network analyzer (1983), formula 39.
    scv = 1 + (1 - rho**2) * (gap_scv - 1)
    scv += rho**2 / math.sqrt(model.servers) * (float(service.scv) - 1)
    return Flow(model.arrival_rate, scv)


def _bounded(model: Model, n: int, q: int, variability: float) -> SteadyState:
    """Return what M/M/n/q does on the scale on which the flows vary.

    A flow whose counts vary v times as much as Poisson's fills n servers and q places as
    Poisson's fills n/v and q/v, with every job standing for v of them (Hayward's equivalence).
    """
    arrival, a, mean = model.arrival_rate, model.offered_load, float(model.service.mean)
    rho = a / n
    scale = max(variability, _LEAST_SCALE, n / _MOST_SERVERS)
    loss, mean_waiting, waiting = _scaled(a / scale, n / scale, q / scale)
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
        probability_of_waiting=waiting if q else 0.0,
        throughput=throughput,
        mean_wait=mean_wait,
        mean_time_in_system=mean_wait + mean,
        mean_waiting=mean_waiting,
        mean_in_system=mean_waiting + a * (1 - loss),
        output=Flow(throughput),
        refusals=Flow(arrival * loss),
        **_laws_of_room(model, rho, q / scale, waiting, mean_wait),
    )


def _laws_of_room(
    model: Model, rho: float, places: float, waiting: float, mean_wait: float
) -> _Laws:
    """Return the distributions, those of M/M/n/q on the scale on which the flows vary.

    Args:
        model: FIFO, or nothing is returned where jobs wait.
        rho: Offered load for each server.
        places: Waiting places on that scale.
        waiting: Share of the admitted that waits.
        mean_wait: Which the distribution is given.
    """
    service = model.service
    assert not isinstance(service, Bulk)
    if model.waiting == 0:
        wait = nothing_waits()
        return {"wait": wait, "time_in_system": _followed(Tail(wait.tail, 1.0), 0.0, 1.0, service)}
    if model.discipline != "fifo" or mean_wait == 0:
        return {}
    whole = min(max(1, round(places)), _MOST_PLACES)
    # The fullest place is the likeliest where ρ > 1: weights count from there.
    ratio = rho ** (places / whole)
    weights = [
        min(ratio, 1.0) ** m if ratio <= 1 else ratio ** (m - whole + 1) for m in range(whole)
    ]
    total = math.fsum(weights)
    mean_place = math.fsum((m + 1) * w for m, w in enumerate(weights)) / total
    drain = mean_place * waiting / mean_wait
    behind = Places(1, drain, 1 - waiting, [w * waiting / total for w in weights]).wait()
    return {"wait": behind, "time_in_system": _after(behind, waiting, service)}


def _after(wait: Tail, waiting: float, service: Distribution) -> TimeLaw:
    """Return a wait and an independent service, the wait cut into steps."""
    constant = as_deterministic(service)
    if constant is not None:
        return Shifted(wait, float(constant.mean))
    law = _stand_in(service)

    @cache
    def steps() -> list[tuple[float, float]]:
        left = [waiting * _STEP_OF_TAIL**i for i in range(_STEPS_OF_TAIL)]
        cut = [(low, high) for low, high in zip([*left[1:], 0.0], left, strict=True)]
        return [(1 - waiting, 0.0)] + [
            (high - low, wait.percentile(1 - (low + high) / 2)) for low, high in cut
        ]

    def tail(t: float) -> float:
        return math.fsum(
            share * (1.0 if t < at else 1 - (law.cdf(t - at) or 0.0)) for share, at in steps()
        )

    return Tail(tail, float(law.mean))


def _stand_in(service: Distribution) -> Distribution:
    """Return some distribution of the same moments: which one changes less than the error."""
    if isinstance(service, General):
        return LogNormal(service.mean, service.scv)
    return service


def _scaled(load: float, servers: float, places: float) -> tuple[float, float, float]:
    """Return loss, mean number waiting, and P(an admitted job waits) of M/M/n/q, n and q real."""
    rho = load / servers
    # Next to 1 the closed forms divide 0 by 0. What moving away costs is far below the error.
    if abs(rho - 1) < _NEXT_TO_ONE:
        rho = 1 + _NEXT_TO_ONE
    inverse = 1 / erlang_b(load, servers)
    if places * math.log(rho) > _OVERFLOWS:
        return 1 - 1 / rho, places - 1 / (rho - 1), 1.0
    power = rho**places
    total = inverse + rho * (1 - power) / (1 - rho)
    waiting = rho * (1 - (places + 1) * power + places * power * rho) / (1 - rho) ** 2
    busy = (1 - power) / (1 - rho)
    return power / total, waiting / total, busy / (total - power)


def _erlang_c(load: float, servers: int) -> float:
    b = erlang_b(load, servers)
    return servers * b / (servers - load * (1 - b))


def _probability_of_waiting(load: float, servers: int, gap_scv: float, service_scv: float) -> float:
    """Return Erlang's C, corrected as Kraemer and Langenbach-Belz do for one server."""
    rho = load / servers
    if gap_scv <= 1:
        factor = 1 + gap_scv + rho * service_scv
        factor /= 1 + rho * (service_scv - 1) + rho**2 * (4 * gap_scv + service_scv)
    else:
        factor = 4 * rho / (gap_scv + rho**2 * (4 * gap_scv + service_scv))
    corrected = 1 + (gap_scv - 1) * (1 - rho) * factor
    return min(1.0, max(0.0, _erlang_c(load, servers) * corrected))


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
