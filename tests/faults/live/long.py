"""Many runs in one go, until the numbers convince; one file of results.

If n independent faults show nothing, a fault shows something in fewer than 3/n of all cases
(95 %). So what is asked for is a number of faults, not of hours: kills, power cuts and
accepted ratings. Live runs, power rounds and rounds of a queue take turns, each with a seed of
its own, until all is reached or the time is up.

A run that fails is kept, with its history and its logs; the others leave their numbers.
"""

import asyncio
import datetime
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from tests.faults.live.controller import Config, Disk, Report, run, versions
from tests.faults.live.power import VARIANTS, PowerConfig, PowerReport, cut_power
from tests.faults.live.queues import QueueConfig, QueueReport, run_queue
from tests.faults.live.sums import Sums, raise_to

__all__ = ["Goal", "Results", "long_run"]

# Long enough that starting and proving are a small part of it, short enough that a failure
# comes with a history that can be read.
_LIVE_SECONDS: Final = 60.0
_CUTS_A_ROUND: Final = 10
_QUEUE_SECONDS: Final = 20.0


@final
@dataclass(frozen=True, slots=True)
class Goal:
    """When it is enough. ``rate``: ratings a second that clients offer."""

    kills: int = 300
    cuts: int = 100
    accepted: int = 1_000_000
    queue_rounds: int = 10
    minutes: float = 30.0
    rate: float = 3_000.0
    clients: int = 64
    every: float = 1.1


@final
@dataclass(slots=True)
class Results(Sums):
    """The sums of all runs, of every kind."""

    seed: int
    began_at: str
    versions: dict[str, str]
    seeds: dict[str, list[int]] = field(
        default_factory=lambda: {"live": [], "power": [], "queue": []}
    )
    cuts: int = 0
    cuts_by_variant: "Counter[str]" = field(default_factory=Counter)
    longest_power_recovery_seconds: float = 0.0
    longest_power_drain_seconds: float = 0.0
    torn_sectors: int = 0
    queue_rounds: int = 0
    queue_messages: int = 0
    queue_kills: int = 0
    queue_pauses: int = 0
    queue_redelivered: int = 0
    queue_late_acks: int = 0
    queue_dead_letters: int = 0
    longest_queue_drain_seconds: float = 0.0
    peak_file_bytes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, report: Report) -> None:
        """Add a live run."""
        seed = report.config.seed
        self.seeds["live"].append(seed)
        self.add_run(report, kind="live")
        self.skipped.update(report.skipped)
        raise_to(self.peak_file_bytes, report.peak_files)

    def add_power(self, report: PowerReport) -> None:
        """Add a round of power cuts."""
        seed = report.config.seed
        self.seeds["power"].append(seed)
        self.blame(seed, f"power, {report.config.variant}", report.violations, report.vacuous)
        self.accepted += report.accepted
        self.unknown += report.unknown
        self.duplicates += report.duplicates
        self.redelivered += report.redelivered
        self.exits.update(report.exits)
        self.cuts += report.cuts
        self.torn_sectors += report.torn_sectors
        self.cuts_by_variant[report.config.variant] += report.cuts
        self.longest_power_recovery_seconds = max(
            self.longest_power_recovery_seconds, report.recovery_seconds
        )
        self.longest_power_drain_seconds = max(
            self.longest_power_drain_seconds, report.drain_seconds
        )

    def add_queue(self, report: QueueReport) -> None:
        """Add a round of a queue."""
        seed = report.config.seed
        self.seeds["queue"].append(seed)
        self.blame(seed, "queue", report.violations, report.vacuous)
        self.queue_rounds += 1
        self.queue_messages += report.sent
        self.queue_kills += report.kills
        self.queue_pauses += report.pauses
        self.queue_redelivered += report.redelivered
        self.queue_late_acks += report.late
        self.queue_dead_letters += report.dead
        self.longest_queue_drain_seconds = max(
            self.longest_queue_drain_seconds, report.drain_seconds
        )


def long_run(
    goal: Goal, *, seed: int, folder: Path, results: Path, say: Callable[[str], None]
) -> Results:
    """Run until the goal is reached; write the results after each run.

    Args:
        goal: When it is enough.
        seed: The first run's; the others count on from it.
        folder: Where runs that failed stay.
        results: The file of results, JSON.
        say: Told one line a run.
    """
    started = time.monotonic()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    total = Results(seed, now, versions())
    number = 0
    while not _reached(goal, total) and time.monotonic() - started < goal.minutes * 60:
        live_done = total.kills >= goal.kills and total.accepted >= goal.accepted
        power_done = total.cuts >= goal.cuts
        place = folder / f"seed-{seed + number}"
        shutil.rmtree(place, ignore_errors=True)
        turns = {kind: len(seeds) for kind, seeds in total.seeds.items()}
        queue_done = total.queue_rounds >= goal.queue_rounds
        if not queue_done and (number % 3 == 2 or (live_done and power_done)):
            queue = asyncio.run(run_queue(QueueConfig(seed + number, _QUEUE_SECONDS), place))
            total.add_queue(queue)
            good = queue.good
        elif power_done or (
            len(total.seeds["live"]) <= len(total.seeds["power"]) and not live_done
        ):
            turn = len(total.seeds["live"]) % 2
            disk: Disk = "tmpfs" if turn else "image"
            config = Config(
                seed + number,
                _LIVE_SECONDS,
                rate=goal.rate,
                every=goal.every,
                clients=goal.clients,
                workers=2 + turn,
                disk=disk,
            )
            report = asyncio.run(run(config, place))
            total.add(report)
            good = report.good
        else:
            variant = VARIANTS[turns["power"] % len(VARIANTS)]
            power = asyncio.run(
                cut_power(PowerConfig(seed + number, _CUTS_A_ROUND, variant=variant), place)
            )
            total.add_power(power)
            good = power.good
        if good:
            shutil.rmtree(place, ignore_errors=True)
        else:
            say(f"seed {seed + number} is kept in {place}")
        number += 1
        total.seconds = round(time.monotonic() - started, 1)
        _write(results, total)
        say(
            f"{total.seconds:6.0f} s  {total.accepted:9,} ratings  {total.kills:4} kills  "
            f"{total.cuts:4} cuts  {total.queue_messages:7,} queued  "
            f"{len(total.violations)} violations  {len(total.vacuous)} vacuous"
        )
    return total


def _write(results: Path, total: Results) -> None:
    """Write them; what the file says of pairs (``pairs``) stays."""
    document = json.loads(results.read_text()) if results.exists() else {}
    kept = {name: document[name] for name in ("pairs",) if name in document}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({**total.shown(), **kept}, indent=2) + "\n")


def _reached(goal: Goal, total: Results) -> bool:
    return (
        total.kills >= goal.kills
        and total.cuts >= goal.cuts
        and total.accepted >= goal.accepted
        and total.queue_rounds >= goal.queue_rounds
    )
