"""Fifty ratings on a disk that fails once: how an honest program goes on, and what must hold.

What is refused is tried again: on the same objects where the error says that there was no
room, and in a new life, everything closed and opened anew, where it says that the file is
broken. What was confirmed is never sent again until all is over; then everything is, under
the ids that it always had.
"""

import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar, final
from unittest.mock import patch

import apsw

from molva._base import sqlite_writer
from molva._base.clock import ManualClock
from molva.messaging import (
    Action,
    BrokenBrokerError,
    Message,
    Queue,
    SendManyError,
    Subscription,
    Topic,
    UnavailableError,
    open_topic,
)
from molva.ratings.ledger import Ledger, LedgerBrokenError, LedgerUnavailableError
from tests.faults.crash.failing import FailingDisk
from tests.faults.crash.scenario import (
    POISON,
    RATINGS,
    apply,
    message,
    opened,
    submission,
    topic_url,
)

__all__ = ["Run", "ratings_in"]

T = TypeVar("T")

_BATCH: Final = 25
# Lives in which one fault must have been overcome: the one it strikes, the next, and one more
# where opening was what it struck.
_LIVES: Final = 4
_TRIES: Final = 4
_REFUSALS: Final = (UnavailableError, LedgerUnavailableError, SendManyError)


@final
class _BrokenError(Exception):
    """This life is over: nothing may be written to a file any more."""


@final
class Run:
    """One scenario on one disk. ``wrong`` says what should not have happened."""

    def __init__(self, folder: Path, disk: FailingDisk) -> None:
        self._folder = folder
        self._disk = disk
        self.wrong: list[str] = []
        self.refused = 0
        self._sent: set[int] = set()
        self._queued: set[int] = set()
        self._tried: Counter[int] = Counter()
        self._applied: set[bytes] = set()
        self._dead: set[bytes] = set()
        self._acked: set[bytes] = set()
        self._maybe_acked: set[bytes] = set()

    async def run(self) -> list[str]:
        """Return what is wrong."""
        # Short, so that the WAL is copied back several times on the way.
        with patch.object(sqlite_writer, "CHECKPOINT_PAGES", 12):
            for _ in range(_LIVES):
                if await self._live():
                    break
            else:
                self.wrong.append("the fault was never overcome")
        if self._disk.behind:
            self.wrong.append(f"written behind a failed sync: {set(self._disk.behind)}")
        self._disk.free()
        await self._look()
        return self.wrong

    async def _live(self) -> bool:
        """Go on until all is done (True), or until something is broken."""
        clock = ManualClock()
        vfs = self._disk.vfs_name
        try:
            async with (
                opened(self._folder, clock, vfs) as (subscription, queue, ledger),
                await open_topic(topic_url(self._folder, vfs), clock=clock) as topic,
            ):
                for first in range(0, RATINGS, _BATCH):
                    numbers = range(first, min(first + _BATCH, RATINGS))
                    await self._send(topic, self._sent, numbers)
                    await self._send(queue, self._queued, numbers)
                    await self._patiently(lambda: self._apply(subscription, ledger))
                    await clock.pass_time(0.3)  # watermarks are written
                    await self._patiently(lambda: self._work(queue))
                while await self._patiently(lambda: self._apply(subscription, ledger)):
                    pass
        except _BrokenError:
            return False
        except _REFUSALS as error:  # opening, or closing
            self._check(error)
            self._disk.free()
            return False
        return True

    async def _patiently(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Try again what was refused; give a full disk room at the second refusal."""
        for tried in itertools.count(1):
            try:
                return await operation()
            except _REFUSALS as error:
                self._check(error)
                if _is_broken(error):
                    await self._stays_broken(operation)
                    raise _BrokenError from error
                if tried == 2:
                    self._disk.free()
                if tried == _TRIES:
                    self.wrong.append(f"still refused with room: {error}")
                    raise _BrokenError from error
        raise AssertionError

    async def _stays_broken(self, operation: Callable[[], Awaitable[object]]) -> None:
        try:
            await operation()
        except _REFUSALS as error:
            if not _is_broken(error):
                self.wrong.append(f"broken, and then {error!r}")
        else:
            self.wrong.append("broken, and then it worked")

    def _check(self, error: Exception) -> None:
        self.refused += 1
        failures = error.failures.values() if isinstance(error, SendManyError) else (error,)
        for failure in failures:
            if not isinstance(failure, UnavailableError | LedgerUnavailableError):
                self.wrong.append(f"refused with {failure!r}")
            causes = []
            cause: BaseException | None = failure
            while cause is not None:
                causes.append(cause)
                cause = cause.__cause__
            if not isinstance(causes[-1], apsw.IOError | apsw.FullError | apsw.CantOpenError):
                self.wrong.append(f"{failure!r} without the disk's error as its cause: {causes}")
            if ".db" not in str(failure):
                self.wrong.append(f"{failure!r} does not name the file")

    async def _send(self, to: Topic | Queue, confirmed: set[int], numbers: range) -> None:
        async def send() -> None:
            missing = [number for number in numbers if number not in confirmed]
            if to.__class__ is Queue:
                self._tried.update(missing)
            messages: list[Message] = [message(number) for number in missing]
            try:
                await to.send_many(messages)
            except SendManyError as error:
                confirmed.update(n for at, n in enumerate(missing) if at not in error.failures)
                raise
            confirmed.update(missing)

        await self._patiently(send)

    async def _apply(self, subscription: Subscription, ledger: Ledger) -> int:
        """Do what a worker does; what cannot be counted now is given back."""
        deliveries = await subscription.receive(_BATCH, wait=0.0)
        good = [d for d in deliveries if int(d.message.body) not in POISON]
        batch = [submission(int(d.message.body), d.message.id) for d in good]
        try:
            await ledger.apply(batch, applied_at_us=1)
        except LedgerUnavailableError:
            await subscription.settle([(d, Action.RETURN) for d in deliveries])
            raise
        self._applied.update(one.id for one in batch)
        await subscription.settle([(d, Action.ACK) for d in good])
        dead = [d for d in deliveries if d not in good]
        try:
            await subscription.settle([(d, Action.REJECT) for d in dead], reason="poison")
        except BrokenBrokerError:
            raise
        except UnavailableError:
            await subscription.settle([(d, Action.RETURN) for d in dead])
            raise
        self._dead.update(d.message.id for d in dead)
        return len(deliveries)

    async def _work(self, queue: Queue) -> None:
        """Take from the queue, and settle in every way there is."""
        for number, delivery in enumerate(await queue.receive(4, wait=0.0)):
            if number == 0:
                await delivery.nack()
                continue
            if number == 1:
                await delivery.extend(60.0)
            self._maybe_acked.add(delivery.message.id)
            await (delivery.reject("poison") if number == 2 else delivery.ack())
            self._acked.add(delivery.message.id)

    async def _look(self) -> None:
        """Open everything on a healthy disk, send all once more, and compare."""
        clock = ManualClock()
        wrong = self.wrong
        for name in ("queue.db", "ledger.db"):
            connection = apsw.Connection(str(self._folder / name))
            if connection.pragma("integrity_check") != "ok":
                wrong.append(f"{name} is corrupt")
            connection.close()
        async with (
            opened(self._folder, clock) as (subscription, queue, ledger),
            await open_topic(topic_url(self._folder, None), clock=clock) as topic,
        ):
            if not self._applied <= ratings_in(self._folder).keys():
                wrong.append("applied and gone")
            letters = {letter.message.id for letter in await subscription.dead_letters()}
            if not self._dead <= letters:
                wrong.append("dead letters are gone")
            rows = {row.message.id for row in await queue.peek(10_000)}
            buried = {letter.message.id for letter in await queue.dead_letters()}
            queued = {message(number).id for number in self._queued}
            if not queued <= rows | buried | self._maybe_acked:
                wrong.append("lost from the queue")
            once = {message(number).id for number, tries in self._tried.items() if tries == 1}
            if self._acked & rows & once:
                wrong.append("settled, and waits again")
            while await apply(subscription, ledger, None, limit=100):
                pass
            sent = {message(number).id for number in self._sent}
            if not sent <= ratings_in(self._folder).keys() | letters:
                wrong.append("sent and lost")
            await topic.send_many([message(number) for number in range(RATINGS)])
            while await apply(subscription, ledger, None, limit=100):
                pass
            expected = {message(n).id: n % 11 for n in range(RATINGS) if n not in POISON}
            found = ratings_in(self._folder)
            if found != expected:
                wrong.append(f"{len(found)} ratings after all was sent again")
            total = await ledger.total("default", n=10**6)
            if total is None or (total.count, total.sum) != (len(expected), sum(expected.values())):
                wrong.append(f"total {total}")
            wrong += [str(difference) async for difference in ledger.verify()]


def ratings_in(folder: Path) -> dict[bytes, int]:
    """Return id and rate of every rating, read without the product's code."""
    connection = apsw.Connection(str(folder / "ledger.db"))
    try:
        rows = connection.execute("SELECT id, rate FROM entry WHERE rate IS NOT NULL").fetchall()
    finally:
        connection.close()
    return {bytes(id_): rate for id_, rate in rows}  # type: ignore[arg-type, misc]


def _is_broken(error: Exception) -> bool:
    failures = error.failures.values() if isinstance(error, SendManyError) else (error,)
    return any(isinstance(failure, BrokenBrokerError | LedgerBrokenError) for failure in failures)
