"""The simulator: two engines and a record of every job that agree, ties, streams, corners."""

import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from molva.queueing import (
    Estimate,
    Model,
    ParameterError,
    Simulation,
    UnstableError,
    analyse,
    events,
    simulate,
)
from molva.queueing.model import Priority, Sinusoid
from molva.queueing.simulate.arrivals import source_of
from molva.queueing.simulate.demands import demands_of
from molva.queueing.simulate.intervals import student
from molva.queueing.simulate.station import station_of
from molva.queueing.simulate.streams import Streams
from molva.queueing.simulate.tally import Sum, Tally
from molva.queueing.simulate.units import clock_of

DATA = Path(__file__).parent.parent / "data" / "simulation_cases.json"
CASES: list[dict[str, Any]] = json.loads(DATA.read_text())["cases"]

FIRST_COME = [
    "M(0.9/s)/M(1s)/1/inf",
    "M(8/s)/M(200ms)/2/inf",
    "M(2.2/s)/M(1s)/2/5",
    "E2(2.2/s)/LN(mean=1s,scv=1.5)/2/5",
    "3*M(1/s)/M(1s)/4",
    "D(0.4s)/D(1s)/2/5",
    "2*D(1ms)/D(0.5ms)/1/1",
    "H2(mean=0.1s,scv=4)/U(0s,2s)/12/3",
    "M(90/s)/M(1s)/100/inf",
    "M(90/s)/E7(1s)/80/7",
    "sin(level=8/s,amplitude=4/s,period=60s)/M(1s)/10/20",
    "sin(level=900/s,amplitude=U(40/s,80/s),period=U(20s,30s))/G(mean=5ms,scv=2)/6/20",
]
OTHERS = [
    "M(5/s)/E3(1s)/inf",
    "M(0.9/s)/M(1s)/1/inf/lifo",
    "M(1.9/s)/M(1s)/2/4/random",
    "M(1.9/s)/M(1s)/2/inf/random",
    "M(3/s)/M(1s)/2/inf/priority(3,7)/patience(M(2s))",
    "M(0.8/s)/M(1s)/1/inf/preemptive(3,5)",
    "M(1.8/s)/M(1s)/2/4/preemptive(3,5,1)",
    "M(4000/s)/bulk(16, 2ms + 0.1ms*k)/1/inf",
    "E2(2/s)/M(1s)/1/2/random/patience(D(1s))",
    "2*D(1s)/D(3s)/2/3/lifo/patience(D(4s))",
    # The server is free at the very instant at which patience ends: the job is served.
    "D(1s)/D(3s)/1/5/patience(D(2s))",
    "M(90/s)/bulk(3,1s+0.1s*k)/40/7/lifo/patience(M(2s))",
]


def digest(result: Simulation) -> str:
    """Return a hash of every bit of a result."""
    assert result.wait is not None
    assert result.time_in_system is not None
    numbers = [
        *(getattr(result, name) for name in result.__dataclass_fields__ if name not in SKIPPED),
        *(result.wait_percentile(share) for share in (0.0, 0.3, 0.5, 0.9, 0.99)),
        *(result.time_in_system_percentile(share) for share in (0.0, 0.3, 0.5, 0.9, 0.99)),
    ]
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


SKIPPED = {"wait", "time_in_system", "pseudo"}


def z_of(found: Estimate | None, exact: float, result: Simulation) -> float:
    assert found is not None
    error = (found.high - found.low) / 2 / student(result.batches - 1)
    return (found.value - exact) / error


@pytest.mark.parametrize("spec", [*FIRST_COME, *OTHERS])
def test_the_compiler_changes_no_bit(spec: str) -> None:
    plain = simulate(spec, jobs=30_000, seed=11, engine="plain")
    compiled = simulate(spec, jobs=30_000, seed=11, engine="compiled")

    assert digest(plain) == digest(compiled)


def test_a_run_without_numba_gives_the_same_bits() -> None:
    spec, code = (
        "E2(2.2/s)/LN(mean=1s,scv=1.5)/2/5",
        (
            "import sys\n"
            "sys.modules['numba'] = None\n"
            "import importlib.machinery, importlib.util\n"
            "find = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name: None if name == 'numba' else find(name)\n"
            "from molva.queueing import simulate\n"
            "from tests.queueing.test_simulation import digest\n"
            "result = simulate(sys.argv[1], jobs=400_000, seed=5)\n"
            "assert 'llvmlite' not in sys.modules\n"
            "print(digest(result))"
        ),
    )
    without = subprocess.run(
        [sys.executable, "-c", code, spec], capture_output=True, text=True, check=True
    )

    assert without.stdout.strip() == digest(simulate(spec, jobs=400_000, seed=5))


@pytest.mark.parametrize("spec", [*FIRST_COME, *OTHERS])
def test_a_long_run_is_what_happens_to_each_of_its_jobs(spec: str) -> None:
    number = 5_000
    model = Model.parse(spec)
    jobs = events(model, number, seed=5)
    clock, streams = clock_of(model), Streams(5, 0)
    classes = len(model.discipline.shares) if isinstance(model.discipline, Priority) else 0
    demands = demands_of(model, clock, streams)
    station = station_of(model, clock, demands, compiled=True)
    tally, source, left = Tally(classes), source_of(model, clock, streams, moved=False), number
    step = 1 if isinstance(model.arrivals, Sinusoid) else 777
    while left:
        gaps = source.take(min(step, left), 777)[0][:left]
        station.play(gaps, demands.take(gaps.size), tally)
        left -= gaps.size

    # The first-come kernels know how a job ends when it comes; the event loop when it leaves.
    until = math.inf if spec in FIRST_COME else jobs[-1].arrival
    gone = [job for job in jobs if job.departure is not None and job.departure <= until]
    served = sorted(job.departure for job in gone if job.fate == "served" and job.departure)
    waits = [float(job.wait / clock.unit) for job in gone if job.wait is not None]
    assert tally.sums[Sum.REFUSED] == sum(job.fate == "refused" for job in jobs)
    assert tally.sums[Sum.LEFT] == len(gone)
    assert tally.sums[Sum.ABANDONED] == sum(job.fate == "abandoned" for job in gone)
    assert tally.sums[Sum.WAIT] == pytest.approx(sum(waits), rel=1e-9)
    assert tally.sums[Sum.WAIT_SQUARED] == pytest.approx(sum(w * w for w in waits), rel=1e-9)
    if spec not in FIRST_COME and len(served) > 1:
        span = float((served[-1] - served[0]) / clock.unit)
        assert tally.sums[Sum.OUTPUT_GAPS] == len(served) - 1
        assert tally.sums[Sum.OUTPUT_GAP] == pytest.approx(span, rel=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["id"]))
def test_a_reference_value_is_within_five_standard_errors(case: dict[str, Any]) -> None:
    result = simulate(case["spec"], jobs=2_000_000, seed=1, engine="compiled")
    found = {
        "Wq": result.mean_wait,
        "wait_s": result.mean_wait,
        "EW": result.mean_wait,
        "Wq2": result.mean_squared_wait if case["id"].startswith("DIS") else None,
        "W": result.mean_time_in_system,
        "L": result.mean_in_system,
        "L_mean": result.mean_in_system,
        "Lq": result.mean_waiting,
        "Pw": result.probability_of_waiting,
        "loss": result.loss_probability,
        "util": result.utilisation,
        "Pab": result.abandonment_probability,
    }
    for rank, each in enumerate(result.classes, start=1):
        found[f"Wq{rank}"] = each.mean_wait
        # Time in system and wait differ by a service time, which is 1 s in these cases.
        assert each.mean_wait is not None
        value, low, high = each.mean_wait.value, each.mean_wait.low, each.mean_wait.high
        found[f"W{rank}"] = Estimate(value + 1, low + 1, high + 1)

    for name, exact in case["values"].items():
        assert abs(z_of(found[name], exact, result)) < 5, name


class TestTies:
    def test_a_departure_comes_before_an_arrival_at_the_same_instant(self) -> None:
        result = simulate("D(0.1s)/D(0.1s)/1", jobs=100_000)

        assert result.loss_probability.value == 0
        assert result.utilisation is not None
        assert result.utilisation.value == pytest.approx(1, abs=1e-4)

    def test_gaps_that_no_float_holds_lose_no_tie(self) -> None:
        result = simulate("D(0.4s)/D(1s)/2/5", jobs=96_000, warm_up=9_600)

        assert result.mean_wait is not None
        assert result.mean_wait.value == pytest.approx(2.4, rel=1e-12)
        assert result.loss_probability.value == pytest.approx(0.2, rel=1e-12)

    @pytest.mark.parametrize(
        "spec", ["2*D(1ms)/D(0.5ms)/1/1", "D(0.7s)/D(7/3s)/3/2", "D(1/3s)/D(1s)/3/inf"]
    )
    def test_a_schedule_is_simulated_exactly(self, spec: str) -> None:
        exact, result = analyse(spec), simulate(spec, jobs=120_000)
        assert exact.loss_probability is not None

        assert result.mean_wait is not None
        assert result.mean_wait.value == pytest.approx(exact.mean_wait, rel=1e-3)
        assert result.loss_probability.value == pytest.approx(exact.loss_probability, rel=1e-3)
        for share in (0.2, 0.5, 0.99):
            found = result.wait_percentile(share)
            assert found is not None
            assert found.value == pytest.approx(exact.wait_percentile(share), rel=1e-12)

    def test_a_trace_in_milliseconds_meets_a_schedule(self, tmp_path: Path) -> None:
        path = tmp_path / "instants.txt"
        path.write_text(
            "\n".join(f"{1_700_000_000_000 + 100 * i + 300 * (i // 7)}" for i in range(50))
        )

        jobs = events(f"trace({path},unit=ms)/D(0.1s)/1", 50)

        assert {job.fate for job in jobs} == {"served"}
        assert jobs[1].arrival * 10 == 1


class TestStreams:
    def test_arrivals_are_the_same_whatever_the_service_is(self) -> None:
        one = events("M(1/s)/M(1s)/1", 200, seed=4)
        other = events("M(1/s)/LN(mean=3s,scv=2)/2/inf/lifo", 200, seed=4)

        assert [job.arrival for job in one] == pytest.approx([job.arrival for job in other])

    def test_replications_and_seeds_have_nothing_in_common(self) -> None:
        def gaps(seed: int, replication: int) -> Any:
            model = Model.parse("M(1/s)/M(1s)/1")
            streams = Streams(seed, replication)
            return source_of(model, clock_of(model), streams, moved=True).take(5000, 5000)[0]

        first = gaps(0, 0)
        for other in (gaps(0, 1), gaps(1, 0)):
            assert abs(float(numpy.corrcoef(first, other)[0, 1])) < 5 / math.sqrt(5000)

    def test_the_number_of_cores_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = "M(2.2/s)/M(1s)/2/5"
        many = digest(simulate(spec, jobs=50_000))
        monkeypatch.setattr("os.cpu_count", lambda: 1)

        assert digest(simulate(spec, jobs=50_000)) == many

    def test_progress_changes_nothing(self) -> None:
        shares: list[float] = []
        spec = "M(2.2/s)/M(1s)/2/5"

        watched = simulate(spec, jobs=50_000, progress=shares.append)

        assert digest(watched) == digest(simulate(spec, jobs=50_000))
        assert shares == sorted(shares)
        assert shares[-1] == 1

    def test_common_numbers_narrow_a_difference(self) -> None:
        slow, fast = (
            simulate(f"M(1.8/s)/M({time}s)/2/inf", jobs=400_000, warm_up=20_000, seed=3)
            for time in (1, 0.95)
        )
        other = simulate("M(1.8/s)/M(0.95s)/2/inf", jobs=400_000, warm_up=20_000, seed=99)
        exact = analyse("M(1.8/s)/M(1s)/2/inf").mean_wait
        faster = analyse("M(1.8/s)/M(0.95s)/2/inf").mean_wait
        assert exact is not None
        assert faster is not None

        common, independent = slow.minus(fast, "mean_wait"), slow.minus(other, "mean_wait")

        assert common.low < exact - faster < common.high
        assert common.high - common.low < 0.7 * (independent.high - independent.low)

    def test_runs_of_different_length_have_no_difference(self) -> None:
        short, long = (simulate("M(1/s)/M(1s)/1", jobs=jobs) for jobs in (10_000, 20_000))

        with pytest.raises(ParameterError, match="the same jobs, warm-up and replications"):
            short.minus(long, "loss_probability")


class TestStopping:
    def test_a_run_goes_on_until_it_is_as_precise_as_was_asked(self) -> None:
        result = simulate("M(0.8/s)/M(1s)/1/inf", precision=0.02, seed=2)

        assert result.reached is True
        assert result.mean_wait is not None
        assert result.mean_wait.relative_width <= 0.02
        assert result.jobs < 5_000_000

    def test_loss_is_what_is_precise_where_nobody_waits(self) -> None:
        result = simulate("M(3/s)/D(1s)/4", precision=0.01)

        assert result.loss_probability.relative_width <= 0.01

    def test_what_was_never_seen_is_not_precise(self) -> None:
        result = simulate("M(1/s)/M(1s)/40", precision=0.1, most_jobs=200_000)

        assert result.reached is False
        assert "loss_probability is not known" in result.notes[-1]

    def test_a_schedule_that_refuses_nobody_is_known_at_once(self) -> None:
        assert simulate("D(1s)/D(1s)/1", precision=0.01).reached is True

    def test_a_run_that_is_interrupted_ends_at_once(self) -> None:
        simulate("M(0.5/s)/M(1s)/1/inf", jobs=10_000, engine="compiled")
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            simulate("M(0.5/s)/M(1s)/1/inf", jobs=10_000_000_000)

        assert time.monotonic() - started < 10

    def test_a_run_that_gives_up_says_how_precise_it_is(self) -> None:
        result = simulate("M(0.99/s)/M(1s)/1/inf", precision=0.0001, most_jobs=3_000_000)

        assert result.reached is False
        assert "not to the ±0.0001 asked for" in result.notes[-1]
        assert "3000000 jobs" in result.notes[-1]

    def test_a_load_that_cannot_settle_in_time_is_not_called_precise(self) -> None:
        started = time.monotonic()
        result = simulate("M(0.999999/s)/M(1s)/1/inf", precision=0.9, most_seconds=1)

        assert result.reached is False
        assert "short for this load" in result.notes[0]
        assert time.monotonic() - started < 30

    def test_time_runs_out_too(self) -> None:
        started = time.monotonic()
        result = simulate("M(0.99/s)/M(1s)/1/inf", precision=0.00001, most_seconds=0.5)

        assert result.reached is False
        assert time.monotonic() - started < 30

    def test_a_run_too_short_for_its_load_says_so(self) -> None:
        assert "short for this load" in simulate("M(0.999/s)/M(1s)/1/inf", jobs=50_000).notes[0]


class TestCorners:
    def test_an_unstable_station_says_by_how_much_it_grows(self) -> None:
        with pytest.raises(UnstableError, match="grows by 1 jobs/s") as caught:
            simulate("M(3/s)/M(1s)/2/inf")

        assert caught.value.growth_per_second == 1

    @pytest.mark.parametrize(
        "spec",
        ["M(2/s)/M(1s)/2/inf", "M(2/s)/M(1s)/2/inf/lifo", "M(8.8/s)/bulk(4,0.1s+0.1s*k)/1/inf"],
    )
    def test_full_load_has_no_steady_state(self, spec: str) -> None:
        with pytest.raises(UnstableError):
            simulate(spec)

    def test_patience_makes_any_load_stable(self) -> None:
        result = simulate("M(4/s)/M(1s)/2/inf/patience(M(1s))", jobs=100_000)
        # Patience like a service: all that are there leave at one rate, as from M/M/inf.
        busy = 2 - 6 * math.exp(-4)

        assert abs(z_of(result.abandonment_probability, 1 - busy / 4, result)) < 5

    def test_what_was_never_seen_is_not_said_to_be_impossible(self) -> None:
        loss = simulate("M(1/s)/M(1s)/40", jobs=100_000).loss_probability

        assert (loss.value, loss.low) == (0, 0)
        assert 1e-6 < loss.high < 1e-3

    def test_a_percentile_beyond_the_run_is_none(self) -> None:
        result = simulate("M(0.8/s)/M(1s)/1/inf", jobs=2_000)

        assert result.wait_percentile(0.99999) is None
        assert result.wait_percentile(0.5) is not None

    @pytest.mark.parametrize(
        "spec",
        [
            "M(1e9/s)/M(1s)/1/3",
            "M(1e-50/s)/M(1s)/1/3",
            "LN(mean=1s,scv=100)/H2(mean=1s,scv=100)/2/4",
            "M(900/s)/M(1s)/1000/100",
            "M(1/s)/M(1s)/1/100000",
            "U(0s,1ms)/D(1h)/3",
            "64*D(1s)/M(1ms)/2/9",
            "sin(level=1/s,amplitude=1/s,period=1ms)/M(1s)/2/2",
        ],
    )
    def test_no_number_is_ever_nan(self, spec: str) -> None:
        result = simulate(spec, jobs=4_000)

        for name in result.__dataclass_fields__:
            found = getattr(result, name)
            if isinstance(found, Estimate):
                assert math.isfinite(found.value + found.low + found.high), name
                assert found.low <= found.value <= found.high, name

    def test_what_two_moments_leave_open_is_said(self) -> None:
        result = simulate("G(mean=1s,scv=2)/M(1s)/2/3", jobs=2_000)

        assert result.notes == (
            "G was played as a gamma distribution; others with its moments differ",
        )

    def test_a_million_servers_are_played(self) -> None:
        result = simulate("M(900000/s)/D(1s)/1000000", jobs=2_000_000, engine="compiled", warm_up=0)

        assert result.loss_probability.value == 0

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"jobs": 399}, "at least 400 jobs"),
            ({"jobs": 1000, "precision": 0.1}, "either a number of jobs or a precision"),
            ({"precision": 0.0}, "as 0.01 for ±1 %"),
            ({"precision": 0.1, "of": "wait"}, "mean_wait"),
            ({"replications": 0}, "from 1 to 1000 replications"),
            ({"warm_up": 1_000_000}, "shorter than its run"),
            ({"engine": "fast"}, "auto, compiled, plain"),
            ({"seed": -1}, "a seed is at least 0"),
            ({"spec": "1000*D(1s)/M(1s)/1/2", "jobs": 400}, "play more jobs"),
        ],
    )
    def test_a_wrong_argument_is_one_sentence(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ParameterError) as caught:
            simulate(options.pop("spec", "M(1/s)/M(1s)/1/2"), **options)

        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_analyse_simulates_where_it_is_told_to() -> None:
    exact = analyse("M(2.2/s)/M(1s)/2/5")
    state = analyse("M(2.2/s)/M(1s)/2/5", method="simulation")

    assert state.road == "simulation, 95 % interval"
    assert state.error is not None
    assert state.error.startswith("mean wait from 1.3")
    assert state.mean_wait == pytest.approx(exact.mean_wait, rel=0.03)
    assert state.wait_percentile(0.9) == pytest.approx(exact.wait_percentile(0.9), rel=0.03)
    assert state.output is not None
    assert exact.output is not None
    assert state.output.scv == pytest.approx(exact.output.scv, rel=0.03)


def test_the_flow_of_refusals_is_that_of_the_analysis() -> None:
    exact = analyse("M(2.2/s)/M(1s)/2/5")
    result = simulate("M(2.2/s)/M(1s)/2/5", jobs=1_000_000)
    assert exact.refusals is not None
    assert exact.refusals.scv is not None
    assert result.refusals is not None

    assert abs(z_of(result.refusals.rate, exact.refusals.rate, result)) < 5
    assert abs(z_of(result.refusals.scv, exact.refusals.scv, result)) < 5


def test_averages_mislead_in_a_simulation_too() -> None:
    day = "sin(level=8/h,amplitude=4/h,period=24h)/M(1h)/10/20"
    result = simulate(day, jobs=1_000_000, engine="compiled")

    assert abs(z_of(result.loss_probability, 0.0242065603, result)) < 5


def test_a_period_of_many_jobs_is_cut_into_slices_without_a_seam() -> None:
    spec = "sin(level=10/s,amplitude=9/s,period=2500s,phase=1)/M(1s)/10/5"
    result = simulate(spec, jobs=2_000_000, seed=6, engine="compiled")

    assert abs(z_of(result.loss_probability, analyse(spec).loss_probability or 0, result)) < 5
    assert abs(z_of(result.mean_wait, analyse(spec).mean_wait or 0, result)) < 5


def test_ten_times_the_jobs_take_no_more_memory() -> None:
    simulate("M(2.2/s)/M(1s)/2/5", jobs=1_000_000, engine="compiled")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    simulate("M(2.2/s)/M(1s)/2/5", jobs=10_000_000, engine="compiled")

    # In KiB; a list of the waits alone would take 80,000.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000


@pytest.mark.timed
def test_ten_times_the_jobs_take_ten_times_as_long() -> None:
    def seconds(jobs: int) -> float:
        taken = []
        for _ in range(3):
            started = time.process_time()
            simulate("M(2.2/s)/M(1s)/2/5", jobs=jobs, engine="compiled", replications=1)
            taken.append(time.process_time() - started)
        return min(taken)

    seconds(100_000)

    assert 5 < seconds(10_000_000) / seconds(1_000_000) < 20
