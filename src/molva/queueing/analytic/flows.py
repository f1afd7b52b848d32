"""What leaves a station M/M/n/q: the jobs served and the jobs refused, as processes.

Both follow from first passages of the number present, one state after the other. Only ratios
are kept from state to state, so a refusal that happens once in 1e60 years has an exact gap.
"""

from typing import Final

from molva.queueing.distributions import Distribution
from molva.queueing.result import Flow

__all__ = ["birth_death_output", "birth_death_refusals", "output_of_single_server"]

# States beyond which a walk over all of them would take longer than the answer is worth: a
# tenth of a second. The shape of the flow is then left undefined.
_MOST_STATES: Final = 100_000

# Below, the mean gap in seconds leaves the range of a double.
_LEAST_LOSS: Final = 1e-280


def birth_death_refusals(arrival: float, service: float, n: int, q: int, loss: float) -> Flow:
    """Return the overflow of M/M/n/q, which is a renewal process.

    Its gaps are the times from one refusal to the next, that is from all places taken until
    the next arrival that finds them taken.

    Source:
        First passages of a birth-death process; for q = 0 the peakedness is Wilkinson's
        1 − α + a/(n + 1 − a + α), with α = aB (1956).
    """
    if n + q > _MOST_STATES or loss < _LEAST_LOSS:
        return Flow(arrival * loss)
    second = 2.0  # E[T²]/E[T]² of the time T from k present until an arrival finds k
    mean = 1 / arrival
    rest = service / (arrival + service)  # 1 − E[e^(−μT)]
    for k in range(1, n + q + 1):
        down = min(k, n) * service
        shorter, mean = mean, (1 + down * mean) / arrival
        # T is a stay in k and then, with the probability ``back``, two more passages.
        back = down / (arrival + down)
        stay = 1 / (arrival + down)
        ratio = shorter / mean
        part = stay / mean
        second = (
            2 * part * (part + back * (ratio + 1)) + back * (second * ratio * ratio + 2 * ratio)
        ) / (1 - back)
        rest = (down * rest + service) / (arrival + down * rest + service)
    carried = arrival * loss / service
    return Flow(
        rate=arrival * loss,
        scv=second - 1,
        peakedness=1 / rest - carried,
        is_poisson=False,
    )


def birth_death_output(arrival: float, service: float, n: int, q: int, throughput: float) -> Flow:
    """Return the output of M/M/n/q; its gaps are not independent, so only their scv is given."""
    load = arrival / service
    top = n + q
    if top > _MOST_STATES:
        return Flow(throughput)
    # Moments of the time to the next departure from each state, from the fullest down.
    first = [0.0] * (top + 1)
    second = [0.0] * (top + 1)
    for k in range(top, -1, -1):
        down = min(k, n) * service
        up = arrival if k < top else 0.0
        above = (first[k + 1], second[k + 1]) if k < top else (0.0, 0.0)
        first[k] = (1 + up * above[0]) / (up + down)
        second[k] = (2 * first[k] + up * above[1]) / (up + down)
    # A departure leaves k behind as often as an arrival finds k and is admitted.
    weights = [1.0]
    for k in range(1, top):
        weights.append(weights[-1] * load / min(k, n))
        if weights[-1] > 1e200:
            weights = [each / 1e200 for each in weights]
    total = sum(weights)
    mean = sum(w * m for w, m in zip(weights, first, strict=False)) / total
    square = sum(w * m for w, m in zip(weights, second, strict=False)) / total
    return Flow(throughput, scv=square / mean**2 - 1, is_poisson=False)


def output_of_single_server(
    arrival_rate: float, arrival_scv: float, service: Distribution, mean_wait: float
) -> Flow:
    """Return the output of G/G/1/inf, whose scv follows from the mean wait.

    Source:
        Marshall, "Some inequalities in queuing", Operations Research 16 (1968).
    """
    rho = arrival_rate * float(service.mean)
    scv = (
        arrival_scv
        + 2 * rho * rho * float(service.scv)
        - 2 * rho * (1 - rho) * mean_wait / float(service.mean)
    )
    return Flow(arrival_rate, scv)
