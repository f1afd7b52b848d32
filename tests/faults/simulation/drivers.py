"""The broker's clients: what a driver for it would be, over the project's own protocol.

``LogSubscription`` reads lanes with the project's ``LaneReader``, as every driver whose
consumers own lanes must; ``LeasedQueue`` holds each message under a lease. Both are written as
one for a real broker would be, so that what passes on them says something about such drivers.
"""

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, cast, final

from molva._base.clock import Clock
from molva._base.waiting import first_of
from molva.messaging import Message, MessagingError
from molva.messaging._lanes import LaneReader, LaneToken, Scan, Watermark
from molva.messaging.driver import (
    Action,
    Capabilities,
    DeadLetter,
    Outcome,
    Peeked,
    QueueStat,
    RawDelivery,
    Settlement,
    SubscriptionStat,
    Token,
    TopicStat,
)
from tests.faults.simulation.broker import Broker, Row
from tests.faults.simulation.loop import Process

__all__ = ["LeasedQueue", "LogSubscription", "LogTopic"]

# Seconds between two writes of the watermarks, and between two looks at who else consumes.
_WATERMARK_INTERVAL: Final = 0.25
_SHARE_INTERVAL: Final = 0.5

_MAX_OPEN: Final = 1_000


def _capabilities(broker: Broker) -> Capabilities:
    plan = broker.plan
    return Capabilities(
        delivery="at-least-once",
        ordering="per-key" if plan.ordered else "none",
        capacity="exact" if plan.capacity else "none",
        survives=frozenset({"kill", "power"} if plan.power_safe else {"kill"}),
        max_body_bytes=1_000_000,
        holding=plan.holding,
        delay=plan.holding == "lease",
        attempts="exact" if plan.holding == "lease" else "approximate",
    )


class _Side:
    """What every client of the broker has."""

    def __init__(self, broker: Broker, process: Process, clock: Clock) -> None:
        self._broker = broker
        self._process = process
        self._clock = clock
        self.capabilities: Final = _capabilities(broker)
        self.capacity: Final = broker.plan.capacity

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Store messages in their order."""
        return await self._broker.ask(
            f"send {len(messages)}", lambda: self._store(messages), stores=True
        )

    def _store(self, messages: Sequence[Message]) -> list[Outcome]:
        broker = self._broker
        outcomes = []
        for message in messages:
            if self.capacity is not None and broker.pending >= self.capacity:
                outcomes.append(Outcome.FULL)
                broker.count("full")
                continue
            broker.do("store", message, self._clock.now_us())
            outcomes.append(Outcome.STORED)
        broker.wake()
        return outcomes

    async def dead_letters(self, *arguments: object) -> list[DeadLetter]:
        """Return all dead letters."""
        return list(self._broker.state.dead.values())

    async def flush(self) -> None:
        """Return when what was settled is written; here nobody depends on it."""

    async def peek(self, limit: int) -> list[Peeked]:
        """Nobody peeks here."""
        return []

    async def purge(self, *, dead: bool) -> int:
        """Nobody purges here."""
        return 0

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Nobody sends back here."""
        return 0


@final
class LogTopic(_Side):
    """The sending side of a log."""

    async def stat(self) -> TopicStat:
        """Return what waits."""
        stat = SubscriptionStat(self._broker.pending, len(self._broker.state.dead), None)
        return TopicStat(len(self._broker.state.rows), {"process": stat})

    async def remove_subscription(self, subscription: str) -> bool:
        """Nobody removes it here."""
        return False

    async def close(self) -> None:
        """Nothing to release."""


@final
class LogSubscription(_Side):
    """One consumer of a log: lanes that it owns, watermarks that it writes now and then."""

    lease: Final = None

    def __init__(self, broker: Broker, process: Process, clock: Clock, member: int) -> None:
        super().__init__(broker, process, clock)
        self._member = member
        self._reader = LaneReader(max_open=_MAX_OPEN)
        self._generations: dict[int, int] = {}
        self._messages: dict[int, tuple[Message, int]] = {}
        self._next_share = 0.0
        self._woken = asyncio.Event()
        self._writing = asyncio.Lock()
        self._sharing = asyncio.Lock()
        self._upkeep: asyncio.Task[None] | None = None
        self._closed = False

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        deadline = self._clock.monotonic() + wait
        while not self._closed:
            await self._share_lanes()
            self._woken.clear()
            if self._reader.must_write:
                await self._write_marks()
            found, uncounted = await self._take(limit)
            if not found:
                if uncounted:
                    await self._write_marks(begin=uncounted)
                    continue
                if self._reader.must_write:
                    continue
            now = self._clock.monotonic()
            if found or now >= deadline:
                return found
            due = self._reader.next_due()
            until = min(deadline, self._next_share, deadline if due is None else due)
            await first_of(self._clock.sleep(max(0.001, until - now)), self._woken.wait())
        return []

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs; dead letters are stored before this returns."""
        reader = self._reader
        rejected = [
            s
            for s in settlements
            if s.action is Action.REJECT and reader.holds(cast(LaneToken, s.token))
        ]
        if rejected:
            await self._broker.ask("bury", lambda: self._bury(rejected))
        now = self._clock.monotonic()
        outcomes = [reader.apply(settlement, now=now) for settlement in settlements]
        if reader.advance() and self._upkeep is None:
            self._upkeep = asyncio.get_running_loop().create_task(self._keep_up())
        self._woken.set()
        return outcomes

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Tell what is still held, as far as this consumer knows."""
        return [
            Outcome.EXTENDED if self._reader.holds(cast(LaneToken, t)) else Outcome.LEASE_LOST
            for t in tokens
        ]

    async def stat(self) -> SubscriptionStat:
        """Return what waits."""
        return SubscriptionStat(self._broker.pending, len(self._broker.state.dead), None)

    async def close(self) -> None:
        """Write the watermarks, free the lanes."""
        self._closed = True
        self._woken.set()
        if self._upkeep is not None:
            self._upkeep.cancel()
        if not self._broker.ended:
            with contextlib.suppress(MessagingError):  # what is unwritten comes again
                await self._write_marks(let_go=self._reader.lanes)
            self._broker.leave(self._member)

    # Lanes ------------------------------------------------------------------------------

    async def _share_lanes(self) -> None:
        now = self._clock.monotonic()
        if now < self._next_share and not self._reader.left():
            return
        async with self._sharing:
            self._next_share = now + _SHARE_INTERVAL
            left = self._reader.left()
            if left:
                self._reader.advance()
                await self._write_marks(let_go=left)
                left = [lane for lane in left if lane in self._reader.left()]
            meant, owned = await self._broker.ask("share", lambda: self._share(left))
            reader = self._reader
            for lane in reader.lanes:
                if owned.get(lane, (0,))[0] != self._generations[lane]:
                    reader.disown(lane)  # lost, or let go of
                elif lane in meant:
                    reader.stay(lane)
                else:
                    reader.leave(lane)
            for lane, (generation, offset, settled, deaths) in owned.items():
                if lane not in reader.lanes:
                    self._generations[lane] = generation
                    reader.own(Watermark(lane, offset, settled), deaths=deaths)

    def _share(self, left: Iterable[int]) -> tuple[set[int], dict[int, tuple[int, int, int, int]]]:
        broker = self._broker
        broker.meet(self._member, self._process, self._woken.set)
        session = broker.sessions.get(self._member)
        if session is None:
            return set(), {}  # killed while this was on its way
        for lane in left:
            if session.lanes.get(lane) == self._generations[lane]:
                del session.lanes[lane]
                broker.wake()
        return broker.meant(self._member), broker.share(self._member)

    async def _take(self, limit: int) -> tuple[list[RawDelivery], frozenset[int]]:
        reader = self._reader
        found = []
        for token in reader.due(self._clock.monotonic(), limit):
            message, stored_at_us = self._messages[token.offset]
            found.append(RawDelivery(message, token.attempt, token, stored_at_us))
        for next_scan, most in reader.ways:
            room = min(limit - len(found), reader.room, most)
            if room <= 0:
                break
            scan = next_scan()
            if scan is None:
                continue
            rows, end = await self._broker.ask("fetch", partial(self._fetch, scan, room))
            if self._closed or scan != next_scan():
                break  # lanes came and went meanwhile: what was read belongs to nobody
            uncounted = reader.uncounted(row.lane for row in rows)
            if uncounted:
                return found, uncounted
            tokens = reader.deliver(scan, [(row.offset, row.lane) for row in rows], end)
            for token, row in zip(tokens, rows, strict=True):
                self._messages[row.offset] = (row.message, row.stored_at_us)
                found.append(RawDelivery(row.message, token.attempt, token, row.stored_at_us))
                self._broker.handed_over(row)
        return found, frozenset()

    def _fetch(self, scan: Scan, limit: int) -> tuple[Sequence[Row], int]:
        last = len(self._broker.state.rows)
        upto = last if scan.upto is None else scan.upto
        rows = self._broker.rows_between(scan.after, upto, scan.lanes, limit)
        return rows, rows[-1].offset if len(rows) == limit else max(scan.after, upto)

    # Writing ----------------------------------------------------------------------------

    async def _keep_up(self) -> None:
        try:
            while True:
                await self._clock.sleep(_WATERMARK_INTERVAL)
                try:
                    if not await self._write_marks():
                        return
                except MessagingError:
                    if self._broker.ended:
                        return
        finally:
            self._upkeep = None

    async def _write_marks(self, *, begin: Iterable[int] = (), let_go: Iterable[int] = ()) -> bool:
        reader = self._reader
        async with self._writing:
            marks = reader.unwritten()
            begin = reader.uncounted(begin)
            survived = reader.survived(let_go)
            deaths = dict.fromkeys(survived, 0) | {n: reader.next_deaths(n) for n in sorted(begin)}
            if not (marks or deaths):
                return False
            # What only counts may not be forgotten: a broker that forgets it forgets a death.
            nothing: set[int] = set()
            generations = dict(self._generations)
            lost = await self._broker.ask(
                "mark",
                lambda: self._mark(marks, deaths, generations),
                forgettable=None if begin else nothing,
            )
            reader.written(marks)
            reader.counted(begin)
            for lane in lost & reader.lanes:
                reader.disown(lane)
        return True

    def _mark(
        self,
        marks: Iterable[Watermark],
        deaths: Mapping[int, int],
        generations: Mapping[int, int],
    ) -> set[int]:
        broker = self._broker
        lost = set()

        def ours(lane: int) -> bool:
            if broker.owns(self._member, lane, generations[lane]):
                return True
            lost.add(lane)
            broker.count("fenced")
            return False

        for mark in marks:
            if ours(mark.lane):
                broker.do("mark", *mark)
        for lane, number in deaths.items():
            if ours(lane):
                broker.do("deaths", lane, number)
        return lost

    def _bury(self, rejected: Iterable[Settlement]) -> None:
        for settlement in rejected:
            offset = cast(LaneToken, settlement.token).offset
            message, stored_at_us = self._messages[offset]
            letter = DeadLetter(
                message, settlement.reason, settlement.attempt, self._clock.now_us(), "log",
                stored_at_us,
            )  # fmt: skip
            self._broker.do("bury", offset, letter)


@final
class LeasedQueue(_Side):
    """Both ends of a queue."""

    def __init__(self, broker: Broker, process: Process, clock: Clock, member: int) -> None:
        super().__init__(broker, process, clock)
        self.lease: Final = broker.plan.lease
        self._woken = asyncio.Event()
        self._closed = False
        self._member = member
        self._held: dict[int, Token] = {}

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        deadline = self._clock.monotonic() + wait
        while not self._closed:
            self._woken.clear()
            taking = asyncio.ensure_future(
                self._broker.ask(f"take {limit}", lambda: self._take(limit))
            )
            try:
                found, due = await asyncio.shield(taking)
            except asyncio.CancelledError:
                taking.add_done_callback(self._give_back)
                raise
            now = self._clock.monotonic()
            if found or now >= deadline:
                return found
            until = deadline if due is None else min(deadline, due)
            await first_of(self._clock.sleep(max(0.001, until - now)), self._woken.wait())
        return []

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs."""
        # Only done work may be forgotten: it is done again, which the ledger notices. Word of
        # an attempt that failed is not: the next one would be counted as the same.
        acks = all(s.action is Action.ACK for s in settlements)
        return await self._broker.ask(
            f"settle {len(settlements)}",
            lambda: [self._settle(settlement) for settlement in settlements],
            forgettable=[Outcome.SETTLED] * len(settlements) if acks else None,
        )

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Let leases run for ``seconds`` from now."""
        return await self._broker.ask(
            f"extend {len(tokens)}", lambda: [self._extend(token, seconds) for token in tokens]
        )

    async def stat(self) -> QueueStat:
        """Return what waits."""
        pending = self._broker.pending
        return QueueStat(pending, pending, 0, 0, len(self._broker.state.dead), 0, None)

    async def close(self) -> None:
        """Give back what is held."""
        self._closed = True
        self._woken.set()
        if self._broker.ended:
            return
        for token in list(self._held.values()):
            row = self._ours(token)
            if row is not None:
                self._broker.do("give", row.offset, 0.0, row.attempt - 1)
        self._broker.leave(self._member)

    def _take(self, limit: int) -> tuple[list[RawDelivery], float | None]:
        broker = self._broker
        broker.meet(self._member, self._process, self._woken.set)
        now = broker.loop.now
        ready = [
            row for row in broker.state.rows if not row.gone and (row.due is None or row.due <= now)
        ]
        if broker.rough and broker.loop.chance.random() < 0.3:
            broker.loop.chance.shuffle(ready)
        found = []
        for row in ready[:limit]:
            broker.do("take", row.offset, now + self.lease)
            token = (broker.incarnation, row.offset, row.turn)
            self._held[row.offset] = token
            found.append(RawDelivery(row.message, row.attempt, token, row.stored_at_us))
            broker.handed_over(row)
        waiting = [row.due for row in broker.state.rows if not row.gone and row.due is not None]
        return found, min(waiting, default=None)

    def _ours(self, token: Token) -> Row | None:
        incarnation, offset, turn = cast("tuple[int, int, int]", token)
        rows = self._broker.state.rows
        if incarnation != self._broker.incarnation or offset > len(rows):
            row = None
        else:
            row = rows[offset - 1]
            if row.gone or not row.held or row.turn != turn or (row.due or 0) <= self._now:
                row = None
        if row is None:
            self._broker.count("fenced")
        return row

    @property
    def _now(self) -> float:
        return self._broker.loop.now

    def _settle(self, settlement: Settlement) -> Outcome:
        broker = self._broker
        row = self._ours(settlement.token)
        if row is None:
            return Outcome.LEASE_LOST
        self._held.pop(row.offset, None)
        if settlement.gives_back:
            attempt = settlement.next_attempt - 1
            broker.do("give", row.offset, self._now + settlement.delay, attempt)
            broker.wake()
            return Outcome.SETTLED
        if settlement.action is Action.REJECT:
            letter = DeadLetter(
                row.message, settlement.reason, settlement.attempt, self._clock.now_us(),
                "queue", row.stored_at_us,
            )  # fmt: skip
            broker.do("bury", row.offset, letter)
        broker.do("remove", row.offset)
        return Outcome.SETTLED

    def _extend(self, token: Token, seconds: float) -> Outcome:
        row = self._ours(token)
        if row is None:
            return Outcome.LEASE_LOST
        self._broker.do("extend", row.offset, self._now + seconds)
        return Outcome.EXTENDED

    def _give_back(self, taking: "asyncio.Future[tuple[list[RawDelivery], float | None]]") -> None:
        if taking.cancelled() or taking.exception() is not None:
            return
        for raw in taking.result()[0]:
            row = self._ours(raw.token)
            if row is not None:
                self._broker.do("give", row.offset, self._now, row.attempt - 1)
