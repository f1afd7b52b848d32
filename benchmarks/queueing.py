"""The simulator of queueing stations against Ciw, SimPy and LINE, and against its own limits.

``QUEUEING_JOBS=10000000000 make bench ARGS=queueing-limits`` plays longer runs than 10⁹ jobs.
"""

import os
import statistics
import subprocess
import sys
import time
from typing import Final

from benchmarks.peers.environments import Peer, peer
from benchmarks.report import Report
from molva.queueing import Model, simulate
from molva.queueing.simulate.arrivals import source_of
from molva.queueing.simulate.demands import demands_of
from molva.queueing.simulate.replication import CHUNK
from molva.queueing.simulate.streams import Streams
from molva.queueing.simulate.units import clock_of

# Name of a case to its model, the mean wait that is known of it, and what is asked for against
# Ciw and against LINE.
CASES: Final = {
    "M/M/1/inf": ("M(0.9/s)/M(1s)/1/inf", 9.0, 1000, 20),
    "M/M/4/inf": ("M(3.6/s)/M(1s)/4/inf", 1.9693725, 1000, 20),
    "E2/LN/2/5": ("E2(2.2/s)/LN(mean=1s,scv=1.5)/2/5", 1.3334109, 500, 12),
}
TURNS: Final = 3
OURS: Final = 20_000_000

# What each takes some seconds for; Ciw's memory grows by a kilobyte a job.
THEIRS: Final = {"ciw": 60_000, "simpy": 80_000, "line-solver": 2_000_000}


def queueing() -> None:
    """Measure the simulator."""
    report = Report(
        "queueing",
        "Simulating stations: jobs a second",
        f"One core, one run (one replication), utilisation 0.9 (E2/LN/2/5: 1.1), {TURNS} turns, "
        "one after the other in each; every peer in an environment of its own, import and start "
        "of the interpreter not counted.",
    )
    peers = [
        peer("ciw", "3.2.7", "ciw_station.py"),
        peer("simpy", "4.1.2", "simpy_station.py"),
        peer("line-solver", "3.0.8", "line_station.py"),
    ]
    rates = {case: _against(report, case, peers) for case in CASES}
    for case in CASES:
        _plain(report, case, rates[case]["ciw"])
        _precise(report, case, rates[case])
    _same_number(report, peers)
    report.write()


def queueing_limits() -> None:
    """Measure the simulator against drawing alone, over ever more jobs, and its start."""
    report = Report(
        "queueing-limits",
        "Simulating stations: what limits it",
        "One core, one run (one replication) but for the commands; each size in a process of "
        "its own.",
    )
    for case in CASES:
        _against_draws(report, case)
    _linear(report)
    _starts(report)
    report.write()


def _rate(spec: str, jobs: int, engine: str = "compiled") -> float:
    started = time.perf_counter()
    simulate(spec, jobs=jobs, engine=engine, replications=1)
    return jobs / (time.perf_counter() - started)


def _peer_rate(each: Peer, case: str, known: float) -> float:
    jobs = THEIRS[each.name]
    answer = each.ask(case, jobs)
    # Whoever plays another model is no peer. Runs of this length are off by some 10 %.
    if abs(answer["mean_wait"] / known - 1) > 0.35:
        raise RuntimeError(f"{each.name} waits {answer['mean_wait']} on {case}, not {known}")
    return jobs / float(answer["seconds"])


def _against(report: Report, case: str, peers: list[Peer]) -> dict[str, list[float]]:
    """Return the rates of the peers."""
    spec, known, of_ciw, of_line = CASES[case]
    asked = {"ciw": str(of_ciw), "simpy": "nothing", "line-solver": str(of_line)}
    simulate(spec, jobs=200_000, engine="compiled", replications=1)
    ours: list[float] = []
    theirs: dict[str, list[float]] = {each.name: [] for each in peers}
    for _ in range(TURNS):
        ours.append(_rate(spec, OURS))
        for each in peers:
            theirs[each.name].append(_peer_rate(each, case, known))
    for each in peers:
        report.ratio(
            f"{case}, jobs/s / {each.name} {each.version}",
            ours,
            theirs[each.name],
            asked[each.name],
        )
    return theirs


def _against_draws(report: Report, case: str) -> None:
    """Compare with drawing the same numbers, in the same pieces, and doing nothing with them."""
    model = Model.parse(CASES[case][0])
    clock, streams = clock_of(model), Streams(0, 0)
    source = source_of(model, clock, streams, moved=True)
    demands = demands_of(model, clock, streams)
    ours, draws = [], []
    for _ in range(2 * TURNS):
        ours.append(_rate(str(model), OURS))
        started = time.perf_counter()
        left = OURS
        while left > 0:
            size = source.take(left, CHUNK)[0].size
            demands.take(size)
            left -= size
        draws.append(OURS / (time.perf_counter() - started))
    report.ratio(f"{case}, jobs/s / drawing the same numbers alone", ours, draws, "0.6")


def _plain(report: Report, case: str, theirs: list[float]) -> None:
    ours = [_rate(CASES[case][0], 1_000_000, "plain") for _ in theirs]
    report.ratio(f"{case} without numba, jobs/s / ciw", ours, theirs, "20")


def _same_number(report: Report, peers: list[Peer]) -> None:
    """Compare runs of the very same number of jobs, in which our start and summary weigh most."""
    jobs = 100_000
    for case, (spec, _, _, _) in CASES.items():
        ours = statistics.median(jobs / _rate(spec, jobs) for _ in range(5))
        parts = []
        for each in peers:
            seconds = float(each.ask(case, jobs)["seconds"])
            parts.append(f"{each.name} {seconds:.2f} s, {seconds / ours:,.0f} times as long")
        report.add(f"{case}, a run of {jobs:,} jobs", f"{ours * 1e3:.1f} ms", "; ".join(parts))


def _linear(report: Report) -> None:
    """Measure time and memory from 10⁶ jobs on, each size in a process of its own."""
    most = int(os.environ.get("QUEUEING_JOBS", "1000000000"))
    size, rates = 1_000_000, {}
    while size <= most:
        code = (
            "import resource, time\n"
            "from molva.queueing import simulate\n"
            "simulate('M(3.6/s)/M(1s)/4/inf', jobs=100000, engine='compiled', replications=1)\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "started = time.perf_counter()\n"
            f"simulate('M(3.6/s)/M(1s)/4/inf', jobs={size}, engine='compiled', replications=1)\n"
            "seconds = time.perf_counter() - started\n"
            "print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, before)"
        )
        shown = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds, memory, before = map(float, shown.stdout.split())
        rates[size] = size / seconds
        report.add(
            f"M/M/4/inf, {size:,} jobs",
            f"{seconds:.3g} s",
            f"{size / seconds / 1e6:.1f} M/s; {memory / 1024:.0f} MiB at most, "
            f"{(memory - before) / 1024:.1f} MiB more than a run of 10⁵",
        )
        size *= 10
    report.figures["rates by jobs"] = rates


def _precise(report: Report, case: str, rates: dict[str, list[float]]) -> None:
    """Say how long ±1 % of the mean wait takes; of the peers, as many jobs at their rate."""
    spec, known, _, _ = CASES[case]
    started = time.perf_counter()
    result = simulate(spec, precision=0.01, engine="compiled", seed=1)
    seconds = time.perf_counter() - started
    assert result.mean_wait is not None
    off = result.mean_wait.value / known - 1
    times = ", ".join(
        f"{name} {result.jobs / statistics.median(found):,.0f} s" for name, found in rates.items()
    )
    report.add(
        f"{case}, mean wait to ±1 %, all cores",
        f"{seconds:.2f} s",
        f"{result.jobs:,} jobs, in truth off by {off:+.2%}; as many jobs take {times}",
    )


def _starts(report: Report) -> None:
    """Measure what a user waits for before anything is computed."""
    commands: dict[str, tuple[list[str], str]] = {
        "import molva.queueing": ([sys.executable, "-c", "import molva.queueing"], "0.3 s"),
        "molva model, a closed form": (
            [sys.executable, "-m", "molva", "model", "M(8/s)/M(200ms)/2/inf"],
            "0.7 s",
        ),
        "molva simulate, 10⁶ jobs": (
            [sys.executable, "-m", "molva", "simulate", "M(8/s)/M(200ms)/2/inf"],
            "nothing",
        ),
    }
    for what, (command, asked) in commands.items():
        taken = []
        for _ in range(7):
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            taken.append(time.perf_counter() - started)
        report.add(
            what,
            f"{statistics.median(taken):.2f} s",
            f"{min(taken):.2f} to {max(taken):.2f}; asked: under {asked}",
        )
