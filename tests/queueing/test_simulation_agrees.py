"""Analysis against simulation, and intervals against what they promise, with fixed seeds."""

import math
import random
import statistics
from typing import NamedTuple

import pytest

from molva.queueing import Estimate, Simulation, SteadyState, analyse, simulate
from molva.queueing.simulate.intervals import student

# Quantities that every analysis with a bounded room, or without one, gives exactly.
BOUNDED = ("loss_probability", "mean_wait", "mean_in_system", "utilisation")
UNBOUNDED = ("mean_wait", "probability_of_waiting", "mean_time_in_system", "mean_in_system")


class Found(NamedTuple):
    spec: str
    quantity: str
    z: float


def random_model(source: random.Random) -> str:
    """Return a model that an exact method computes, loaded as services are."""
    n = source.choice([1, 1, 1, 2, 3, 5, 12, 80])
    rho = source.uniform(0.3, 0.85)
    q = source.choice([0, 1, 3, 10])
    mean = source.choice([0.01, 1, 60])
    rate = f"{round(rho * n / mean, 6)}/s"
    over = f"{round(source.uniform(0.5, 1.3) * n / mean, 6)}/s"
    law = source.choice(
        [
            f"E2({mean}s)",
            f"U(0s,{2 * mean}s)",
            f"LN(mean={mean}s,scv=0.7)",
            f"H2(mean={mean}s,scv=3)",
            f"D({mean}s)",
            f"E9({mean}s)",
        ]
    )
    gaps = source.choice(
        [f"E3({rate})", f"H2(mean={rate},scv=2.5)", f"D({rate})", f"U(0s,{2 * mean / rho / n}s)"]
    )
    order = source.choice(["", "/lifo", "/random"])
    return source.choice(
        [
            f"M({rate})/M({mean}s)/{n}/inf{order}",
            f"M({over})/M({mean}s)/{n}/{q}",
            f"M({over})/{law}/{n}",
            f"{gaps}/M({mean}s)/{n}/inf",
            f"M({rate})/D({mean}s)/{n}/inf",
            f"M({round(rho / mean, 6)}/s)/{law}/1/inf",
            f"M({round(1.1 * rho / mean, 6)}/s)/{law}/1/{q}",
            f"M({round(4 * rho / mean, 6)}/s)/bulk(8, {mean}s + {mean / 8}s*k)/1/inf",
            f"{gaps}/{law}/inf",
        ]
    )


def z_of(found: Estimate, exact: float, batches: int) -> float:
    error = (found.high - found.low) / 2 / student(batches - 1)
    return (found.value - exact) / error


def compared(seed: int) -> Found:
    source = random.Random(seed)
    while True:
        spec = random_model(source)
        state = analyse(spec)
        if state.road == "approximation":
            continue
        bounded = state.model.servers is not None and state.model.waiting is not None
        quantity = source.choice(BOUNDED if bounded else UNBOUNDED)
        exact = getattr(state, quantity)
        if exact is not None and 1e-3 < exact < math.inf and exact != 1:
            break
    result = simulate(spec, jobs=200_000, seed=seed, engine="compiled")
    return Found(spec, quantity, z_of(getattr(result, quantity), exact, result.batches))


def normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


@pytest.fixture(scope="module")
def three_hundred() -> list[Found]:
    return [compared(seed) for seed in range(300)]


def test_analysis_and_simulation_of_300_random_models_agree(three_hundred: list[Found]) -> None:
    assert [found for found in three_hundred if not abs(found.z) < 5] == []


def test_what_is_left_between_them_is_standard_normal(three_hundred: list[Found]) -> None:
    values = sorted(found.z for found in three_hundred)
    number = len(values)
    distance = max(
        max(normal(z) - i / number, (i + 1) / number - normal(z)) for i, z in enumerate(values)
    )

    # Kolmogorov and Smirnov at one in a thousand; mean and spread at four standard errors.
    assert distance < 1.95 / math.sqrt(number)
    assert abs(statistics.fmean(values)) < 4 / math.sqrt(number)
    # Student's t over some 30 batches spreads by 4 % more than the normal.
    assert 0.84 < statistics.pstdev(values) < 1.20


COVERED = [
    ("M(0.5/s)/M(1s)/1/inf", "mean_wait"),
    ("M(0.8/s)/M(1s)/1/inf", "mean_wait"),
    ("M(0.8/s)/M(1s)/1/inf", "p90"),
    ("M(2.2/s)/M(1s)/2/5", "loss_probability"),
    ("M(2.2/s)/M(1s)/2/5", "p50"),
    ("M(3/s)/E2(1s)/4", "loss_probability"),
    ("E2(1.4/s)/M(1s)/2/inf", "p99"),
    ("M(0.7/s)/H2(mean=1s,scv=3)/1/inf", "mean_in_system"),
    ("M(2.4/s)/D(1s)/3/inf", "probability_of_waiting"),
    ("M(0.7/s)/M(1s)/1/inf", "output"),
]


def both(spec: str, quantity: str, seed: int, state: SteadyState) -> tuple[Estimate | None, float]:
    result: Simulation = simulate(spec, jobs=160_000, seed=seed, engine="compiled")
    if quantity[0] == "p" and quantity[1:].isdigit():
        share = float(quantity[1:]) / 100
        exact = state.time_in_system_percentile(share)
        assert exact is not None
        return result.time_in_system_percentile(share), exact
    if quantity == "output":
        assert state.output is not None
        assert state.output.scv is not None
        return result.output.scv, state.output.scv
    exact = getattr(state, quantity)
    assert exact is not None
    return getattr(result, quantity), exact


def test_of_1000_intervals_as_many_contain_the_number_as_they_say() -> None:
    inside = dict.fromkeys(COVERED, 0)
    for at, (spec, quantity) in enumerate(COVERED):
        state = analyse(spec)
        for seed in range(100):
            found, exact = both(spec, quantity, 10_000 + 100 * at + seed, state)
            assert found is not None
            inside[spec, quantity] += found.low <= exact <= found.high

    assert 930 <= sum(inside.values()) <= 970, inside
    # For each of them, 95 in 100, give or take four standard errors.
    assert all(number >= 86 for number in inside.values()), inside
