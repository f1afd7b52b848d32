"""The receiving side of the SQLite driver; ``sqlite.py`` says why it is built this way."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import itemgetter
from typing import Any, Final, TypeVar, cast, final

import apsw

from molva._base.clock import Clock
from molva._base.seldom import SeldomLog
from molva._base.sqlite_file import SQLiteFileError
from molva._base.sqlite_writer import BrokenFileError, SQLiteWriter
from molva.messaging._lanes import LaneReader, LaneToken, Scan, Watermark, lane_of
from molva.messaging.driver import (
    Action,
    DeadLetter,
    Outcome,
    Peeked,
    RawDelivery,
    Settlement,
    SubscriptionStat,
    Token,
)
from molva.messaging.drivers._sqlite_file import (
    TAKE_OFFSETS,
    DeadLetters,
    SQLiteSide,
    checksum_of,
    facts,
    message_of,
    one,
    select,
    translated,
    watermark_sum,
)
from molva.messaging.drivers._sqlite_members import Members, Waker
from molva.messaging.errors import IncompatibleBrokerError, InUseError, TopicNotFoundError
from molva.messaging.message import Message

__all__ = ["SQLiteSubscription"]

T = TypeVar("T")

_logger: Final = logging.getLogger("molva.messaging")

_lane_of_row: Final = itemgetter(1)

# Seconds between two writes of the watermarks. Shorter, and consuming takes the write lock
# from senders more often; longer, and more of the tail comes again after a crash.
_WATERMARK_INTERVAL: Final = 0.25
# Seconds after which it is seen that a sender waits for room, which the watermarks make: the
# first time after they moved, then each time until they are due anyway. Longer, and senders
# wait for nothing; shorter, and consuming takes the loop more often than it has to.
_FIRST_LOOK_FOR_SENDERS: Final = 0.002
_LOOK_FOR_SENDERS: Final = 0.01
# Seconds between two looks at who else consumes. A killed consumer's lanes wait so long.
_SHARE_INTERVAL: Final = 0.25
# A consumer with nothing to do deletes when so many rows can go, and so many at a time:
# fewer rows are not worth a write, more would hold the lock for long.
_TRIM_IDLE_ROWS: Final = 2_000


@final
class SQLiteSubscription(SQLiteSide):
    """One consumer of a subscription in a SQLite file."""

    lease: Final = None  # it owns lanes, for as long as it lives

    def __init__(
        self,
        *,
        writer: SQLiteWriter,
        reads: apsw.Connection,
        path: str,
        members: Members,
        waker: Waker,
        room_waker: Waker,
        reader: LaneReader,
        topic: str,
        topic_id: int,
        subscription: str,
        subscription_id: int,
        lanes: int,
        clock: Clock,
    ) -> None:
        super().__init__(writer, reads, path=path, topic=topic, topic_id=topic_id, lanes=lanes)
        self._members = members
        self._waker = waker
        self._room_waker = room_waker
        self._subscription = subscription
        self._dead = DeadLetters(
            path, "subscription_id", subscription_id, f"topic {topic}, subscription {subscription}"
        )
        self._log = SeldomLog(_logger, clock)
        self._reader = reader
        self._subscription_id = subscription_id
        self._clock = clock
        self._all_lanes = (1 << lanes) - 1
        columns = (
            "SELECT offset, lane, id, key, headers, body, checksum, ttl, stored_at_us, only_for "
            f"FROM {self._table}"
        )
        in_range = "WHERE offset > ? AND offset <= ?"
        self._select_all = f"{columns} {in_range} ORDER BY offset LIMIT ?"
        self._select_some = f"{columns} {in_range} AND ? >> lane & 1 ORDER BY offset LIMIT ?"
        self._select_one = f"{columns} WHERE offset = ?"
        self._next_share = clock.monotonic()
        self._upkeep: asyncio.Task[None] | None = None
        self._idle = False
        self._closed = False
        # Set while all lanes must stay here.
        self._purging = False
        # Whether a commit of ours may not have reached the disk; perhaps one before us.
        self._unsynced = True
        # Held from reading what is unwritten until it is noted as written: a slow write must
        # not undo what a quick one behind it has counted.
        self._writing_marks = asyncio.Lock()
        # Set to make every receive that waits look again.
        self._woken = asyncio.Event()

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        with translated(self._path):
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
                if self._reader.must_write:
                    await self._write_watermarks()
                    if self._closed:
                        return []
                found, uncounted = self._take(limit)
                if not found:
                    if uncounted:
                        await self._count(uncounted)
                        continue
                    if self._reader.must_write:
                        continue
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
        with translated(self._path):
            self._writer.check()
        rejected = [s for s in settlements if s.action is Action.REJECT]
        if rejected:
            with translated(self._path):
                await self._bury(rejected)
        was_full = reader.room == 0
        now = self._clock.monotonic()
        outcomes = [reader.apply(settlement, now=now) for settlement in settlements]
        self._note_settled()
        if was_full or reader.must_write or any(s.gives_back for s in settlements):
            # There is something for a receive that waits meanwhile.
            self._woken.set()
        return outcomes

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters of this subscription, oldest first."""
        with translated(self._path):
            return self._dead.look(self._reads, limit)

    async def stat(self) -> SubscriptionStat:
        """Return what waits."""
        with translated(self._path):
            found = self._stat(self._clock).subscriptions.get(self._subscription)
        if found is None:
            raise self._removed()
        return found

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Tell what is still held; a lane is owned without end."""
        holds = self._reader.holds
        return [
            Outcome.EXTENDED if holds(cast(LaneToken, token)) else Outcome.LEASE_LOST
            for token in tokens
        ]

    async def flush(self) -> None:
        """Write the watermarks, and wait for the fsync of all that was written before."""
        with translated(self._path):
            self._writer.check()
            await self._write_watermarks(durable=True)

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Store dead letters once more at the end of the log, for this subscription only."""

        def work(connection: apsw.Connection) -> int:
            rows = self._dead.chosen(connection, ids, limit)
            last = one(connection, TAKE_OFFSETS, (len(rows), self._topic_id))
            now_us = self._clock.now_us()
            connection.executemany(
                f"""
                INSERT INTO {self._table}
                    (offset, lane, id, key, headers, body, stored_at_us, ttl, only_for, checksum)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                """,
                (
                    (
                        offset,
                        lane := lane_of(key, id_, self._lanes),
                        id_,
                        key,
                        headers,
                        body,
                        now_us,
                        ttl,
                        self._subscription_id,
                        checksum_of(
                            id_,
                            key,
                            headers,
                            body,
                            facts(offset, lane, now_us, ttl, self._subscription_id),
                        ),
                    )
                    for offset, (_, id_, key, headers, body, ttl, _p) in enumerate(
                        rows, last - len(rows) + 1
                    )
                ),
            )
            self._dead.forget(connection, [row[0] for row in rows])
            return len(rows)

        with translated(self._path):
            replayed = await self._write(work, durable=True)
        self._woken.set()
        self._waker.wake()
        return replayed

    async def purge(self, *, dead: bool) -> int:
        """Settle all that waits, or delete all dead letters."""
        with translated(self._path):
            if dead:
                return await self._write(self._dead.forget_all, durable=True)
            self._next_share = self._clock.monotonic()
            await self._share_lanes()
            self._check_alone()
            self._purging = True
            try:
                number = await self._purge()
            finally:
                self._purging = False
        self._waker.wake()
        self._room_waker.wake()
        return number

    async def _purge(self) -> int:
        await self._write_watermarks()
        async with self._writing_marks:
            marks, not_ours = await self._write(self._settle_all, durable=True)
            before = self._reader.settled
            # What is open is forgotten: late settlements find another epoch.
            for mark in marks:
                self._reader.disown(mark.lane)
                self._reader.own(mark)
        return sum(mark.settled for mark in marks) - before - not_ours

    def _check_alone(self) -> None:
        others = self._members.share()[1] - 1
        missing = self._lanes - len(self._reader.lanes)
        if others or missing:
            raise InUseError(
                f"{self._path}: {others} other consumers hold lanes of subscription "
                f"{self._subscription!r}; stop them, then purge"
            )

    async def peek(self, limit: int) -> list[Peeked]:
        """Return what stands above the watermarks, oldest first."""
        sql = f"""
            SELECT m.offset, m.lane, m.id, m.key, m.headers, m.body, m.checksum, m.ttl,
                   m.stored_at_us, m.only_for
            FROM {self._table} m JOIN watermark w ON w.lane = m.lane AND w.subscription_id = ?
            WHERE m.offset > (SELECT min(offset) FROM watermark WHERE subscription_id = ?)
              AND m.offset > w.offset
              AND (m.only_for IS NULL OR m.only_for = w.subscription_id)
            ORDER BY m.offset
        """
        found: list[Peeked] = []
        own = (self._subscription_id, self._subscription_id)
        with translated(self._path):
            for row in self._reads.execute(sql, own):
                offset, lane, *_, stored_at_us, _ = cast("tuple[Any, ...]", row)
                state = self._reader.state(lane, offset)
                if state == "settled":
                    continue
                if len(found) == limit:
                    break
                attempts = 0 if state == "ready" else 1
                message = self._message_of_row(row)
                assert message is not None, "the query leaves out what is not ours"
                found.append(Peeked(message, state, attempts, stored_at_us))
        return found

    async def close(self) -> None:
        """Write the watermarks, free the lanes, release the file."""
        self._closed = True
        self._woken.set()
        asyncio.get_running_loop().remove_reader(self._members.wake_descriptor)
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait([self._upkeep])
        with translated(self._path):
            try:
                if not self._writer.broken:
                    await self._write_watermarks(let_go=self._reader.lanes)
            finally:
                # In this order: who takes a lane over reads its watermark first.
                self._members.close()
                self._waker.close()
                self._room_waker.close()
                self._reads.close()
                await self._writer.close()

    # Lanes ------------------------------------------------------------------------------

    async def _share_lanes(self) -> None:
        """Own the lanes that are meant for this consumer, and let go of the others."""
        now = self._clock.monotonic()
        left = self._reader.left()
        if self._closed or self._purging or (now < self._next_share and not left):
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
            await self._write_watermarks(let_go=left)
            if self._closed:
                return
            # Asked anew: another receive may have come this far meanwhile. And no others:
            # what became free during the write has a watermark that is not written.
            for lane in set(left) & set(self._reader.left()):
                self._reader.disown(lane)
                self._members.free_lane(lane)
        for lane in meant - self._reader.lanes:
            if self._members.take_lane(lane):
                self._begin_lane(lane)

    def _begin_lane(self, lane: int) -> None:
        # Only now that it is ours: its last owner wrote this before it let go.
        row = self._reads.execute(
            """
            SELECT offset, settled, deaths, sum FROM watermark
            WHERE subscription_id = ? AND lane = ?
            """,
            (self._subscription_id, lane),
        ).fetchone()
        if row is None:
            self._members.free_lane(lane)
            raise self._removed()
        offset, settled, deaths, sum_ = cast("tuple[int, int, int, int]", row)
        if None in row or sum_ != watermark_sum(offset, settled, deaths):
            self._members.free_lane(lane)
            raise IncompatibleBrokerError(
                f"{self._path}: how far subscription {self._subscription!r} has read in lane "
                f"{lane} is damaged: the disk or another program changed it; restore the file "
                "from a copy, or remove the subscription and read all that is kept anew"
            )
        self._reader.own(Watermark(lane, offset, settled), deaths=deaths)
        if self._reader.alone([lane]):
            self._log.warning(
                "%s: %d consumers in a row died with messages of lane %d of subscription %r; "
                "they are handed over one at a time to find out which it was",
                self._path,
                deaths,
                lane,
                self._subscription,
            )

    def _removed(self) -> TopicNotFoundError:
        return TopicNotFoundError(
            f"{self._path}: subscription {self._subscription!r} of topic {self._topic!r} was "
            "removed; open it again to make it anew"
        )

    # Reading ----------------------------------------------------------------------------

    def _take(self, limit: int) -> tuple[list[RawDelivery], frozenset[int]]:
        """Return what can be handed over now, and the lanes to count before there is more."""
        reader = self._reader
        found = self._take_again(limit)
        for next_scan, most in reader.ways:
            room = min(limit - len(found), reader.room, most)
            if uncounted := self._take_new(next_scan, room, found):
                return found, uncounted
        return found, frozenset()

    def _take_again(self, limit: int) -> list[RawDelivery]:
        """Return the nacked messages whose time has come."""
        found: list[RawDelivery] = []
        now = self._clock.monotonic()
        tokens = self._reader.due(now, limit)
        for token in tokens:
            row = self._reads.execute(self._select_one, (token.offset,)).fetchone()
            assert row is not None, "an unsettled message is never deleted"
            try:
                again = self._message_of_row(cast("tuple[Any, ...]", row))
            except IncompatibleBrokerError:
                for late in tokens[len(found) :]:
                    self._reader.give_back(late, due=now, attempt=late.attempt)
                if not found:
                    raise
                break
            assert again is not None, "what is of others only was never handed over"
            found.append(RawDelivery(again, token.attempt, token, row[8]))
        return found

    def _take_new(
        self, next_scan: Callable[[], Scan | None], limit: int, found: list[RawDelivery]
    ) -> frozenset[int]:
        """Add up to ``limit`` messages to ``found``; return lanes to count before any more."""
        reader = self._reader
        while limit > 0 and (scan := next_scan()) is not None:
            rows, end = self._read(scan, limit)
            # Looked at before anything is handed over: a damaged row is one clear error, as
            # often as it is asked for, and nothing behind it overtakes it.
            messages: list[Message | None] = []
            try:
                for row in rows:
                    messages.append(self._message_of_row(row))
            except IncompatibleBrokerError:
                rows = rows[: len(messages)]
                if not rows and not found:
                    raise
                end = rows[-1][0] if rows else scan.after
            uncounted = reader.uncounted(map(_lane_of_row, rows))
            if uncounted:
                return uncounted  # nothing is taken note of: the same scan comes again
            tokens = reader.deliver(scan, [(row[0], row[1]) for row in rows], end)
            others = False
            for token, message_, row in zip(tokens, messages, rows, strict=True):
                if message_ is None:
                    reader.settle(token)  # another subscription's replay
                    others = True
                else:
                    found.append(RawDelivery(message_, token.attempt, token, row[8]))
                    limit -= 1
            if others:
                self._note_settled()
            elif scan.upto is None or end < scan.upto:
                break  # the end of the log, or the limit
        return frozenset()

    def _message_of_row(self, row: tuple[Any, ...]) -> Message | None:
        """Return the message of a row; None where it is of another subscription only."""
        offset, lane, id_, key, headers, body, checksum, ttl, stored_at_us, only_for = row
        more = facts(offset, lane, stored_at_us, ttl, only_for)
        plain = headers is None and ttl is None and only_for is None  # most are
        if plain and checksum == checksum_of(id_, key, None, body, more):
            return Message(body, id_, key)
        message = message_of(self._at(offset), id_, key, headers, body, checksum, ttl, more=more)
        return None if only_for not in (None, self._subscription_id) else message

    def _at(self, offset: int) -> str:
        return f"{self._path}: message {offset} of topic {self._topic!r}"

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
            expected = min(limit, upto - scan.after)
            if len(rows) < expected or (rows and rows[-1][0] - scan.after != len(rows)):
                # Offsets are dense, and all lanes are ours.
                raise IncompatibleBrokerError(
                    f"{self._path}: topic {self._topic!r} is damaged: behind message "
                    f"{scan.after:,} some are missing, so the disk or another program changed "
                    "the file; restore it from a copy"
                )
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

    def _note_settled(self) -> None:
        # Whoever writes the watermarks advances them first. To do so with each settlement
        # would look at every lane, a message.
        if self._upkeep is None and self._reader.advance():
            self._upkeep = asyncio.get_running_loop().create_task(self._keep_up())

    # Writing ----------------------------------------------------------------------------

    async def _bury(self, rejected: Sequence[Settlement]) -> None:
        """Store dead letters. One that a crash brings here twice is kept once."""
        now_us = self._clock.now_us()
        held = [s for s in rejected if self._reader.holds(cast(LaneToken, s.token))]

        rows = [(s.reason, s.attempt, now_us, cast(LaneToken, s.token).offset) for s in held]
        await self._write(lambda connection: self._dead.bury(connection, self._table, rows))

    async def _write(self, work: Callable[[apsw.Connection], T], *, durable: bool = False) -> T:
        """Run ``work`` in a transaction; see "Design" for why most need no fsync."""
        self._unsynced = True
        result = await self._writer.write(work, durable=durable)
        # Whatever was committed before is older than this fsync.
        self._unsynced = not durable
        return result

    def _settle_all(self, connection: apsw.Connection) -> tuple[list[Watermark], int]:
        """Move every watermark to the end; return them, and how many were not ours."""
        last = one(
            connection, "SELECT last_offset FROM topic WHERE topic_id = ?", (self._topic_id,)
        )
        own = (self._subscription_id,)
        waiting = f"""
            SELECT m.lane, count(*), count(nullif(m.only_for, w.subscription_id))
            FROM {self._table} m JOIN watermark w ON w.lane = m.lane AND w.subscription_id = ?
            WHERE m.offset > w.offset GROUP BY m.lane
        """
        not_ours = 0
        for lane, number, of_others in select(connection, waiting, own):
            not_ours += of_others
            connection.execute(
                "UPDATE watermark SET settled = settled + ? WHERE subscription_id = ? AND lane = ?",
                (number, self._subscription_id, lane),
            )
        sql = "UPDATE watermark SET offset = ?, deaths = 0 WHERE subscription_id = ?"
        connection.execute(sql, (last, self._subscription_id))
        marks = "SELECT lane, offset, settled FROM watermark WHERE subscription_id = ?"
        return [Watermark(*row) for row in select(connection, marks, own)], not_ours

    async def _keep_up(self) -> None:
        """Write the watermarks a while after they moved; tidy up; stop when nothing moves."""
        try:
            while True:
                await self._until_watermarks_are_due()
                try:
                    wrote = await self._write_watermarks()
                    trimmed = self._idle and await self._trim_idle()
                except BrokenFileError:
                    return  # whoever settles or receives next is told
                except SQLiteFileError as error:
                    self._log.warning("watermarks are not written, messages may repeat: %s", error)
                    continue
                if not (wrote or trimmed or self._reader.advance()):
                    return
        finally:
            self._upkeep = None

    async def _until_watermarks_are_due(self) -> None:
        """Wait a while; but not for long as long as a sender waits for room."""
        due = self._clock.monotonic() + _WATERMARK_INTERVAL
        pause = _FIRST_LOOK_FOR_SENDERS
        while (left := due - self._clock.monotonic()) > 0:
            await self._clock.sleep(min(pause, left))
            if self._room_waker.anybody():
                return
            pause = _LOOK_FOR_SENDERS

    async def _count(self, lanes: frozenset[int]) -> None:
        """Write down that messages of these lanes are about to be handed over."""
        try:
            await self._write_watermarks(begin=lanes)
        except BrokenFileError:
            raise
        except SQLiteFileError as error:
            # A full disk, say. Consuming goes on, as it does without watermarks, but not
            # with a message that may have killed others.
            if self._reader.alone(lanes):
                raise
            self._log.warning("hand-overs are not counted, only this consumer's: %s", error)
            self._reader.counted(lanes)

    async def _write_watermarks(
        self,
        *,
        durable: bool = False,
        begin: Iterable[int] = (),
        let_go: Iterable[int] = (),
    ) -> bool:
        """Write what moved; return whether there was anything to write.

        Args:
            durable: Wait for the fsync of this and all that was written before.
            begin: Lanes to count a hand-over of, until they move or are let go of.
            let_go: Lanes that are about to be let go of.
        """
        reader = self._reader
        async with self._writing_marks:
            reader.advance()
            watermarks = reader.unwritten()
            # Asked anew: another receive may have counted them meanwhile.
            begin = reader.uncounted(begin)
            survived = reader.survived(let_go)
            begun = [(reader.next_deaths(lane), lane) for lane in begin]
            nothing = not (watermarks or begin or survived)
            if nothing and not (durable and self._unsynced):
                return False
            own = self._subscription_id

            def work(connection: apsw.Connection) -> None:
                connection.executemany(
                    """
                    UPDATE watermark
                    SET offset = ?, settled = ?, deaths = CASE settled WHEN ? THEN deaths ELSE 0 END
                    WHERE subscription_id = ? AND lane = ? AND offset < ?
                    """,
                    # Never back: a lane that was handed over may be further by now.
                    ((w.offset, w.settled, w.settled, own, w.lane, w.offset) for w in watermarks),
                )
                lane_is = "WHERE subscription_id = ? AND lane = ?"
                connection.executemany(
                    f"UPDATE watermark SET deaths = 0 {lane_is}", ((own, lane) for lane in survived)
                )
                # Behind the watermarks, which begin the count anew.
                connection.executemany(
                    f"UPDATE watermark SET deaths = ? {lane_is}",
                    ((deaths, own, lane) for deaths, lane in begun),
                )
                if nothing:
                    # A commit that changes nothing writes and syncs nothing, and earlier ones
                    # may wait for it. One that changes a row and changes it back does both.
                    sql = "UPDATE watermark SET settled = settled + ? WHERE subscription_id = ?"
                    connection.execute(sql, (1, own))
                    connection.execute(sql, (-1, own))

            await self._write(work, durable=durable)
            reader.written(watermarks)
            reader.counted(begin)
        if watermarks:
            self._room_waker.wake()
        return True

    async def _trim_idle(self) -> bool:
        first, done = self._trimmable(self._reads)
        if not 0 < first <= done - _TRIM_IDLE_ROWS:
            return False
        upto = min(done, first + _TRIM_IDLE_ROWS)
        await self._write(lambda connection: self._trim(connection, upto))
        return True
