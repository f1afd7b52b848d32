"""One run: from a seed to a verdict.

Clients rate while the plan's faults strike. Then all is healed, and the end of the run is its
proof, as in the live runs: the backlog is gone within 30 virtual seconds without anybody's
help; what the ledger holds is compared with what clients were told, by the judge of the live
runs; ``verify`` finds no difference; everything is delivered once more, and nothing moves.
"""

import contextlib
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, final
from unittest.mock import patch

from molva.messaging import Message, _receiving
from molva.ratings.ledger.sqlite import SQLiteLedger
from molva.ratings.rating import Rating, encode_entry
from tests.faults.live.evidence import Dead, Evidence
from tests.faults.live.judge import judge
from tests.faults.live.ledgers.sqlite import read_file
from tests.faults.simulation.clients import Client, Record
from tests.faults.simulation.loop import Process, SimulatedLoop
from tests.faults.simulation.plan import ACTIVE_SECONDS, Fault, Plan, draw
from tests.faults.simulation.service import Server, Service

__all__ = ["Report", "replay", "simulate", "vacuous"]

# Virtual seconds in which a healed service must have counted all it accepted.
_DRAIN: Final = 30.0
# Virtual seconds that clients get to come to an end once all is healed.
_CLIENTS_END: Final = 60.0

# In memory where there is such a folder: a simulated disk needs no real one.
_SHM: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None

_POISON: Final = (b"no JSON", b'{"type":"rating/1","campaign":"default","accepted_at_us":1}')


@final
@dataclass(slots=True)
class Report:
    """What a run showed.

    Attributes:
        violations: What contradicts a promise; empty for a system that keeps them.
        counts: What happened, for the verdict on whether runs proved anything.
        lines: The trace: what happened when, one tuple a line.
    """

    plan: Plan
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    lines: list[tuple[object, ...]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def trace(self) -> str:
        """The trace as text: the same for the same seed, byte for byte."""
        return "".join(
            f"{line[0]:10.6f}  {' '.join(str(word) for word in line[1:])}\n" for line in self.lines
        )


def replay(seed: int) -> Report:
    """Run a seed; fail with all there is to know where a promise was broken."""
    report = simulate(seed)
    assert not report.violations, (
        f"seed {seed} breaks a promise:\n  "
        + "\n  ".join(report.violations)
        + f"\nIts trace: python -m tests.faults.simulation {seed}"
        + f"\nKeep it, in REGRESSIONS of tests/faults/simulation/test_simulation.py: {seed},"
    )
    return report


def simulate(seed: int, plan: Plan | None = None) -> Report:
    """Return what a seed shows."""
    if plan is None:
        plan = draw(seed)
    report = Report(plan)
    with _quiet(), _folder() as folder:
        _Run(plan, report, folder).go()
    return report


# What must have happened in a set of runs that is to prove anything, and what it means if not.
_NEEDED: Final = {
    "accepted": "no rating was accepted",
    "redelivered": "no message came again",
    "duplicates": "the ledger met no duplicate",
    "unknown": "every client knew what became of its rating",
    "killed at work": "nobody was killed at work",
    "fenced": "nobody came too late to settle",
    "power": "the broker never lost its power",
    "ledger power": "the ledger never lost its power",
    "fsync failed": "no fsync failed",
    "forgotten": "no settlement was forgotten",
    "stored twice": "nothing was stored twice",
    "full": "nothing was refused for want of room",
    "dead": "nothing became a dead letter",
    "reads": "nobody read a total",
}


def vacuous(counts: Counter[str]) -> list[str]:
    """Return why runs in which only this happened prove too little; empty if they don't."""
    return [meaning for what, meaning in _NEEDED.items() if not counts[what]]


@final
class _Run:
    """One run, and all that belongs to it."""

    def __init__(self, plan: Plan, report: Report, folder: Path) -> None:
        self._plan = plan
        self._report = report
        self._folder = folder
        self._loop = loop = SimulatedLoop(plan.seed)
        self._record = Record()
        self._poisoned: dict[bytes, int] = {}
        self._god = Process("controller")
        lines = report.lines

        def trace(*words: object) -> None:
            lines.append((loop.now, *words))

        self._trace = trace

    def go(self) -> None:
        report, loop = self._report, self._loop
        try:
            loop.run(self._god, self._main())
        except AssertionError as error:
            report.violations.append(f"{type(error).__name__}: {error}")
        report.violations += loop.errors
        report.seconds = loop.now
        self._clean_up()

    async def _main(self) -> None:
        loop = self._loop
        self._service = service = Service(
            loop, self._plan, self._folder, _empty_ledger(), self._trace
        )
        service.start_all()
        clients = [Client(n, service, self._record) for n in range(self._plan.clients)]
        tasks = [loop.start(client.process, client.run()) for client in clients]
        for fault in self._plan.faults:
            await self._until(fault.at)
            self._strike(fault)
            await self._pass(0.001)
        await self._until(ACTIVE_SECONDS)
        for client in clients:
            client.impatient = True
        self._heal()
        healed_at = loop.now
        while not all(task.done() for task in tasks):
            service.start_all()
            if loop.now > healed_at + _CLIENTS_END:
                raise AssertionError("clients do not come to an end")
            await self._pass(0.5)
        for task in tasks:
            task.result()
        await self._prove()

    # Faults -----------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> None:
        service, loop, counts = self._service, self._loop, self._report.counts
        kind = fault.kind
        self._trace("controller", kind, fault.role, fault.number, fault.seconds)
        counts[kind] += 1
        number = fault.number % (
            self._plan.servers if fault.role == "serve" else self._plan.workers
        )
        server = service.servers[fault.role, number]
        later = fault.seconds
        if kind == "kill" and fault.at_work:
            server.doomed = lambda: self._kill(server)
        elif kind == "kill":
            self._kill(server)
        elif kind == "pause" and server.process.alive and not server.process.paused:
            loop.pause(server.process)
            self._in(later, lambda: loop.resume(server.process))
        elif kind in ("restart", "power") and not service.broker.down:
            service.broker.restart(later / 4, power=kind == "power")
        elif kind == "ledger":
            service.storage.slow = True
            self._in(later, self._ledger_well)
        elif kind == "catalog":
            service.catalog.down = True
            self._in(later / 2, self._catalog_well)
        elif kind == "poison":
            self._poison()
        elif kind == "fsync":
            disk = service.storage.disk
            assert disk is not None
            disk.failing = 1
            self._in(later, self._cut_ledger)
        self._in(later, service.start_all)

    def _kill(self, server: Server) -> None:
        if not server.process.alive or self._service.broker.ended:
            return
        self._trace("controller", "kills", server.process.name)
        if self._record.in_flight or self._service.broker.pending:
            self._report.counts["killed at work"] += 1
        self._loop.kill(server.process)
        self._in(self._loop.chance.random(), self._service.start_all)

    def _cut_ledger(self) -> None:
        """Cut the power of the machine that the ledger and all processes are on."""
        self._trace("controller", "cuts the ledger's power")
        self._report.counts["ledger power"] += 1
        for server in self._service.servers.values():
            self._kill(server)
        self._service.storage.cut()

    def _poison(self) -> None:
        """Store what nobody can count, behind the intake's back."""
        broker = self._service.broker
        dice = self._loop.chance
        id_ = b"poison" + dice.getrandbits(80).to_bytes(10, "big")
        self._poisoned[id_] = 1
        broker.do("store", Message(dice.choice(_POISON), id_, "default/item-0"), 0)
        broker.sync()
        broker.wake()

    def _ledger_well(self) -> None:
        self._service.storage.slow = False

    def _catalog_well(self) -> None:
        self._service.catalog.down = False

    def _heal(self) -> None:
        self._trace("controller", "heals everything")
        service = self._service
        service.broker.rough = False
        # A watermark that it confirmed and forgot is written again only where it moves again,
        # or where its consumer begins anew.
        service.broker.restart(0.05, power=False)
        service.catalog.down = service.storage.slow = False
        if service.storage.disk is not None:
            service.storage.disk.failing = 0
        for server in service.servers.values():
            server.doomed = None
            if server.process.paused:
                self._loop.resume(server.process)
        service.start_all()

    # The proof --------------------------------------------------------------------------

    async def _prove(self) -> None:
        service, report = self._service, self._report
        await self._drained("after healing")
        before = self._evidence()
        # What was lost with a power that it need not outlive was never promised.
        for told in (*self._record.ratings.values(), *self._record.conflicts):
            if told.id in service.broker.unpromised:
                told.ok_at, told.unknown = None, told.unknown + 1
        found = judge(self._record, before, self._poisoned)
        if not self._plan.broker.ordered:
            found = [each for each in found if not each.startswith("order")]
        report.violations += found
        await self._verify()
        await self._deliver_again(before)
        self._count(before)

    async def _drained(self, when: str) -> None:
        loop, broker = self._loop, self._service.broker
        deadline = loop.now + _DRAIN
        while broker.pending:
            if loop.now > deadline:
                self._report.violations.append(
                    f"liveness: {broker.pending} messages wait {_DRAIN:.0f} s {when}"
                )
                return
            self._service.start_all()  # what a supervisor does with a process that ended
            await self._pass(0.1)

    def _evidence(self) -> Evidence:
        storage = self._service.storage
        ledger = read_file(storage.path)
        state = self._service.broker.state
        dead = [Dead(d.message.id, d.message.body, d.reason) for d in state.dead.values()]
        met_again = storage.outcomes["DUPLICATE"]
        return Evidence(ledger.rows, ledger.totals, dead, len(state.rows), met_again)

    async def _verify(self) -> None:
        server = self._service.servers["serve", 0]
        self._report.violations += [
            f"verify: {difference}" async for difference in server.ledger.real.verify()
        ]

    async def _deliver_again(self, before: Evidence) -> None:
        """Deliver everything once more, and let every client send everything once more."""
        broker = self._service.broker
        self._trace("controller", "delivers everything once more")
        broker.restart(0.1, power=False)
        broker.do("again")
        counted = {row.id for row in before.rows}
        for told in self._record.ratings.values():
            if told.id in counted:
                rating = Rating(told.campaign, 7, told.rate, told.item)
                message = Message(encode_entry(rating), told.id, f"{told.campaign}/{told.item}")
                broker.do("store", message, 0)
        await self._drained("after all was delivered once more")
        after = self._evidence()
        if (after.rows, after.totals) != (before.rows, before.totals):
            self._report.violations.append("again: delivering all once more moved the totals")
        if {d.id for d in after.dead} != {d.id for d in before.dead}:
            self._report.violations.append("again: delivering all once more made dead letters")

    def _count(self, evidence: Evidence) -> None:
        counts, service = self._report.counts, self._service
        counts.update(service.broker.counts)
        counts["duplicates"] = service.storage.outcomes["DUPLICATE"]
        counts["unknown"] = self._record.unknown
        counts["accepted"] = sum(t.ok_at is not None for t in self._record.ratings.values())
        counts["reads"] = len(self._record.totals)
        counts["dead"] = len(evidence.dead)
        disk = service.storage.disk
        counts["fsync failed"] = 0 if disk is None else disk.failed
        self._trace("controller", "is done", sorted(counts.items()))

    # Time, and the end ------------------------------------------------------------------

    async def _pass(self, seconds: float) -> None:
        future = self._loop.create_future()
        self._loop.call_later(seconds, future.set_result, None)
        await future

    async def _until(self, at: float) -> None:
        if at > self._loop.now:
            await self._pass(at - self._loop.now)

    def _in(self, seconds: float, what: object) -> None:
        self._loop.call_later(seconds, what)  # type: ignore[arg-type]

    def _clean_up(self) -> None:
        """End everything, the dead as well, in an order that leaves nothing to complain of."""
        service = getattr(self, "_service", None)
        if service is None:
            return
        loop = self._loop
        service.broker.ended = True
        servers = [*service.servers.values(), *service.ended]
        for server in servers:
            server.ledger.end()
            loop.bury(server.process)

        async def end() -> None:
            for _ in range(20):
                busy = [s for s in servers if s.process.busy]
                if not busy:
                    break
                for server in busy:
                    loop.bury(server.process)
                await self._pass(10.0)
            for opened in service.opened:
                await opened.close()
            for server in servers:
                await server.ledger.close()

        shown = len(self._report.lines)
        loop.run(self._god, end())
        del self._report.lines[shown:]  # nothing of it belongs to the run


@cache
def _empty_ledger() -> bytes:
    """Return the file of an empty ledger: migrating one anew for each seed would cost more."""
    folder = Path(tempfile.mkdtemp(dir=_SHM))
    try:
        loop = SimulatedLoop(0)

        async def make() -> None:
            await SQLiteLedger.open(folder / "ledger.db", commit="loop").close()

        loop.run(Process("maker"), make())
        return (folder / "ledger.db").read_bytes()
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=_SHM))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing, and watch no loop on the real clock, which would take a thread."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with patch.object(_receiving, "watched", contextlib.nullcontext):
            yield
    finally:
        logging.disable(before)
