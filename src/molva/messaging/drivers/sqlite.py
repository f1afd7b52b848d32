"""SQLite driver: durable topics in one file on a local disk.

URL:
    ``sqlite:///var/lib/molva/queue.db?topic=ratings&subscription=process``

    ``topic``, ``subscription``
        Names inside the file: a log, and one reader of it.
    ``lanes``
        Into how many lanes the keys of a new topic are spread, 1 to 62. Default 16. So
        many consumers of one subscription can work side by side.
    ``capacity``
        How many messages may wait in the slowest subscription. Default: no bound.
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
    At least once, oldest first in each lane. Survives kill and power: a send returns
    after its fsync. Any number of processes on one host may share the file; one that
    sends is fastest, because write locks are unfair. It cannot live on a network file
    system: WAL needs shared memory, and lanes need locks.

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

    A consumer with nothing to do waits on a named pipe, which senders write to after each
    commit: it wakes within a millisecond and costs nothing until then.

    The last offset stands in the topic's row, written once a batch. AUTOINCREMENT promises
    the same, and writes a second table for every single message.

    Deleting on receive is simpler and was rejected: it delivers at most once. A lease for
    each message was rejected for topics: it costs two writes a message, and gives no order
    to several consumers.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Final, final

import apsw

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva._base.sqlite_writer import SQLiteWriter, commit_on_loop
from molva.messaging._lanes import LaneReader, lane_of
from molva.messaging.driver import DeadLetter, Outcome, TopicStat
from molva.messaging.drivers._sqlite_file import (
    OPTIONS,
    FileOptions,
    QueueFile,
    SQLiteSide,
    one,
    translated,
)
from molva.messaging.drivers._sqlite_members import Members, Waker, lanes_folder
from molva.messaging.drivers._sqlite_subscription import SQLiteSubscription
from molva.messaging.message import Message
from molva.messaging.url import BrokerURL

__all__ = ["OPTIONS", "SQLiteTopic", "open_subscription", "open_topic"]

# Seconds between two looks at what can be deleted.
_TRIM_INTERVAL: Final = 1.0

_TAKE_OFFSETS: Final = """
    UPDATE topic SET last_offset = last_offset + ? WHERE topic_id = ? RETURNING last_offset
"""


async def open_topic(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "SQLiteTopic":
    """Open the sending side of the topic that the URL names."""
    options = FileOptions(url)
    with QueueFile(url, options) as file, translated():
        topic_id, lanes = file.find_topic(clock)
        on_loop = commit_on_loop(str(file.path.parent), options.commit)
        return SQLiteTopic(
            writer=SQLiteWriter(file.keep(), path=str(file.path), on_loop=on_loop),
            reads=file.open(),
            waker=Waker(lanes_folder(file.path)),
            topic_id=topic_id,
            lanes=lanes,
            capacity=options.capacity,
            clock=clock,
        )


async def open_subscription(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "SQLiteSubscription":
    """Open one consumer of the subscription that the URL names."""
    options = FileOptions(url)
    with QueueFile(url, options) as file, translated():
        topic_id, lanes = file.find_topic(clock)
        subscription_id = file.find_subscription(topic_id, clock)
        # See "Design": what a consumer writes needs no fsync.
        file.connection.pragma("synchronous", "normal")
        return SQLiteSubscription(
            writer=SQLiteWriter(file.keep(), path=str(file.path), on_loop=True),
            reads=file.open(),
            members=Members(lanes_folder(file.path), subscription_id),
            reader=LaneReader(max_open=options.max_open),
            topic_id=topic_id,
            subscription_id=subscription_id,
            lanes=lanes,
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
        waker: Waker,
        topic_id: int,
        lanes: int,
        capacity: int | None,
        clock: Clock,
    ) -> None:
        super().__init__(writer, reads, topic_id, lanes)
        self._waker = waker
        self.capacity: Final = capacity
        self._clock = clock
        self._insert = f"INSERT INTO {self._table} VALUES (?, ?, ?, ?, ?, ?, ?)"
        # What every subscription has settled, as last looked up. It only grows, so an old
        # value refuses too early, never too late; it is looked up again before refusing.
        self._settled = 0
        self._trim_from, self._trim_upto = 0, -1
        self._next_trim = clock.monotonic()

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Store messages in one commit, in their order."""
        with translated():
            stored = await self._writer.write(lambda connection: self._store(connection, messages))
        if stored:
            self._waker.wake()
        if stored == len(messages):
            return [Outcome.STORED] * stored
        return [Outcome.STORED] * stored + [Outcome.FULL] * (len(messages) - stored)

    async def stat(self) -> TopicStat:
        """Return what the topic holds."""
        with translated():
            return self._stat(self._clock)

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters of a subscription, oldest first."""
        with translated():
            return self._dead_letters(subscription, limit)

    async def close(self) -> None:
        """Release the file."""
        self._waker.close()
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
        return one(connection, _TAKE_OFFSETS, (number, self._topic_id)) - number

    def _rows(
        self, last: int, messages: Sequence[Message]
    ) -> Iterator[tuple[int, int, bytes, str | None, str | None, bytes, int]]:
        now_us = self._clock.now_us()
        lanes = self._lanes
        last_key, lane = None, 0
        for offset, message in enumerate(messages, last + 1):
            key = message.key
            if key is None or key != last_key:
                lane = lane_of(key, message.id, lanes)
                last_key = key
            headers = message.headers
            yield (
                offset,
                lane,
                message.id,
                key,
                json.dumps(dict(headers)) if headers else None,
                message.body,
                now_us,
            )

    def _room(self, connection: apsw.Connection, last: int, wanted: int) -> int:
        assert self.capacity is not None
        if last - self._settled + wanted > self.capacity:
            self._settled = one(
                connection,
                """
                SELECT coalesce(min(settled), 0) FROM (
                    SELECT s.start_offset + sum(w.settled) AS settled
                    FROM subscription s JOIN watermark w USING (subscription_id)
                    WHERE s.topic_id = ? GROUP BY s.subscription_id)
                """,
                (self._topic_id,),
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
