"""Sinusoids whose line is unbounded, or whose periods are drawn anew each time."""

import heapq
import math
import random

import pytest

from molva.queueing import NoAnalysisError, UnstableError, analyse


def test_a_line_without_a_bound_is_that_of_a_room_that_is_never_full() -> None:
    wave = "sin(level=8/h,amplitude=4/h,period=24h)/M(1h)/10"
    unbounded = analyse(f"{wave}/inf")
    bounded = analyse(f"{wave}/250")

    assert unbounded.loss_probability == 0
    assert unbounded.refusals is None
    assert unbounded.mean_wait == pytest.approx(bounded.mean_wait, rel=1e-8)
    assert unbounded.wait_percentile(0.99) == pytest.approx(bounded.wait_percentile(0.99), rel=1e-8)


def test_a_wave_without_amplitude_and_bound_is_erlangs_station() -> None:
    flat = analyse("sin(level=8/h,amplitude=0/h,period=24h)/M(1h)/10/inf")
    still = analyse("M(8/h)/M(1h)/10/inf")

    assert flat.mean_wait == pytest.approx(still.mean_wait, rel=1e-8)
    assert flat.time_in_system_percentile(0.9) == pytest.approx(
        still.time_in_system_percentile(0.9), rel=1e-8
    )


def test_more_than_can_be_served_in_the_mean_is_unstable() -> None:
    with pytest.raises(UnstableError, match="grows by 1 jobs/s"):
        analyse("sin(level=3/s,amplitude=2/s,period=1h)/M(1s)/2/inf")


def test_too_long_a_line_is_refused() -> None:
    with pytest.raises(NoAnalysisError, match="give it waiting places"):
        analyse("sin(level=90/s,amplitude=90/s,period=24h)/M(1s)/100/inf")


def test_an_amplitude_drawn_from_next_to_nothing_is_that_amplitude() -> None:
    drawn = analyse("sin(level=8/h,amplitude=U(3.999999/h,4/h),period=U(24h,24.00001h))/M(1h)/10/5")
    fixed = analyse("sin(level=8/h,amplitude=4/h,period=24h)/M(1h)/10/5")

    assert drawn.road == "numerical, error < 1e-6"
    assert drawn.loss_probability == pytest.approx(fixed.loss_probability, rel=1e-5)
    assert drawn.mean_wait == pytest.approx(fixed.mean_wait, rel=1e-5)


def test_drawn_periods_are_those_of_a_plain_simulation() -> None:
    state = analyse("sin(level=4/s,amplitude=U(1/s,4/s),period=U(2s,9s),phase=0.5)/M(1s)/3/2")
    assert state.mean_wait is not None
    runs = [simulated(random.Random(seed)) for seed in range(16)]

    for index, exact in ((0, state.loss_probability), (1, state.mean_wait)):
        values = [run[index] for run in runs]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        assert exact is not None
        assert abs(mean - exact) < 5 * spread / math.sqrt(len(values))


def test_with_servers_for_all_only_the_mean_rate_counts() -> None:
    state = analyse("sin(level=4/s,amplitude=U(1/s,4/s),period=U(2s,9s))/M(2s)/inf")

    assert state.mean_in_system == pytest.approx(8)
    assert state.mean_wait == 0


def simulated(source: random.Random) -> tuple[float, float]:
    """Return loss and mean wait of 3 servers and 2 places over many drawn periods."""
    begin, amplitude, period = 0.0, source.uniform(1, 4), source.uniform(2, 9)
    at, lost, came, waited = 0.0, 0, 0, 0.0
    ends = [0.0] * 3
    starts: list[float] = []
    for _ in range(40_000):
        at += source.expovariate(8.0)
        while at >= begin + period:
            begin += period
            amplitude, period = source.uniform(1, 4), source.uniform(2, 9)
        rate = 4 + amplitude * math.sin(2 * math.pi * (at - begin) / period + 0.5)
        if source.random() * 8.0 >= rate:
            continue
        came += 1
        starts = [start for start in starts if start > at]
        if len(starts) >= 2 and ends[0] > at:
            lost += 1
            continue
        start = max(at, ends[0])
        heapq.heapreplace(ends, start + source.expovariate(1.0))
        starts.append(start)
        waited += start - at
    return lost / came, waited / (came - lost)
