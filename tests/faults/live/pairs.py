"""Runs of the service as it is scaled out: three HTTP processes, three workers, one pair.

A short run has a schedule of its own, the one that scaling out is about: a worker and an
HTTP process are killed half way, workers join and leave, and Kafka or RabbitMQ is restarted at a
third and at a half. A long one draws its faults from a seed, as runs on files do, until so many
processes were killed; its numbers stand under the pair's name in one file for all pairs.
"""

import asyncio
import datetime
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from tests.faults.live.controller import Config, Report, run, versions
from tests.faults.live.faults import Planned
from tests.faults.live.pair import Pair, Pool, Servers
from tests.faults.live.sums import Sums

__all__ = ["RESTARTED", "PairResults", "drawn", "long_pair", "scaled_out"]

# Processes of each role.
_EACH: Final = 3

# What makes sense where nothing, or not everything, is a file.
_KINDS: Final = ("kill", "pause", "network", "clock", "poison", "storm", "terminate")

# Seconds between two workers that join and leave.
_COMING_AND_GOING: Final = 2.0

# Ratings of a short run, and the seconds in which they have to be accepted. Kafka takes some
# eight to start twice, and ten times as many where others need the machine, too.
_ENOUGH: Final = 900
_AT_MOST: Final = 120.0

# Of ratings that are offered in a long run, those that have to be accepted. A broker that is
# away for half of a run is a hard one; with fewer than this there was hardly a run.
_LEAST: Final = 0.1

# Brokers that are restarted in the run that every pair has to stand.
RESTARTED: Final = ("kafka", "nats", "rabbitmq")

# Seconds of load in one run of a long one.
_ROUND: Final = 60.0


def scaled_out(pair: Pair, *, seed: int) -> Config:
    """Return the run that every pair has to stand.

    Half way is when half of the ratings were accepted: Kafka and RabbitMQ need seconds to start,
    or many on a busy machine.
    """
    half = _ENOUGH // 2
    schedule = [
        Planned(0.2, "storm", (), _AT_MOST, str(_COMING_AND_GOING)),
        # Whoever is killed has something in hand: what it needs does not answer just then.
        Planned(0.0, "ledger", (), 1.5, "pause", after=half),
        Planned(0.7, "kill", (("work", 0), ("serve", 0)), 1.0, after=half),
        # Whoever was told nothing asks again: without that, all outcomes may be known.
        Planned(0.0, "network", (), 1.0, "cut", 1, after=_ENOUGH * 2 // 3),
    ]
    if pair.broker in RESTARTED:
        schedule += [
            Planned(0.0, "broker", (), 0.0, "restart", after=_ENOUGH // 3),
            Planned(0.9, "broker", (), 0.0, "restart", after=half),
        ]
    return Config(
        seed,
        _AT_MOST,
        rate=300,
        clients=24,
        workers=_EACH,
        processes=_EACH,
        replay=100,
        pair=pair,
        schedule=schedule,
        accepted=_ENOUGH,
        gives_up=4,
    )


def drawn(pair: Pair, *, seed: int, seconds: float, rate: float, every: float) -> Config:
    """Return a run whose faults are drawn from its seed."""
    return Config(
        seed,
        seconds,
        rate=rate,
        every=every,
        clients=32,
        workers=_EACH,
        processes=_EACH,
        pair=pair,
        kinds=(*_KINDS, *pair.parts),
        least=_LEAST,
    )


@final
@dataclass(slots=True)
class PairResults(Sums):
    """The sums of all runs of one pair.

    Attributes:
        servers: Versions of broker and ledger.
    """

    pair: str
    seed: int
    began_at: str
    versions: dict[str, str]
    servers: dict[str, str]
    runs: int = 0

    def add(self, report: Report) -> None:
        """Add a run."""
        self.runs += 1
        self.add_run(report)


def long_pair(
    pair: Pair,
    *,
    kills: int,
    seconds: float,
    seed: int,
    rate: float,
    every: float,
    folder: Path,
    results: Path | None,
    say: Callable[[str], None],
) -> PairResults:
    """Run a pair until so many processes were killed, or the time is up.

    Args:
        pair: Broker and ledger.
        kills: How many kills are enough.
        seconds: End after so long, whatever.
        seed: The first run's; the others count on from it.
        rate: Ratings a second that clients offer.
        every: Mean seconds between two faults.
        folder: Where runs that failed stay.
        results: The file of results, JSON, written after each run; what it says of other
            pairs, and of runs on files, stays.
        say: Told one line a run.
    """
    began = time.monotonic()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with Pool() as pool:
        servers = pool.of(pair)
        total = PairResults(pair.name, seed, now, versions(), _versions(servers))
        while total.kills < kills and (left := seconds - (time.monotonic() - began)) > 0:
            place = folder / f"{pair.name}-{seed}"
            shutil.rmtree(place, ignore_errors=True)
            length = min(_ROUND, max(left, 10.0))
            config = drawn(pair, seed=seed, seconds=length, rate=rate, every=every)
            report = asyncio.run(run(config, place, servers))
            total.add(report)
            if report.good:
                shutil.rmtree(place, ignore_errors=True)
            else:
                (place / "report.json").write_text(json.dumps(report.shown(), indent=2))
                say(f"seed {seed} is kept in {place}")
            seed += 1
            total.seconds = round(time.monotonic() - began, 1)
            if results is not None:
                _write(results, total)
            say(
                f"{total.seconds:6.0f} s  {pair.name}  {total.accepted:9,} ratings  "
                f"{total.kills:4} kills  {len(total.violations)} violations  "
                f"{len(total.vacuous)} vacuous"
            )
    return total


def _versions(servers: Servers) -> dict[str, str]:
    return {server.kind.name: server.version or "unknown" for server in servers.values()}


def _write(results: Path, total: PairResults) -> None:
    document: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    pairs: Mapping[str, Any] = document.get("pairs", {})
    document["pairs"] = dict(sorted({**pairs, total.pair: total.shown()}.items()))
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(document, indent=2) + "\n")
