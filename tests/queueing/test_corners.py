"""Where formulas break: next to saturation, without variation, with millions, with nothing."""

import dataclasses
import math

import pytest

from molva.queueing import (
    Flow,
    ModelError,
    NoAnalysisError,
    ParameterError,
    SteadyState,
    UnstableError,
    analyse,
    erlang_b,
)


def numbers(state: SteadyState) -> list[float]:
    """Return every number of a result, percentiles and flows among them."""
    found = []
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Flow):
            found += [v for v in (value.rate, value.scv, value.peakedness) if v is not None]
        elif isinstance(value, float):
            found.append(value)
    for share in (0.5, 0.999):
        found += [
            value
            for value in (state.wait_percentile(share), state.time_in_system_percentile(share))
            if value is not None
        ]
    return found


@pytest.mark.parametrize(
    "spec",
    [
        "M(0.999999/s)/M(1s)/1/inf",
        "M(999999/s)/M(1s)/1000000/inf",
        "M(1/s)/M(1s)/1000000/inf",
        "M(0.999999/s)/E2(1s)/1/inf",
        "M(0.999999/s)/D(1s)/1/inf",
        "M(9.99999/s)/D(1s)/10/inf",
        "D(0.999999/s)/M(1s)/1/inf",
        "H2(mean=0.999999/s,scv=100)/M(1s)/1/inf",
        "H2(mean=18/s,scv=100)/M(1s)/20/inf",
        "M(0.5/s)/LN(mean=1s,scv=0)/1/inf",
        "M(0.5/s)/LN(mean=1s,scv=100)/1/inf",
        "M(0.5/s)/H2(mean=1s,scv=100)/1/inf",
        "M(0.5/s)/G(mean=1s,scv=0)/3/inf",
        "M(0.5/s)/G(mean=1s,scv=100)/1/inf",
        "G(mean=1s,scv=0)/G(mean=1s,scv=100)/3/4",
        "G(mean=1s,scv=100)/G(mean=1s,scv=100)/1/0",
        "G(mean=1s,scv=0.001)/E1000(1s)/1/100000",
        "M(1/s)/M(1s)/1/100000",
        "M(1000/s)/M(1s)/1/5000",
        "M(1e8/s)/M(1s)/1",
        "M(1e-60/s)/M(1e-60s)/3/4",
        "M(0.001/s)/M(1s)/1/3",
        "M(0.001/s)/D(1s)/10/inf",
        "M(10/s)/M(1s)/100",
        "M(1/s)/M(1s)/100000",
        "M(3/s)/D(1s)/1/200",
        "M(0.1/s)/E4(1s)/1/20",
        "M(0.9/s)/H2(mean=1s,scv=100)/1/100",
        "M(0.9/s)/LN(mean=1s,scv=100)/1/100",
        "M(1/s)/U(0s,2s)/1/10",
        "M(1/s)/M(1s)/inf",
        "D(1s)/U(0s,9s)/inf",
        "M(7999/s)/bulk(16, 2ms + 0s*k)/1/inf",
        "M(1/h)/bulk(16, 2ms + 0.1ms*k)/1/inf",
        "M(90000/s)/bulk(16, 2ms + 0.1ms*k)/1/0",
        "sin(level=1/s,amplitude=1/s,period=24h)/M(1s)/3/2",
        "D(1ms)/D(1min)/1",
        "M(1000/s)/D(1s)/1/50",
        "M(1000000/s)/E2(1s)/1/3",
        "M(0.999999/s)/M(1s)/1/inf/lifo",
        "M(0.999999/s)/M(1s)/1/inf/random",
        "M(1000/s)/M(1s)/1/5000/lifo",
        "M(1000/s)/M(1s)/1/100/random",
        "M(0.5/s)/H2(mean=1s,scv=100)/1/inf/lifo",
        "M(0.999999/s)/D(1s)/1/inf/lifo",
        "H2(mean=0.999999/s,scv=100)/M(1s)/1/inf/lifo",
        "M(1000000/s)/M(1s)/1000000/1000000",
        "M(1000000/s)/LN(mean=1s,scv=100)/1000000",
        "9*M(1e-9/s)/M(1s)/2/3",
        "9*M(1000000/s)/M(1s)/2/3",
        "4*M(0.24999975/s)/M(1s)/1/inf",
        "M(1/h)/bulk(16, 2ms + 0.1ms*k)/1/5",
        "sin(level=1/h,amplitude=1/h,period=1s)/M(1s)/3/inf",
    ],
)
def test_every_number_is_finite_and_none_is_negative(spec: str) -> None:
    for value in numbers(analyse(spec)):
        assert math.isfinite(value)
        assert value >= -1e-12


def test_next_to_saturation_the_digits_stay() -> None:
    state = analyse("M(0.999999/s)/M(1s)/1/inf")

    assert state.mean_wait == pytest.approx(999_999, rel=1e-12)
    assert analyse("M(0.999999/s)/D(1s)/1/inf").mean_wait == pytest.approx(499_999.5, rel=1e-10)


def test_at_saturation_a_bounded_room_is_evenly_full() -> None:
    state = analyse("M(1/s)/M(1s)/1/99998")

    assert state.loss_probability == pytest.approx(1e-5, rel=1e-12)
    assert state.mean_in_system == pytest.approx(99_999 / 2, rel=1e-12)


def test_a_loss_of_1e_30_keeps_its_digits() -> None:
    # By exact fractions: 60 servers at one erlang.
    inverse = sum(math.perm(60, k) for k in range(61))
    state = analyse("M(1/s)/M(1s)/60")

    assert state.loss_probability == pytest.approx(1 / inverse, rel=1e-12)
    assert state.refusals is not None
    assert state.refusals.rate < 1e-80


def test_a_tiny_loss_of_one_server_keeps_its_digits() -> None:
    places, rho = 60, 0.3
    exact = (1 - rho) * rho ** (places + 1) / (1 - rho ** (places + 2))

    state = analyse(f"M({rho}/s)/M(1s)/1/{places}", method="embedded-chain")

    assert exact < 1e-30
    assert state.loss_probability == pytest.approx(exact, rel=1e-9)


def test_a_million_servers_are_no_trouble() -> None:
    assert erlang_b(1e6, 1e6) == pytest.approx(math.sqrt(2 / math.pi / 1e6), rel=2e-3)


@pytest.mark.parametrize(
    ("spec", "growth"),
    [
        ("M(9/s)/M(1s)/8/inf", 1.0),
        ("M(8/s)/M(1s)/8/inf", 0.0),
        ("M(3/s)/E2(1s)/1/inf", 2.0),
        ("E2(3/s)/M(1s)/2/inf", 1.0),
        ("M(3/s)/D(1s)/2/inf", 1.0),
        ("D(3/s)/D(1s)/2/inf", 1.0),
        ("E2(3/s)/E2(1s)/2/inf", 1.0),
        ("M(9000/s)/bulk(16, 2ms + 0s*k)/1/inf", 1000.0),
    ],
)
def test_an_unstable_station_says_how_fast_its_line_grows(spec: str, growth: float) -> None:
    with pytest.raises(UnstableError, match="unstable") as caught:
        analyse(spec)

    assert caught.value.growth_per_second == pytest.approx(growth, abs=1e-9)
    assert caught.value.utilisation >= 1
    if growth:
        assert f"grows by {growth:g} jobs/s" in str(caught.value)


def test_a_full_schedule_without_variation_is_stable() -> None:
    assert analyse("D(1s)/D(1s)/1/inf").mean_wait == 0


@pytest.mark.parametrize(
    ("spec", "method", "words"),
    [
        ("M(1/s)/M(1s)/1", "erlang", "unknown method 'erlang'"),
        ("M(1/s)/M(1s)/1", "birth-deaht", "did you mean 'birth-death'?"),
        ("M(1/s)/D(1s)/1", "birth-death", "is for M/M/n/q"),
        ("sin(level=1/s,amplitude=U(0/s,1/s),period=1h)/D(1s)/1", None, "no analysis computes"),
        ("2*E2(1/s)/M(1s)/1", None, "no analysis computes"),
        ("2*M(1/s)/M(1s)/1/9000000", None, "fewer servers or waiting places"),
        ("E2(1/s)/bulk(4, 1ms + 1ms*k)/1/inf", None, "no analysis computes"),
        ("D(1ms)/D(2ms)/1/1000000", None, "fewer waiting places"),
        ("D(1000003/s)/D(7.000001us)/7/3", None, "does not repeat"),
        ("M(1/s)/bulk(999, 1ms + 1ms*k)/1/inf", None, "at most 2500"),
    ],
)
def test_what_cannot_be_computed_is_said(spec: str, method: str | None, words: str) -> None:
    with pytest.raises(NoAnalysisError) as caught:
        analyse(spec, method=method)

    assert words in str(caught.value)
    assert isinstance(caught.value, ModelError)


def test_an_absurd_overload_is_refused() -> None:
    with pytest.raises(ParameterError, match="times what it can serve"):
        analyse("M(1e-60s)/M(1e60s)/1")


def test_what_two_moments_do_not_determine_is_none() -> None:
    state = analyse("M(0.5/s)/G(mean=1s,scv=2)/1/inf")

    assert state.road == "closed form"
    assert state.mean_wait == pytest.approx(1.5)
    assert state.mean_squared_wait is None
    assert state.wait_percentile(0.99) is None
