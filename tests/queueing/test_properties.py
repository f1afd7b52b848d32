"""What holds of every station, whatever computes it, on models drawn with fixed seeds."""

import itertools
import math
import random
from collections.abc import Iterator

import pytest

from molva.queueing import METHODS, Flow, SteadyState, analyse


def law(source: random.Random, mean: str, letters: str) -> str:
    letter = source.choice(letters)
    scv = source.choice(["1", "1.5", "4", "20"])
    small = source.choice(["0.1", "0.5", "1", "3"])
    return {
        "M": f"M({mean}s)",
        "D": f"D({mean}s)",
        "E": f"E{source.randint(2, 6)}({mean}s)",
        "H": f"H2(mean={mean}s,scv={scv})",
        "U": f"U({float(mean) / 2!r}s,{float(mean) * 1.5!r}s)",
        "L": f"LN(mean={mean}s,scv={small})",
        "G": f"G(mean={mean}s,scv={small})",
    }[letter]


def drawn(seed: int) -> str:
    """Return some station that some method computes."""
    source = random.Random(seed)
    n = source.choice([1, 1, 2, 3, 8])
    q = source.choice(["inf", "0", "1", "4", "15"])
    rho = source.choice([0.2, 0.6, 0.9, 0.98] if q == "inf" else [0.3, 0.8, 1.0, 1.4, 3.0])
    gap = f"{round(1 / (rho * n), 6)}"
    kind = source.randrange(8)
    order = source.choice(["", "", "/lifo", "/random"]) if q != "0" else ""
    if kind == 0:
        return f"{law(source, gap, 'M')}/{law(source, '1', 'M')}/{n}/{q}{order}"
    if kind == 1:
        return f"{law(source, f'{1 / rho:.6f}', 'M')}/{law(source, '1', 'DEHU')}/1/{q}{order}"
    if kind == 2:
        return (
            f"{law(source, gap, 'DEHUL')}/{law(source, '1', 'M')}/{n}/inf{order}"
            if rho < 1
            else (f"{law(source, gap, 'M')}/{law(source, '1', 'DEHULG')}/{n}")
        )
    if kind == 3:
        batch = source.randint(2, 5)
        return f"{batch}*M({batch * float(gap):.6f}s)/M(1s)/{n}/{q}"
    if kind == 4:
        return (
            f"M({gap}s)/D(1s)/{n}/inf{order}" if rho < 1 else f"D({float(gap):.2f}s)/D(1s)/{n}/{q}"
        )
    if kind == 5:
        room = "inf" if rho < 1 else source.choice(["0", "3", "9"])
        limit = source.randint(2, 6)
        rate = rho * limit / (0.5 + 0.2 * limit)
        return f"M({rate:.6f}/s)/bulk({limit}, 0.5s + 0.2s*k)/1/{room}"
    if kind == 6:
        return f"{law(source, gap, 'DEHUG')}/{law(source, '1', 'DEHUG')}/{n}/{q}"
    level = rho * n if q != "inf" else min(rho, 0.6) * n
    return f"sin(level={level:.6f}/s,amplitude={level / 2:.6f}/s,period=10s)/M(1s)/{n}/{q}"


def flows(state: SteadyState) -> Iterator[Flow]:
    for flow in (state.output, state.refusals):
        if flow is not None:
            yield flow


@pytest.mark.parametrize("seed", range(80))
def test_what_holds_of_every_station(seed: int) -> None:
    state = analyse(drawn(seed))
    arrival = state.model.arrival_rate
    loss, mean_wait = state.loss_probability, state.mean_wait
    assert loss is not None
    assert mean_wait is not None
    assert state.mean_time_in_system is not None
    exactly = 1e-9 if state.road != "numerical, error < 1e-8" else 1e-7

    # What arrives is served or refused.
    assert state.throughput == pytest.approx(arrival * (1 - loss), rel=exactly)
    if state.refusals is not None:
        assert state.refusals.rate == pytest.approx(arrival * loss, rel=exactly, abs=1e-12)
    assert state.output is not None
    assert state.output.rate == pytest.approx(state.throughput, rel=exactly)
    # Little's law, for those who wait and for all.
    assert state.mean_waiting == pytest.approx(state.throughput * mean_wait, rel=exactly, abs=1e-12)
    assert state.mean_in_system == pytest.approx(
        state.throughput * state.mean_time_in_system, rel=exactly
    )
    # A wait is a wait of somebody.
    if state.probability_of_waiting is not None and state.wait is not None:
        assert state.wait.tail(0.0) == pytest.approx(state.probability_of_waiting, abs=1e-7)
    if state.model.waiting == 0 and state.model.servers is not None:
        assert mean_wait == 0
        assert state.wait_percentile(0.999) == 0
    if state.mean_squared_wait is not None:
        assert state.mean_squared_wait >= mean_wait**2 * (1 - 1e-9)
    # Percentiles rise, are where the tail says, and a time in system is longer than its wait.
    shares = (0.1, 0.5, 0.9, 0.99, 0.999)
    waits = [state.wait_percentile(share) for share in shares]
    times = [state.time_in_system_percentile(share) for share in shares]
    for values in (waits, times):
        known = [value for value in values if value is not None]
        assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(known))
        assert all(math.isfinite(value) and value >= 0 for value in known)
    for share, wait, time in zip(shares, waits, times, strict=True):
        if wait is not None and time is not None:
            assert time >= wait * (1 - 1e-9)
        if time is not None and state.time_in_system is not None:
            assert state.time_in_system.tail(time * (1 + 1e-9)) <= 1 - share + 1e-7
            assert state.time_in_system.tail(time * (1 - 1e-6)) >= 1 - share - 1e-7
    # Processes: gaps and counts vary by something, and refusals are never Poisson.
    for flow in flows(state):
        assert flow.scv is None or flow.scv >= -1e-9
        assert flow.peakedness is None or flow.peakedness >= 0
    if state.refusals is not None:
        assert not state.refusals.is_poisson


def test_every_method_is_drawn() -> None:
    methods = {analyse(drawn(seed)).method for seed in range(80)}

    assert methods == set(METHODS)


@pytest.mark.parametrize("seed", range(16))
def test_a_tail_integrates_to_its_mean(seed: int) -> None:
    state = analyse(drawn(1000 + seed))
    mean = state.mean_time_in_system
    for law, expected in ((state.wait, state.mean_wait), (state.time_in_system, mean)):
        if law is None or not expected or state.road == "approximation":
            continue
        assert mean is not None
        # Steps that divide a service time of a second, where tails may have kinks.
        total, low = 0.0, 0.0
        while low == 0 or law.tail(low) > 1e-6:
            step = 0.25 if low < 6 else 1.0 if low < 60 else low / 8
            inside = [
                law.tail(low + step * at) for at in (0.1127016653792583, 0.5, 0.8872983346207417)
            ]
            total += step * (5 * inside[0] + 8 * inside[1] + 5 * inside[2]) / 18
            low += step
        assert total == pytest.approx(expected, rel=1e-2, abs=1e-6)
