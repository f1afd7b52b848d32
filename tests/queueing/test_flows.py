"""What leaves a station, by a second road where there is a formula and by playing it elsewhere."""

import heapq
import itertools
import math
import random
from fractions import Fraction

import pytest

from molva.queueing import analyse
from molva.queueing.analytic.constant_departures import departure_gap_scv
from molva.queueing.analytic.constant_service import _Line


@pytest.mark.parametrize("rho", ["0.3", "0.8", "0.95"])
def test_constant_service_of_one_server_leaves_as_marshall_says(rho: str) -> None:
    line = _Line(Fraction(rho), 1)
    state = analyse(f"M({rho}/s)/D(1s)/1/inf")
    assert state.output is not None

    assert departure_gap_scv(float(rho), 1, line.beyond) == pytest.approx(
        state.output.scv, rel=1e-9
    )


@pytest.mark.parametrize(("arrival", "n", "q"), [(2.4, 3, None), (1.2, 2, None), (3.0, 4, 0)])
def test_the_output_behind_constant_service_is_that_of_a_plain_simulation(
    arrival: float, n: int, q: int | None
) -> None:
    room = "/inf" if q is None else ""
    state = analyse(f"M({arrival}/s)/D(1s)/{n}{room}")
    assert state.output is not None
    assert state.output.scv is not None

    found = [output_scv(random.Random(seed), arrival, n, q) for seed in range(20)]
    mean = sum(found) / len(found)
    spread = math.sqrt(sum((v - mean) ** 2 for v in found) / (len(found) - 1))

    assert abs(mean - state.output.scv) < 5 * spread / math.sqrt(len(found))


def output_scv(source: random.Random, arrival: float, n: int, q: int | None) -> float:
    at, ends = 0.0, [0.0] * n
    departures = []
    for _ in range(10_000):
        at += source.expovariate(arrival)
        if q == 0 and ends[0] > at:
            continue
        end = max(at, ends[0]) + 1
        heapq.heapreplace(ends, end)
        departures.append(end)
    gaps = [later - earlier for earlier, later in itertools.pairwise(departures)]
    mean = sum(gaps) / len(gaps)
    return sum((gap - mean) ** 2 for gap in gaps) / len(gaps) / mean**2


def test_behind_many_servers_a_light_flow_leaves_as_it_came() -> None:
    state = analyse("M(1/s)/D(1s)/30/inf")
    assert state.output is not None

    assert state.output.scv == pytest.approx(1, rel=1e-9)
