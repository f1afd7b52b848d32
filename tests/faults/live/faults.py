"""What goes wrong, when, and for how long: drawn from a seed before anything runs.

    kill        SIGKILL of any process, often of two at once; back after 0 to 3 s
    pause       SIGSTOP for 0.5 to 5 s: longer than a commit waits for a lock. What goes on
                afterwards is a zombie that believes that no time has passed; some are
                killed instead
    network     one of the proxy's faults, for a while
    eio         a process whose Nth fsync fails, under strace
    full        the disk is full for a while
    clock       a process that starts with its wall clock an hour off, in a time namespace
                with another monotonic clock
    slow        another program holds the write lock of queue or ledger; some workers are
                killed while they wait
    poison      messages that no worker can count
    storm       workers come and go, twice a second unless it says otherwise
    terminate   SIGTERM; it has ten seconds

and of servers, where broker or ledger is one:

    broker      stopped in order, killed, or stopped with SIGSTOP; back after a while, on the
    ledger      same port with the same data

Kinds are drawn by weight, times from an exponential distribution. Everything a fault needs
is drawn with it, so a schedule depends on its seed and on nothing that happens: the same
seed is the same schedule. What a run meets under it differs all the same, because the
processes' own timing does.
"""

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, final

import apsw

from molva.messaging import Message, MessagingError, Topic
from tests.brokers import Server
from tests.faults.live.client import History
from tests.faults.live.fleet import Fleet, Member, Role
from tests.faults.live.proxy import Faults, Proxy

__all__ = ["SERVERS", "WEIGHTS", "Planned", "Saboteur", "missing_tools", "plan"]

WEIGHTS: Final[dict[str, float]] = {
    "kill": 10,
    "pause": 2,
    "network": 3,
    "eio": 1,
    "full": 0.7,
    "clock": 1,
    "slow": 1,
    "poison": 1.5,
    "storm": 0.7,
    "terminate": 0.7,
}

# What is added to these where broker and ledger are servers.
SERVERS: Final[dict[str, float]] = {"broker": 0.4, "ledger": 0.4}

# What is done to a server. A restart is an orderly one.
_SERVER: Final = ("restart", "kill", "pause")

_NETWORK: Final[Mapping[str, Faults | None]] = {
    "reset": None,
    "refuse": None,
    "drop": Faults(drop=True),
    "lost-request": Faults(lost="up"),
    "lost-answer": Faults(lost="down"),
    "delay": Faults(delay=0.05, jitter=0.2),
    "slice": Faults(slice=True),
    "cut": Faults(cut_after=7),
}

# Bodies that no worker can count, by what is wrong with them.
_POISON: Final[Mapping[str, bytes]] = {
    "no JSON": b"\x00\xff not JSON",
    "NaN": b'{"kind":"rating/1","campaign":"default","accepted_at_us":1,"rate":NaN}',
    "newer version": b'{"kind":"rating/9","campaign":"default","accepted_at_us":1,"rate":5}',
    "unknown campaign": b'{"kind":"rating/1","campaign":"none","accepted_at_us":1,"rate":5}',
    "off the scale": b'{"kind":"rating/1","campaign":"default","accepted_at_us":1,"rate":99}',
    "surrogate": b'{"kind":"rating/1","campaign":"default","accepted_at_us":1,"rate":5,'
    b'"item":"\\ud800"}',
    "NUL": b'{"kind":"rating/1","campaign":"default","accepted_at_us":1,"rate":5,'
    b'"item":"a\\u0000b"}',
    "5,000 digits": b'{"kind":"rating/1","campaign":"default","accepted_at_us":1,"rate":'
    + b"7" * 5_000
    + b"}",
    "deep": b"[" * 10_000 + b"]" * 10_000,
}


@final
@dataclass(frozen=True, slots=True)
class Planned:
    """One fault: ``at`` seconds after the start, for ``seconds``. ``who``: (role, number).

    ``after``: the start is when so many ratings were accepted. Where a server needs longer to
    come back than a run was to last, "half way" is not a time.
    """

    at: float
    kind: str
    who: tuple[tuple[Role, int], ...] = ()
    seconds: float = 0.0
    detail: str = ""
    number: int = 0
    after: int = 0

    def shown(self) -> dict[str, object]:
        """Return it as a JSON object."""
        return {**asdict(self), "who": [f"{role} {number}" for role, number in self.who]}


def plan(
    seed: int,
    *,
    seconds: float,
    every: float,
    kinds: Sequence[str] = tuple(WEIGHTS),
    processes: int = 2,
) -> list[Planned]:
    """Return what goes wrong in a run.

    Args:
        seed: Names the schedule.
        seconds: How long the run is under load.
        every: Mean seconds between two faults.
        kinds: Which faults to draw from. Each comes at least once where there is time.
        processes: Of each role.
    """
    rng = random.Random(f"schedule {seed}")
    weights = [(WEIGHTS | SERVERS)[kind] for kind in kinds]
    times = []
    at = rng.uniform(0.3, 1.0)
    while at < seconds:
        times.append(at)
        at += rng.expovariate(1.0 / every)
    drawn = rng.choices(list(kinds), weights, k=len(times))
    for kind in kinds:
        if kind not in drawn:
            plenty = [place for place, other in enumerate(drawn) if drawn.count(other) > 1]
            if plenty:
                drawn[rng.choice(plenty)] = kind
    return [
        _draw(rng, round(at, 3), kind, processes) for at, kind in zip(times, drawn, strict=True)
    ]


def _draw(rng: random.Random, at: float, kind: str, processes: int) -> Planned:
    roles: tuple[Role, ...] = ("serve", "work")
    anyone = [(role, number) for role in roles for number in range(processes)]
    rng.shuffle(anyone)
    one = (anyone[0],)
    match kind:
        case "kill":
            who = tuple(anyone[: 2 if rng.random() < 0.35 else 1])
            return Planned(at, kind, who, seconds=round(rng.uniform(0, 3), 2))
        case "pause":
            end = "kill" if rng.random() < 0.3 else "go on"
            return Planned(at, kind, one, round(rng.uniform(0.5, 5), 2), end)
        case "network":
            fault = rng.choice(list(_NETWORK))
            where = rng.randrange(processes)
            return Planned(at, kind, (), round(rng.uniform(0.5, 3), 2), fault, where)
        case "eio":
            return Planned(at, kind, one, 6.0, number=rng.randint(1, 60))
        case "full":
            return Planned(at, kind, (), round(rng.uniform(1.5, 4), 2))
        case "clock":
            return Planned(at, kind, one, detail=rng.choice(("3600", "-3600")), number=100_000)
        case "slow":
            file = rng.choice(("queue.db", "ledger.db"))
            return Planned(at, kind, one, round(rng.uniform(1, 6.5), 2), file, rng.randrange(2))
        case "poison":
            return Planned(at, kind, detail=rng.choice(list(_POISON)), number=rng.randint(1, 5))
        case "storm":
            return Planned(at, kind, (), round(rng.uniform(2, 4), 2))
        case "terminate":
            return Planned(at, kind, one)
        case "broker" | "ledger":
            # Longer than a session or a lease, which is 3 s in a run.
            return Planned(at, kind, (), round(rng.uniform(0.5, 5), 2), rng.choice(_SERVER))
        case _:
            raise ValueError(
                f"there is no fault {kind!r}; there are {', '.join(WEIGHTS | SERVERS)}"
            )


def missing_tools(*, limited: bool) -> dict[str, str]:
    """Return the faults that cannot be had here, and why."""
    missing = {}
    if shutil.which("strace") is None:
        missing["eio"] = "strace is not installed"
    elif subprocess.run(["strace", "-o", "/dev/null", "true"], check=False).returncode:
        missing["eio"] = "strace may not trace here"
    if not limited:
        missing["full"] = "small file systems cannot be mounted here"
    return missing


def _time_namespace(seconds: int) -> list[str]:
    """Return what runs a command with its monotonic clock so far ahead; [] if nothing can."""
    wrapper = [
        *("unshare", "--time", "--fork", "--kill-child"),
        *("--boottime", str(seconds), "--monotonic", str(seconds)),
    ]
    with contextlib.suppress(OSError):
        if not subprocess.run([*wrapper, "true"], check=False, capture_output=True).returncode:
            return wrapper
    return []


@final
@dataclass(slots=True)
class Saboteur:
    """Does to a running service what a schedule says.

    Attributes:
        done: Faults that happened, by kind.
        idle: Faults that happened while nothing was under way: they prove nothing.
        servers: Broker and ledger, those that are servers.
        poisoned: Ids of poison that the broker has, to how often it may have them.
        notes: What could not be done as planned, and why.
    """

    fleet: Fleet
    proxies: Sequence[Proxy]
    folder: Path
    history: History
    topic: Topic
    witness: tuple[str, ...] = ()
    limited: bool = False
    servers: Mapping[str, Server] = field(default_factory=dict)
    done: "Counter[str]" = field(default_factory=Counter)
    idle: "Counter[str]" = field(default_factory=Counter)
    poisoned: dict[bytes, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _tasks: "set[asyncio.Task[None]]" = field(default_factory=set)
    _full: bool = False
    # Poison of which it is open whether the broker has it.
    _unsent: dict[bytes, Message] = field(default_factory=dict)
    # Of each server: one thing at a time happens to it.
    _turns: "defaultdict[str, asyncio.Lock]" = field(
        default_factory=lambda: defaultdict(asyncio.Lock)
    )

    async def follow(self, schedule: Sequence[Planned]) -> None:
        """Do all of it, each at its time, whatever the ones before are still doing."""
        start = time.monotonic()
        self._tasks = {asyncio.ensure_future(self._in_time(each, start)) for each in schedule}
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks)

    async def heal(self) -> None:
        """End every fault: wait for those under way, and put right what they changed."""
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        for proxy in self.proxies:
            proxy.faults = Faults()
            await proxy.start()
        for member in self.fleet.members:
            if member.paused:
                self.fleet.go_on(member)
            if member.due is not None:
                # Whoever was to start it again for a fault has just been told to stop.
                member.due = min(member.due, time.monotonic())
        for server in self.servers.values():
            if not server.is_running():
                await asyncio.to_thread(server.start)
        await self._send_poison()

    async def _in_time(self, planned: Planned, start: float) -> None:
        while self.history.accepted < planned.after:
            await asyncio.sleep(0.02)
            start = time.monotonic()
        await asyncio.sleep(max(0.0, start + planned.at - time.monotonic()))
        await self._do(planned)

    async def _do(self, planned: Planned) -> None:
        under_way = await self._busy()
        # Where the run ends meanwhile it has happened, too: it is healed, not undone.
        happened: str | None = None
        with contextlib.suppress(asyncio.CancelledError):
            happened = await self._cause(planned)
        if happened is None:
            detailed = planned.kind == "network" or planned.kind in SERVERS
            name = f"{planned.kind} {planned.detail}" if detailed else planned.kind
            self.done[name] += 1
            self.idle[planned.kind] += not under_way
        else:
            self.notes.append(f"{planned.kind} at {planned.at:.1f} s: {happened}")

    async def _busy(self) -> int:
        """Wait a moment for a request that is under way; return how many are.

        Requests take a millisecond or two. At a moderate rate there often is none, and a
        fault then hits nobody.
        """
        deadline = time.monotonic() + 0.5
        while not self.history.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0)
        return self.history.in_flight

    async def _cause(self, planned: Planned) -> str | None:
        """Do it; return why it could not be done, None where it was."""
        return await {
            "kill": self._kill,
            "pause": self._pause,
            "network": self._network,
            "eio": self._eio,
            "full": self._fill,
            "clock": self._clock,
            "slow": self._slow,
            "poison": self._poison,
            "storm": self._storm,
            "terminate": self._terminate,
            "broker": self._server,
            "ledger": self._server,
        }[planned.kind](planned)

    async def _find(self, who: tuple[Role, int]) -> Member | None:
        """Return the one that is meant, or another of its role; wait where none is at work."""
        role, number = who
        deadline = time.monotonic() + 4
        while True:
            alive = [m for m in self.fleet.of(role) if m.ready and not m.paused and not m.doomed]
            if alive or time.monotonic() > deadline:
                return alive[number % len(alive)] if alive else None
            await asyncio.sleep(0.02)

    async def _kill(self, planned: Planned) -> str | None:
        victims = {await self._find(who): None for who in planned.who}
        hit = [
            self.fleet.kill(victim, restart_after=planned.seconds / (1 + number))
            for number, victim in enumerate(victims)
            if victim is not None
        ]
        return None if any(hit) else "nobody was alive to be killed"

    async def _pause(self, planned: Planned) -> str | None:
        member = await self._find(planned.who[0])
        if member is None or not self.fleet.pause(member):
            return "nobody was alive to be paused"
        try:
            await asyncio.sleep(planned.seconds)
        finally:
            if planned.detail == "kill":
                self.fleet.kill(member)
            else:
                self.fleet.go_on(member)
        return None

    async def _network(self, planned: Planned) -> str | None:
        proxy = self.proxies[planned.number % len(self.proxies)]
        faults = _NETWORK[planned.detail]
        if faults is not None:
            proxy.faults = faults
        elif planned.detail == "refuse":
            await proxy.refuse()
        else:
            proxy.reset()
        try:
            await asyncio.sleep(planned.seconds)
        finally:
            proxy.faults = Faults()
            # Whatever was lost on a connection leaves it useless.
            proxy.reset()
            await proxy.start()
        return None

    async def _reborn(
        self, planned: Planned, *, wrapper: Sequence[str], added: Sequence[str] = ()
    ) -> Member | None:
        """Kill a process and start it again under something."""
        member = await self._find(planned.who[0])
        if member is None or not self.fleet.kill(member, restart_after=60):
            return None
        while member.alive:
            await asyncio.sleep(0.01)
        self.fleet.start(member, wrapper=wrapper, added=added)
        return member

    async def _eio(self, planned: Planned) -> str | None:
        inject = f"inject=fsync,fdatasync:error=EIO:when={planned.number}"
        strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync"]
        member = await self._reborn(planned, wrapper=[*strace, "-e", inject])
        if member is None:
            return "nobody was alive"
        deadline = time.monotonic() + planned.seconds
        try:
            while member.alive and not member.doomed and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
        finally:
            # Whoever was not ended by it still has it before him, and would meet it when all
            # is said to be healed.
            if member.alive and not member.doomed:
                self.fleet.kill(member)
        if not member.doomed:
            self.done["eio that ended the process"] += 1
        return None

    async def _clock(self, planned: Planned) -> str | None:
        wrapper = _time_namespace(planned.number)
        if not wrapper:
            self.notes.append("no time namespace here: only the wall clock was set")
        member = await self._reborn(planned, wrapper=wrapper, added=[f"wall={planned.detail}"])
        return None if member else "nobody was alive"

    async def _fill(self, planned: Planned) -> str | None:
        if not self.limited or self._full:
            return "the disk is not one that can be filled, or is full already"
        self._full = True
        ballast = self.folder / "ballast"
        try:
            end = time.monotonic() + planned.seconds
            with ballast.open("wb") as file:
                size = 0
                while time.monotonic() < end:
                    free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
                    if free > 0:
                        with contextlib.suppress(OSError):
                            os.posix_fallocate(file.fileno(), size, free)
                            size += free
                    await asyncio.sleep(0.1)
        finally:
            ballast.unlink(missing_ok=True)
            self._full = False
        return None

    async def _slow(self, planned: Planned) -> str | None:
        release = threading.Event()
        loop = asyncio.get_running_loop()
        locked: asyncio.Future[bool] = loop.create_future()

        def hold() -> None:
            # All of it in one thread: a connection that waits for a lock cannot be closed
            # by another.
            connection = apsw.Connection(str(self.folder / planned.detail))
            try:
                connection.set_busy_timeout(3_000)
                connection.execute("BEGIN IMMEDIATE")
            except apsw.Error:
                loop.call_soon_threadsafe(locked.set_result, False)
            else:
                loop.call_soon_threadsafe(locked.set_result, True)
                release.wait()
                connection.execute("ROLLBACK")
            finally:
                connection.close()

        holding = asyncio.ensure_future(asyncio.to_thread(hold))
        try:
            if not await asyncio.shield(locked):
                return "the lock was not to be had within 3 s"
            await asyncio.sleep(planned.seconds / 2)
            victim = await self._find(planned.who[0])
            if planned.number and victim is not None:
                self.fleet.kill(victim, restart_after=0.5)
                self.done["kill while a file was locked"] += 1
            await asyncio.sleep(planned.seconds / 2)
        finally:
            release.set()
            await asyncio.wait([holding])
        return None

    async def _poison(self, planned: Planned) -> str | None:
        for number in range(planned.number):
            id_ = os.urandom(16)
            self._unsent[id_] = Message(_POISON[planned.detail], id_, f"default/item-{number}")
        # What is not sent when the run ends is sent when all is healed.
        sent = await self._send_poison()
        return None if sent else "the broker took no poison for long"

    async def _send_poison(self) -> bool:
        """Send what is not known to be sent; return whether all of it was."""
        for id_, message in list(self._unsent.items()):
            for _ in range(40):
                self.poisoned[id_] = self.poisoned.get(id_, 0) + 1
                try:
                    await self.topic.send(message)
                except MessagingError:
                    await asyncio.sleep(0.5)
                else:
                    self._unsent.pop(id_, None)
                    break
        return not self._unsent

    async def _storm(self, planned: Planned) -> str | None:
        end = time.monotonic() + planned.seconds
        added: list[Member] = []
        number = 0
        try:
            while time.monotonic() < end:
                added.append(self.fleet.add("work", added=self.witness))
                await asyncio.sleep(float(planned.detail or 0.5))
                number += 1
                if len(added) > 1:
                    leaver = added.pop(0)
                    leaver.leaving = True
                    if number % 2:
                        self.fleet.kill(leaver, restart_after=None)
                    else:
                        self.fleet.terminate(leaver)
        finally:
            for member in added:
                member.leaving = True
                self.fleet.terminate(member)
        return None

    async def _terminate(self, planned: Planned) -> str | None:
        member = await self._find(planned.who[0])
        if member is None or not self.fleet.terminate(member):
            return "nobody was alive"
        member.due = time.monotonic() + 60
        started = time.monotonic()
        while member.alive and member.doomed == 15:
            if time.monotonic() - started > 10:
                self.fleet.surprises.append(f"{member.name} did not end within 10 s of SIGTERM")
                self.fleet.kill(member)
                return None
            await asyncio.sleep(0.05)
        if member in self.fleet.members and not member.alive:
            member.due = time.monotonic()
        return None

    async def _server(self, planned: Planned) -> str | None:
        server = self.servers.get(planned.kind)
        if server is None:
            return f"the {planned.kind} is a file"
        hit, back = {
            "restart": (server.stop, server.start),
            "kill": (server.kill, server.start),
            "pause": (server.pause, server.resume),
        }[planned.detail]
        async with self._turns[planned.kind]:
            try:
                await _to_the_end(hit)
                await asyncio.sleep(planned.seconds)
            finally:
                await _to_the_end(back)
        return None


async def _to_the_end(change: Callable[[], None]) -> None:
    """Run it in a thread; wait for its end also where the run is over meanwhile."""
    changing = asyncio.ensure_future(asyncio.to_thread(change))
    try:
        await asyncio.shield(changing)
    except asyncio.CancelledError:
        await asyncio.wait([changing])
        raise
