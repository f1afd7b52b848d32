"""Batches of arrivals, k*M/M/n/q, against their Markov chain and against their neighbours."""

import math

import numpy
import pytest
from numpy.typing import NDArray

from molva.queueing import UnstableError, analyse

Matrix = NDArray[numpy.float64]

BOUNDED = [
    (4, 0.3, 1, 5),
    (2, 0.9, 3, 4),
    (3, 0.5, 2, 0),
    (7, 0.4, 2, 3),
    (5, 0.1, 1, 0),
    (2, 2, 3, 9),
]


def chain(batch: int, events: float, n: int, top: int) -> tuple[Matrix, Matrix, Matrix]:
    """Return the rates up, the rates down, and where M^X/M/n with ``top`` places is."""
    up, down = numpy.zeros((top + 1, top + 1)), numpy.zeros((top + 1, top + 1))
    for k in range(top + 1):
        up[k, min(k + batch, top)] += events
        if k:
            down[k, k - 1] = min(k, n)
    rates = up + down
    generator = rates - numpy.diag(rates.sum(axis=1))
    equations = numpy.vstack([generator.T, numpy.ones(top + 1)])
    right = numpy.concatenate([numpy.zeros(top + 1), [1.0]])
    return up, down, numpy.linalg.lstsq(equations, right, rcond=None)[0]


@pytest.mark.parametrize(("batch", "events", "n", "q"), BOUNDED)
class TestBounded:
    def test_means_are_those_of_the_chain(self, batch: int, events: float, n: int, q: int) -> None:
        state = analyse(f"{batch}*M({events}/s)/M(1s)/{n}/{q}")
        _, _, p = chain(batch, events, n, n + q)
        k = numpy.arange(n + q + 1)
        refused = numpy.maximum(0, k + batch - n - q)

        assert state.loss_probability == pytest.approx(p @ refused / batch, rel=1e-9)
        assert state.mean_in_system == pytest.approx(p @ k, rel=1e-9)
        assert state.mean_waiting == pytest.approx(p @ numpy.maximum(k - n, 0), rel=1e-9)
        assert state.utilisation == pytest.approx(p @ numpy.minimum(k, n) / n, rel=1e-9)
        assert state.mean_wait is not None
        assert state.mean_wait * state.throughput == pytest.approx(
            state.mean_waiting, rel=1e-9, abs=1e-12
        )

    def test_the_mean_wait_is_that_of_the_places(
        self, batch: int, events: float, n: int, q: int
    ) -> None:
        """The wait is known by Little's law and by the departures that each job waits for."""
        state = analyse(f"{batch}*M({events}/s)/M(1s)/{n}/{q}")
        wait, time = state.wait, state.time_in_system
        assert wait is not None
        assert time is not None
        x, w = numpy.polynomial.legendre.leggauss(40)
        pairs = list(zip(x.tolist(), w.tolist(), strict=True))
        nodes = [(5 * j + 2.5 * (at + 1), 2.5 * each) for j in range(9) for at, each in pairs]

        mean = sum(each * wait.tail(t) for t, each in nodes)
        assert mean == pytest.approx(state.mean_wait, rel=1e-9, abs=1e-12)
        mean = sum(each * time.tail(t) for t, each in nodes)
        assert mean == pytest.approx(state.mean_time_in_system, rel=1e-9)

    def test_flows_are_those_of_the_chain(self, batch: int, events: float, n: int, q: int) -> None:
        state = analyse(f"{batch}*M({events}/s)/M(1s)/{n}/{q}")
        top = n + q
        up, down, p = chain(batch, events, n, top)
        k = numpy.arange(top + 1)
        refused = numpy.maximum(0, k + batch - top)
        rates = up + down
        out = numpy.diag(rates.sum(axis=1))
        assert state.output is not None
        assert state.refusals is not None

        # Departures: the time to the next one, from where one leads.
        silent = up - out
        start = p @ down / (p @ down).sum()
        first = -numpy.linalg.solve(silent, numpy.ones(top + 1))
        second = -2 * numpy.linalg.solve(silent, first)
        scv = start @ second / (start @ first) ** 2 - 1
        assert state.output.scv == pytest.approx(scv, rel=1e-8)

        # Refusals: some at one instant, the next after a passage from the full station.
        quiet = rates.copy()
        quiet[refused > 0] = down[refused > 0]
        quiet -= out
        first = -numpy.linalg.solve(quiet, numpy.ones(top + 1))
        second = -2 * numpy.linalg.solve(quiet, first)
        batches = events * p[refused > 0].sum()
        jobs = events * float(p @ refused)
        assert state.refusals.rate == pytest.approx(jobs, rel=1e-9)
        gap, square = batches / jobs * first[-1], batches / jobs * second[-1]
        assert gap == pytest.approx(1 / jobs, rel=1e-8)
        assert state.refusals.scv == pytest.approx(square / gap**2 - 1, rel=1e-8)
        together = events * float(p @ (refused * (refused - 1) / 2)) / jobs
        later = numpy.linalg.solve(numpy.eye(top + 1) + out - rates, events * refused)[-1]
        assert state.refusals.peakedness == pytest.approx(1 + together + later - jobs, rel=1e-8)


def test_the_published_mean_of_m_x_m_1_holds() -> None:
    state = analyse("4*M(0.2/s)/M(1s)/1/inf")  # BAT-01

    assert state.mean_in_system == pytest.approx(10, rel=1e-12)
    assert state.mean_time_in_system == pytest.approx(12.5, rel=1e-12)


@pytest.mark.parametrize(("batch", "rho", "n"), [(3, 0.7, 1), (2, 0.8, 3), (6, 0.4, 4)])
def test_a_room_that_is_never_full_is_as_good_as_any(batch: int, rho: float, n: int) -> None:
    events = rho * n / batch
    bounded = analyse(f"{batch}*M({events}/s)/M(1s)/{n}/600")
    unbounded = analyse(f"{batch}*M({events}/s)/M(1s)/{n}/inf")

    assert bounded.mean_wait == pytest.approx(unbounded.mean_wait, rel=1e-9)
    assert bounded.mean_squared_wait == pytest.approx(unbounded.mean_squared_wait, rel=1e-9)
    assert bounded.output is not None
    assert unbounded.output is not None
    assert bounded.output.scv == pytest.approx(unbounded.output.scv, rel=1e-9)
    for share in (0.5, 0.99, 0.999):
        for of in ("wait_percentile", "time_in_system_percentile"):
            assert getattr(bounded, of)(share) == pytest.approx(
                getattr(unbounded, of)(share), rel=1e-9
            )


def test_next_to_saturation_the_tail_is_exponential() -> None:
    state = analyse("4*M(0.24999975/s)/M(1s)/1/inf")

    assert state.mean_wait == pytest.approx(2_499_999, rel=1e-9)
    assert state.wait_percentile(0.999) == pytest.approx(2_499_999 * math.log(1000), rel=1e-5)
    with pytest.raises(UnstableError):
        analyse("4*M(0.25/s)/M(1s)/1/inf")
