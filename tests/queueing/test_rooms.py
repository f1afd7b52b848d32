"""M/G/1/q: waits and refusals of a bounded room, by the Markov chain of a marked job."""

import numpy
import pytest
from scipy import linalg

from molva.queueing import analyse
from molva.queueing.analytic import _poisson
from molva.queueing.analytic.birth_death import _Places
from tests.queueing.chains import one_server, phases


@pytest.mark.parametrize("law", ["E2(1s)", "H2(mean=1s,scv=4)"])
@pytest.mark.parametrize(("arrival", "q"), [(0.9, 1), (0.9, 6), (2.0, 4), (0.3, 12)])
class TestOneServer:
    def test_a_wait_is_that_of_a_marked_job(self, law: str, arrival: float, q: int) -> None:
        _, p = one_server(arrival, law, q)
        start, chain = phases(law)
        # Ahead of the job: the service under way and up to q − 1 more, one after the other.
        ahead = numpy.kron(numpy.eye(q), chain)
        for k in range(q - 1):
            ahead[2 * k + 2 : 2 * k + 4, 2 * k : 2 * k + 2] = numpy.outer(-chain.sum(axis=1), start)
        found = p[1:-2] / (1 - p[-2:].sum())
        state = analyse(f"M({arrival}/s)/{law}/1/{q}")
        assert state.wait is not None
        assert state.time_in_system is not None

        inverse = numpy.linalg.inv(-ahead)
        assert state.mean_squared_wait == pytest.approx(
            2 * (found @ inverse @ inverse).sum(), rel=1e-9
        )
        # Its own service follows.
        whole = linalg.block_diag(ahead, chain)
        whole[0:2, -2:] = numpy.outer(-chain.sum(axis=1), start)
        begins = numpy.concatenate([found, (1 - found.sum()) * start])
        # The last is where a point of the inversion meets λ, and a recursion turns round.
        for t in (0.1, 1.0, 3.0, 10.0, 12 / arrival):
            waits = (found @ linalg.expm(ahead * t)).sum()
            assert state.wait.tail(t) == pytest.approx(waits, abs=1e-10)
            times = (begins @ linalg.expm(whole * t)).sum()
            assert state.time_in_system.tail(t) == pytest.approx(times, abs=1e-10)

    def test_refusals_are_those_of_the_chain(self, law: str, arrival: float, q: int) -> None:
        generator, p = one_server(arrival, law, q)
        size = len(p)
        refused = numpy.zeros(size)
        refused[-2:] = arrival
        silent = generator - numpy.diag(refused)
        at_one = p * refused / (p @ refused)
        state = analyse(f"M({arrival}/s)/{law}/1/{q}")
        assert state.refusals is not None

        inverse = numpy.linalg.inv(-silent)
        first, second = (at_one @ inverse).sum(), 2 * (at_one @ inverse @ inverse).sum()
        assert state.refusals.scv == pytest.approx(second / first**2 - 1, rel=1e-8)
        # Peakedness: refusals after one, while its server of mean 1 s is busy.
        later = at_one @ numpy.linalg.inv(numpy.eye(size) - generator) @ refused
        assert state.refusals.peakedness == pytest.approx(1 + later - p @ refused, rel=1e-8)


@pytest.mark.parametrize("q", [0, 1, 8])
@pytest.mark.parametrize("arrival", [0.4, 1.0, 1.7])
def test_without_memory_both_methods_agree(arrival: float, q: int) -> None:
    best = analyse(f"M({arrival}/s)/M(1s)/1/{q}")
    other = analyse(f"M({arrival}/s)/M(1s)/1/{q}", method="embedded-chain")
    assert best.refusals is not None
    assert other.refusals is not None
    assert best.wait is not None
    assert other.wait is not None

    assert other.refusals.scv == pytest.approx(best.refusals.scv, rel=1e-9)
    assert other.refusals.peakedness == pytest.approx(best.refusals.peakedness, rel=1e-9)
    assert other.mean_squared_wait == pytest.approx(best.mean_squared_wait, rel=1e-9, abs=1e-15)
    for t in (0.2, 2.0, 7.0):
        assert other.wait.tail(t) == pytest.approx(best.wait.tail(t), abs=1e-9)


@pytest.mark.parametrize(
    ("law", "jumps"),
    [("D(1s)", 1.0), ("U(0s,2s)", 2.0), ("U(0.5s,1.5s)", 0.5), ("LN(mean=1s,scv=2)", 4.0)],
)
def test_the_moments_behind_any_service_are_integrals_of_the_tail(law: str, jumps: float) -> None:
    state = analyse(f"M(1.1/s)/{law}/1/3")
    assert state.wait is not None
    x, w = numpy.polynomial.legendre.leggauss(10)

    mean = squared = 0.0
    low = 0.0
    while low == 0 or (state.wait.tail(low) > 1e-9 and low < 4000):
        high = low + (jumps / 2 if low < 12 else low / 4)
        for at, weight in zip((x + 1) / 2, w / 2, strict=True):
            t = low + (high - low) * float(at)
            tail = state.wait.tail(t)
            mean += (high - low) * weight * tail
            squared += (high - low) * weight * 2 * t * tail
        low = high

    assert mean == pytest.approx(state.mean_wait, rel=1e-6)
    assert squared == pytest.approx(state.mean_squared_wait, rel=1e-5)


def test_a_refusal_once_in_1e30_arrivals_keeps_the_shape_of_its_flow() -> None:
    best = analyse("M(0.01/s)/M(1s)/1/14")
    other = analyse("M(0.01/s)/M(1s)/1/14", method="embedded-chain")
    assert best.refusals is not None
    assert other.refusals is not None

    assert best.refusals.rate < 1e-30
    assert other.refusals.scv == pytest.approx(best.refusals.scv, rel=1e-9)
    assert other.refusals.peakedness == pytest.approx(best.refusals.peakedness, rel=1e-6)


@pytest.mark.parametrize("law", ["M(1s)", "D(1s)", "U(0.5s,1.5s)", "E3(1s)", "H2(mean=1s,scv=4)"])
def test_the_output_of_one_server_without_a_room_is_idle_times_and_services(law: str) -> None:
    one = analyse(f"M(2/s)/{law}/1", method="insensitive")
    chain = analyse(f"M(2/s)/{law}/1", method="embedded-chain")
    assert one.output is not None
    assert chain.output is not None

    assert one.output.scv == pytest.approx(chain.output.scv, rel=1e-9)


def test_the_output_of_any_loss_station_is_that_of_its_chain() -> None:
    memoryless = analyse("M(3/s)/M(1s)/4")
    by_residuals = analyse("M(3/s)/M(1s)/4", method="insensitive")
    nearly = analyse("M(3/s)/LN(mean=1s,scv=0.000001)/4")
    constant = analyse("M(3/s)/D(1s)/4")

    assert memoryless.output is not None
    assert by_residuals.output is not None
    assert by_residuals.output.scv == pytest.approx(memoryless.output.scv, rel=1e-9)
    assert nearly.output is not None
    assert constant.output is not None
    assert nearly.output.scv == pytest.approx(constant.output.scv, rel=1e-5)


@pytest.mark.parametrize(("n", "q", "rho"), [(1, 3000, 1.0), (3, 5000, 1.002), (4000, 3500, 0.99)])
def test_large_sums_by_blocks_are_those_of_every_term(n: int, q: int, rho: float) -> None:
    places = _Places(n, q, rho, 1e-4)
    for x in (0.5 * q, 0.97 * q, q + 3.0, 1.05 * q + n):
        whole = _poisson.expectation(x, lambda i: places.beyond(i) + places.held(i))
        blocks = _poisson._expectation_by_blocks(
            x, *_poisson.window(x), q, lambda i: places.beyond(i) + places.held(i)
        )
        assert blocks == pytest.approx(whole, rel=1e-10, abs=1e-13)
