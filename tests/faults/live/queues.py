"""A round of a queue with leases: producers and consumers in processes that die and stand still.

Design:
    Two producers send for ever; three consumers work, at random speed, on what they are handed:
    ack, nack with a delay, reject, or raise until the attempts are used up. Faults come from
    the seed: SIGKILL of either, and SIGSTOP of a consumer for longer than its leases, so that
    what it held is handed to others; let go on, it acknowledges what is no longer its own.

    At the end producers are killed and consumers go on, unharmed, until nothing waits. Logs and
    dead letters are judged (``queue_judge``). Then the dead letters are replayed, to consumers
    that can process them now: each must be done, and none may be left.

    A round without a redelivery, a late ack or a dead letter proves nothing, and fails.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal, final

from molva.messaging import open_queue
from tests.faults.live.queue_actor import MAX_ATTEMPTS, REPAIRED, fate, id_of
from tests.faults.live.queue_judge import DeadOne, Event, judge_queue, read_log

__all__ = ["QueueConfig", "QueueReport", "run_queue"]

_ACTOR: Final = Path(__file__).with_name("queue_actor.py")
# Seconds of a lease: short, so that a pause of two outlives it.
_LEASE: Final = 0.8
_PAUSE: Final = (1.2, 2.2)
# Seconds in which a healed queue must be empty.
_DRAIN: Final = 30.0

Kind = Literal["kill", "pause", "kill-producer"]
_KINDS: Final[Sequence[Kind]] = ("kill", "kill", "pause", "pause", "kill-producer")


@final
@dataclass(frozen=True, slots=True)
class QueueConfig:
    """One round. ``mutant``: a bug on purpose, see ``queue_actor``."""

    seed: int
    seconds: float = 5.0
    every: float = 0.5
    producers: int = 2
    consumers: int = 3
    mutant: str = ""


@final
@dataclass(slots=True)
class QueueReport:
    """What one round did and found."""

    config: QueueConfig
    violations: list[str] = field(default_factory=list)
    vacuous: list[str] = field(default_factory=list)
    sent: int = 0
    done: int = 0
    redelivered: int = 0
    late: int = 0
    dead: int = 0
    replayed: int = 0
    kills: int = 0
    pauses: int = 0
    drain_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether the round proved something, and found nothing."""
        return not self.violations and not self.vacuous

    def shown(self) -> dict[str, object]:
        """Return it as a JSON object."""
        return asdict(self)


async def run_queue(config: QueueConfig, folder: Path | None = None) -> QueueReport:
    """Return what one round did and found. ``folder``: where file and logs stay."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="molva-queue-") as temporary:
            return await run_queue(config, Path(temporary))
    folder.mkdir(parents=True, exist_ok=True)
    return await _Round(config, folder).run()


@final
class _Actor:
    """One producer or consumer, in all its lives; each life of a consumer has its own log."""

    def __init__(self, role: str, name: str, url: str, folder: Path, mutant: str) -> None:
        self.role, self.name = role, name
        self._url, self._folder, self._mutant = url, folder, mutant
        self._lives = 0
        self.paused = False
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def events(self) -> Path:
        return self._folder / f"{self.name}-{self._lives}.events"

    def at_work(self) -> set[tuple[str, int]]:
        """Return what a consumer has begun and not ended, unless it is paused already."""
        if self.paused or not self.events.exists():
            return set()
        open_ = set()
        for event in read_log(self.events.read_text(), self.name):
            if event.what == "begin":
                open_.add((event.id, event.attempt))
            elif event.what != "done":
                open_.discard((event.id, event.attempt))
        return open_

    def start(self) -> None:
        self._lives += self.role == "consume"
        self.paused = False
        log = self.events
        with (self._folder / f"{self.name}.log").open("ab") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, _ACTOR, self.role, self._url, log, self.name),
                    *([self._mutant] if self._mutant else []),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def signal(self, number: int) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def surprise(self) -> str | None:
        """Return what it said, if it ended by itself."""
        assert self.process is not None
        if self.process.poll() is None:
            return None
        said = (self._folder / f"{self.name}.log").read_text()[-2_000:]
        return f"{self.name} ended by itself with {self.process.returncode}: {said}"


@final
class _Round:
    def __init__(self, config: QueueConfig, folder: Path) -> None:
        self._folder = folder
        self._url = f"sqlite://{folder}/queue.db?queue=work&lease={_LEASE}"
        self._report = QueueReport(config)
        self._dice = random.Random(f"queue {config.seed}")
        self._producers = [
            _Actor("produce", f"p{number}", self._url, folder, "")
            for number in range(config.producers)
        ]
        self._consumers = [
            _Actor("consume", f"c{number}", self._url, folder, config.mutant)
            for number in range(config.consumers)
        ]

    async def run(self) -> QueueReport:
        report, config = self._report, self._report.config
        started = time.monotonic()
        actors = [*self._producers, *self._consumers]
        async with await open_queue(self._url):
            pass  # made by one, opened by all
        try:
            for actor in actors:
                actor.start()
            await self._all_at_work(time.monotonic() + 90)
            await self._under_faults(time.monotonic() + config.seconds)
            for producer in self._producers:
                producer.kill()
            healed = time.monotonic()
            left = await self._drained(healed + _DRAIN)
            report.drain_seconds = round(time.monotonic() - healed, 2)
            await self._judge(left)
            await self._replay()
            report.violations += [s for c in self._consumers if (s := c.surprise())]
        finally:
            for actor in actors:
                if actor.process is not None:
                    actor.kill()
        self._weigh()
        report.seconds = round(time.monotonic() - started, 2)
        return report

    async def _all_at_work(self, deadline: float) -> None:
        """Wait until every process has done something: a fault before that proves little."""
        count = len(self._producers) + len(self._consumers)
        while sum(log.stat().st_size > 0 for log in self._folder.glob("*.events")) < count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"not every process is at work; see {self._folder}")
            await asyncio.sleep(0.05)

    async def _under_faults(self, until: float) -> None:
        config, dice, report = self._report.config, self._dice, self._report
        paused: list[asyncio.Task[None]] = []
        kinds: list[Kind] = []
        while time.monotonic() < until:
            await asyncio.sleep(min(dice.expovariate(1 / config.every), 2.0))
            if not kinds:
                kinds = dice.sample(_KINDS, len(_KINDS))
            kind = kinds.pop()
            # Whoever stands still is let go on: what it does then is the point of it.
            alive = [each for each in self._consumers if not each.paused] or self._consumers
            actor = dice.choice(self._producers if kind == "kill-producer" else alive)
            if kind == "pause":
                actor = max(self._consumers, key=lambda each: len(each.at_work()))
                seconds = dice.uniform(*_PAUSE)
                paused.append(asyncio.ensure_future(self._pause(actor, seconds)))
            else:
                actor.kill()
                report.kills += 1
                actor.start()
        await asyncio.gather(*paused)

    async def _pause(self, actor: _Actor, seconds: float) -> None:
        life = actor.process
        actor.signal(signal.SIGSTOP)
        actor.paused = True
        self._report.pauses += 1
        await asyncio.sleep(seconds)
        if actor.process is life:
            actor.signal(signal.SIGCONT)
            actor.paused = False

    async def _drained(self, deadline: float) -> int:
        """Wait until nothing waits, and logs say no more; return how much does at the end."""
        async with await open_queue(self._url) as queue:
            while True:
                stat = await queue.stat()
                assert stat is not None
                if not stat.pending or time.monotonic() > deadline:
                    await asyncio.sleep(0.3)  # an event is written after what it tells of
                    return stat.pending
                await asyncio.sleep(0.05)

    def _events(self) -> list[Event]:
        events = []
        for path in self._folder.glob("*.events"):
            events += read_log(path.read_text(), path.stem)
        return events

    async def _judge(self, left: int) -> None:
        async with await open_queue(self._url) as queue:
            dead = [
                DeadOne(letter.message.id.hex(), letter.reason, letter.attempts)
                for letter in await queue.dead_letters(1_000_000)
            ]
        events = self._events()
        tried = {event.id for event in events if event.what == "try"}
        numbers = {
            id_: (producer.name, number)
            for producer in self._producers
            for number in range(len(tried) + 1)
            if (id_ := id_of(producer.name, number).hex()) in tried
        }
        found = judge_queue(
            events,
            dead,
            waiting=left,
            numbers=numbers,
            fates={id_: fate(number) for id_, (_, number) in numbers.items()},
            max_attempts=MAX_ATTEMPTS,
        )
        report = self._report
        report.violations += found.violations
        report.sent, report.done, report.dead = found.sent, found.done, found.dead
        report.redelivered, report.late = found.redelivered, found.late

    async def _replay(self) -> None:
        """Send the dead letters back to consumers that can process them now."""
        report = self._report
        (self._folder / REPAIRED).touch()
        async with await open_queue(self._url) as queue:
            ids = {letter.message.id.hex() for letter in await queue.dead_letters(1_000_000)}
            report.replayed = await queue.replay()
        if report.replayed != report.dead:
            report.violations.append(f"replayed {report.replayed} of {report.dead} dead letters")
        left = await self._drained(time.monotonic() + _DRAIN)
        done = {event.id for event in self._events() if event.what == "done"}
        if left or not ids <= done:
            report.violations.append(f"replayed: {len(ids - done)} never done, {left} wait")
        async with await open_queue(self._url) as queue:
            if await queue.dead_letters(10):
                report.violations.append("replayed, and dead again")

    def _weigh(self) -> None:
        report = self._report
        if not report.redelivered:
            report.vacuous.append("no message came again because of a fault")
        if not report.late:
            report.vacuous.append("no lease was lost: no zombie acknowledged late")
        if not report.dead:
            report.vacuous.append("no message became a dead letter")
        if not report.kills or not report.pauses:
            report.vacuous.append("nobody was killed, or nobody paused")
