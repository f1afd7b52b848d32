"""Who is next: the last to come, or one drawn by lot, by Markov chains and by integrals."""

import itertools

import numpy
import pytest
from numpy.typing import NDArray
from scipy import integrate, linalg

from molva.queueing import SteadyState, analyse

Matrix = NDArray[numpy.float64]


def tail_of_chain(start: Matrix, chain: Matrix, t: float) -> float:
    return float(start @ linalg.expm(chain * t).sum(axis=1))


def drawn(arrival: float, capacity: float, places: int) -> Matrix:
    """Return the chain of a job beside j = 0, 1 … others that wait, one of whom is drawn."""
    chain = numpy.zeros((places, places))
    for j in range(places):
        if j + 1 < places:
            chain[j, j + 1] = arrival
        if j:
            chain[j, j - 1] = capacity * j / (j + 1)
        chain[j, j] = -chain[j].sum() - capacity / (j + 1)
    return chain


def stacked(arrival: float, capacity: float, room: int) -> Matrix:
    """Return the chain of a job below 0, 1 … later ones, of whom at most ``room`` fit."""
    chain = numpy.zeros((room + 1, room + 1))
    for j in range(room + 1):
        if j < room:
            chain[j, j + 1] = arrival
        if j:
            chain[j, j - 1] = capacity
        chain[j, j] = -chain[j].sum() - (0 if j else capacity)
    return chain


def found_waiting(arrival: float, n: int, q: int) -> Matrix:
    """Return the share of admitted that finds n busy and 0, 1 … q − 1 waiting, services of 1 s."""
    weights = [1.0]
    for k in range(1, n + q):
        weights.append(weights[-1] * arrival / min(k, n))
    found: Matrix = numpy.array(weights) / sum(weights)
    return found[n:]


@pytest.mark.parametrize(("arrival", "n", "q"), [(1.6, 2, 4), (2.6, 2, 7), (0.8, 1, 1), (3, 3, 5)])
class TestBoundedRoom:
    def test_a_draw_is_the_chain_of_those_who_wait(self, arrival: float, n: int, q: int) -> None:
        state = analyse(f"M({arrival}/s)/M(1s)/{n}/{q}/random")
        assert state.wait is not None
        start, chain = found_waiting(arrival, n, q), drawn(arrival, n, q)

        for t in (0.0, 0.2, 1.0, 4.0):
            assert state.wait.tail(t) == pytest.approx(tail_of_chain(start, chain, t), abs=1e-10)

    def test_the_last_come_waits_for_the_room_above_it(
        self, arrival: float, n: int, q: int
    ) -> None:
        state = analyse(f"M({arrival}/s)/M(1s)/{n}/{q}/lifo")
        assert state.wait is not None
        start = found_waiting(arrival, n, q)

        for t in (0.2, 1.0, 4.0):
            expected = sum(
                share * linalg.expm(stacked(arrival, n, q - 1 - m) * t)[0].sum()
                for m, share in enumerate(start)
            )
            assert state.wait.tail(t) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("order", ["lifo", "random"])
    def test_the_mean_is_that_of_the_first_come(
        self, arrival: float, n: int, q: int, order: str
    ) -> None:
        first = analyse(f"M({arrival}/s)/M(1s)/{n}/{q}")
        state = analyse(f"M({arrival}/s)/M(1s)/{n}/{q}/{order}")

        assert moments(state) == pytest.approx(
            (first.mean_wait, state.mean_squared_wait, first.mean_time_in_system), rel=1e-6
        )


def moments(state: SteadyState) -> tuple[float, float, float]:
    """Return E[W], E[W²] and E[T] as integrals of the tails."""
    wait, time = state.wait, state.time_in_system
    assert wait is not None
    assert time is not None
    end = 1.0
    while time.tail(end) > 1e-9:
        end *= 2
    edges = [0.0, *(end * 2.0**-k for k in range(12, -1, -1))]
    x, w = numpy.polynomial.legendre.leggauss(24)
    total = [0.0, 0.0, 0.0]
    for low, high in itertools.pairwise(edges):
        for at, weight in zip(low + (high - low) * (x + 1) / 2, w * (high - low) / 2, strict=True):
            total[0] += weight * wait.tail(at)
            total[1] += weight * 2 * at * wait.tail(at)
            total[2] += weight * time.tail(at)
    return total[0], total[1], total[2]


@pytest.mark.parametrize(
    "spec",
    [
        "M(1.4/s)/M(1s)/2/inf/lifo",
        "M(1.4/s)/M(1s)/2/inf/random",
        "M(0.6/s)/E3(1s)/1/inf/lifo",
        "M(0.5/s)/H2(mean=1s,scv=3)/1/inf/lifo",
        "E3(1.4/s)/M(1s)/2/inf/lifo",
        "H2(mean=0.5/s,scv=3)/M(1s)/1/inf/lifo",
    ],
)
def test_moments_are_integrals_of_the_tail(spec: str) -> None:
    state = analyse(spec)

    assert moments(state) == pytest.approx(
        (state.mean_wait, state.mean_squared_wait, state.mean_time_in_system), rel=1e-5
    )


def test_the_last_come_behind_constant_service_waits_the_mean() -> None:
    state = analyse("M(0.6/s)/D(1s)/1/inf/lifo")
    assert state.wait is not None
    x, w = numpy.polynomial.legendre.leggauss(12)

    # The density jumps at whole service times.
    tails = [
        (low + (at + 1) / 2, weight / 2, state.wait.tail(low + (at + 1) / 2))
        for low in range(150)
        for at, weight in zip(x.tolist(), w.tolist(), strict=True)
    ]

    assert sum(each * tail for _, each, tail in tails) == pytest.approx(state.mean_wait, rel=1e-9)
    squared = sum(2 * t * each * tail for t, each, tail in tails)
    assert squared == pytest.approx(state.mean_squared_wait, rel=1e-7)
    assert state.time_in_system_percentile(0.9) == pytest.approx(
        1 + (state.wait_percentile(0.9) or 0)
    )


@pytest.mark.parametrize("rho", [0.3, 0.7])
def test_a_draw_among_any_number_is_the_chain_of_very_many(rho: float) -> None:
    state = analyse(f"M({3 * rho}/s)/M(1s)/3/inf/random")
    assert state.wait is not None
    assert state.probability_of_waiting is not None
    places = 200
    start = numpy.array([(1 - rho) * rho**j for j in range(places)])
    start *= state.probability_of_waiting
    chain = drawn(3 * rho, 3.0, places)

    for t in (0.0, 0.1, 1.0, 5.0, 20.0):
        assert state.wait.tail(t) == pytest.approx(tail_of_chain(start, chain, t), abs=1e-11)


@pytest.mark.parametrize("order", ["lifo", "random"])
def test_a_room_that_is_never_full_is_as_good_as_any(order: str) -> None:
    bounded = analyse(f"M(1.2/s)/M(1s)/2/200/{order}")
    unbounded = analyse(f"M(1.2/s)/M(1s)/2/inf/{order}")

    assert bounded.mean_squared_wait == pytest.approx(unbounded.mean_squared_wait, rel=1e-9)
    for share in (0.5, 0.9, 0.999):
        assert bounded.wait_percentile(share) == pytest.approx(
            unbounded.wait_percentile(share), rel=1e-6
        )
        assert bounded.time_in_system_percentile(share) == pytest.approx(
            unbounded.time_in_system_percentile(share), rel=1e-6
        )


@pytest.mark.parametrize("method", ["takacs", "pollaczek-khinchine"])
def test_methods_agree_on_the_last_come(method: str) -> None:
    best = analyse("M(0.7/s)/M(1s)/1/inf/lifo")
    other = analyse("M(0.7/s)/M(1s)/1/inf/lifo", method=method)

    assert other.mean_squared_wait == pytest.approx(best.mean_squared_wait, rel=1e-9)
    for share in (0.5, 0.99):
        assert other.wait_percentile(share) == pytest.approx(best.wait_percentile(share), rel=1e-6)


def test_next_to_saturation_a_draw_keeps_its_digits() -> None:
    state = analyse("M(0.999999/s)/M(1s)/1/inf/random")
    wait = state.wait
    assert wait is not None

    mean, _ = integrate.quad(
        lambda u: wait.tail(1e6 * u / (1 - u)) * 1e6 / (1 - u) ** 2, 0, 1, limit=400, epsrel=1e-11
    )

    assert mean == pytest.approx(999_999, rel=1e-8)
