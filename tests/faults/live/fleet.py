"""The service's processes: started, killed, stopped, started again; each in a group of its own.

A signal goes to the group of a process that this module started and has not yet reaped,
so its number cannot have become another's. The group and not the process, because some
run under ``strace`` or ``unshare``, which stand between.

What ends by itself is started again, as a supervisor would, and how it ended is written
down: an exit that nobody caused is a finding, even where no rating was lost.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, final

import psutil

from molva.cli.running import PARENT_PIPE

__all__ = ["Fleet", "Member", "Role", "command", "wait_stopped"]

Role = Literal["serve", "work"]

_LAUNCH: Final = Path(__file__).with_name("launch.py")

# How a process may end without being a finding: told to (0), a broker or a ledger that
# cannot be reached (3: a full disk, a locked file), an I/O error (74).
_HONEST_EXITS: Final = frozenset({0, 3, 74})

# Seconds before a process that ended by itself is started again.
_RESTART: Final = 0.3

_READY: Final = {"serve": b"ratings survive", "work": b"taking ratings"}


def command(added: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the command ``molva``, with what ``launch`` adds to it."""
    if not added:
        return (sys.executable, "-m", "molva")
    return (sys.executable, "-P", str(_LAUNCH), ",".join(added))


@final
@dataclass(eq=False, slots=True)
class Member:
    """One process of the service, in all its lives.

    Attributes:
        added: What ``launch`` adds to it; nothing, and it is the command itself.
        wrapper: A command that runs it in the next life only.
        due: When it is to be started again; None: at once.
        doomed: The signal that it was sent last, 0 for none.
    """

    name: str
    role: Role
    arguments: tuple[str, ...]
    log: Path
    port: int = 0
    added: tuple[str, ...] = ()
    process: "subprocess.Popen[bytes] | None" = None
    doomed: int = 0
    paused: bool = False
    leaving: bool = False
    due: float | None = None
    log_start: int = 0
    started_at: float = 0.0
    slowest_start: float = 0.0
    lives: int = 0
    _ready: bool = False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether it has said that it is at work, in this life."""
        if not self.alive:
            return False
        if not self._ready:
            with self.log.open("rb") as log:
                log.seek(self.log_start)
                self._ready = _READY[self.role] in log.read(20_000)
            if self._ready:
                self.slowest_start = max(self.slowest_start, time.monotonic() - self.started_at)
        return self._ready

    def started(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self.doomed, self.paused, self.due, self._ready = 0, False, None, False
        self.started_at = time.monotonic()
        self.lives += 1

    def signal(self, number: int) -> bool:
        """Send a signal; return whether anybody got it."""
        if self.process is None or self.process.poll() is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        return True


@final
@dataclass(slots=True)
class Fleet:
    """All processes of a service.

    Attributes:
        options: What all of them are started with.
        logs: The folder of their logs.
        exits: How processes ended: (role, code) to how often.
        surprises: Ends that nobody caused.
    """

    options: tuple[str, ...]
    logs: Path
    members: list[Member] = field(default_factory=list)
    exits: "Counter[str]" = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    kills: int = 0
    peak_rss: dict[str, int] = field(default_factory=dict)
    _parent: tuple[int, int] = field(default_factory=os.pipe)

    def add(self, role: Role, *, port: int = 0, added: Sequence[str] = ()) -> Member:
        """Add a process and start it."""
        number = 1 + max((int(m.name.split()[1]) for m in self.of(role)), default=0)
        arguments = ("--port", str(port)) if role == "serve" else ()
        name = f"{role} {number}"
        log = self.logs / f"{role}-{number}.log"
        member = Member(name, role, arguments, log, port, tuple(added))
        self.members.append(member)
        self.start(member)
        return member

    def of(self, role: Role) -> list[Member]:
        """Return the processes of one role."""
        return [member for member in self.members if member.role == role]

    def start(
        self, member: Member, *, wrapper: Sequence[str] = (), added: Sequence[str] = ()
    ) -> None:
        """Start a process that does not run."""
        assert not member.alive, member.name
        self.reap(member)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MOLVA_")}
        # Compiling all modules anew takes longer than the rest of a start.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        # Should this process be killed, its children end by themselves.
        environment[PARENT_PIPE] = str(self._parent[0])
        with member.log.open("ab") as log:
            member.log_start = log.tell()
            process = subprocess.Popen(
                [
                    *wrapper,
                    *command((*member.added, *added)),
                    *(member.role, *self.options, *member.arguments),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                process_group=0,
                pass_fds=(self._parent[0],),
            )
        member.started(process)

    def kill(self, member: Member, *, restart_after: float | None = 0.0) -> bool:
        """Kill it; return whether it was alive. ``restart_after=None``: it stays dead."""
        if not member.signal(signal.SIGKILL):
            return False
        member.doomed = signal.SIGKILL
        member.leaving = restart_after is None
        member.due = time.monotonic() + (restart_after or 0.0)
        self.kills += 1
        return True

    def terminate(self, member: Member) -> bool:
        """Ask it to end; return whether it was alive."""
        # One that was killed a moment ago, and is not reaped yet, still ends by that.
        member.doomed = member.doomed or signal.SIGTERM
        return member.signal(signal.SIGTERM)

    def pause(self, member: Member) -> bool:
        """Stop its clock; return whether it was alive."""
        member.paused = member.signal(signal.SIGSTOP)
        return member.paused

    def go_on(self, member: Member) -> None:
        """Let a paused process go on."""
        member.signal(signal.SIGCONT)
        member.paused = False

    def reap(self, member: Member) -> None:
        """Write down how a process ended, once."""
        process = member.process
        if process is None or (code := process.poll()) is None:
            return
        member.process = None
        self.exits[f"{member.role} {code}"] += 1
        killed = member.doomed == signal.SIGKILL and code in (-signal.SIGKILL, 137)
        # Asked to end while Python was still starting: nobody listened for the signal yet.
        early = member.doomed == signal.SIGTERM and code == -signal.SIGTERM
        if not killed and not early and code not in _HONEST_EXITS:
            with member.log.open("rb") as log:
                log.seek(member.log_start)
                said = log.read().decode("utf-8", "replace")[-2_000:]
            self.surprises.append(f"{member.name} ended by itself with {code}: {said}")
        if not member.doomed:
            member.due = time.monotonic() + _RESTART

    async def keep_running(self) -> None:
        """Start what died again, when it is due; until cancelled."""
        while True:
            self.look_after()
            await asyncio.sleep(0.05)

    def look_after(self) -> None:
        """Start what is due."""
        now = time.monotonic()
        for member in list(self.members):
            if member.alive:
                _ = member.ready  # notes how long it took
                continue
            self.reap(member)
            if member.leaving:
                self.members.remove(member)
            elif member.due is not None and now >= member.due:
                self.start(member)

    async def all_ready(self, *, seconds: float) -> bool:
        """Wait until every process is at work; start what is not there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for member in self.members:
                if not member.alive and member.due is None:
                    member.due = 0.0
            self.look_after()
            if all(member.ready for member in self.members):
                return True
            await asyncio.sleep(0.03)
        return False

    async def stop(self, *, seconds: float = 30.0) -> bool:
        """Ask all to end; kill what does not in time. Return whether all did, well."""
        for member in self.members:
            member.leaving = True
            if member.paused:
                self.go_on(member)
            self.terminate(member)
        deadline = time.monotonic() + seconds
        while any(m.alive for m in self.members) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        late = [member for member in self.members if member.alive]
        self.kill_all()
        return not late

    def kill_all(self) -> None:
        """Kill everything that still runs. Blocks until it is gone."""
        for member in self.members:
            member.leaving = True
            if member.signal(signal.SIGKILL):
                member.doomed = signal.SIGKILL
        for member in self.members:
            if member.process is not None:
                member.process.wait()
                self.reap(member)

    def close(self) -> None:
        """Kill everything and release what is held."""
        self.kill_all()
        for descriptor in self._parent:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def measure(self) -> None:
        """Note the largest resident set that each role ever had, in bytes."""
        for member in self.members:
            if not member.alive or member.process is None:
                continue
            with contextlib.suppress(psutil.Error):
                rss = sum(p.memory_info().rss for p in _tree(member.process.pid))
                self.peak_rss[member.role] = max(self.peak_rss.get(member.role, 0), rss)


def _tree(pid: int) -> Iterator[psutil.Process]:
    top = psutil.Process(pid)
    yield top
    yield from top.children(recursive=True)


def wait_stopped(members: Sequence[Member], *, seconds: float = 60.0) -> None:
    """Wait until processes that were sent SIGSTOP stand still, all of their threads.

    SIGSTOP is not at once: a thread inside an fsync stops when that returns.
    """
    deadline = time.monotonic() + seconds
    for member in members:
        if member.process is None:
            continue
        threads = Path(f"/proc/{member.process.pid}/task")
        while True:
            try:
                states = {
                    (thread / "stat").read_text().rpartition(")")[2].split()[0]
                    for thread in threads.iterdir()
                }
            except (FileNotFoundError, ProcessLookupError):
                states = set()  # it has gone, which is as still as can be
            if states <= {"T", "t", "Z", "X"}:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{member.name} does not stop: {states}")
            time.sleep(0.001)
