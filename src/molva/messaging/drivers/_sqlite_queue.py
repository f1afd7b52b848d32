"""The queues of the SQLite driver; ``sqlite.py`` says why they are built this way."""

import asyncio
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final, cast, final

import apsw

from molva._base.clock import Clock
from molva._base.sqlite_file import transaction
from molva._base.sqlite_writer import SQLiteWriter
from molva._base.waiting import first_of
from molva.messaging.driver import (
    Action,
    DeadLetter,
    Outcome,
    Peeked,
    QueueStat,
    RawDelivery,
    Settlement,
    Token,
)
from molva.messaging.drivers._sqlite_file import (
    ORDERS,
    QUEUE_CAPABILITIES,
    DeadLetters,
    checksum_of,
    facts,
    headers_text,
    message_of,
    one,
    select,
    translated,
)
from molva.messaging.drivers._sqlite_members import Members, Waker, lanes_folder
from molva.messaging.drivers._sqlite_room import room_folder, wait_for_room
from molva.messaging.errors import IncompatibleBrokerError
from molva.messaging.message import Message

__all__ = ["SQLiteQueue", "shift_after_boot"]

# Seconds after which a consumer that waits looks for itself. Whoever stores or gives back
# wakes it; this is for what nobody saw, such as a sender that was killed before it could.
_LOOK: Final = 1.0

# Linux names each boot.
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

_READY: Final = 0
_HELD: Final = 1
_DELAYED: Final = 2


@final
class SQLiteQueue:
    """Both ends of a queue in a SQLite file."""

    capabilities: Final = QUEUE_CAPABILITIES

    def __init__(
        self,
        *,
        writer: SQLiteWriter,
        reads: apsw.Connection,
        path: Path,
        name: str,
        queue_id: int,
        discipline: str,
        capacity: int | None,
        drops_oldest: bool,
        lease: float,
        clock: Clock,
    ) -> None:
        self._writer = writer
        # Reads need no lock, but a connection of their own: the writer's may be inside a
        # transaction, in a thread that waits for another process.
        self._reads = reads
        self._path = path
        self._name = name
        self._queue_id = queue_id
        self._random = random.Random() if discipline == "random" else None  # no secret
        self.capacity: Final = capacity
        self._drops_oldest = drops_oldest
        self.lease: Final = lease
        self._clock = clock
        self._dead = DeadLetters(path, "queue_id", queue_id, f"queue {name}")
        self._folder = lanes_folder(path)
        self._waker = Waker(self._folder)
        self._room_waker = Waker(room_folder(path))
        # Made when this end first receives: a sender needs no pipe.
        self._members: Members | None = None
        self._woken = asyncio.Event()
        self._closed = False
        # What this end holds, to be given back when it closes.
        self._held: dict[int, int] = {}
        table = f"queue_{queue_id}"
        self._table = table
        order = ORDERS[discipline]
        self._order = order
        self._insert = f"""
            INSERT INTO {table} (offset, id, key, headers, body, priority, ttl, checksum,
                                 stored_at_us, state, due_us, place)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """
        self._is_ready = f"SELECT EXISTS (SELECT 1 FROM {table} WHERE state = 0)"
        self._next_due = f"SELECT min(due_us) FROM {table} WHERE state > 0"
        self._promote = f"UPDATE {table} SET state = 0 WHERE state > 0 AND due_us <= ?"
        self._choose = f"""
            SELECT offset, turn, attempt, id, key, headers, body, checksum, ttl, priority,
                   stored_at_us
            FROM {table} WHERE state = 0 ORDER BY {order} LIMIT ?
        """
        self._claim = (
            f"UPDATE {table} SET state = 1, due_us = ?, turn = ?, attempt = ? WHERE offset = ?"
        )
        still_ours = "WHERE offset = ? AND turn = ? AND state = 1"
        self._delete = f"DELETE FROM {table} {still_ours}"
        self._give = f"UPDATE {table} SET state = ?, due_us = ?, attempt = ? {still_ours}"
        self._extend = f"UPDATE {table} SET due_us = ? {still_ours}"
        self._is_ours = f"SELECT EXISTS (SELECT 1 FROM {table} {still_ours})"

    # Sending ----------------------------------------------------------------------------

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Store messages in one commit, in their order."""
        with translated(self._path):
            stored = await self._writer.write(
                lambda connection: self._store(connection, messages), durable=True
            )
        if stored:
            self._wake()
        if stored == len(messages):
            return [Outcome.STORED] * stored
        return [Outcome.STORED] * stored + [Outcome.FULL] * (len(messages) - stored)

    async def wait_for_room(self, *, wait: float) -> bool:
        """Wait until a message fits."""
        capacity = self.capacity
        with translated(self._path):
            return await wait_for_room(
                self._path,
                f"q{self._queue_id}",
                lambda: capacity is None or self._pending(self._reads) < capacity,
                wait=wait,
                clock=self._clock,
            )

    def _pending(self, connection: apsw.Connection) -> int:
        sql = "SELECT stored - settled FROM queue WHERE queue_id = ?"
        return one(connection, sql, (self._queue_id,))

    def _store(self, connection: apsw.Connection, messages: Sequence[Message]) -> int:
        """Insert as many messages as there is room for; return how many."""
        if self.capacity is not None:
            messages = messages[: self._room(connection, self.capacity, len(messages))]
        self._insert_all(connection, messages)
        return len(messages)

    def _insert_all(self, connection: apsw.Connection, messages: Sequence[Message]) -> None:
        stored = one(
            connection,
            "UPDATE queue SET stored = stored + ? WHERE queue_id = ? RETURNING stored",
            (len(messages), self._queue_id),
        )
        now_us, ticks = self._clock.now_us(), self._now_us()
        dice = self._random
        connection.executemany(
            self._insert,
            (
                (
                    offset,
                    m.id,
                    m.key,
                    headers := headers_text(m) if m.headers else None,
                    m.body,
                    m.priority,
                    m.ttl,
                    checksum_of(
                        m.id, m.key, headers, m.body, facts(offset, m.priority, now_us, m.ttl, None)
                    ),
                    now_us,
                    _DELAYED if m.delay else _READY,
                    ticks + round(m.delay * 1e6) if m.delay else 0,
                    0 if dice is None else dice.getrandbits(62),
                )
                for offset, m in enumerate(messages, stored - len(messages) + 1)
            ),
        )

    def _room(self, connection: apsw.Connection, capacity: int, wanted: int) -> int:
        """Return how many of ``wanted`` fit, after making room if that was asked for."""
        room = capacity - self._pending(connection)
        if self._drops_oldest and room < wanted:
            before = connection.total_changes()
            connection.execute(
                f"""
                DELETE FROM {self._table} WHERE offset IN (
                    SELECT offset FROM {self._table} WHERE state <> 1 ORDER BY offset LIMIT ?)
                """,
                (min(wanted, capacity) - room,),
            )
            dropped = connection.total_changes() - before
            connection.execute(
                "UPDATE queue SET settled = settled + ?, dropped = dropped + ? WHERE queue_id = ?",
                (dropped, dropped, self._queue_id),
            )
            room += dropped
        return max(0, min(room, wanted))

    # Receiving --------------------------------------------------------------------------

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        with translated(self._path):
            if self._members is None:
                self._members = Members(self._folder, f"q{self._queue_id}")
            deadline = self._clock.monotonic() + wait
            while True:
                if self._closed:
                    return []
                # Forget earlier wake-ups before looking: one that comes after this look
                # is then still there when we wait.
                self._woken.clear()
                self._members.drain_wake()
                found, due_us = await self._take(limit)
                now = self._clock.monotonic()
                if found or now >= deadline:
                    return found
                until = min(deadline, now + _LOOK)
                if due_us is not None:
                    until = min(until, due_us / 1e6)
                await self._wait_for_wake(max(0.0, until - now))

    async def _take(self, limit: int) -> tuple[list[RawDelivery], int | None]:
        """Return what was taken; where nothing was, also when something becomes ready."""
        now_us = self._now_us()
        due_us = cast("int | None", self._reads.execute(self._next_due).get)
        if (due_us is None or due_us > now_us) and not one(self._reads, self._is_ready, ()):
            return [], due_us  # an empty queue costs no write
        claiming = asyncio.ensure_future(
            self._writer.write(
                lambda connection: self._claim_some(connection, limit), durable=False
            )
        )
        try:
            rows = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The claim goes on to its end; what it took is given back at once.
            claiming.add_done_callback(self._abandon)
            raise
        found = []
        for offset, turn, attempt, *message, stored_at_us in rows:
            self._held[offset] = turn + 1
            found.append(
                RawDelivery(
                    self._message_of(offset, *message, stored_at_us),
                    attempt + 1,
                    (offset, turn + 1),
                    stored_at_us,
                )
            )
        return found, None

    def _claim_some(self, connection: apsw.Connection, limit: int) -> list[tuple[Any, ...]]:
        now_us = self._now_us()
        connection.execute(self._promote, (now_us,))
        rows = select(connection, self._choose, (limit,))
        self._check(rows)
        until = now_us + round(self.lease * 1e6)
        connection.executemany(
            self._claim,
            ((until, turn + 1, attempt + 1, offset) for offset, turn, attempt, *_ in rows),
        )
        return rows

    def _check(self, rows: list[tuple[Any, ...]]) -> None:
        """Cut off what stands behind a damaged row; raise where it is the first."""
        for place, (offset, _, _, *message) in enumerate(rows):
            try:
                self._message_of(offset, *message)
            except IncompatibleBrokerError:
                if place == 0:
                    raise
                del rows[place:]
                return

    def _message_of(self, offset: int, *row: Any) -> Message:
        id_, key, headers, body, checksum, ttl, priority, stored_at_us = row
        more = facts(offset, priority, stored_at_us, ttl, None)
        place = self._at(offset)
        return message_of(place, id_, key, headers, body, checksum, ttl, priority, more=more)

    def _abandon(self, claiming: "asyncio.Future[list[tuple[Any, ...]]]") -> None:
        if claiming.cancelled() or claiming.exception() is not None or self._closed:
            return
        for row in claiming.result():
            self._held[row[0]] = row[1] + 1
        returned = [
            Settlement((row[0], row[1] + 1), Action.RETURN, attempt=row[2] + 1)
            for row in claiming.result()
        ]
        if returned:
            task = asyncio.ensure_future(self.settle_batch(returned))
            _background.add(task)
            task.add_done_callback(_background.discard)

    async def _wait_for_wake(self, timeout: float) -> None:
        assert self._members is not None
        loop = asyncio.get_running_loop()
        descriptor = self._members.wake_descriptor
        loop.add_reader(descriptor, self._woken.set)
        try:
            await first_of(self._clock.sleep(timeout), self._woken.wait())
        finally:
            # Closing let go of the descriptor already, and its number may be another's.
            if not self._closed:
                loop.remove_reader(descriptor)

    # Settling ---------------------------------------------------------------------------

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs, all of them in one commit."""
        with translated(self._path):
            outcomes = await self._writer.write(
                lambda connection: self._settle(connection, settlements), durable=False
            )
        for settlement in settlements:
            offset, turn = cast("tuple[int, int]", settlement.token)
            if self._held.get(offset) == turn:
                del self._held[offset]
        if any(settlement.gives_back for settlement in settlements):
            self._wake()
        if not all(settlement.gives_back for settlement in settlements):
            self._room_waker.wake()
        return outcomes

    def _settle(
        self, connection: apsw.Connection, settlements: Sequence[Settlement]
    ) -> list[Outcome]:
        outcomes = []
        gone = 0
        execute, changes = connection.execute, connection.changes
        ticks = self._now_us()
        now_us = self._clock.now_us()
        for token, action, delay, reason, attempt in settlements:
            key = cast("tuple[int, int]", token)
            if action is Action.REJECT and one(connection, self._is_ours, key):
                self._dead.bury(connection, self._table, [(reason, attempt, now_us, key[0])])
            if action in (Action.ACK, Action.REJECT):
                execute(self._delete, key)
                settled = changes()
                gone += settled
            else:
                state = _DELAYED if delay > 0 else _READY
                due_us = ticks + round(delay * 1e6)
                handed = attempt if action is Action.NACK else attempt - 1
                execute(self._give, (state, due_us, handed, *key))
                settled = changes()
            outcomes.append(Outcome.SETTLED if settled else Outcome.LEASE_LOST)
        if gone:
            self._note_gone(connection, gone)
        return outcomes

    def _note_gone(self, connection: apsw.Connection, number: int) -> None:
        connection.execute(
            "UPDATE queue SET settled = settled + ? WHERE queue_id = ?", (number, self._queue_id)
        )

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Let leases run for ``seconds`` from now."""

        def work(connection: apsw.Connection) -> list[Outcome]:
            until = self._now_us() + round(seconds * 1e6)
            outcomes = []
            for token in tokens:
                connection.execute(self._extend, (until, *cast("tuple[int, int]", token)))
                lost = not connection.changes()
                outcomes.append(Outcome.LEASE_LOST if lost else Outcome.EXTENDED)
            return outcomes

        with translated(self._path):
            return await self._writer.write(work, durable=False)

    async def flush(self) -> None:
        """Wait for the fsync of all that was settled."""
        with translated(self._path):
            await self._writer.write(self._touch, durable=True)

    def _touch(self, connection: apsw.Connection) -> None:
        # A commit that changes nothing writes and syncs nothing. One that changes a row and
        # changes it back does both.
        self._note_gone(connection, 1)
        self._note_gone(connection, -1)

    # Looking ----------------------------------------------------------------------------

    async def stat(self) -> QueueStat:
        """Return what the queue holds."""
        now_us = self._now_us()
        with translated(self._path):
            [(pending, dead, dropped)] = select(
                self._reads,
                "SELECT stored - settled, dead, dropped FROM queue WHERE queue_id = ?",
                (self._queue_id,),
            )
            counts = dict(
                select(
                    self._reads,
                    f"""
                    SELECT state, count(*) FROM {self._table}
                    WHERE state > 0 AND due_us > ? GROUP BY state
                    """,
                    (now_us,),
                )
            )
            sql = f"SELECT stored_at_us FROM {self._table} ORDER BY offset LIMIT 1"
            oldest = cast("int | None", self._reads.execute(sql).get)
        held, delayed = counts.get(_HELD, 0), counts.get(_DELAYED, 0)
        age = None if oldest is None else max(0.0, (self._clock.now_us() - oldest) / 1e6)
        return QueueStat(pending, pending - held - delayed, held, delayed, dead, dropped, age)

    async def peek(self, limit: int) -> list[Peeked]:
        """Return what is ready in its order, then what is not, by when it will be."""
        sql = f"""
            SELECT offset, id, key, headers, body, checksum, ttl, priority, state, attempt,
                   stored_at_us
            FROM {self._table}
        """
        now_us = self._now_us()
        with translated(self._path):
            rows = select(
                self._reads, f"{sql} WHERE state = 0 ORDER BY {self._order} LIMIT ?", (limit,)
            )
            rows += select(
                self._reads,
                f"{sql} WHERE state > 0 ORDER BY due_us > ?, due_us LIMIT ?",
                (now_us, limit - len(rows)),
            )
        names = {_READY: "ready", _HELD: "held", _DELAYED: "delayed"}
        return [
            Peeked(
                self._message_of(row[0], *row[1:8], row[10]),
                cast(Any, names[row[8]]),
                row[9],
                row[10],
            )
            for row in rows
        ]

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        with translated(self._path):
            return self._dead.look(self._reads, limit)

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Store dead letters once more, as messages that were never tried."""

        def work(connection: apsw.Connection) -> int:
            rows = self._dead.chosen(connection, ids, limit)
            # Capacity was asked when they first came.
            self._insert_all(
                connection,
                [
                    message_of("", id_, key, headers, body, None, ttl, priority)
                    for _, id_, key, headers, body, ttl, priority in rows
                ],
            )
            self._dead.forget(connection, [row[0] for row in rows])
            return len(rows)

        with translated(self._path):
            replayed = await self._writer.write(work, durable=True)
        self._wake()
        return replayed

    async def purge(self, *, dead: bool) -> int:
        """Delete all messages, also those that somebody holds, or all dead letters."""

        def work(connection: apsw.Connection) -> int:
            if dead:
                return self._dead.forget_all(connection)
            before = connection.total_changes()
            connection.execute(f"DELETE FROM {self._table} WHERE true")
            number = connection.total_changes() - before
            self._note_gone(connection, number)
            return number

        with translated(self._path):
            number = await self._writer.write(work, durable=True)
        self._room_waker.wake()
        return number

    async def close(self) -> None:
        """Give back what is held, release the file."""
        with translated(self._path):
            try:
                if self._held and not self._writer.broken:
                    sql = f"UPDATE {self._table} SET state = 0, attempt = attempt - 1 "
                    held = list(self._held.items())
                    await self._writer.write(
                        lambda connection: connection.executemany(
                            sql + "WHERE offset = ? AND turn = ? AND state = 1", held
                        ),
                        durable=False,
                    )
                    self._wake()
            finally:
                self._closed = True
                self._woken.set()
                if self._members is not None:
                    asyncio.get_running_loop().remove_reader(self._members.wake_descriptor)
                    self._members.close()
                self._waker.close()
                self._room_waker.close()
                self._reads.close()
                await self._writer.close()

    def _wake(self) -> None:
        self._woken.set()
        self._waker.wake()

    def _now_us(self) -> int:
        return round(self._clock.monotonic() * 1e6)

    def _at(self, offset: int) -> str:
        return f"{self._path}: message {offset} of queue {self._name!r}"


# Tasks that nobody waits for; the loop itself keeps no strong reference.
_background: Final[set[asyncio.Future[Any]]] = set()


def shift_after_boot(connection: apsw.Connection, clock: Clock) -> None:
    """Carry leases and delays over to the monotonic clock of this boot.

    That clock is the same for all processes and no setting of the wall clock moves it, so
    leases run on it; but it begins anew with each boot. How far it stood from the wall
    clock is kept, and with it everything is moved, once.
    """
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    ahead_us = clock.now_us() - round(clock.monotonic() * 1e6)

    def found() -> tuple[str, int] | None:
        row = connection.execute("SELECT boot_id, wall_minus_monotonic_us FROM boot").fetchone()
        return cast("tuple[str, int] | None", row)

    def is_same(kept: tuple[str, int] | None) -> bool:
        # Where boots have no names, one whose clock stands where it stood is the same.
        return kept is not None and (
            kept[0] == boot_id if boot_id else abs(kept[1] - ahead_us) < 60_000_000
        )

    if is_same(found()):
        return
    with transaction(connection):
        kept = found()
        if is_same(kept):
            return  # another process was quicker
        if kept is not None:
            for (queue_id,) in select(connection, "SELECT queue_id FROM queue", ()):
                connection.execute(
                    f"UPDATE queue_{queue_id} SET due_us = due_us + ? WHERE state > 0",
                    (kept[1] - ahead_us,),
                )
        connection.execute("INSERT OR REPLACE INTO boot VALUES (1, ?, ?)", (boot_id, ahead_us))
