"""SQLite driver: durable topics and queues in one file on a local disk.

URL:
    ``sqlite:///var/lib/molva/queue.db?topic=ratings&subscription=process``

    ``topic``, ``subscription``; or ``queue``
        Names inside the file: a log, and one reader of it; or a queue.
    ``lanes``
        Into how many lanes the keys of a new topic are spread, 1 to 62. Default 16. So
        many consumers of one subscription can work side by side.
    ``capacity``
        How many messages may wait in the queue, or in the topic's slowest subscription.
        Default: no bound.
    ``lease``
        Seconds that a consumer may hold a queue's message before it comes again, unless it
        extends its lease. Default 30.
    ``start``
        Where a new subscription begins: ``earliest`` (default), the oldest message that
        is kept, or ``latest``, behind all that were stored so far.
    ``max_open``
        Messages that one consumer may hold and not have settled. Default 10000.
    ``commit``
        ``loop``, ``thread``, or ``auto`` (default), which measures an fsync to decide.
    ``vfs``
        Name of a registered SQLite VFS, for tests and for encryption.

Delivery:
    At least once; a topic oldest first in each lane, a queue in its discipline's order.
    Survives kill and power: a send returns after its fsync. Any number of processes on one
    host may share the file; one that sends is fastest, because write locks are unfair. It
    cannot live on a network file system: WAL needs shared memory, and lanes need locks.

Design:
    A topic is a log: one table, whose offsets are dense and never used again. A consumer
    owns lanes of it by file locks, which are free the moment its process dies
    (``_sqlite_members``). Acks advance a watermark for each lane (``_lanes``), and all of
    these are written in one small commit, at most four a second: consuming costs no write
    a message, and after a crash the tail comes again. A consumer's commits are not synced:
    a power cut takes the last of them together, watermarks and dead letters, never one of
    the middle, so that messages come again and are settled, or rejected, once more.

    Offsets are dense, so what waits is the last offset less what is settled, exact but for
    the acks of the last quarter of a second. A message below every watermark is deleted
    by the sender, some in each of its own commits, and by a consumer with nothing to do.

    A message that kills its consumer's process is found without a write for each message:
    the first hand-over in a lane is counted beside its watermark, which begins the count
    anew when more is settled. Behind two deaths without progress the lane is read in groups,
    behind a third one message at a time, and with each consumer that it was alone with it
    has one attempt more, so that it becomes a dead letter in the end (``_lanes``). How often
    and for when a message was nacked is not written down: a consumer that takes its lane
    over begins it at the first attempt, at once.

    A consumer with nothing to do waits on a named pipe, which senders write to after each
    commit: it wakes within a millisecond and costs nothing until then. A sender that waits
    for room does the same (``_sqlite_room``); a topic's consumer writes its watermarks
    within a few milliseconds as long as one does.

    The last offset stands in the topic's row, written once a batch. AUTOINCREMENT promises
    the same, and writes a second table for every single message.

    A queue is a table too. Taking a message does not delete it: it is marked as held, with
    an end to its lease and its turn counted up, and the turn is the token's epoch, so that a
    late settlement never touches what somebody else now holds. A consumer that died leaves
    nothing to clean up. Two partial indexes divide what is ready, in the order of the
    discipline, from what is held or delayed, by when it becomes ready: taking one costs the
    same whatever waits, and walks over nothing. What is taken and settled needs no fsync: a
    power cut takes the last of it, and messages come again.

    Leases and delays run on the machine's monotonic clock, which all processes share and no
    setting of the wall clock moves; it begins anew with each boot, so what stands in the
    file is carried over once (``shift_after_boot``).

    Every message carries a checksum, because SQLite's pages have none: a flipped bit is an
    error where it is read, never a wrong body.

    A dead letter of a topic is replayed through the log, marked as one subscription's only;
    the others count it as settled when they come to it.

    Deleting on receive is simpler and was rejected: it delivers at most once. A lease for
    each message was rejected for topics: it costs two writes a message, and gives no order
    to several consumers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, final

import apsw

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva._base.sqlite_writer import SQLiteWriter, commit_on_loop
from molva.messaging._lanes import LaneReader, lane_of
from molva.messaging.driver import DeadLetter, Outcome, TopicStat
from molva.messaging.drivers._sqlite_file import (
    QUEUE_CAPABILITIES,
    QUEUE_OPTIONS,
    TAKE_OFFSETS,
    TOPIC_CAPABILITIES,
    TOPIC_OPTIONS,
    FileOptions,
    QueueFile,
    SQLiteSide,
    checksum_of,
    facts,
    headers_text,
    one,
    translated,
)
from molva.messaging.drivers._sqlite_members import Members, Waker, lanes_folder, live_members
from molva.messaging.drivers._sqlite_queue import SQLiteQueue, shift_after_boot
from molva.messaging.drivers._sqlite_room import room_folder, wait_for_room
from molva.messaging.drivers._sqlite_subscription import SQLiteSubscription
from molva.messaging.errors import InUseError
from molva.messaging.message import Message
from molva.messaging.url import BrokerURL

__all__ = [
    "QUEUE_CAPABILITIES",
    "QUEUE_OPTIONS",
    "TOPIC_CAPABILITIES",
    "TOPIC_OPTIONS",
    "SQLiteTopic",
    "open_queue",
    "open_subscription",
    "open_topic",
]

# Seconds between two looks at what can be deleted.
_TRIM_INTERVAL: Final = 1.0


async def open_topic(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "SQLiteTopic":
    """Open the sending side of the topic that the URL names."""
    options = FileOptions(url)
    with QueueFile(url, options) as file, translated(file.path):
        topic_id, lanes = file.find_topic(clock)
        on_loop = commit_on_loop(str(file.path.parent), options.commit)
        return SQLiteTopic(
            writer=SQLiteWriter(file.keep(), path=str(file.path), on_loop=on_loop),
            reads=file.open(),
            path=file.path,
            waker=Waker(lanes_folder(file.path)),
            topic=url.topic or "",
            topic_id=topic_id,
            lanes=lanes,
            capacity=url.capacity,
            clock=clock,
        )


async def open_subscription(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "SQLiteSubscription":
    """Open one consumer of the subscription that the URL names."""
    options = FileOptions(url)
    with QueueFile(url, options) as file, translated(file.path):
        topic_id, lanes = file.find_topic(clock)
        subscription_id = file.find_subscription(topic_id, clock)
        # See "Design": what a consumer writes needs no fsync.
        file.connection.pragma("synchronous", "normal")
        return SQLiteSubscription(
            writer=SQLiteWriter(file.keep(), path=str(file.path), on_loop=True),
            reads=file.open(),
            path=str(file.path),
            members=Members(lanes_folder(file.path), subscription_id),
            waker=Waker(lanes_folder(file.path)),
            room_waker=Waker(room_folder(file.path)),
            reader=LaneReader(max_open=options.max_open),
            topic=url.topic or "",
            topic_id=topic_id,
            subscription=url.subscription or "",
            subscription_id=subscription_id,
            lanes=lanes,
            clock=clock,
        )


async def open_queue(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "SQLiteQueue":
    """Open both ends of the queue that the URL names."""
    options = FileOptions(url)
    with QueueFile(url, options) as file, translated(file.path):
        queue_id, discipline = file.find_queue(clock)
        shift_after_boot(file.connection, clock)
        on_loop = commit_on_loop(str(file.path.parent), options.commit)
        return SQLiteQueue(
            writer=SQLiteWriter(file.keep(), path=str(file.path), on_loop=on_loop),
            reads=file.open(),
            path=file.path,
            name=url.queue or "",
            queue_id=queue_id,
            discipline=discipline,
            capacity=url.capacity,
            drops_oldest=url.overflow == "drop-oldest",
            lease=options.lease,
            clock=clock,
        )


@final
class SQLiteTopic(SQLiteSide):
    """The sending side of a topic in a SQLite file."""

    def __init__(
        self,
        *,
        writer: SQLiteWriter,
        reads: apsw.Connection,
        path: Path,
        waker: Waker,
        topic: str,
        topic_id: int,
        lanes: int,
        capacity: int | None,
        clock: Clock,
    ) -> None:
        super().__init__(writer, reads, path=str(path), topic=topic, topic_id=topic_id, lanes=lanes)
        self._file = path
        self._folder = lanes_folder(path)
        self._waker = waker
        self._room_waker = Waker(room_folder(path))
        self.capacity: Final = capacity
        self._clock = clock
        self._insert = f"INSERT INTO {self._table} VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, ?)"
        # What every subscription has settled, as last looked up. It only grows, so an old
        # value refuses too early, never too late; it is looked up again before refusing.
        self._settled = 0
        self._trim_from, self._trim_upto = 0, -1
        self._next_trim = clock.monotonic()

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Store messages in one commit, in their order."""
        with translated(self._path):
            stored = await self._writer.write(lambda connection: self._store(connection, messages))
        if stored:
            self._waker.wake()
        if stored == len(messages):
            return [Outcome.STORED] * stored
        return [Outcome.STORED] * stored + [Outcome.FULL] * (len(messages) - stored)

    async def wait_for_room(self, *, wait: float) -> bool:
        """Wait until a message fits."""

        def has_room() -> bool:
            sql = "SELECT last_offset FROM topic WHERE topic_id = ?"
            last = one(self._reads, sql, (self._topic_id,))
            return self.capacity is None or self._room(self._reads, last, 1) > 0

        with translated(self._path):
            return await wait_for_room(
                self._file, f"t{self._topic_id}", has_room, wait=wait, clock=self._clock
            )

    async def stat(self) -> TopicStat:
        """Return what the topic holds."""
        with translated(self._path):
            return self._stat(self._clock)

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters of a subscription, oldest first."""
        with translated(self._path):
            dead = self._dead_letters_of(subscription)
            return [] if dead is None else dead.look(self._reads, limit)

    async def remove_subscription(self, subscription: str) -> bool:
        """Remove a subscription that nobody consumes."""
        with translated(self._path):
            dead = self._dead_letters_of(subscription)
            if dead is None:
                return False

            def work(connection: apsw.Connection) -> None:
                # Here, so that as little as possible lies between looking and removing. Who
                # joins in between is told when it takes its lanes (``_removed``).
                number = live_members(self._folder, dead.owner)
                if number:
                    raise InUseError(
                        f"{self._path}: {number} consumers of subscription {subscription!r} are "
                        "at work; stop them, then remove it"
                    )
                # Its id may be given to another, whose messages these never were. They stay,
                # as nobody's: offsets are dense. So do lock files, 0 bytes each: deleting one
                # that somebody is about to lock would let two lock "the same" file.
                sql = f"UPDATE {self._table} SET only_for = 0 WHERE only_for = ?"
                connection.execute(sql, (dead.owner,))
                for table in ("dead_letter", "watermark", "subscription"):
                    sql = f"DELETE FROM {table} WHERE subscription_id = ?"
                    connection.execute(sql, (dead.owner,))

            await self._writer.write(work)
            self._settled = 0
            self._room_waker.wake()
            return True

    async def close(self) -> None:
        """Release the file."""
        self._waker.close()
        self._room_waker.close()
        self._reads.close()
        await self._writer.close()

    def _store(self, connection: apsw.Connection, messages: Sequence[Message]) -> int:
        """Insert as many messages as there is room for; return how many."""
        last = self._take_offsets(connection, len(messages))
        if self.capacity is not None:
            room = self._room(connection, last, len(messages))
            if room < len(messages):
                self._take_offsets(connection, room - len(messages))
                messages = messages[:room]
        if messages:
            connection.executemany(self._insert, self._rows(last, messages))
        self._trim_some(connection, len(messages))
        return len(messages)

    def _take_offsets(self, connection: apsw.Connection, number: int) -> int:
        """Reserve so many offsets (or give some back); return the last one before them."""
        return one(connection, TAKE_OFFSETS, (number, self._topic_id)) - number

    def _rows(
        self, last: int, messages: Sequence[Message]
    ) -> Iterator[tuple[int, int, bytes, str | None, str | None, bytes, int, float | None, int]]:
        now_us = self._clock.now_us()
        lanes, pack = self._lanes, facts
        last_key, lane = None, 0
        for offset, message in enumerate(messages, last + 1):
            key = message.key
            if key is None or key != last_key:
                lane = lane_of(key, message.id, lanes)
                last_key = key
            id_, body = message.id, message.body
            headers = headers_text(message) if message.headers else None
            yield (
                offset,
                lane,
                id_,
                key,
                headers,
                body,
                now_us,
                message.ttl,
                checksum_of(id_, key, headers, body, pack(offset, lane, now_us, message.ttl, None)),
            )

    def _room(self, connection: apsw.Connection, last: int, wanted: int) -> int:
        assert self.capacity is not None
        if last - self._settled + wanted > self.capacity:
            self._settled = one(
                connection,
                # Without a subscription, what is kept waits for the first one.
                f"""
                SELECT coalesce(
                    (SELECT min(settled) FROM (
                        SELECT s.start_offset + sum(w.settled) AS settled
                        FROM subscription s JOIN watermark w USING (subscription_id)
                        WHERE s.topic_id = ? GROUP BY s.subscription_id)),
                    (SELECT min(offset) - 1 FROM {self._table}),
                    ?)
                """,
                (self._topic_id, last),
            )
        return max(0, self.capacity - (last - self._settled))

    def _trim_some(self, connection: apsw.Connection, stored: int) -> None:
        """Delete a few settled messages with each batch, more than it brought.

        Deleting all of them at once would hold up the senders; never deleting while
        there is load would fill the disk.
        """
        now = self._clock.monotonic()
        if now >= self._next_trim:
            self._next_trim = now + _TRIM_INTERVAL
            self._trim_from, self._trim_upto = self._trimmable(connection)
        if 0 < self._trim_from <= self._trim_upto:
            upto = min(self._trim_upto, self._trim_from + 2 * stored + 16)
            self._trim(connection, upto)
            self._trim_from = upto + 1
