"""The receiving side of the SQLite driver; ``sqlite.py`` says why it is built this way."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final, cast, final

import apsw

from molva._base.clock import Clock
from molva._base.seldom import SeldomLog
from molva._base.sqlite_file import SQLiteFileError
from molva._base.sqlite_writer import BrokenFileError, SQLiteWriter
from molva.messaging._lanes import LaneReader, LaneToken, Scan, Watermark
from molva.messaging.driver import (
    Action,
    DeadLetter,
    Outcome,
    RawDelivery,
    Settlement,
    SubscriptionStat,
)
from molva.messaging.drivers._sqlite_file import SQLiteSide, message_of, one, select, translated
from molva.messaging.drivers._sqlite_members import Members

__all__ = ["SQLiteSubscription"]

_logger: Final = logging.getLogger("molva.messaging")

# Seconds between two writes of the watermarks. Shorter, and consuming takes the write lock
# from senders more often; longer, and more of the tail comes again after a crash.
_WATERMARK_INTERVAL: Final = 0.25
# Seconds between two looks at who else consumes. A killed consumer's lanes wait so long.
_SHARE_INTERVAL: Final = 0.25
# A consumer with nothing to do deletes when so many rows can go, and so many at a time:
# fewer rows are not worth a write, more would hold the lock for long.
_TRIM_IDLE_ROWS: Final = 2_000


@final
class SQLiteSubscription(SQLiteSide):
    """One consumer of a subscription in a SQLite file."""

    def __init__(
        self,
        *,
        writer: SQLiteWriter,
        reads: apsw.Connection,
        members: Members,
        reader: LaneReader,
        topic_id: int,
        subscription_id: int,
        lanes: int,
        clock: Clock,
    ) -> None:
        super().__init__(writer, reads, topic_id, lanes)
        self._members = members
        self._log = SeldomLog(_logger, clock)
        self._reader = reader
        self._subscription_id = subscription_id
        self._clock = clock
        self._all_lanes = (1 << lanes) - 1
        columns = f"SELECT offset, lane, id, key, headers, body FROM {self._table}"
        in_range = "WHERE offset > ? AND offset <= ?"
        self._select_all = f"{columns} {in_range} ORDER BY offset LIMIT ?"
        self._select_some = f"{columns} {in_range} AND ? >> lane & 1 ORDER BY offset LIMIT ?"
        self._select_one = f"{columns} WHERE offset = ?"
        self._next_share = clock.monotonic()
        self._upkeep: asyncio.Task[None] | None = None
        self._idle = False
        self._closed = False
        # Set to make every receive that waits look again.
        self._woken = asyncio.Event()

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        with translated():
            deadline = self._clock.monotonic() + wait
            while True:
                self._writer.check()
                await self._share_lanes()
                if self._closed:
                    return []  # what the descriptors named may be something else by now
                # Forget earlier wake-ups before looking: one that comes after this look
                # is then still there when we wait.
                self._woken.clear()
                self._members.drain_wake()
                found = self._take(limit)
                now = self._clock.monotonic()
                self._idle = not found
                if found or now >= deadline:
                    return found
                due = self._reader.next_due()
                until = min(deadline, self._next_share, deadline if due is None else due)
                await self._wait_for_wake(max(0.0, until - now))

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs; dead letters are stored before this returns."""
        reader = self._reader
        with translated():
            self._writer.check()
        rejected = [s for s in settlements if s.action is Action.REJECT]
        if rejected:
            with translated():
                await self._bury(rejected)
        was_full = reader.room == 0
        now = self._clock.monotonic()
        outcomes = [reader.apply(settlement, now=now) for settlement in settlements]
        if reader.advance() and self._upkeep is None:
            self._upkeep = asyncio.get_running_loop().create_task(self._keep_up())
        if was_full or any(s.gives_back for s in settlements):
            # There is something for a receive that waits meanwhile.
            self._woken.set()
        return outcomes

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters of this subscription, oldest first."""
        with translated():
            return self._dead_letters(self._name(), limit)

    async def stat(self) -> SubscriptionStat:
        """Return what waits."""
        with translated():
            return self._stat(self._clock).subscriptions[self._name()]

    async def close(self) -> None:
        """Write the watermarks, free the lanes, release the file."""
        self._closed = True
        self._woken.set()
        asyncio.get_running_loop().remove_reader(self._members.wake_descriptor)
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait([self._upkeep])
        with translated():
            try:
                if not self._writer.broken:
                    await self._write_watermarks()
            finally:
                # In this order: who takes a lane over reads its watermark first.
                self._members.close()
                self._reads.close()
                await self._writer.close()

    def _name(self) -> str:
        sql = "SELECT name FROM subscription WHERE subscription_id = ?"
        [(name,)] = select(self._reads, sql, (self._subscription_id,))
        assert isinstance(name, str)
        return name

    # Lanes ------------------------------------------------------------------------------

    async def _share_lanes(self) -> None:
        """Own the lanes that are meant for this consumer, and let go of the others."""
        now = self._clock.monotonic()
        left = self._reader.left()
        if self._closed or (now < self._next_share and not left):
            return
        self._next_share = now + _SHARE_INTERVAL
        rank, number = self._members.share()
        meant = {lane for lane in range(self._lanes) if lane % number == rank}
        for lane in self._reader.lanes:
            if lane in meant:
                self._reader.stay(lane)
            else:
                self._reader.leave(lane)
        left = self._reader.left()
        if left:
            self._reader.advance()
            await self._write_watermarks()
            if self._closed:
                return
            # Asked anew: another receive may have come this far meanwhile. And no others:
            # what became free during the write has a watermark that is not written.
            for lane in set(left) & set(self._reader.left()):
                self._reader.disown(lane)
                self._members.free_lane(lane)
        for lane in meant - self._reader.lanes:
            if self._members.take_lane(lane):
                # Only now: its last owner wrote this before it let go.
                row = self._reads.execute(
                    """
                    SELECT lane, offset, settled FROM watermark
                    WHERE subscription_id = ? AND lane = ?
                    """,
                    (self._subscription_id, lane),
                ).fetchone()
                assert row is not None
                self._reader.own(Watermark(*row))

    # Reading ----------------------------------------------------------------------------

    def _take(self, limit: int) -> list[RawDelivery]:
        reader = self._reader
        found = []
        for token in reader.due(self._clock.monotonic(), limit):
            row = self._reads.execute(self._select_one, (token.offset,)).fetchone()
            assert row is not None, "an unsettled message is never deleted"
            found.append(RawDelivery(message_of(*row[2:]), token.attempt, token))
        limit = min(limit - len(found), reader.room)
        while limit > 0 and (scan := reader.next_scan()) is not None:
            rows, end = self._read(scan, limit)
            tokens = reader.deliver(scan, [(row[0], row[1]) for row in rows], end)
            for token, (_, _, id_, key, headers, body) in zip(tokens, rows, strict=True):
                found.append(RawDelivery(message_of(id_, key, headers, body), 1, token))
            limit -= len(rows)
            if scan.upto is None or end < scan.upto:
                break  # the end of the log, or the limit
        return found

    def _read(self, scan: Scan, limit: int) -> tuple[list[tuple[Any, ...]], int]:
        """Read one scan; return its rows and the offset up to which nothing was missed."""
        upto = scan.upto
        if upto is None:
            sql = "SELECT last_offset FROM topic WHERE topic_id = ?"
            upto = one(self._reads, sql, (self._topic_id,))
            if upto == scan.after:
                return [], scan.after
        if scan.lanes == self._all_lanes:
            rows = select(self._reads, self._select_all, (scan.after, upto, limit))
        else:
            rows = select(self._reads, self._select_some, (scan.after, upto, scan.lanes, limit))
        return rows, rows[-1][0] if len(rows) == limit else upto

    async def _wait_for_wake(self, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        descriptor = self._members.wake_descriptor
        loop.add_reader(descriptor, self._woken.set)
        timer = loop.call_later(timeout, self._woken.set)
        try:
            await self._woken.wait()
        finally:
            timer.cancel()
            # Closing let go of the descriptor already, and its number may be another's.
            if not self._closed:
                loop.remove_reader(descriptor)

    # Writing ----------------------------------------------------------------------------

    async def _bury(self, rejected: Sequence[Settlement]) -> None:
        """Store dead letters. One that a crash brings here twice is kept once."""
        now_us = self._clock.now_us()
        held = [s for s in rejected if self._reader.holds(cast(LaneToken, s.token))]

        def work(connection: apsw.Connection) -> None:
            before = connection.total_changes()
            connection.executemany(
                f"""
                INSERT OR IGNORE INTO dead_letter
                    (subscription_id, offset, id, key, headers, body, reason, attempts, died_at_us)
                SELECT ?, offset, id, key, headers, body, ?, ?, ? FROM {self._table}
                WHERE offset = ?
                """,
                (
                    (self._subscription_id, s.reason, s.attempt, now_us, token.offset)
                    for s in held
                    for token in [cast(LaneToken, s.token)]
                ),
            )
            # Counted as they come: counting them anew takes longer the more there are.
            connection.execute(
                "UPDATE subscription SET dead = dead + ? WHERE subscription_id = ?",
                (connection.total_changes() - before, self._subscription_id),
            )

        await self._writer.write(work)

    async def _keep_up(self) -> None:
        """Write the watermarks a while after they moved; tidy up; stop when nothing moves."""
        try:
            while True:
                await self._clock.sleep(_WATERMARK_INTERVAL)
                try:
                    wrote = await self._write_watermarks()
                    trimmed = self._idle and await self._trim_idle()
                except BrokenFileError:
                    return  # whoever settles or receives next is told
                except SQLiteFileError as error:
                    self._log.warning("watermarks are not written, messages may repeat: %s", error)
                    continue
                if not wrote and not trimmed:
                    return
        finally:
            self._upkeep = None

    async def _write_watermarks(self) -> bool:
        watermarks = self._reader.unwritten()
        if not watermarks:
            return False

        def work(connection: apsw.Connection) -> None:
            connection.executemany(
                """
                UPDATE watermark SET offset = ?, settled = ?
                WHERE subscription_id = ? AND lane = ? AND offset < ?
                """,
                # Never back: a lane that was handed over may be further by now.
                (
                    (w.offset, w.settled, self._subscription_id, w.lane, w.offset)
                    for w in watermarks
                ),
            )

        await self._writer.write(work)
        self._reader.written(watermarks)
        return True

    async def _trim_idle(self) -> bool:
        first, done = self._trimmable(self._reads)
        if not 0 < first <= done - _TRIM_IDLE_ROWS:
            return False
        upto = min(done, first + _TRIM_IDLE_ROWS)
        await self._writer.write(lambda connection: self._trim(connection, upto))
        return True
