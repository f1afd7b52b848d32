"""The bulk server: waits and times in system, also of a bounded room."""

import math
import random
from collections import deque

import numpy
import pytest

from molva.queueing import SteadyState, analyse


def integrals(state: SteadyState, end: float, step: float) -> tuple[float, float]:
    """Return the means of wait and time in system as integrals of their tails."""
    assert state.wait is not None
    assert state.time_in_system is not None
    x, w = numpy.polynomial.legendre.leggauss(2)
    wait = time = 0.0
    for i in range(round(end / step)):
        for at, weight in zip(x.tolist(), w.tolist(), strict=True):
            t = (i + (at + 1) / 2) * step
            wait += step / 2 * weight * state.wait.tail(t)
            time += step / 2 * weight * state.time_in_system.tail(t)
    return wait, time


@pytest.mark.parametrize(
    "spec",
    [
        "M(3/s)/bulk(3, 0.5s + 0.2s*k)/1/7",
        "M(2/s)/bulk(4, 0.5s + 0.2s*k)/1/2",
        "M(3/s)/bulk(4, 0.3s + 0.3s*k)/1/4",
        "M(3/s)/bulk(4, 1s + 0s*k)/1/5",
        "M(2/s)/bulk(2, 0s + 0.4s*k)/1/inf",
    ],
)
def test_means_are_integrals_of_the_tails(spec: str) -> None:
    state = analyse(spec)

    wait, time = integrals(state, 40 if state.model.waiting is None else 12, 0.1)

    assert wait == pytest.approx(state.mean_wait, rel=1e-3)
    assert time == pytest.approx(state.mean_time_in_system, rel=1e-3)


@pytest.mark.parametrize("places", ["7", "2", "0", "inf"])
def test_bulks_of_one_are_constant_service(places: str) -> None:
    bulk = analyse(f"M(0.8/s)/bulk(1, 0.75s + 0.25s*k)/1/{places}")
    single = analyse(f"M(0.8/s)/D(1s)/1/{places}")

    for share in (0.1, 0.5, 0.9, 0.999):
        assert bulk.wait_percentile(share) == pytest.approx(
            single.wait_percentile(share), rel=1e-8, abs=1e-12
        )
        assert bulk.time_in_system_percentile(share) == pytest.approx(
            single.time_in_system_percentile(share), rel=1e-8
        )


@pytest.mark.parametrize(
    ("arrival", "limit", "base", "each", "places"),
    [(3.0, 3, 0.5, 0.2, 7), (4.0, 5, 0.4, 0.25, 6), (2.5, 3, 0.2, 0.3, None)],
)
def test_times_are_those_of_a_plain_simulation(
    arrival: float, limit: int, base: float, each: float, places: int | None
) -> None:
    room = "inf" if places is None else places
    state = analyse(f"M({arrival}/s)/bulk({limit}, {base}s + {each}s*k)/1/{room}")
    wait, time = state.wait, state.time_in_system
    assert wait is not None
    assert time is not None
    points = [0.3, 0.8, 1.4, 2.2]
    runs = [
        simulated(random.Random(seed), arrival, limit, base, each, places) for seed in range(20)
    ]

    for t in points:
        for law, index in ((wait, 0), (time, 1)):
            shares = [sum(job[index] > t for job in run) / len(run) for run in runs]
            mean = sum(shares) / len(shares)
            spread = math.sqrt(sum((s - mean) ** 2 for s in shares) / (len(shares) - 1))
            assert abs(mean - law.tail(t)) < 5 * spread / math.sqrt(len(shares)) + 1e-12


def simulated(
    source: random.Random, arrival: float, limit: int, base: float, each: float, q: int | None
) -> list[tuple[float, float]]:
    """Return wait and time in system of each admitted job."""
    line: deque[float] = deque()
    jobs: list[tuple[float, float]] = []
    free_at = at = 0.0
    for _ in range(6_000):
        at += source.expovariate(arrival)
        while line and free_at <= at:
            taken = [line.popleft() for _ in range(min(limit, len(line)))]
            end = free_at + base + each * len(taken)
            jobs += [(free_at - came, end - came) for came in taken]
            free_at = end
        if free_at <= at:
            jobs.append((0.0, base + each))
            free_at = at + base + each
        elif q is None or len(line) < q:
            line.append(at)
    return jobs
