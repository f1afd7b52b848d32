"""The queues of the memory driver: what the SQLite driver does, in dictionaries and heaps.

What is ready stands in one heap, in the order of the discipline; what is held or delayed in
another, by when it becomes ready. Rows that left are taken out of a heap when they come to
its top, and a heap that is mostly of such rows is built anew, so that everything costs a
logarithm and memory is bounded by what waits.
"""

import asyncio
import heapq
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, cast, final

from molva._base.clock import Clock
from molva._base.waiting import first_of
from molva.messaging.driver import (
    Action,
    Capabilities,
    DeadLetter,
    Outcome,
    Peeked,
    QueueStat,
    RawDelivery,
    Settlement,
    Token,
)
from molva.messaging.message import Message

__all__ = ["QUEUE_CAPABILITIES", "MemoryQueue", "Store", "wait_for_room"]

QUEUE_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="in-process",
    capacity="exact",
    survives=frozenset(),
    max_body_bytes=500_000_000,
    shared=False,
    holding="lease",
    disciplines=frozenset({"fifo", "lifo", "priority", "random"}),
    overflows=frozenset({"reject", "drop-oldest"}),
    delay=True,
    attempts="exact",
)


@final
@dataclass(slots=True, eq=False)
class _Row:
    """A message in the queue. ``due``: None while it is ready."""

    offset: int
    rank: tuple[int, int]
    message: Message
    stored_at_us: int
    due: float | None = None
    held: bool = False
    turn: int = 0
    attempt: int = 0


@final
class Store:
    """What a queue holds, whoever has it open."""

    def __init__(self, name: str, discipline: str) -> None:
        self.name: Final = name
        self.discipline: Final = discipline
        self.rows: Final[dict[int, _Row]] = {}  # by offset, ascending
        self.dead: Final[list[DeadLetter]] = []
        self.ends: Final[list[MemoryQueue]] = []
        self.room: Final[set[asyncio.Event]] = set()  # of senders that wait for it
        self.dropped = 0
        # All that was ever stored, where a test wants to look at it.
        self.sent: list[Message] | None = None
        self._ready: list[tuple[tuple[int, int], int]] = []
        self._waiting: list[tuple[float, int, int]] = []  # due, offset, turn
        self._last = 0
        self._rank = _rank_of(discipline)

    def add(self, message: Message, *, now: float, now_us: int) -> None:
        """Store a message."""
        if self.sent is not None:
            self.sent.append(message)
        self._last = offset = self._last + 1
        row = _Row(offset, self._rank(offset, message), message, now_us)
        self.rows[offset] = row
        if message.delay:
            self.put_off(row, now + message.delay)
        else:
            heapq.heappush(self._ready, (row.rank, offset))

    def put_off(self, row: _Row, due: float) -> None:
        """Let a row become ready at ``due``."""
        row.due = due
        heapq.heappush(self._waiting, (due, row.offset, row.turn))
        if len(self._waiting) > 64 + 2 * len(self.rows):
            self._waiting = [entry for entry in self._waiting if self._waits(entry)]
            heapq.heapify(self._waiting)

    def make_ready(self, row: _Row) -> None:
        """Let a row be ready now, at its old place in the order."""
        row.due, row.held = None, False
        heapq.heappush(self._ready, (row.rank, row.offset))

    def promote(self, now: float) -> None:
        """Make ready what is due."""
        waiting = self._waiting
        while waiting and (waiting[0][0] <= now or not self._waits(waiting[0])):
            entry = heapq.heappop(waiting)
            if self._waits(entry):
                self.make_ready(self.rows[entry[1]])

    def next_due(self) -> float | None:
        """Return when the next row becomes ready, after ``promote``."""
        return self._waiting[0][0] if self._waiting else None

    def take(self) -> _Row | None:
        """Take the next ready row."""
        while self._ready:
            _, offset = heapq.heappop(self._ready)
            row = self.rows.get(offset)
            if row is not None and row.due is None:
                return row
        return None

    def drop_oldest(self, number: int) -> int:
        """Drop the oldest rows that nobody holds; return how many."""
        chosen: list[int] = []
        for row in self.rows.values():
            if len(chosen) == number:
                break
            if not row.held:
                chosen.append(row.offset)
        for offset in chosen:
            del self.rows[offset]
        self.dropped += len(chosen)
        if len(self._ready) > 64 + 2 * len(self.rows):
            self._ready = [(r.rank, r.offset) for r in self.rows.values() if r.due is None]
            heapq.heapify(self._ready)
        return len(chosen)

    def wake(self) -> None:
        """Let every end that waits look again."""
        for end in self.ends:
            end.woken.set()

    def note_room(self) -> None:
        """Let every sender that waits for room look again."""
        for event in self.room:
            event.set()

    def _waits(self, entry: tuple[float, int, int]) -> bool:
        due, offset, turn = entry
        row = self.rows.get(offset)
        return row is not None and row.due == due and row.turn == turn


@final
class MemoryQueue:
    """Both ends of a queue in this process."""

    capabilities: Final = QUEUE_CAPABILITIES

    def __init__(
        self,
        store: Store,
        *,
        capacity: int | None,
        drops_oldest: bool,
        lease: float,
        clock: Clock,
    ) -> None:
        self._store = store
        self.capacity: Final = capacity
        self._drops_oldest = drops_oldest
        self.lease: Final = lease
        self._clock = clock
        self.woken: Final = asyncio.Event()
        self._closed = False
        self._held: dict[int, int] = {}
        store.ends.append(self)

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Store messages in their order."""
        store = self._store
        room = wanted = len(messages)
        if self.capacity is not None:
            free = self.capacity - len(store.rows)
            if self._drops_oldest and free < wanted:
                free += store.drop_oldest(min(wanted, self.capacity) - free)
            room = max(0, min(free, wanted))
        now, now_us = self._clock.monotonic(), self._clock.now_us()
        for message in messages[:room]:
            store.add(message, now=now, now_us=now_us)
        store.wake()
        return [Outcome.STORED] * room + [Outcome.FULL] * (wanted - room)

    async def wait_for_room(self, *, wait: float) -> bool:
        """Wait until a message fits."""
        return await wait_for_room(
            self._store.room, lambda: self._closed or self._has_room(), wait, self._clock
        )

    def _has_room(self) -> bool:
        return self.capacity is None or len(self._store.rows) < self.capacity

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        store, clock = self._store, self._clock
        deadline = clock.monotonic() + wait
        while not self._closed:
            self.woken.clear()
            now = clock.monotonic()
            store.promote(now)
            found: list[RawDelivery] = []
            while len(found) < limit and (row := store.take()) is not None:
                row.held = True
                row.turn += 1
                row.attempt += 1
                store.put_off(row, now + self.lease)
                self._held[row.offset] = row.turn
                token = (row.offset, row.turn)
                found.append(RawDelivery(row.message, row.attempt, token, row.stored_at_us))
            if found or now >= deadline:
                return found
            due = store.next_due()
            until = deadline if due is None else min(deadline, due)
            await first_of(clock.sleep(max(0.0, until - now)), self.woken.wait())
        return []

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs."""
        store = self._store
        now, now_us = self._clock.monotonic(), self._clock.now_us()
        outcomes = []
        for token, action, delay, reason, attempt in settlements:
            row = self._ours(token)
            if row is None:
                outcomes.append(Outcome.LEASE_LOST)
                continue
            outcomes.append(Outcome.SETTLED)
            if action is Action.ACK or action is Action.REJECT:
                del store.rows[row.offset]
                if action is Action.REJECT:
                    store.dead.append(
                        DeadLetter(
                            row.message,
                            reason,
                            attempt,
                            now_us,
                            f"queue {store.name}",
                            row.stored_at_us,
                        )
                    )
                continue
            row.attempt = attempt if action is Action.NACK else attempt - 1
            row.held = False
            if delay > 0:
                store.put_off(row, now + delay)
            else:
                store.make_ready(row)
        if any(settlement.gives_back for settlement in settlements):
            store.wake()
        store.note_room()
        return outcomes

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Let leases run for ``seconds`` from now."""
        now = self._clock.monotonic()
        outcomes = []
        for token in tokens:
            row = self._ours(token, forget=False)
            if row is not None:
                self._store.put_off(row, now + seconds)
            outcomes.append(Outcome.LEASE_LOST if row is None else Outcome.EXTENDED)
        return outcomes

    async def flush(self) -> None:
        """Nothing to do: there is nothing that could be outlived."""

    async def stat(self) -> QueueStat:
        """Return what the queue holds."""
        store = self._store
        store.promote(self._clock.monotonic())
        held = sum(row.held for row in store.rows.values())
        delayed = sum(row.due is not None for row in store.rows.values()) - held
        pending = len(store.rows)
        oldest = next(iter(store.rows.values()), None)
        return QueueStat(
            pending=pending,
            ready=pending - held - delayed,
            held=held,
            delayed=delayed,
            dead=len(store.dead),
            dropped=store.dropped,
            oldest_seconds=(
                None
                if oldest is None
                else max(0.0, (self._clock.now_us() - oldest.stored_at_us) / 1e6)
            ),
        )

    async def peek(self, limit: int) -> list[Peeked]:
        """Return what is ready in its order, then what is not, by when it will be."""
        self._store.promote(self._clock.monotonic())
        rows = self._store.rows.values()
        ready = sorted((row for row in rows if row.due is None), key=lambda row: row.rank)
        others = sorted((row for row in rows if row.due is not None), key=lambda row: row.due or 0)
        return [
            Peeked(
                row.message,
                "ready" if row.due is None else "held" if row.held else "delayed",
                row.attempt,
                row.stored_at_us,
            )
            for row in [*ready, *others][:limit]
        ]

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        return self._store.dead[:limit]

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Store dead letters once more, as messages that were never tried."""
        store = self._store
        wanted = [d for d in store.dead if ids is None or d.message.id in ids][:limit]
        now, now_us = self._clock.monotonic(), self._clock.now_us()
        for letter in wanted:
            store.dead.remove(letter)
            m = letter.message
            again = Message(m.body, m.id, m.key, m.headers, m.priority, ttl=m.ttl)
            store.add(again, now=now, now_us=now_us)
        store.wake()
        return len(wanted)

    async def purge(self, *, dead: bool) -> int:
        """Forget all messages, also those that somebody holds, or all dead letters."""
        gone: Collection[object] = self._store.dead if dead else self._store.rows
        number = len(gone)
        (self._store.dead if dead else self._store.rows).clear()
        self._store.note_room()
        return number

    async def close(self) -> None:
        """Give back what is held."""
        self._closed = True
        for offset, turn in self._held.items():
            row = self._store.rows.get(offset)
            if row is not None and row.held and row.turn == turn:
                row.attempt -= 1
                self._store.make_ready(row)
        self._store.ends.remove(self)
        self.woken.set()
        self._store.wake()
        self._store.note_room()

    def _ours(self, token: Token, *, forget: bool = True) -> _Row | None:
        """Return the row that a token names, if it is still held under it."""
        offset, turn = cast("tuple[int, int]", token)
        if forget and self._held.get(offset) == turn:
            del self._held[offset]
        row = self._store.rows.get(offset)
        return row if row is not None and row.held and row.turn == turn else None


async def wait_for_room(
    waiting: set[asyncio.Event], has_room: Callable[[], bool], wait: float, clock: Clock
) -> bool:
    """Wait up to ``wait`` seconds until there is room; return whether there is.

    Args:
        waiting: Where to leave an event, which is set whenever room was made.
        has_room: Tells whether a message fits now.
        wait: Seconds.
        clock: Where time comes from.
    """
    deadline = clock.monotonic() + wait
    made = asyncio.Event()
    waiting.add(made)
    try:
        while not has_room():
            left = deadline - clock.monotonic()
            if left <= 0:
                return False
            made.clear()
            await first_of(clock.sleep(left), made.wait())
        return True
    finally:
        waiting.discard(made)


def _rank_of(discipline: str) -> Callable[[int, Message], tuple[int, int]]:
    """Return what orders the rows of a queue: the smallest is taken first."""
    if discipline == "lifo":
        return lambda offset, message: (0, -offset)
    if discipline == "priority":
        return lambda offset, message: (-message.priority, offset)
    if discipline == "random":
        dice = random.Random()  # chance, no secret
        return lambda offset, message: (dice.getrandbits(62), offset)
    return lambda offset, message: (0, offset)
