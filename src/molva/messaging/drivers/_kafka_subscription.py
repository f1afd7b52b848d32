"""The receiving side of the Kafka driver; ``kafka.py`` says why it is built this way."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, cast, final

from confluent_kafka import KafkaError, KafkaException

from molva._base.clock import Clock
from molva._base.seldom import SeldomLog
from molva._base.waiting import first_of
from molva.messaging._lanes import LaneReader, Mark, PlainToken, Watermark
from molva.messaging.driver import (
    Action,
    Capabilities,
    DeadLetter,
    FirstDeliveries,
    Outcome,
    Peeked,
    RawDelivery,
    Settlement,
    SubscriptionStat,
    Token,
)
from molva.messaging.drivers._kafka_broker import Broker, explained
from molva.messaging.drivers._kafka_consumer import FENCED, Poller, Position
from molva.messaging.drivers._kafka_dead import DeadLetters, publish_all
from molva.messaging.drivers._kafka_options import Names
from molva.messaging.drivers._kafka_producer import Publisher
from molva.messaging.drivers._kafka_records import (
    message_of,
    messages_of,
    offset_of,
    partition_of,
    stored_at_us,
    stored_at_us_of,
    topic_of,
)
from molva.messaging.errors import InUseError, MessagingError, UnavailableError
from molva.messaging.message import Message

__all__ = ["KafkaSubscription"]

_logger: Final = logging.getLogger("molva.messaging")

# Seconds between two commits of positions. Shorter, and consuming costs the brokers more
# writes; longer, and more of the tail comes again after a crash.
_COMMIT_INTERVAL: Final = 0.1
# Seconds that a commit may take. One that took longer is tried again.
_COMMIT_TIMEOUT: Final = 5.0
# Seconds that closing waits for its last commit, and for the group to be left.
_CLOSE: Final = 3.0

# Seconds that an open waits for lanes after it has joined without any.
_SECOND_ROUND: Final = 1.0

# Records, and bytes of them, that wait here to be handed over. Fewer, and a fast consumer
# waits for the thread; more, and a slow one's memory grows.
_MOST_WAITING: Final = 4_000
_MOST_WAITING_BYTES: Final = 16_000_000

# Where in a token the attempt stands, and what we put behind it: Kafka is not asked again for
# what is given back, or becomes a dead letter.
_ATTEMPT: Final = 4
_MESSAGE: Final = 5
_STORED_AT: Final = 6

# In the metadata of a committed position: how many consumers in a row died behind it.
_DEATHS: Final = "molva deaths="


@final
@dataclass(slots=True)
class _Partition:
    """What is kept of a partition that is ours."""

    topic: str
    number: int
    waiting: deque[Any] = field(default_factory=deque)  # records, not yet handed over
    waiting_bytes: int = 0
    # By offset, what was given back, and when it was stored.
    again: dict[int, tuple[Message, int]] = field(default_factory=dict)
    paused: bool = False
    read_to: int = -1
    first: bool = True  # nothing was read of it yet


@final
class KafkaSubscription:
    """One consumer of a subscription."""

    lease: Final = None  # it owns lanes, for as long as it lives

    def __init__(
        self,
        broker: Broker,
        names: Names,
        *,
        partitions: int,
        capabilities: Capabilities,
        publisher: Publisher,
        reader: LaneReader,
        clock: Clock,
    ) -> None:
        url = broker.url
        self.capabilities: Final = capabilities
        self._broker = broker
        self._names = names
        self._number = partitions
        self._publisher = publisher
        self._reader = reader
        self._clock = clock
        self._origin = f"topic {url.topic}, subscription {url.subscription}"
        self._dead = DeadLetters(broker, names.dead, self._origin, clock)
        self._log = SeldomLog(_logger, clock)
        # By lane: that of a partition of the topic is even, that of the retry topic odd.
        self._partitions: dict[int, _Partition] = {}
        self._waiting = 0
        self._waiting_bytes = 0
        self._next_lane = 0
        self._upkeep: asyncio.Task[None] | None = None
        self._closed = False
        self._refused: MessagingError | None = None
        # Held from reading what is to be written until it is noted as written.
        self._committing = asyncio.Lock()
        # Set to make every receive that waits look again.
        self._woken = asyncio.Event()
        # Set when something was settled, for lanes that are about to go.
        self._settled = asyncio.Event()
        options = broker.options
        self._poller = Poller(
            options.consumer(names.group),
            [names.topic, names.retry],
            grace=options.grace,
            events=self,
        )

    async def join(self, *, timeout: float) -> None:
        """Wait until this consumer has joined its group, or for as long as ``timeout``.

        Who joins while others work on messages waits for them; that is no error.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        await asyncio.wait([self._poller.joined], timeout=timeout)
        # The first round may give nothing: lanes come in the next one, once others have let
        # go of them. Or there are more consumers than lanes.
        deadline = min(deadline, loop.time() + _SECOND_ROUND)
        while not self._partitions and self._refused is None and loop.time() < deadline:
            self._woken.clear()
            await self._wait(deadline - loop.time())
        if self._refused is not None:
            raise self._refused

    # Receiving --------------------------------------------------------------------------

    async def receive_batch(self, limit: int, *, wait: float) -> Sequence[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        self._broker.check_process()
        deadline = self._clock.monotonic() + wait
        while not self._closed:
            self._poller.hear()
            if self._refused is not None:
                raise self._refused
            await self._check_alive()
            self._woken.clear()
            reader = self._reader
            begin = self._to_count()
            if begin:
                await self._count(begin)  # and what is settled is written by the same commit
            elif reader.must_write:
                await self._commit()
            found = self._take(limit)
            now = self._clock.monotonic()
            if found or now >= deadline:
                return found
            if (reader.must_write or self._to_count()) and not self._woken.is_set():
                continue
            due = reader.next_due()
            await self._wait(min(deadline, deadline if due is None else due) - now)
        return []

    def _to_count(self) -> frozenset[int]:
        """Return the lanes to count before any message of them is handed over."""
        reader = self._reader
        waiting = [
            lane
            for lane in reader.uncounted(self._partitions)
            if self._partitions[lane].waiting and reader.allowed(lane, once_written=True)
        ]
        others = [lane for lane in waiting if not reader.alone([lane])]
        # Of all that comes alone one message is handed over at a time, and so one is counted.
        return frozenset(others or waiting[:1])

    def _take(self, limit: int) -> Sequence[RawDelivery]:
        reader = self._reader
        found: list[RawDelivery] = []
        for name in reader.due(self._clock.monotonic(), limit):
            message, stored = self._partitions[name.lane].again.pop(name.offset)
            token = (*name, message, stored)
            found.append(RawDelivery(message, name.attempt, token, stored))
        left = limit - len(found)
        tokens: list[PlainToken] = []
        lanes = [lane for lane, part in self._partitions.items() if part.waiting]
        # Each time another lane comes first: none waits behind one that is always full.
        self._next_lane += 1
        turn = self._next_lane % len(lanes) if lanes else 0
        for lane in lanes[turn:] + lanes[:turn]:
            if len(tokens) >= left:
                break
            if not reader.uncounted([lane]):
                number = min(left - len(tokens), reader.allowed(lane))
                if records := self._take_from(lane, number):
                    offsets = list(map(offset_of, records))
                    facts = messages_of(records), stored_at_us_of(records)
                    tokens += reader.deliver_of(lane, offsets, *facts)
        if not self._is_full():
            self._poller.room.set()
        attempts = [token[_ATTEMPT] for token in tokens]
        messages, stored_at = [token[_MESSAGE] for token in tokens], [t[_STORED_AT] for t in tokens]
        if not found and attempts.count(1) == len(attempts):
            return FirstDeliveries(messages, tokens, stored_at)
        return [*found, *map(RawDelivery, messages, attempts, tokens, stored_at)]

    def _take_from(self, lane: int, number: int) -> list[Any]:
        part = self._partitions[lane]
        number = min(number, len(part.waiting))
        if not number:
            return []
        # Their share of the bytes, not their own: what is left is right as soon as none is,
        # and nothing hangs on it that is worth a look at each.
        size = part.waiting_bytes * number // len(part.waiting)
        part.waiting_bytes -= size
        records = [part.waiting.popleft() for _ in range(number)]
        if not part.paused:
            self._waiting -= number
            self._waiting_bytes -= size
        elif not part.waiting:
            part.paused = False
            self._poller.resume([(part.topic, part.number)])
        return records

    async def _wait(self, seconds: float) -> None:
        if not self._woken.is_set():
            await first_of(self._clock.sleep(max(0.0, seconds)), self._woken.wait())

    # Settling ---------------------------------------------------------------------------

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs; dead letters are stored before this returns."""
        self._broker.check_process()
        await self._check_alive()
        rejected = [s for s in settlements if s.action is Action.REJECT]
        if rejected:
            await self._bury(rejected)
        now = self._clock.monotonic()
        wakes = self._reader.room == 0
        outcomes = []
        for settlement in settlements:
            outcome = self._reader.apply(settlement, now=now)
            outcomes.append(outcome)
            if settlement.gives_back:
                wakes = True
                if outcome is Outcome.SETTLED:
                    lane, _, offset, *_, message, stored = cast(PlainToken, settlement.token)
                    self._partitions[lane].again[offset] = message, stored
        self._note_settled(wakes=wakes)
        return outcomes

    async def ack_batch(self, tokens: Sequence[Token]) -> Sequence[int]:
        """Settle hand-overs as done; return the places of those that are lost."""
        self._broker.check_process()
        await self._check_alive()
        was_full = self._reader.room == 0
        lost = self._reader.settle_many(cast(Sequence[PlainToken], tokens))
        self._note_settled(wakes=was_full)
        return lost

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Tell what is still held; a lane is owned without end."""
        self._broker.check_process()
        await self._check_alive()
        holds = self._reader.holds
        return [
            Outcome.EXTENDED if holds(cast(PlainToken, token)) else Outcome.LEASE_LOST
            for token in tokens
        ]

    async def flush(self) -> None:
        """Return when the brokers have all positions."""
        await self._commit()

    async def _bury(self, rejected: Sequence[Settlement]) -> None:
        now_us = self._clock.now_us()
        letters = []
        for settlement in rejected:
            lane, _, offset, *_, message, stored = token = cast(PlainToken, settlement.token)
            if self._reader.holds(token):
                reason, attempt = settlement.reason, settlement.attempt
                letter = DeadLetter(message, reason, attempt, now_us, self._origin, stored)
                letters.append((f"@{lane}:{offset}", letter))
        if letters:
            await publish_all(self._broker, self._publisher, self._dead.records(letters))

    def _note_settled(self, *, wakes: bool) -> None:
        self._settled.set()
        # Anything may have waited for it: room, the lane, the next group.
        if wakes or self._waiting:
            self._woken.set()
        # Whoever commits advances the watermarks first: to do so with each settlement would
        # look at every lane each time.
        if self._upkeep is None and self._reader.advance():
            self._upkeep = asyncio.get_running_loop().create_task(self._keep_up())

    # What is kept -----------------------------------------------------------------------

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        return await self._dead.look(limit)

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Store dead letters in this subscription's own retry topic, then forget them."""
        return await self._dead.replay(self._publisher, self._names.retry, ids, limit)

    async def stat(self) -> SubscriptionStat:
        """Return what waits."""
        await self._commit()
        return await self._broker.stat(self._names, self._number, await self._dead.count())

    async def purge(self, *, dead: bool) -> int:
        """Settle all that waits, or forget all dead letters."""
        if dead:
            return await self._dead.purge(self._publisher)
        topics = {self._names.topic: self._number, self._names.retry: 1}
        others = await self._broker.members(self._names.group) - 1
        if others > 0 or len(self._partitions) < sum(topics.values()):
            raise InUseError(
                f"{self._broker.url}: {max(1, others)} other consumers hold lanes of this "
                "subscription; stop them, then purge"
            )
        ends = await self._broker.ends(topics)
        starts = await self._broker.ends(topics, earliest=True)
        async with self._committing:
            self._reader.advance()
            before = {m.watermark.lane: m.watermark.offset + 1 for m in self._reader.marks()}
            committed = await self._broker.committed(self._names.group, topics)
            positions = [(topic, partition, end, "") for (topic, partition), end in ends.items()]
            await self._poller.seek(positions)
            number = 0
            for topic, partition, end, _ in positions:
                lane = self._lane_of(topic, partition)
                began = before.get(lane, committed.get((topic, partition), 0))
                number += max(0, end - max(began, starts[topic, partition]))
                # What is open is forgotten: late settlements find another epoch.
                self._own(topic, partition, end, 0)
            await self._poller.commit(positions, timeout=_COMMIT_TIMEOUT)
        return number

    async def peek(self, limit: int) -> list[Peeked]:
        """Return what stands above the watermarks, oldest first."""
        await self._commit()
        topics = {self._names.topic: self._number, self._names.retry: 1}
        ends, positions = await asyncio.gather(
            self._broker.ends(topics), self._broker.committed(self._names.group, topics)
        )
        read = await self._broker.read(
            {at: (positions.get(at, 0), end) for at, end in ends.items()},
            # Those above a watermark that are settled are left out below.
            limit
            + self._reader.open
            + sum(len(part.again) for part in self._partitions.values())
            + 1_000,
        )
        read.sort(key=lambda record: (stored_at_us(record), record.offset()))
        found: list[Peeked] = []
        for record in read:
            lane = self._lane_of(record.topic(), record.partition())
            state = self._reader.state(lane, record.offset())
            if state != "settled" and len(found) < limit:
                attempts = 0 if state == "ready" else 1
                found.append(Peeked(message_of(record), state, attempts, stored_at_us(record)))
        return found

    async def close(self) -> None:
        """Commit, leave the group, let go of everything."""
        self._closed = True
        self._woken.set()
        self._settled.set()
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait([self._upkeep])
        try:
            await self._commit(let_go=self._reader.lanes, timeout=_CLOSE)
        except UnavailableError as error:
            self._log.warning(
                "%s: positions are not committed, messages repeat: %s", self._broker.url, error
            )
        await self._poller.close(timeout=_CLOSE)
        await self._publisher.close()
        self._broker.close()

    # Told by the thread that polls ------------------------------------------------------

    def on_records(self, records: list[Any]) -> None:
        """Note what was read."""
        # By the thousand: this is run for every message. Those of a partition come together.
        topics, retry = list(map(topic_of, records)), self._names.retry
        lanes = [2 * partition for partition in map(partition_of, records)]
        if retry in topics:
            lanes = [lane + (topic == retry) for lane, topic in zip(lanes, topics, strict=True)]
        begin = 0
        for lane, run in groupby(lanes):
            end = begin + len(list(run))
            if lane in self._partitions:  # or it went while this was on its way
                self._add(lane, records[begin:end])
            begin = end
        if self._is_full():
            self._poller.room.clear()
        self._woken.set()

    def _add(self, lane: int, records: list[Any]) -> None:
        """Let records of one lane wait to be handed over."""
        part = self._partitions[lane]
        offsets = list(map(offset_of, records))
        following = part.read_to + 1
        if offsets != list(range(following, following + len(offsets))):
            for place, offset in enumerate(offsets):
                if offset != part.read_to + 1:
                    before, part = part, self._look_at_gap(part, offset)
                    if part is not before:
                        records = records[place - len(offsets) :]
                part.read_to, part.first = offset, False
        part.read_to, part.first = offsets[-1], False
        part.waiting.extend(records)
        size = sum(map(len, records))
        part.waiting_bytes += size
        if not part.paused:
            self._waiting += len(records)
            self._waiting_bytes += size

    def on_owned(self, positions: Sequence[Position]) -> None:
        """Begin with partitions where they were committed."""
        for topic, partition, offset, metadata in positions:
            deaths = metadata.partition(_DEATHS)[2]
            lane = self._own(topic, partition, offset, int(deaths) if deaths.isdigit() else 0)
            if self._reader.alone([lane]):
                _logger.warning(
                    "%s: %s consumers in a row died with messages of partition %d; they are "
                    "handed over one at a time to find out which it was",
                    self._broker.url,
                    deaths,
                    partition,
                )
        self._woken.set()

    async def on_leaving(self, partitions: Sequence[tuple[str, int]]) -> list[Position]:
        """Hand over nothing more of these, wait a while for what is open, forget them."""
        lanes = [lane for at in partitions if (lane := self._lane_of(*at)) in self._partitions]
        for lane in lanes:
            self._reader.leave(lane)
            self._drop_waiting(self._partitions[lane])
        deadline = time.monotonic() + self._broker.options.grace
        while not (self._closed or set(lanes) <= set(self._reader.left())):
            self._settled.clear()
            rest = deadline - time.monotonic()
            if rest <= 0:
                break
            await first_of(asyncio.sleep(rest), self._settled.wait())
        self._reader.advance()
        marks = self._reader.marks(let_go=lanes)
        positions = [self._position(mark) for mark in marks if mark.watermark.lane in lanes]
        self._forget(lanes)
        return positions

    def on_lost(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Forget what is somebody else's."""
        self._forget(self._lane_of(*at) for at in partitions)
        self._settled.set()
        self._woken.set()

    def on_full(self) -> None:
        """Pause what cannot be handed over now, or everything."""
        full = [
            part
            for lane, part in self._partitions.items()
            if part.waiting and not part.paused and not self._reader.allowed(lane)
        ] or [part for part in self._partitions.values() if part.waiting and not part.paused]
        for part in full:
            part.paused = True
            self._waiting -= len(part.waiting)
            self._waiting_bytes -= part.waiting_bytes
        self._poller.pause([(part.topic, part.number) for part in full])
        if not self._is_full():
            self._poller.room.set()

    def on_error(self, error: KafkaError) -> None:
        """Say what is wrong; raise to whoever receives what does not pass by itself."""
        told = explained(self._broker.url, error, self._broker.options)
        if error.fatal() or error.code() in (
            KafkaError.TOPIC_AUTHORIZATION_FAILED,
            KafkaError.GROUP_AUTHORIZATION_FAILED,
        ):
            self._refused = told
            if not self._poller.joined.done():
                self._poller.joined.set_result(None)
            self._woken.set()
        self._log.warning("%s", told)

    # Lanes ------------------------------------------------------------------------------

    def _lane_of(self, topic: str, partition: int) -> int:
        return 2 * partition + (topic == self._names.retry)

    def _own(self, topic: str, partition: int, offset: int, deaths: int) -> int:
        lane = self._lane_of(topic, partition)
        self._forget([lane])
        # A position is the next offset to read, a watermark the last one that is settled.
        begin = max(-1, offset - 1)
        self._partitions[lane] = _Partition(topic, partition, read_to=begin)
        self._reader.own(Watermark(lane, begin, 0), deaths=deaths)
        return lane

    def _look_at_gap(self, part: _Partition, offset: int) -> _Partition:
        """Say what a record means that is not the next one."""
        if offset <= part.read_to:
            # The topic was made anew, or lost its end with a leader that was not in sync.
            # Nothing that is known of it holds any more.
            _logger.error(
                "%s: partition %d of %s went back to offset %d; what was settled behind it comes "
                "again",
                self._broker.url,
                part.number,
                part.topic,
                offset,
            )
            return self._partitions[self._own(part.topic, part.number, offset, 0)]
        if part.first and part.read_to >= 0:
            _logger.error(
                "%s: offsets %d to %d of partition %d were not there any more: messages that the "
                "topic's retention deleted unread, unless it is compacted or has transactions",
                self._broker.url,
                part.read_to + 1,
                offset - 1,
                part.number,
            )
        return part

    def _forget(self, lanes: Iterable[int]) -> None:
        """Forget lanes. Tokens of them are stale from now on."""
        for lane in lanes:
            part = self._partitions.pop(lane, None)
            if part is not None:
                self._drop_waiting(part)
                self._reader.disown(lane)

    def _drop_waiting(self, part: _Partition) -> None:
        if not part.paused:
            self._waiting -= len(part.waiting)
            self._waiting_bytes -= part.waiting_bytes
        part.waiting.clear()
        part.waiting_bytes = 0
        if not self._is_full():
            self._poller.room.set()

    def _is_full(self) -> bool:
        return self._waiting > _MOST_WAITING or self._waiting_bytes > _MOST_WAITING_BYTES

    # Positions --------------------------------------------------------------------------

    def _position(self, mark: Mark) -> Position:
        part = self._partitions[mark.watermark.lane]
        metadata = f"{_DEATHS}{mark.deaths}" if mark.deaths else ""
        return part.topic, part.number, mark.watermark.offset + 1, metadata

    async def _keep_up(self) -> None:
        """Commit a while after something was settled; stop when nothing moves."""
        try:
            while True:
                await asyncio.sleep(_COMMIT_INTERVAL)
                try:
                    if not await self._commit():
                        return
                except UnavailableError as error:
                    self._log.warning(
                        "%s: positions are not committed, messages may repeat: %s",
                        self._broker.url,
                        error,
                    )
        finally:
            self._upkeep = None

    async def _count(self, lanes: frozenset[int]) -> None:
        """Write down that messages of these lanes are about to be handed over."""
        try:
            await self._commit(begin=lanes)
        except UnavailableError as error:
            # Consuming goes on, as it does without positions, but not with a message that
            # may have killed others.
            if self._reader.alone(lanes):
                raise
            self._log.warning(
                "%s: hand-overs are not counted, only this consumer's: %s", self._broker.url, error
            )
            self._reader.counted(lanes)

    async def _commit(
        self,
        *,
        begin: Iterable[int] = (),
        let_go: Iterable[int] = (),
        every: bool = False,
        timeout: float = _COMMIT_TIMEOUT,
    ) -> bool:
        """Commit what moved, or ``every`` lane; return whether there was anything.

        Raises:
            UnavailableError: The brokers did not take it, or did not answer.
        """
        async with self._committing:
            self._reader.advance()
            marks = self._reader.marks(begin=begin, let_go=let_go, every=every)
            if not marks:
                return False
            try:
                await self._poller.commit([self._position(m) for m in marks], timeout=timeout)
            except KafkaException as error:
                if error.args[0].code() in FENCED:
                    self._lose_all()
                    return True
                raise explained(self._broker.url, error.args[0], self._broker.options) from error
            except TimeoutError as error:
                raise UnavailableError(
                    f"{self._broker.url}: a commit was not answered within {timeout:g} s"
                ) from error
            self._reader.wrote(marks, begin=begin)
        return True

    async def _check_alive(self) -> None:
        """After this process stood still for long, ask Kafka whether its lanes are still its own.

        Otherwise it would go on with them until a heartbeat is answered: a moment in which
        two consumers work on one lane. Kafka takes a position only from who is a member.
        """
        if not self._poller.stood_still or not self._partitions:
            return
        self._log.warning("%s: this process stood still for long", self._broker.url)
        await self._commit(every=True)
        self._poller.stood_still = False

    def _lose_all(self) -> None:
        """Kafka has given our lanes to others; the thread is about to hear of it too."""
        self.on_lost([(part.topic, part.number) for part in self._partitions.values()])
