"""One run: a seed, a service in real processes, faults, and a verdict.

Design:
    The controller is never killed. It owns the seed, the schedule and the history; clients
    and proxies are tasks of its own loop, so that every time in the history is of one
    clock. The service is its children: HTTP processes and workers. On files each HTTP
    process is reachable directly and through a proxy; of a pair (``pair``), as scaling out
    is done, all of them stand behind a round-robin.

    The end of a run is its proof; see ``proof``.

    A run that proves nothing fails as one that finds something does: faults that did not
    happen, or happened while nothing was under way, or no rating that came twice.
"""

import asyncio
import contextlib
import os
import platform
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal, final

import apsw
from examples.scaling_out.round_robin import RoundRobin

from molva.messaging import MessagingError, Topic, open_topic
from tests.brokers.ports import free_ports
from tests.faults.live.client import Client, History, Load, Pace
from tests.faults.live.disk import Image, can_mount, limited
from tests.faults.live.evidence import Place
from tests.faults.live.faults import WEIGHTS, Planned, Saboteur, missing_tools, plan
from tests.faults.live.fleet import Fleet, command
from tests.faults.live.pair import STORES_ONCE, Pair, Servers
from tests.faults.live.proof import prove
from tests.faults.live.proxy import Proxy

__all__ = ["CAMPAIGNS", "Config", "Report", "put_campaigns", "run", "versions"]

# Name, lowest and highest rate. One is there from the start, the other is made.
CAMPAIGNS: Final = (("default", 0, 10), ("stars", 1, 5))

# Beyond these something grows that should not: a worker needs some 90 MB here, and a WAL
# is copied back from 16 MB on, unless a stopped process reads an old state meanwhile.
_MAX_RSS: Final = 400 * 2**20
_MAX_WAL: Final = 256 * 2**20

_DISK_MEGABYTES: Final = 768

Disk = Literal["image", "tmpfs", "folder"]


@final
@dataclass(frozen=True, slots=True)
class Config:
    """One run.

    Attributes:
        rate: Ratings a second that clients offer, all together.
        every: Mean seconds between two faults.
        disk: Where data lies: an ext4 image or a tmpfs, each of which can be full; or the
            folder itself, which needs no rights.
        added: What ``launch`` adds to roles: a mutant, by role.
        strict: Whether a run that proves nothing fails.
        replay: How many ratings are sent again over HTTP at the end; all of them are sent
            again through the broker.
        schedule: What goes wrong instead of what the seed says.
        pair: Broker and ledger; None for the embedded defaults.
        processes: HTTP processes.
        accepted: So many accepted ratings are enough, and ``seconds`` is the most; 0: it goes
            on for ``seconds``.
        gives_up: One in so many unknown answers makes a client give up.
        least: The share of what is offered that must be accepted, or the run proves nothing.
    """

    seed: int
    seconds: float
    rate: float = 500.0
    every: float = 2.0
    clients: int = 32
    workers: int = 2
    items: int = 40
    kinds: Sequence[str] = tuple(WEIGHTS)
    disk: Disk = "image"
    added: Mapping[str, str] = field(default_factory=dict)
    strict: bool = True
    replay: int = 500
    schedule: Sequence[Planned] | None = None
    pair: Pair | None = None
    processes: int = 2
    accepted: int = 0
    gives_up: int = 12
    least: float = 0.2


@final
@dataclass(slots=True)
class Report:
    """What a run did and found. ``violations`` is empty where it found nothing.

    Attributes:
        vacuous: Why the run proves nothing; empty where it does.
        recovery_seconds: From the end of the last fault until all was counted.
        silence_seconds: The longest time in which no client was told anything good.
        duplicates: Ratings that the workers met again, and did not count.
        redelivered: Messages that the broker handed over again.
    """

    config: Config
    schedule: list[Planned]
    violations: list[str] = field(default_factory=list)
    vacuous: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    accepted: int = 0
    offered: int = 0
    rate: float = 0.0
    results: dict[str, int] = field(default_factory=dict)
    unknown: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    kills: int = 0
    exits: dict[str, int] = field(default_factory=dict)
    dead_letters: int = 0
    duplicates: int = 0
    redelivered: int = 0
    reads: int = 0
    recovery_seconds: float = 0.0
    silence_seconds: float = 0.0
    slowest_start_seconds: float = 0.0
    peak_rss: dict[str, int] = field(default_factory=dict)
    peak_files: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether the run proved something, and found nothing."""
        return not self.violations and not (self.config.strict and self.vacuous)

    def shown(self) -> dict[str, object]:
        """Return it as a JSON object."""
        document = asdict(self)
        document["schedule"] = [planned.shown() for planned in self.schedule]
        return document


def versions() -> dict[str, str]:
    """Return what a run was made with."""
    root = Path(__file__).parents[3]
    git = subprocess.run(
        ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    return {
        "commit": git.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "sqlite": apsw.sqlite_lib_version(),
        "apsw": apsw.apsw_version(),
        "kernel": platform.release(),
        "cores": str(os.cpu_count()),
    }


def put_campaigns(place: Place) -> None:
    """Make the campaigns that are not there from the start."""
    for name, lowest, highest in CAMPAIGNS[1:]:
        done = subprocess.run(
            [
                *(*command(), "campaign", "put", name, *place.options),
                *("--scale", f"{lowest}-{highest}"),
            ],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"campaign put {name}: {done.stderr}")


@contextlib.contextmanager
def _disk(folder: Path, config: Config) -> Iterator[tuple[Path, bool]]:
    """Give the folder for the data, and whether its disk can be full."""
    place = folder / "disk"
    if config.disk != "folder" and can_mount(folder):
        config = Config(config.seed, config.seconds, disk="folder")
    if config.disk == "tmpfs":
        with limited(place, megabytes=_DISK_MEGABYTES):
            yield place, True
    elif config.disk == "image":
        image = Image(folder / "disk.img", megabytes=_DISK_MEGABYTES)
        try:
            image.make()
            image.mount(place)
            yield place, True
        finally:
            image.discard()
    else:
        place.mkdir()
        yield place, False


async def run(config: Config, folder: Path | None = None, servers: Servers | None = None) -> Report:
    """Return what one run did and found.

    Args:
        config: What to do.
        folder: Where logs and history stay.
        servers: Those of the run's pair.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="molva-faults-") as temporary:
            return await run(config, Path(temporary), servers)
    folder.mkdir(parents=True, exist_ok=True)
    if config.pair is not None:
        place = config.pair.place(servers or {}, folder)
        return await _Run(config, folder, place, servers=servers).run()
    with _disk(folder, config) as (disk, is_limited):
        data = disk / "data"
        data.mkdir()
        place = Place.of_files(data, data / "ledger.db", folder / "witness.log")
        return await _Run(config, folder, place, is_limited=is_limited).run()


@final
class _Run:
    def __init__(
        self,
        config: Config,
        folder: Path,
        place: Place,
        *,
        is_limited: bool = False,
        servers: Servers | None = None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._place = place
        self._servers = servers or {}
        skipped = {
            kind: why
            for kind, why in missing_tools(limited=is_limited).items()
            if kind in config.kinds
        }
        kinds = [kind for kind in config.kinds if kind not in skipped]
        schedule = config.schedule
        if schedule is None:
            schedule = plan(config.seed, seconds=config.seconds, every=config.every, kinds=kinds)
        self._report = Report(config, list(schedule))
        self._report.skipped = skipped
        self._fleet = Fleet(self._place.options, folder)
        self._history = History(folder / "history.jsonl")
        self._proxies: list[Proxy] = []
        self._balancer: RoundRobin | None = None
        self._ports: list[int] = []
        self._topic: Topic | None = None
        self._is_limited = is_limited
        self._healed_at = 0.0
        # Seconds until all are at work again when all is healed: some processes start, on a
        # machine that others use too.
        self._starting = 90.0

    async def run(self) -> Report:
        report = self._report
        started = time.monotonic()
        try:
            topic = await self._start()
            saboteur = Saboteur(
                self._fleet,
                self._proxies,
                self._place.data,
                self._history,
                topic,
                witness=self._added("work"),
                limited=self._is_limited,
                servers=self._servers,
            )
            await self._under_load(saboteur)
            await self._prove(saboteur)
            if not await self._fleet.stop():
                report.violations.append("not all processes ended within 30 s of SIGTERM")
            report.violations += self._fleet.surprises
            self._sum_up(saboteur)
        finally:
            if self._topic is not None:
                with contextlib.suppress(MessagingError):
                    await self._topic.close()
            if self._balancer is not None:
                await self._balancer.close()
            for proxy in self._proxies:
                await proxy.close()
            self._fleet.close()
            self._history.close()
        report.seconds = time.monotonic() - started
        return report

    # ------------------------------------------------------------- the load

    def _added(self, role: str) -> tuple[str, ...]:
        witness = (f"witness={self._place.witness}",) if role == "work" else ()
        mutant = self._config.added.get(role)
        return (*self._place.added, *witness, *((mutant,) if mutant else ()))

    async def _start(self) -> Topic:
        put_campaigns(self._place)
        for number in range(self._config.processes):
            member = self._fleet.add("serve", port=free_ports(1)[0], added=self._added("serve"))
            proxy = Proxy(member.port, seed=self._config.seed * self._config.processes + number)
            await proxy.start()
            self._proxies.append(proxy)
            self._ports += [member.port, proxy.port]
        if self._config.pair is not None:
            self._balancer = RoundRobin([("127.0.0.1", proxy.port) for proxy in self._proxies])
            await self._balancer.start()
            self._ports = [self._balancer.port]
        for _ in range(self._config.workers):
            self._fleet.add("work", added=self._added("work"))
        if not await self._fleet.all_ready(seconds=self._starting):
            raise RuntimeError(f"the service does not start; see {self._folder}")
        # For the poison. Opened now, because a full disk would not let it be opened later.
        self._topic = await open_topic(self._place.topic_url)
        return self._topic

    async def _under_load(self, saboteur: Saboteur) -> None:
        config, history = self._config, self._history
        pace = Pace(config.rate)
        load = Load(
            [
                Client(
                    number,
                    seed=config.seed,
                    ports=lambda: self._ports,
                    history=history,
                    pace=pace,
                    items=config.items,
                    campaigns=CAMPAIGNS,
                    gives_up=config.gives_up,
                )
                for number in range(config.clients)
            ]
        )
        keeping = asyncio.ensure_future(self._fleet.keep_running())
        watching = asyncio.ensure_future(self._watch())
        history.last_ok_at = started = time.monotonic()
        load.start()
        sabotage = asyncio.ensure_future(saboteur.follow(self._report.schedule))
        try:
            while time.monotonic() - started < config.seconds and not self._is_enough():
                await asyncio.sleep(0.05)
            load.check()
            self._report.rate = round(history.accepted / (time.monotonic() - started), 1)
            for client in load:
                client.stop()
            sabotage.cancel()
            await asyncio.gather(sabotage, return_exceptions=True)
            await saboteur.heal()
            self._healed_at = time.monotonic()
            if not await self._fleet.all_ready(seconds=self._starting):
                self._report.violations.append("healed, and yet not every process is at work")
            await load.stop(seconds=15)
            # The processes may have taken long to start.
            self._healed_at = time.monotonic()
        finally:
            await load.cancel()
            for task in (keeping, watching, sabotage):
                task.cancel()
            await asyncio.gather(keeping, watching, sabotage, return_exceptions=True)
        for task in (keeping, watching):
            if not task.cancelled():
                task.result()

    def _is_enough(self) -> bool:
        return 0 < self._config.accepted <= self._history.accepted

    async def _watch(self) -> None:
        peak = self._report.peak_files
        while True:
            self._fleet.measure()
            for path in self._place.data.iterdir():
                with contextlib.suppress(OSError):
                    peak[path.name] = max(peak.get(path.name, 0), path.stat().st_size)
            await asyncio.sleep(1.0)

    # ------------------------------------------------------------- the end

    async def _prove(self, saboteur: Saboteur) -> None:
        keeping = asyncio.ensure_future(self._fleet.keep_running())
        try:
            proof = await prove(
                self._place,
                self._fleet,
                self._history,
                healed_at=self._healed_at,
                poisoned=saboteur.poisoned,
                replay=self._config.replay,
                faults=sum(saboteur.done.values()),
            )
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        report = self._report
        report.violations += proof.violations
        report.recovery_seconds = proof.recovery_seconds
        report.duplicates = proof.evidence.duplicates
        report.redelivered = proof.redelivered
        report.dead_letters = len(proof.evidence.dead)

    # ------------------------------------------------------------- the sum

    def _sum_up(self, saboteur: Saboteur) -> None:
        report, history, fleet = self._report, self._history, self._fleet
        report.accepted = history.accepted
        report.offered = len(history.ratings)
        report.results = dict(history.results)
        report.unknown = sum(
            told.ok_at is None and told.unknown > 0 for told in history.ratings.values()
        )
        report.reads = len(history.totals)
        report.faults = dict(saboteur.done)
        report.kills = fleet.kills
        report.exits = dict(fleet.exits)
        report.notes += saboteur.notes
        report.silence_seconds = round(history.longest_silence, 2)
        report.slowest_start_seconds = round(
            max((member.slowest_start for member in fleet.members), default=0.0), 2
        )
        report.peak_rss = fleet.peak_rss
        for role, size in fleet.peak_rss.items():
            if size > _MAX_RSS:
                report.violations.append(f"a {role} process grew to {size / 2**20:.0f} MiB")
        for name, size in report.peak_files.items():
            if name.endswith("-wal") and size > _MAX_WAL:
                report.violations.append(f"{name} grew to {size / 2**20:.0f} MiB")
        report.vacuous += self._why_vacuous(saboteur)

    def _why_vacuous(self, saboteur: Saboteur) -> Iterator[str]:
        report = self._report
        planned = Counter(each.kind for each in report.schedule)
        for kind, number in planned.items():
            happened = sum(
                count for name, count in saboteur.done.items() if name.split()[0] == kind
            )
            if number and not happened:
                yield f"no {kind} happened, of {number} planned"
            elif saboteur.idle[kind] > max(1, number / 2):
                yield f"{saboteur.idle[kind]} of {number} {kind} came while nothing was under way"
        config = self._config
        least = config.accepted or config.rate * config.seconds * config.least
        if report.accepted < least:
            yield f"only {report.accepted} ratings were accepted"
        if planned["kill"] and not report.unknown:
            yield "the outcome of every rating was known"
        stores_once = config.pair is not None and config.pair.broker in STORES_ONCE
        if planned["kill"] and not report.duplicates and not stores_once:
            yield "no rating came twice"
        if planned["kill"] and not report.redelivered:
            yield "the broker delivered nothing again"
