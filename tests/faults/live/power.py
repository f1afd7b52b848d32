"""Power cuts: the service runs on a disk of ours, which loses its power at random moments.

Design:
    One round is one service, one history and several cuts. Clients go on through all of
    them: a cut is, to them, a service that is away for a second. At a cut

        1. every process is stopped, and stands still, in the middle of whatever it does;
        2. the disk is copied: what was not synced is not in the copy (``disk``);
        3. the processes are killed without ever going on, and the disk is replaced by its
           copy;
        4. the service is started on it.

    Whatever was acknowledged, was so before the first step, so all of it must be there:
    no rating is forgiven. A file that was synced and one that was not lie beside the data
    at every cut, and tell whether the cut was one.

    Variants:
        plain       at any moment under load
        checkpoint  the write-ahead log is copied back all the time, where it usually is
                    every 16 MB, so that most cuts fall into that, or into trimming
        recovery    a second cut while the service starts after the first one
        ledger      queue and ledger have a disk each, and only the ledger's is cut: finds
                    what was settled with the broker before the ledger was durable
        queue       only the queue's is cut: the ledger knows ratings that come again
        torn        of what was not synced some sectors are on the disk, of the files of queue
                    and ledger; the write-ahead log is copied back all the time as well

    One round of many cuts costs one start of Python a cut and no more; a check after each
    cut would say sooner which one it was, and costs three times as much.
"""

import asyncio
import contextlib
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal, final

from tests.brokers.ports import free_ports
from tests.faults.live.client import Client, History, Load, Pace
from tests.faults.live.controller import CAMPAIGNS, put_campaigns
from tests.faults.live.disk import Image
from tests.faults.live.evidence import Place
from tests.faults.live.fleet import Fleet, wait_stopped
from tests.faults.live.proof import prove

__all__ = ["VARIANTS", "PowerConfig", "PowerReport", "cut_power"]

Variant = Literal["plain", "checkpoint", "recovery", "ledger", "queue", "torn"]
VARIANTS: Final[Sequence[Variant]] = (
    "plain",
    "checkpoint",
    "recovery",
    "ledger",
    "queue",
    "torn",
)

# Files that a torn cut mixes. A mark is never synced: it may be there before its time.
_TORN: Final = frozenset(
    f"{name}.db{suffix}"
    for name in ("queue", "ledger", "catalog")
    for suffix in ("", "-wal", "-mark")
)

# Pages of the write-ahead log after which it is copied back in the variant of that name.
_EAGER_PAGES: Final = 30


# Seconds that a sync takes longer where a cut is to fall between a write and its sync.
_SLOW_SYNC: Final = 0.01

# Seconds for which a cut waits until something was accepted since the one before: without,
# there is nothing that it could take away.
_FIRST_ACCEPTED: Final = 10.0


@final
@dataclass(frozen=True, slots=True)
class PowerConfig:
    """One round. ``added``: what ``launch`` adds to roles, a mutant by role."""

    seed: int
    cuts: int
    variant: Variant = "plain"
    rate: float = 500.0
    clients: int = 24
    workers: int = 2
    items: int = 40
    added: Mapping[str, str] = field(default_factory=dict)
    replay: int = 100


@final
@dataclass(slots=True)
class PowerReport:
    """What a round did and found.

    Attributes:
        recovery_seconds: The longest time from a cut until a rating was accepted again.
        drain_seconds: From the last cut until all was counted.
    """

    config: PowerConfig
    cuts: int = 0
    violations: list[str] = field(default_factory=list)
    vacuous: list[str] = field(default_factory=list)
    accepted: int = 0
    unknown: int = 0
    duplicates: int = 0
    redelivered: int = 0
    recovery_seconds: float = 0.0
    drain_seconds: float = 0.0
    torn_sectors: int = 0
    exits: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether the round proved something, and found nothing."""
        return not self.violations and not self.vacuous

    def shown(self) -> dict[str, object]:
        """Return it as a JSON object."""
        return asdict(self)


async def cut_power(config: PowerConfig, folder: Path | None = None) -> PowerReport:
    """Return what one round did and found. ``folder``: where logs and history stay."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="molva-power-") as temporary:
            return await cut_power(config, Path(temporary))
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        disks = [_Disk(folder, "main")]
        if config.variant in ("ledger", "queue"):
            disks.append(_Disk(folder, "ledger"))
        for disk in disks:
            stack.callback(disk.discard)
            disk.make()
        return await _Round(config, folder, disks).run()


@final
class _Disk:
    """A disk that can be replaced by what a power cut leaves of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._cuts = 0
        self.mount = folder / name
        self._image = Image(folder / f"{name}-0.img")
        self._cut: Image | None = None
        self._later: Image | None = None
        # How many sectors of what was not synced were left on it, over all cuts.
        self.torn = 0

    def make(self) -> None:
        self._image.make()
        self._image.mount(self.mount)

    def copy(self, *, torn: bool) -> None:
        """Note what a cut at this moment leaves. Two files of ours tell whether it is one."""
        self._cuts += 1
        with (self.mount / f"synced-{self._cuts}").open("w") as file:
            file.write("this must stay")
            file.flush()
            os.fsync(file.fileno())
        (self.mount / f"unsynced-{self._cuts}").write_text("this must be gone")
        self._cut = self._image.cut(self._folder / f"{self._name}-{self._cuts}.img")
        if torn:
            self._image.flush()
            self._later = self._image.cut(self._folder / f"{self._name}-later.img")

    def replace(self, dice: random.Random) -> list[str]:
        """Go on with what the cut left; return why it was none. Nobody holds the disk."""
        assert self._cut is not None
        self._image.discard()
        self._image, self._cut = self._cut, None
        self._image.mount(self.mount)
        if self._later is not None:
            later = self._folder / f"{self._name}-later"
            self.torn += self._image.tear(self._later, later, _TORN, dice)
            self._later.discard()
            self._later = None
        found = []
        if (self.mount / f"unsynced-{self._cuts}").exists():
            found.append("a file that was never synced survived: this was no power cut")
        if (self.mount / f"synced-{self._cuts}").read_text() != "this must stay":
            found.append("a file that was synced was lost: this was more than a power cut")
        return found

    def discard(self) -> None:
        for image in (self._cut, self._later):
            if image is not None:
                image.discard()
        self._image.discard()


@final
class _Round:
    def __init__(self, config: PowerConfig, folder: Path, disks: Sequence[_Disk]) -> None:
        self._config = config
        self._disks = disks
        self._cut_disks = {
            "ledger": disks[-1:],
            "queue": disks[:1],
        }.get(config.variant, disks)
        data = disks[0].mount / "data"
        data.mkdir()
        self._place = Place.of_files(data, disks[-1].mount / "ledger.db", folder / "witness.log")
        if len(disks) == 1:
            self._place = Place.of_files(data, data / "ledger.db", folder / "witness.log")
        self._fleet = Fleet(self._place.options, folder)
        self._history = History(folder / "history.jsonl")
        self._report = PowerReport(config)
        self._random = random.Random(f"power {config.seed} {config.variant}")

    async def run(self) -> PowerReport:
        report, fleet = self._report, self._fleet
        started = time.monotonic()
        try:
            put_campaigns(self._place)
            [port] = free_ports(1)
            fleet.add("serve", port=port, added=self._added("serve"))
            for _ in range(self._config.workers):
                fleet.add("work", added=self._added("work"))
            if not await fleet.all_ready(seconds=90):
                raise RuntimeError(f"the service does not start; see {fleet.logs}")
            await self._cut_under_load(port)
            proof = await prove(
                self._place,
                fleet,
                self._history,
                healed_at=self._healed_at,
                poisoned={},
                replay=self._config.replay,
            )
            report.violations += proof.violations
            report.duplicates = proof.evidence.duplicates
            report.redelivered = proof.redelivered
            report.drain_seconds = proof.recovery_seconds
            if not await fleet.stop():
                report.violations.append("not all processes ended within 30 s of SIGTERM")
            report.violations += fleet.surprises
        finally:
            fleet.close()
            self._history.close()
        history = self._history
        report.accepted = history.accepted
        report.unknown = sum(
            told.ok_at is None and told.unknown > 0 for told in history.ratings.values()
        )
        report.exits = dict(fleet.exits)
        if not history.results["unknown"]:
            report.vacuous.append("no client was ever left without an answer")
        if not report.duplicates:
            report.vacuous.append("no rating came twice")
        report.torn_sectors = sum(disk.torn for disk in self._disks)
        if self._config.variant == "torn" and not report.torn_sectors:
            report.vacuous.append("no sector was torn: all that was written had been synced")
        report.seconds = round(time.monotonic() - started, 2)
        return report

    def _added(self, role: str) -> tuple[str, ...]:
        words = [self._config.added.get(role, "")]
        if self._config.variant in ("checkpoint", "torn"):
            words.append(f"checkpoint={_EAGER_PAGES}")
        if self._config.variant == "torn":
            words.append(f"slow-sync={_SLOW_SYNC}")
        if role == "work":
            words.append(f"witness={self._place.witness}")
        return tuple(word for word in words if word)

    async def _cut_under_load(self, port: int) -> None:
        config, fleet = self._config, self._fleet
        pace = Pace(config.rate)
        load = Load(
            [
                Client(
                    number,
                    seed=config.seed,
                    ports=lambda: (port,),
                    history=self._history,
                    pace=pace,
                    items=config.items,
                    campaigns=CAMPAIGNS,
                )
                for number in range(config.clients)
            ]
        )
        load.start()
        try:
            await self._cut_again_and_again(load)
            for client in load:
                client.stop()
            self._healed_at = time.monotonic()
            await load.stop(seconds=15)
        finally:
            await load.cancel()
        if not await fleet.all_ready(seconds=90):
            self._report.violations.append("not every process started after the last cut")
        self._healed_at = time.monotonic()

    async def _cut_again_and_again(self, load: Load) -> None:
        config = self._config
        while self._report.cuts < config.cuts:
            accepted = self._history.accepted
            await asyncio.sleep(self._random.uniform(0.2, 0.9))
            # A busy machine may need longer than that for the first one.
            deadline = time.monotonic() + _FIRST_ACCEPTED
            while self._history.accepted == accepted and time.monotonic() < deadline:
                await asyncio.sleep(0.005)
            load.check()
            if self._history.accepted == accepted:
                self._report.vacuous.append("nothing was accepted between two cuts")
            await self._cut()
            if config.variant == "recovery" and self._report.cuts < config.cuts:
                # While Python starts, while the files are opened, and a little later.
                await asyncio.sleep(self._random.uniform(0.1, 0.8))
                await self._cut()
            await self._accepting_again()

    async def _cut(self) -> None:
        fleet, report = self._fleet, self._report
        self._cut_at = time.monotonic()
        # Nobody of ours runs between here and the end: every acknowledgement that a client
        # will ever see of these processes has left them before they stood still.
        for member in fleet.members:
            fleet.pause(member)
        wait_stopped(fleet.members)
        for disk in self._cut_disks:
            disk.copy(
                torn=self._config.variant == "torn"
            )  # nobody of the service moves: what is copied is one moment
        for member in fleet.members:
            fleet.kill(member)
            if member.process is not None:
                member.process.wait()
        for disk in self._cut_disks:
            report.violations += disk.replace(self._random)
        report.cuts += 1
        for member in fleet.members:
            fleet.start(member)

    async def _accepting_again(self) -> None:
        accepted = self._history.accepted
        if not await self._fleet.all_ready(seconds=90):
            self._report.violations.append("not every process started after a cut")
            raise RuntimeError(f"the service does not start; see {self._fleet.logs}")
        deadline = time.monotonic() + 15
        while self._history.accepted == accepted and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        seconds = round(time.monotonic() - self._cut_at, 2)
        self._report.recovery_seconds = max(self._report.recovery_seconds, seconds)
