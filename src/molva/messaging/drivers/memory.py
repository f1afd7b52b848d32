"""Memory driver: topics and queues in this process, gone with it. For tests and for trying.

URL:
    ``memory://name?topic=ratings&subscription=process``

    ``name``
        Every URL of one name, in one process, reaches the same broker.
    ``topic``, ``subscription``; or ``queue``
        A log, and one reader of it; or a queue.
    ``lanes``, ``start``, ``max_open``; ``lease``
        As for SQLite.

Delivery:
    At least once, oldest first in each lane. Survives nothing: no kill, no power cut.

Design:
    The same lanes and watermarks as the SQLite driver, over a list instead of a table, so
    that it is a faithful fake: what passes on it passes there. Consumers in one process
    share the lanes by the order in which they joined. A watermark is written at once,
    because writing costs nothing here; a consumer that closes without settling leaves its
    tail to the next one, as elsewhere.

    A broker lives as long as anybody has it open, and then as long as it holds messages:
    a test that wants an empty one takes a name of its own.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, cast, final

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva._base.url import one_of, positive_integer, positive_number
from molva._base.waiting import first_of
from molva.messaging._lanes import (
    MAX_LANES,
    LaneReader,
    LaneToken,
    Watermark,
    lane_of,
)
from molva.messaging.driver import (
    Action,
    Capabilities,
    DeadLetter,
    Outcome,
    Peeked,
    RawDelivery,
    Settlement,
    SubscriptionStat,
    Token,
    TopicStat,
)
from molva.messaging.drivers._memory_queue import (
    QUEUE_CAPABILITIES,
    MemoryQueue,
    Store,
    wait_for_room,
)
from molva.messaging.errors import (
    InUseError,
    InvalidURLError,
    QueueNotFoundError,
    TopicNotFoundError,
)
from molva.messaging.message import Message
from molva.messaging.url import BrokerURL

__all__ = [
    "QUEUE_CAPABILITIES",
    "QUEUE_OPTIONS",
    "TOPIC_CAPABILITIES",
    "TOPIC_OPTIONS",
    "MemoryQueue",
    "MemorySubscription",
    "MemoryTopic",
    "open_queue",
    "open_subscription",
    "open_topic",
]

TOPIC_OPTIONS: Final = ("lanes", "start", "max_open")
QUEUE_OPTIONS: Final = ("lease",)

TOPIC_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="per-key",
    capacity="exact",
    survives=frozenset(),
    max_body_bytes=500_000_000,
    shared=False,
)

_START: Final = one_of("earliest", "latest")
_DEFAULT_LANES: Final = 16
_DEFAULT_MAX_OPEN: Final = 10_000
_DEFAULT_LEASE: Final = 30.0

# Offset, lane, message, when it was stored, and whose only it is: a replayed one is one
# subscription's.
_Row = tuple[int, int, Message, int, str | None]


@dataclass(slots=True)
class _Reading:
    """A subscription: its watermarks, its dead letters, who consumes it."""

    watermarks: dict[int, Watermark]
    start: int
    consumers: "list[MemorySubscription]" = field(default_factory=list)
    owners: "dict[int, MemorySubscription]" = field(default_factory=dict)
    dead: list[DeadLetter] = field(default_factory=list)

    @property
    def settled(self) -> int:
        return self.start + sum(mark.settled for mark in self.watermarks.values())


@dataclass(slots=True)
class _Log:
    """A topic. ``rows`` is ascending by offset."""

    lanes: int
    last: int = 0
    rows: list[_Row] = field(default_factory=list)
    readings: dict[str, _Reading] = field(default_factory=dict)
    room: set[asyncio.Event] = field(default_factory=set)  # of senders that wait for it
    # All that was ever stored, where a test wants to look at it: see ``molva.messaging.testing``.
    sent: list[Message] | None = None

    @property
    def waiting(self) -> int:
        """How many messages the slowest subscription has not settled."""
        return self.last - min((r.settled for r in self.readings.values()), default=0)

    def trim(self) -> None:
        """Forget what every subscription has settled, and tell who waits for room."""
        for event in self.room:
            event.set()
        if self.readings:
            done = min(
                mark.offset for r in self.readings.values() for mark in r.watermarks.values()
            )
            del self.rows[: bisect_right(self.rows, done, key=lambda row: row[0])]

    def stat(self, clock: Clock) -> TopicStat:
        found = {}
        for name, reading in self.readings.items():
            pending = self.last - reading.settled
            oldest = None
            if pending:
                lowest = min(mark.offset for mark in reading.watermarks.values())
                at = bisect_right(self.rows, lowest, key=lambda row: row[0])
                if at < len(self.rows):
                    oldest = max(0.0, (clock.now_us() - self.rows[at][3]) / 1e6)
            found[name] = SubscriptionStat(pending, len(reading.dead), oldest)
        return TopicStat(self.last, found)


_brokers: Final[dict[str, dict[str, _Log]]] = {}
_queues: Final[dict[str, dict[str, Store]]] = {}
# Names of brokers that keep what they were sent.
_recorded: Final[set[str]] = set()


def _open_log(url: BrokerURL) -> _Log:
    url.check_driver_options(TOPIC_OPTIONS)
    if url.topic is None:
        raise InvalidURLError(f"{url}: names no topic; add ?topic=ratings")
    # Both sides share a URL, so each refuses what the other would.
    url.option("max_open", positive_integer, None)
    url.option("start", _START, "earliest")
    lanes = url.option("lanes", positive_integer, None)
    if lanes is not None and lanes > MAX_LANES:
        raise InvalidURLError(f"memory: lanes={lanes} is refused; 1 to {MAX_LANES} is accepted")
    logs = _brokers.setdefault(url.host + url.path, {})
    if url.topic not in logs:
        if url.create == "never":
            raise TopicNotFoundError(
                f"memory: there is no topic {url.topic!r}, and create=never was asked"
            )
        sent: list[Message] | None = [] if url.host + url.path in _recorded else None
        logs[url.topic] = _Log(lanes or _DEFAULT_LANES, sent=sent)
    log = logs[url.topic]
    if lanes not in (None, log.lanes):
        raise InvalidURLError(
            f"memory: lanes={lanes} is refused; topic {url.topic!r} was made with {log.lanes}, "
            "which cannot change"
        )
    return log


async def open_topic(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "MemoryTopic":
    """Open the sending side of the topic that the URL names."""
    return MemoryTopic(_open_log(url), url.capacity, clock)


async def open_subscription(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "MemorySubscription":
    """Open one consumer of the subscription that the URL names."""
    if url.subscription is None:
        raise InvalidURLError(f"{url}: names no subscription; add &subscription=process")
    log = _open_log(url)
    reading = log.readings.get(url.subscription)
    if reading is None:
        if url.create == "never":
            raise TopicNotFoundError(
                f"memory: topic {url.topic!r} has no subscription {url.subscription!r}, and "
                "create=never was asked"
            )
        start = log.last
        if url.option("start", _START, "earliest") == "earliest":
            start -= len(log.rows)
        marks = {lane: Watermark(lane, start, 0) for lane in range(log.lanes)}
        reading = log.readings[url.subscription] = _Reading(marks, start)
    max_open = url.option("max_open", positive_integer, _DEFAULT_MAX_OPEN)
    return MemorySubscription(
        log,
        reading,
        LaneReader(max_open=max_open),
        clock,
        topic=url.topic or "",
        name=url.subscription,
    )


async def open_queue(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> MemoryQueue:
    """Open both ends of the queue that the URL names."""
    url.check_driver_options(QUEUE_OPTIONS)
    if url.queue is None:
        raise InvalidURLError(f"{url}: names no queue; add ?queue=mails")
    lease = url.option("lease", positive_number, _DEFAULT_LEASE)
    queues = _queues.setdefault(url.host + url.path, {})
    if url.queue not in queues:
        if url.create == "never":
            raise QueueNotFoundError(
                f"memory: there is no queue {url.queue!r}, and create=never was asked"
            )
        queues[url.queue] = Store(url.queue, url.discipline or "fifo")
        if url.host + url.path in _recorded:
            queues[url.queue].sent = []
    store = queues[url.queue]
    if url.discipline not in (None, store.discipline):
        raise InvalidURLError(
            f"memory: discipline={url.discipline} is refused; queue {url.queue!r} was made with "
            f"{store.discipline}, which cannot change"
        )
    return MemoryQueue(
        store,
        capacity=url.capacity,
        drops_oldest=url.overflow == "drop-oldest",
        lease=lease,
        clock=clock,
    )


@final
class MemoryTopic:
    """The sending side of a topic in this process."""

    capabilities: Final = TOPIC_CAPABILITIES

    def __init__(self, log: _Log, capacity: int | None, clock: Clock) -> None:
        self._log = log
        self.capacity: Final = capacity
        self._clock = clock

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Store messages in their order."""
        log = self._log
        room = len(messages)
        if self.capacity is not None:
            room = max(0, min(room, self.capacity - log.waiting))
        now_us = self._clock.now_us()
        if log.sent is not None:
            log.sent += messages[:room]
        for message in messages[:room]:
            log.last += 1
            lane = lane_of(message.key, message.id, log.lanes)
            log.rows.append((log.last, lane, message, now_us, None))
        for reading in log.readings.values():
            for consumer in reading.consumers:
                consumer.wake()
        return [Outcome.STORED] * room + [Outcome.FULL] * (len(messages) - room)

    async def wait_for_room(self, *, wait: float) -> bool:
        """Wait until a message fits."""
        log, capacity = self._log, self.capacity
        return await wait_for_room(
            log.room, lambda: capacity is None or log.waiting < capacity, wait, self._clock
        )

    async def stat(self) -> TopicStat:
        """Return what the topic holds."""
        return self._log.stat(self._clock)

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters of a subscription, oldest first."""
        reading = self._log.readings.get(subscription)
        return [] if reading is None else reading.dead[:limit]

    async def remove_subscription(self, subscription: str) -> bool:
        """Remove a subscription that nobody consumes."""
        reading = self._log.readings.get(subscription)
        if reading is None:
            return False
        if reading.consumers:
            raise InUseError(
                f"memory: {len(reading.consumers)} consumers of subscription {subscription!r} "
                "are at work; stop them, then remove it"
            )
        del self._log.readings[subscription]
        self._log.trim()
        return True

    async def close(self) -> None:
        """Nothing to release: the broker stays."""


@final
class MemorySubscription:
    """One consumer of a subscription in this process."""

    capabilities: Final = TOPIC_CAPABILITIES
    lease: Final = None  # it owns lanes, for as long as it lives

    def __init__(
        self,
        log: _Log,
        reading: _Reading,
        reader: LaneReader,
        clock: Clock,
        *,
        topic: str,
        name: str,
    ) -> None:
        self._log = log
        self._name = name
        self._origin = f"topic {topic}, subscription {name}"
        self._reading = reading
        self._reader = reader
        self._clock = clock
        self._woken = asyncio.Event()
        self._closed = False
        reading.consumers.append(self)
        self._wake_all()

    def wake(self) -> None:
        """Tell this consumer that something changed."""
        self._woken.set()

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        deadline = self._clock.monotonic() + wait
        while True:
            if self._closed:
                return []
            self._woken.clear()
            self._share_lanes()
            found = self._take(limit)
            now = self._clock.monotonic()
            if found or now >= deadline:
                return found
            due = self._reader.next_due()
            await self._wait(min(deadline, deadline if due is None else due) - now)

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs."""
        reader = self._reader
        now, now_us = self._clock.monotonic(), self._clock.now_us()
        was_full = reader.room == 0
        outcomes = []
        for settlement in settlements:
            token = cast(LaneToken, settlement.token)
            if settlement.action is Action.REJECT and reader.holds(token):
                row = self._row(token.offset)
                self._reading.dead.append(
                    DeadLetter(
                        row[2], settlement.reason, settlement.attempt, now_us, self._origin, row[3]
                    )
                )
            outcomes.append(reader.apply(settlement, now=now))
        reader.advance()
        self._write_watermarks()
        if reader.left():
            self._share_lanes()
        if was_full or any(s.gives_back for s in settlements):
            # There is something for a receive that waits meanwhile.
            self.wake()
        return outcomes

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        return self._reading.dead[:limit]

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Tell what is still held; a lane is owned without end."""
        holds = self._reader.holds
        return [
            Outcome.EXTENDED if holds(cast(LaneToken, token)) else Outcome.LEASE_LOST
            for token in tokens
        ]

    async def flush(self) -> None:
        """Nothing to do: there is nothing that could be outlived."""

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Store dead letters once more at the end of the log, for this subscription only."""
        dead, log = self._reading.dead, self._log
        wanted = [d for d in dead if ids is None or d.message.id in ids][:limit]
        now_us = self._clock.now_us()
        for letter in wanted:
            message = letter.message
            log.last += 1
            lane = lane_of(message.key, message.id, log.lanes)
            log.rows.append((log.last, lane, message, now_us, self._name))
            dead.remove(letter)
        for reading in log.readings.values():
            for consumer in reading.consumers:
                consumer.wake()
        return len(wanted)

    async def purge(self, *, dead: bool) -> int:
        """Settle all that waits, or forget all dead letters."""
        reading, log = self._reading, self._log
        if dead:
            number = len(reading.dead)
            reading.dead.clear()
            return number
        if len(reading.consumers) > 1:
            raise InUseError(
                f"memory: {len(reading.consumers) - 1} other consumers of subscription "
                f"{self._name!r} hold lanes; stop them, then purge"
            )
        self._share_lanes()
        self._write_watermarks()
        before = reading.settled
        for lane, mark in reading.watermarks.items():
            waiting = sum(row[1] == lane and row[0] > mark.offset for row in log.rows)
            mark = Watermark(lane, log.last, mark.settled + waiting)
            reading.watermarks[lane] = mark
            # What is open is forgotten: late settlements find another epoch.
            self._reader.disown(lane)
            self._reader.own(mark)
        log.trim()
        return reading.settled - before

    async def peek(self, limit: int) -> list[Peeked]:
        """Return what stands above the watermarks, oldest first."""
        found: list[Peeked] = []
        for offset, lane, message, stored_at_us, only_for in self._log.rows:
            if len(found) == limit:
                break
            if offset <= self._reading.watermarks[lane].offset or only_for not in (
                None,
                self._name,
            ):
                continue
            state = self._reader.state(lane, offset)
            if state != "settled":
                found.append(Peeked(message, state, 0 if state == "ready" else 1, stored_at_us))
        return found

    async def stat(self) -> SubscriptionStat:
        """Return what waits."""
        return self._log.stat(self._clock).subscriptions[self._name]

    async def close(self) -> None:
        """Give back what is held."""
        self._closed = True
        self.wake()
        self._reading.consumers.remove(self)
        for lane in self._reader.lanes:
            self._give_lane(lane)
        self._wake_all()

    def _share_lanes(self) -> None:
        reading, reader = self._reading, self._reader
        number = len(reading.consumers)
        rank = reading.consumers.index(self)
        for lane in range(self._log.lanes):
            meant = lane % number == rank
            if lane in reader.lanes:
                (reader.stay if meant else reader.leave)(lane)
            elif meant and lane not in reading.owners:
                reading.owners[lane] = self
                reader.own(reading.watermarks[lane])
        for lane in reader.left():
            self._give_lane(lane)
            self._wake_all()

    def _give_lane(self, lane: int) -> None:
        self._reader.disown(lane)
        del self._reading.owners[lane]

    def _wake_all(self) -> None:
        for consumer in self._reading.consumers:
            consumer.wake()

    def _write_watermarks(self) -> None:
        watermarks = self._reader.unwritten()
        for mark in watermarks:
            self._reading.watermarks[mark.lane] = mark
        self._reader.written(watermarks)
        if watermarks:
            self._log.trim()

    def _take(self, limit: int) -> list[RawDelivery]:
        reader, rows = self._reader, self._log.rows
        found = []
        for token in reader.due(self._clock.monotonic(), limit):
            row = self._row(token.offset)
            found.append(RawDelivery(row[2], token.attempt, token, row[3]))
        limit = min(limit - len(found), reader.room)
        while limit > 0 and (scan := reader.next_scan()) is not None:
            upto = self._log.last if scan.upto is None else scan.upto
            at = bisect_right(rows, scan.after, key=lambda row: row[0])
            taken: list[_Row] = []
            while at < len(rows) and rows[at][0] <= upto and len(taken) < limit:
                if scan.lanes >> rows[at][1] & 1:
                    taken.append(rows[at])
                at += 1
            end = taken[-1][0] if len(taken) == limit else upto
            tokens = reader.deliver(scan, [row[:2] for row in taken], end)
            others = False
            for token, (_, _, message, stored_at_us, only_for) in zip(tokens, taken, strict=True):
                if only_for is None or only_for == self._name:
                    found.append(RawDelivery(message, 1, token, stored_at_us))
                    limit -= 1
                else:
                    reader.settle(token)  # another subscription's replay
                    others = True
            if others:
                reader.advance()
            elif scan.upto is None or end < scan.upto:
                break
        # Lanes without a message of their own moved on as well.
        self._write_watermarks()
        return found

    def _row(self, offset: int) -> _Row:
        rows = self._log.rows
        return rows[bisect_right(rows, offset, key=lambda row: row[0]) - 1]

    async def _wait(self, seconds: float) -> None:
        """Wait for a wake-up, or until this clock has moved on by ``seconds``."""
        await first_of(self._clock.sleep(max(0.0, seconds)), self._woken.wait())
