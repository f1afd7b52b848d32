"""Every number by a second road: linear systems, root finding, series and plain simulation."""

import cmath
import math
import random
from collections import deque

import numpy
import pytest
from scipy import integrate, linalg

from molva.queueing import Model, SteadyState, analyse, course, erlang_b
from molva.queueing.analytic.schedule import schedule
from tests.queueing.chains import Matrix, one_server, stationary, with_diagonal


def birth_death(arrival: float, service: float, n: int, q: int) -> Matrix:
    rates = numpy.zeros((n + q + 1, n + q + 1))
    for k in range(n + q):
        rates[k, k + 1] = arrival
        rates[k + 1, k] = min(k + 1, n) * service
    return with_diagonal(rates)


def gap_scv(start: Matrix, inside: Matrix) -> float:
    """Return the scv of the time that the chain ``inside`` takes to leave, from ``start``."""
    inverse = numpy.linalg.inv(-inside)
    first = float(start @ inverse @ numpy.ones(len(inside)))
    second = 2 * float(start @ inverse @ inverse @ numpy.ones(len(inside)))
    return second / first**2 - 1


BOUNDED = [
    (2.2, 1.0, 2, 5),
    (0.9, 1.0, 1, 10),
    (1.0, 1.0, 1, 3),
    (30.0, 1.0, 20, 7),
    (5.0, 1, 3, 0),
]


@pytest.mark.parametrize(("arrival", "service", "n", "q"), BOUNDED)
class TestBirthDeath:
    def solved(self, arrival: float, service: float, n: int, q: int) -> SteadyState:
        return analyse(f"M({arrival}/s)/M({service}/s)/{n}/{q}")

    def test_means_are_those_of_the_generator(
        self, arrival: float, service: float, n: int, q: int
    ) -> None:
        state = self.solved(arrival, service, n, q)
        p = stationary(birth_death(arrival, service, n, q))
        k = numpy.arange(n + q + 1)

        assert state.loss_probability == pytest.approx(p[-1], rel=1e-9)
        assert state.mean_in_system == pytest.approx(p @ k, rel=1e-9)
        assert state.mean_waiting == pytest.approx(p @ numpy.maximum(k - n, 0), rel=1e-9)
        assert state.utilisation == pytest.approx(p @ numpy.minimum(k, n) / n, rel=1e-9)
        assert state.probability_of_waiting == pytest.approx(p[n:-1].sum() / (1 - p[-1]), rel=1e-9)

    def test_times_are_those_of_a_marked_job(
        self, arrival: float, service: float, n: int, q: int
    ) -> None:
        state = self.solved(arrival, service, n, q)
        p = stationary(birth_death(arrival, service, n, q))
        # A job's own chain: places q … 1, then service, then gone.
        chain = numpy.zeros((q + 1, q + 1))
        for place in range(1, q + 1):
            chain[place, place] = -n * service
            chain[place, place - 1] = n * service
        chain[0, 0] = -service
        start = numpy.concatenate([[p[:n].sum()], p[n:-1]]) / (1 - p[-1])
        assert state.wait is not None
        assert state.time_in_system is not None

        for t in (0.05, 0.3, 1.0, 4.0):
            waits = start[1:] @ linalg.expm(chain[1:, 1:] * t).sum(axis=1) if q else 0.0
            times = start @ linalg.expm(chain * t).sum(axis=1)
            assert state.wait.tail(t) == pytest.approx(waits, abs=1e-12)
            assert state.time_in_system.tail(t) == pytest.approx(times, abs=1e-12)

    def test_percentiles_are_where_the_tail_says(
        self, arrival: float, service: float, n: int, q: int
    ) -> None:
        state = self.solved(arrival, service, n, q)
        assert state.time_in_system is not None

        for share in (0.1, 0.5, 0.99, 0.999):
            t = state.time_in_system.percentile(share)
            assert state.time_in_system.tail(t) == pytest.approx(1 - share, rel=1e-9)

    def test_the_squared_wait_is_the_integral_of_its_tail(
        self, arrival: float, service: float, n: int, q: int
    ) -> None:
        state = self.solved(arrival, service, n, q)
        wait = state.wait
        assert wait is not None

        squared, _ = integrate.quad(lambda t: 2 * t * wait.tail(t), 0, 60, limit=500)

        assert state.mean_squared_wait == pytest.approx(squared, rel=1e-7, abs=1e-12)

    def test_flows_are_those_of_the_generator(
        self, arrival: float, service: float, n: int, q: int
    ) -> None:
        state = self.solved(arrival, service, n, q)
        full = birth_death(arrival, service, n, q)
        p = stationary(full)
        assert state.refusals is not None
        assert state.output is not None

        # Refusals: the chain leaves by an arrival in its last state, and starts there.
        inside = full.copy()
        inside[-1, -1] -= arrival
        last = numpy.zeros(n + q + 1)
        last[-1] = 1.0
        assert state.refusals.scv == pytest.approx(gap_scv(last, inside), rel=1e-8)
        mu = service
        transform = last @ numpy.linalg.solve(mu * numpy.eye(n + q + 1) - inside, arrival * last)
        peakedness = 1 / (1 - transform) - arrival * p[-1] / mu
        assert state.refusals.peakedness == pytest.approx(peakedness, rel=1e-8)

        # Output: it leaves by a departure, and starts where the departure leads.
        silent = numpy.triu(full)
        after = p[1:] * numpy.minimum(numpy.arange(1, n + q + 1), n)
        start = numpy.concatenate([after / after.sum(), [0.0]])
        assert state.output.scv == pytest.approx(gap_scv(start, silent), rel=1e-8, abs=1e-12)


def test_the_peakedness_of_a_loss_station_is_wilkinsons() -> None:
    a, n = 5.0, 4
    overflow = a * erlang_b(a, n)
    state = analyse(f"M({a}/s)/M(1s)/{n}")
    assert state.refusals is not None

    assert state.refusals.peakedness == pytest.approx(1 - overflow + a / (n + 1 - a + overflow))


@pytest.mark.parametrize(("load", "servers"), [(0.3, 0.5), (1.0, 0.25), (8.0, 10.5), (40.0, 33.7)])
def test_erlang_b_between_whole_numbers_is_its_integral(load: float, servers: float) -> None:
    inverse, _ = integrate.quad(
        lambda t: load * math.exp(servers * math.log1p(t) - load * t), 0, math.inf
    )

    assert erlang_b(load, servers) == pytest.approx(1 / inverse, rel=1e-9)


@pytest.mark.parametrize(
    "spec", ["M(8/s)/M(0.2s)/2/inf", "M(8/s)/M(0.2s)/inf", "M(8/s)/U(0s,2s)/inf"]
)
def test_what_enters_as_poisson_leaves_as_poisson_where_burke_and_mirasol_say(spec: str) -> None:
    state = analyse(spec)
    assert state.output is not None

    assert (state.output.is_poisson, state.output.scv, state.output.peakedness) == (True, 1, 1)
    assert state.output.rate == pytest.approx(8)
    assert state.refusals is None or state.refusals.rate == 0


@pytest.mark.parametrize(("order", "factor"), [("lifo", 1 / (1 - 0.8)), ("random", 2 / (2 - 0.8))])
def test_the_order_changes_the_spread_and_not_the_mean(order: str, factor: float) -> None:
    first = analyse("M(2.4/s)/M(1s)/3/inf")
    other = analyse(f"M(2.4/s)/M(1s)/3/inf/{order}")
    assert first.mean_squared_wait is not None

    assert other.mean_wait == first.mean_wait
    assert other.mean_squared_wait == pytest.approx(first.mean_squared_wait * factor)


@pytest.mark.parametrize("law", ["E2(1s)", "H2(mean=1s,scv=4)"])
@pytest.mark.parametrize("q", [0, 1, 6])
def test_one_server_with_places_is_its_markov_chain(law: str, q: int) -> None:
    arrival = 0.9
    _, p = one_server(arrival, law, q)
    number = numpy.concatenate([[0], numpy.repeat(numpy.arange(1, q + 2), 2)])

    state = analyse(f"M({arrival}/s)/{law}/1/{q}", method="embedded-chain")

    assert state.loss_probability == pytest.approx(p[-2:].sum(), rel=1e-9)
    assert state.mean_in_system == pytest.approx(p @ number, rel=1e-9)
    assert state.utilisation == pytest.approx(1 - p[0], rel=1e-9)


@pytest.mark.parametrize("n", [1, 3])
def test_any_gaps_with_exponential_service_are_their_markov_chain(n: int) -> None:
    rho, levels = 0.8, 250
    size = 2 * (levels + 1)
    rates = numpy.zeros((size, size))
    for k in range(levels + 1):
        rates[2 * k, 2 * k + 1] = 2 * rho * n
        rates[2 * k + 1, 2 * min(k + 1, levels)] += 2 * rho * n
        for phase in (0, 1):
            if k:
                rates[2 * k + phase, 2 * (k - 1) + phase] = min(k, n)
    p = stationary(with_diagonal(rates)).reshape(-1, 2).sum(axis=1)

    state = analyse(f"E2({rho * n}/s)/M(1s)/{n}/inf")

    assert state.mean_in_system == pytest.approx(p @ numpy.arange(levels + 1), rel=1e-8)


@pytest.mark.parametrize(
    ("rho", "n"),
    [(0.2, 1), (0.3, 4), (0.37, 3), (0.5, 1), (0.9, 3), (0.999, 10), (0.95, 50), (0.999, 1000)],
)
def test_constant_service_is_crommelins_sum_over_roots(rho: float, n: int) -> None:
    a = round(rho * n, 6)
    total = 0.0
    for k in range(1, n):
        turn = cmath.exp(2j * math.pi * k / n)
        z = 0.5 * turn
        for _ in range(100):
            power = turn * cmath.exp(-a / n * (1 - z))
            z -= (z - power) / (1 - a / n * power)
        total += (1 / (1 - z)).real
    expected = total + (a * a - n * (n - 1)) / (2 * (n - a))

    state = analyse(f"M({a}/s)/D(1s)/{n}/inf")

    assert state.mean_waiting == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_the_tail_behind_a_uniform_service_time_is_its_power_series() -> None:
    """The integral of the distribution function obeys a delay equation, solved piece by piece."""
    arrival, terms = 0.85, 60
    pieces: list[list[float]] = []
    value, slope = 0.0, 1 - arrival
    for _ in range(4):
        before = pieces[-1] if pieces else [0.0] * terms
        c = [value, slope] + [0.0] * (terms - 2)
        for i in range(terms - 2):
            change = arrival * (i + 1) * c[i + 1] - arrival / 2 * (c[i] - before[i])
            c[i + 2] = change / ((i + 2) * (i + 1))
        pieces.append(c)
        value = sum(x * 2.0**i for i, x in enumerate(c))
        slope = sum(i * x * 2.0 ** (i - 1) for i, x in enumerate(c) if i)
    state = analyse(f"M({arrival}/s)/U(0s,2s)/1/inf")
    assert state.wait is not None

    for t in (0.5, 2.0, 2.1, 5.0, 7.5):
        c, x = pieces[int(t // 2)], t % 2
        below = sum(i * each * x ** (i - 1) for i, each in enumerate(c) if i)
        assert state.wait.tail(t) == pytest.approx(1 - below, abs=1e-10)


@pytest.mark.parametrize(
    "spec",
    [
        "M(0.8/s)/E3(1s)/1/inf",
        "M(1.6/s)/D(1s)/2/inf",
        "M(0.6/s)/M(1s)/1/inf/lifo",
        "E3(1.5/s)/M(1s)/2/inf",
    ],
)
def test_the_moments_of_a_wait_are_integrals_of_its_tail(spec: str) -> None:
    state = analyse(spec)
    wait = state.wait
    assert wait is not None

    mean, _ = integrate.quad(wait.tail, 1e-9, 250, limit=400, epsabs=1e-10)
    squared, _ = integrate.quad(lambda t: 2 * t * wait.tail(t), 1e-9, 250, limit=400, epsabs=1e-8)

    assert state.mean_wait == pytest.approx(mean, rel=1e-6)
    assert state.mean_squared_wait == pytest.approx(squared, rel=1e-5)


def test_the_mean_behind_a_lognormal_service_time_is_the_integral_of_its_tail() -> None:
    state = analyse("M(0.5/s)/LN(mean=1s,scv=0.25)/1/inf")
    wait = state.wait
    assert wait is not None
    x, w = numpy.polynomial.legendre.leggauss(60)

    mean = sum(10 * wait.tail(10 + 10 * at) * weight for at, weight in zip(x, w, strict=True))

    assert state.mean_wait == pytest.approx(mean, rel=1e-7)


class TestBulk:
    @pytest.mark.parametrize("places", ["inf", "5", "0"])
    def test_bulks_of_one_are_constant_service(self, places: str) -> None:
        bulk = analyse(f"M(0.8/s)/bulk(1, 0.75s + 0.25s*k)/1/{places}")
        single = analyse(f"M(0.8/s)/D(1s)/1/{places}")

        assert bulk.mean_wait == pytest.approx(single.mean_wait, rel=1e-9, abs=1e-12)
        assert bulk.loss_probability == pytest.approx(single.loss_probability, rel=1e-9)
        if places == "inf":
            for share in (0.5, 0.99):
                assert bulk.wait_percentile(share) == pytest.approx(
                    single.wait_percentile(share), rel=1e-9
                )

    @pytest.mark.parametrize("places", [None, 20])
    def test_it_is_what_a_plain_simulation_gives(self, places: int | None) -> None:
        arrival, limit, base, each = 3600.0, 16, 2e-3, 0.1e-3
        room = "inf" if places is None else places
        state = analyse(f"M({arrival}/s)/bulk({limit}, {base}s + {each}s*k)/1/{room}")
        assert state.mean_wait is not None
        means, losses, late = [], [], []
        for seed in range(20):
            waits, lost = self.simulated(random.Random(seed), arrival, limit, base, each, places)
            means.append(sum(waits) / len(waits))
            losses.append(lost / (lost + len(waits)))
            late.append(sum(wait > 4e-3 for wait in waits) / len(waits))

        assert abs(self.z(means, state.mean_wait)) < 5
        if places is not None:
            assert state.loss_probability is not None
            assert abs(self.z(losses, state.loss_probability)) < 5
        else:
            assert state.wait is not None
            assert abs(self.z(late, state.wait.tail(4e-3))) < 5

    @staticmethod
    def simulated(
        source: random.Random, arrival: float, limit: int, base: float, each: float, q: int | None
    ) -> tuple[list[float], int]:
        line: deque[float] = deque()
        waits: list[float] = []
        lost, free_at, at = 0, 0.0, 0.0
        for _ in range(15_000):
            at += source.expovariate(arrival)
            while line and free_at <= at:
                taken = [line.popleft() for _ in range(min(limit, len(line)))]
                waits += [free_at - came for came in taken]
                free_at += base + each * len(taken)
            if free_at <= at:
                waits.append(0.0)
                free_at = at + base + each
            elif q is not None and len(line) >= q:
                lost += 1
            else:
                line.append(at)
        return waits, lost

    @staticmethod
    def z(values: list[float], expected: float) -> float:
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return (mean - expected) / (spread / math.sqrt(len(values)))


class TestSchedule:
    @pytest.mark.parametrize(("gap", "time", "n", "q"), [(2, 5, 2, 1), (3, 7, 1, 4), (4, 9, 2, 2)])
    def test_what_is_lost_is_what_cannot_be_served(
        self, gap: int, time: int, n: int, q: int
    ) -> None:
        state = analyse(f"D({gap}s)/D({time}s)/{n}/{q}")

        assert state.loss_probability == pytest.approx(max(0, 1 - n * gap / time), abs=1e-15)

    @pytest.mark.parametrize(("gap", "time", "n"), [(2, 3, 1), (2, 5, 2), (1, 7, 3), (5, 3, 1)])
    def test_without_a_room_a_server_idles_to_the_next_arrival(
        self, gap: int, time: int, n: int
    ) -> None:
        state = analyse(f"D({gap}s)/D({time}s)/{n}")

        assert state.loss_probability == pytest.approx(1 - n / max(n, math.ceil(time / gap)))

    def test_the_adder_of_the_manual(self) -> None:
        half = analyse("D(1ms)/D(0.5ms)/1")
        refused = analyse("2*D(1ms)/D(0.5ms)/1")
        two = analyse("2*D(1ms)/D(0.5ms)/2")
        queued = analyse("2*D(1ms)/D(0.5ms)/1/1")

        assert (half.throughput, half.utilisation, half.loss_probability) == (1000, 0.5, 0)
        assert (refused.throughput, refused.loss_probability) == (1000, 0.5)
        assert (two.throughput, two.utilisation) == (2000, 0.5)
        assert (queued.throughput, queued.utilisation) == (2000, 1.0)
        assert queued.time_in_system_percentile(0.5) == 0.0005
        assert queued.time_in_system_percentile(0.99) == 0.001

    def test_a_tie_is_a_departure_first(self) -> None:
        plan = schedule(Model.parse("D(0.1s)/D(0.3s)/3"))

        assert plan.refusals == ()


@pytest.mark.parametrize("spec", ["10/20", "3/2", "5"])
def test_a_wave_without_amplitude_is_the_stationary_station(spec: str) -> None:
    flat = analyse(f"sin(level=4/h,amplitude=0/h,period=24h)/M(1h)/{spec}")
    still = analyse(f"M(4/h)/M(1h)/{spec}")

    assert flat.loss_probability == pytest.approx(still.loss_probability, rel=1e-6)
    assert flat.mean_wait == pytest.approx(still.mean_wait, rel=1e-6, abs=1e-9)
    assert flat.wait_percentile(0.99) == pytest.approx(still.wait_percentile(0.99), rel=1e-6)
    assert flat.time_in_system_percentile(0.9) == pytest.approx(
        still.time_in_system_percentile(0.9), rel=1e-6
    )


def test_averages_mislead() -> None:
    varying = analyse("sin(level=8/h,amplitude=4/h,period=24h)/M(1h)/10/20")
    at_the_mean = analyse("M(8/h)/M(1h)/10/20")

    assert varying.loss_probability == pytest.approx(0.0242, abs=5e-5)
    assert at_the_mean.loss_probability == pytest.approx(0.00095, abs=5e-6)


def test_the_course_of_a_day_has_the_mean_of_the_day() -> None:
    model = Model.parse("sin(level=8/h,amplitude=4/h,period=24h)/M(1h)/10/20")
    day = course(model, 1024)

    assert sum(day.mean_in_system) / 1024 == pytest.approx(analyse(model).mean_in_system, rel=1e-7)


@pytest.mark.parametrize(
    ("spec", "other"),
    [
        ("M(0.8/s)/M(1s)/1/inf", "pollaczek-khinchine"),
        ("M(1.6/s)/M(1s)/2/inf", "takacs"),
        ("M(0.8/s)/M(1s)/1/7", "embedded-chain"),
        ("M(0.8/s)/M(1s)/1", "insensitive"),
        ("M(0.8/s)/D(1s)/1/inf", "pollaczek-khinchine"),
    ],
)
def test_two_methods_for_one_model_agree(spec: str, other: str) -> None:
    best, second = analyse(spec), analyse(spec, method=other)

    assert second.method == other != best.method
    assert second.mean_wait == pytest.approx(best.mean_wait, rel=1e-9)
    assert second.loss_probability == pytest.approx(best.loss_probability, rel=1e-9)
    assert second.probability_of_waiting == pytest.approx(best.probability_of_waiting, rel=1e-9)
    assert best.output is not None
    assert second.output is not None
    if second.output.scv is not None and best.output.scv is not None:
        assert second.output.scv == pytest.approx(best.output.scv, rel=1e-8)
