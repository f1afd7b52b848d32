"""One consumer of a queue in RabbitMQ: what it takes, how it holds it, how it settles it.

Taking. A consumer that is subscribed all the time is sent messages before anybody asks, and what
lies here unasked no other consumer can have. So it is subscribed while somebody receives, and for
exactly what is asked for: the server sends no more than that. Who comes back within 50 ms, again
and again, is worth sending ahead to: then the subscription stays, with a window of twice what is
held, for as long as the receives keep coming. What nobody fetched goes back to where it was.

Holding. A delivery's number belongs to its channel: on another it would settle another message.
The token carries the channel's epoch, and one of an older epoch reaches nobody.

Settling. The server counts each return of a message, and does not tell a failure from a message
that nobody looked at; nor can a message be changed. So a failed one goes back to its place, and
we remember that it did; what the server counts besides are consumers that went away with it, and
only many of those are the message's fault. One that nobody looked at is published anew, with the
count that it has, and the original acknowledged when that is confirmed; likewise one that is to
wait, and dead letters. A crash between the two leaves both, and never neither. What cannot be
stored goes back to its place: held on to, it would come to nobody where nobody settles it again.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, Final

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from aiormq.exceptions import AMQPError

from molva._base.clock import Clock
from molva._base.seldom import SeldomLog
from molva._base.waiting import first_of
from molva.messaging._about import about
from molva.messaging.driver import (
    Action,
    Capabilities,
    DeadLetter,
    Outcome,
    Peeked,
    RawDelivery,
    Settlement,
    Token,
)
from molva.messaging.drivers._amqp_dead import dead_letters_of, purge_dead, replay_dead
from molva.messaging.drivers._amqp_incoming import take_deliveries
from molva.messaging.drivers._amqp_link import ANSWER, AMQPLink, translated
from molva.messaging.drivers._amqp_messages import (
    Received,
    bury,
    foreign,
    pack,
    received,
)
from molva.messaging.drivers._amqp_options import Names
from molva.messaging.drivers._amqp_sender import AMQPSender, Parcel, RefusedError, Restore
from molva.messaging.drivers._amqp_topology import Ladder, asked, consumers_of, ready_in
from molva.messaging.errors import (
    InUseError,
    MessagingError,
    UnavailableError,
    UnsupportedFeatureError,
)

__all__ = ["AMQPConsumer"]

_logger: Final = logging.getLogger("molva.messaging")

# Seconds within which the next receive makes a caller one that keeps coming. Longer, and messages
# lie here while it thinks; shorter, and a busy machine makes it subscribe for each.
_HOT: Final = 0.05
# Seconds for which a subscription outlives the last receive, and what came meanwhile: of a caller
# that does not keep coming, and of one that does. Longer, and others wait for what lies here.
_KEEP: Final = 0.2
_KEEP_HOT: Final = 1.0
# Seconds without another message after which a batch is handed over to a caller that keeps coming.
_STREAMING: Final = 0.001
# Messages that are sent ahead, at least and at most, to a caller that keeps coming.
_LEAST_WINDOW: Final = 64
_MOST_WINDOW: Final = 2_000
# Seconds without a message after which it is looked whether there are any. The server tells of
# all; this finds what a connection that is open and dead does not.
_LOOK: Final = 2.0
# Seconds for what is on its way, where a caller does not wait.
_ON_ITS_WAY: Final = 0.03
# Seconds before a server that was not reached is tried again: the first time, and at most.
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 0.5
# How often what nobody fetched may go back to its place and be counted; then it goes behind.
_MOST_RETURNS: Final = 2
# How often a consumer may go away with a message before that is taken for the message's fault.
# Fewer, and good ones become dead letters where workers are killed in turn: what is at the head
# is in the hands of each. More, and one that kills takes as many workers along. With five attempts
# it is twenty times, RabbitMQ 4's own limit.
_GRACE: Final = 15
# Messages of which we know how often we gave them back.
_MOST_NACKED: Final = 10_000
# Seconds in which closing gives back what is held.
_GIVE_BACK: Final = 3.0


class AMQPConsumer:
    """Takes, holds and settles the messages of one queue.

    Args:
        link: The connection to receive by.
        sender: Publishes what comes again.
        names: What the queue is called.
        counts: Whether the server counts what comes back, as quorum queues do.
        restore: Makes what was removed in the server again, or raises.
        clock: Where time comes from.
    """

    lease: Final = None

    def __init__(
        self,
        link: AMQPLink,
        sender: AMQPSender,
        names: Names,
        *,
        capabilities: Capabilities,
        counts: bool,
        prefetch: int | None,
        restore: Restore,
        clock: Clock,
    ) -> None:
        self.capabilities: Final = capabilities
        self.names: Final = names
        self.ladder: Final = Ladder(sender.link, names)
        self._link = link
        self._sender = sender
        self._counts = counts
        self._most = min(_MOST_WINDOW, prefetch or _MOST_WINDOW)
        self._restore = restore
        self._clock = clock
        self._log = SeldomLog(_logger, clock)
        self._closed = False
        # The channel, and which one since we were opened; what it holds, by delivery number.
        self._channel: Channel | None = None
        self._epoch = 0
        self._held: dict[int, Received] = {}
        # What it holds besides: somebody else's, on its way to the dead letters.
        self._burying: set[int] = set()
        self._ready: deque[int] = deque()
        # The subscription: its tag, which one it is, how many it may hold, how many it does.
        self._tag: str | None = None
        self._consumer = 0
        self._window = 0
        # Ids of those that a full queue had no room for counting: they are handed over uncounted,
        # or nothing would be, and there would never be room.
        self._no_room: set[bytes] = set()
        # What the server was told last, or is being told.
        self._prefetch = 1
        self._outstanding = 0
        self._subscribing = asyncio.Lock()
        # Held while it is written what becomes of messages; taken after the one above.
        self._writing = asyncio.Lock()
        # How often we gave a message back as failed, to its place: the server counts that, too.
        self._nacked: dict[bytes, int] = {}
        # Who waits, and since when nobody does.
        self._came = asyncio.Event()
        self._receivers = 0
        self._returned_at = float("-inf")
        self._is_hot = False
        # Whether there was as much as was asked for: then more is on its way.
        self._was_full = False
        self._idle: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    # Receiving --------------------------------------------------------------------------

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        began = self._clock.monotonic()
        deadline, pause = began + wait, _FIRST_PAUSE
        self._is_hot = began - self._returned_at < _HOT
        self._receivers += 1
        if self._idle is not None:
            self._idle.cancel()
        try:
            while not self._closed:
                self._came.clear()
                try:
                    if not self._ready:
                        await self._shielded(self._subscribe(limit))
                    if self._ready:
                        if self._is_hot or self._was_full:
                            await self._gather(limit)
                        return self._take(limit)
                    left = deadline - self._clock.monotonic()
                    if left <= 0 and not await self._shielded(self._is_coming()):
                        # What comes from now on may be for another.
                        await self._shielded(self._unsubscribe())
                        return self._take(limit) if self._ready else []
                    if left > 0:
                        await self._wait(min(left, _LOOK))
                    if not self._came.is_set() and left > _LOOK:
                        await self._shielded(self._watch())
                except UnavailableError:
                    if deadline - self._clock.monotonic() <= pause:
                        raise
                    await self._wait(pause)
                    pause = min(_LONGEST_PAUSE, 2 * pause)
            return []
        finally:
            self._receivers -= 1
            self._returned_at = self._clock.monotonic()
            if not self._receivers and not self._closed:
                keep = _KEEP_HOT if self._is_hot else _KEEP
                loop = asyncio.get_running_loop()
                self._idle = loop.call_later(keep, self._spawn_idle)

    def _take(self, limit: int) -> list[RawDelivery]:
        """Hand over what is here. Without an await: who is cancelled has not taken it."""
        found = []
        held, epoch = self._held, self._epoch
        for _ in range(min(limit, len(self._ready))):
            number = self._ready.popleft()
            one = held[number]
            token = (epoch, number)
            found.append(RawDelivery(one.message, self._attempt(one), token, one.stored_at_us))
        self._was_full = len(found) == limit
        return found

    async def _gather(self, limit: int) -> None:
        """Let come what is streaming in: settling three costs as much as settling many."""
        before = 0
        while before < len(self._ready) < limit:
            before = len(self._ready)
            await asyncio.sleep(_STREAMING)

    async def _wait(self, seconds: float) -> None:
        await first_of(self._clock.sleep(seconds), self._came.wait())

    async def _subscribe(self, limit: int) -> None:
        """See to it that the server sends messages: up to ``limit``, where nothing is open.

        One subscription is ended for another only where all has come that it lets come: the
        server keeps what is under way to one that ends, until the next one begins.
        """
        async with self._subscribing:
            if self._tag is not None and self._outstanding < self._window:
                return
            await self._end_subscription()
            window = limit
            if self._is_hot:
                window = max(_LEAST_WINDOW, 2 * (len(self._held) + limit))
            window = min(window, max(limit, self._most), 65_535)
            with translated(self._link.address):
                channel = await self._opened()
                try:
                    async with self._answered(channel):
                        self._prefetch = window
                        await channel.basic_qos(prefetch_count=window)
                        self._consumer += 1
                        self._outstanding, self._window = 0, window
                        tag = f"molva-{self._epoch}-{self._consumer}"
                        self._tag = tag
                        await channel.basic_consume(self.names.main, _nobody, consumer_tag=tag)
                except AMQPError as error:
                    self._tag = None
                    if channel.is_closed and "NOT_FOUND" in str(error):
                        await self._restored()
                        return
                    raise
                except BaseException:
                    self._tag = None
                    raise

    async def _restored(self) -> None:
        """Make again what somebody has removed, or raise that it is missing."""
        await self.make_again()
        self._log.warning(
            "%s: %s had been removed and is made anew; what was in it is lost",
            self._link.address,
            self.names.main,
        )
        self._came.set()

    async def make_again(self) -> None:
        """Make again what is missing: the queue, its dead letters, its delays."""
        await self._restore()
        await self.ladder.restore()

    async def _unsubscribe(self) -> None:
        async with self._subscribing:
            await self._end_subscription()

    async def _end_subscription(self) -> None:
        tag, self._tag = self._tag, None
        channel = self._channel
        if tag is None or channel is None or channel.is_closed:
            return
        with translated(self._link.address):
            # Without an answer: what is written behind it is read behind it.
            await channel.basic_cancel(tag, nowait=True)

    async def _opened(self) -> Channel:
        channel = self._channel
        if channel is None or channel.is_closed:
            if channel is not None:
                self._lose(channel)
            channel = await self._link.channel()
            take_deliveries(channel, self._note)
            channel.on_consumer_cancel_callbacks.add(self._note_cancel)
            self._channel = channel
            self._epoch += 1
            opened = channel
            channel.closing.add_done_callback(lambda _: self._lose(opened))
        return channel

    def _lose(self, channel: Channel) -> None:
        """Take note that a channel is gone: the server has back what it held."""
        if channel is not self._channel:
            return
        self._channel = self._tag = None
        self._epoch += 1
        self._held.clear()
        self._burying.clear()
        self._ready.clear()
        self._came.set()

    def _note_cancel(self, frame: Any) -> None:
        """Take note that the server ended the subscription: the queue is gone, or its leader."""
        if frame.consumer_tag == self._tag:
            self._tag = None
        self._came.set()

    def _note(self, delivered: DeliveredMessage) -> None:
        """Take in what the server sends, also to a consumer that was ended since."""
        number = delivered.delivery_tag or 0
        if delivered.channel is not self._channel:
            return
        try:
            one = received(delivered, int(str(delivered.consumer_tag).rpartition("-")[2]))
        except Exception as error:  # noqa: BLE001 - whatever it is: see below
            # What is neither held nor buried would be acknowledged with what is around it.
            self._burying.add(number)
            self._spawn(self._bury_foreign(self._epoch, number, delivered, str(error)))
            return
        self._outstanding += one.consumer == self._consumer
        self._held[number] = one
        if delivered.redelivered and not self._counts:
            # Nobody has counted that a consumer went away with it; now we do.
            one.returns += 1
            if one.message.id not in self._no_room:
                token = (self._epoch, number)
                counted = Settlement(token, Action.RETURN, attempt=self._attempt(one))
                self._spawn(self.settle_batch([counted]))
                return
        self._ready.append(number)
        self._came.set()

    async def _is_coming(self) -> bool:
        """Tell whether something is there that a subscription will bring."""
        ready = await asked(lambda channel: ready_in(channel, self.names.main), self._link)
        if not ready:
            await self._wait(_ON_ITS_WAY)
        elif not self._came.is_set():
            await self._wait(1.0)
            return self._came.is_set()
        return False

    async def _watch(self) -> None:
        """Begin anew where messages are ready and do not come."""
        for _ in range(2):
            ready = await asked(lambda channel: ready_in(channel, self.names.main), self._link)
            if not ready or self._came.is_set() or self._tag is None:
                return
            await self._wait(_ON_ITS_WAY * 10)
        if self._window > self._outstanding and not self._came.is_set():
            self._log.warning(
                "%s: %s has messages and sends none; subscribing anew",
                self._link.address,
                self.names.main,
            )
            await self._unsubscribe()

    def _spawn_idle(self) -> None:
        self._spawn(self._be_idle())

    async def _be_idle(self) -> None:
        """Let others have what nobody here asks for."""
        with contextlib.suppress(MessagingError):
            await self._unsubscribe()
            # What was under way comes first: it is older than what it would be put behind.
            await self._synced()
            await asyncio.sleep(_ON_ITS_WAY)
            if not self._receivers and not self._closed and self._ready:
                await self._give_back_unseen()

    async def _give_back_unseen(self) -> None:
        """Let what nobody has fetched go back to where it was, or behind if it did so often."""
        unseen = [self._ready.popleft() for _ in range(len(self._ready))]
        held = self._held
        often = {n for n in unseen if held[n].returns >= _MOST_RETURNS or not self._counts}
        returned = [
            Settlement((self._epoch, n), Action.RETURN, attempt=self._attempt(held[n]))
            for n in unseen
            if n in often
        ]
        # Nobody subscribes in between: it would be sent what is behind these.
        async with self._subscribing:
            await self._write([], [number for number in unseen if number not in often])
        if returned:
            await self.settle_batch(returned)

    # Settling ---------------------------------------------------------------------------

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs: what comes again is stored first, then the original is done with.

        What cannot be stored goes back to its place, since nobody may come to settle it again:
        it comes again, without its delay, and what was to be a dead letter is LEASE_LOST.
        """
        outcomes = [Outcome.LEASE_LOST] * len(settlements)
        done: list[int] = []
        back: list[int] = []
        stored: list[int] = []
        seen: set[Token] = set()
        for place, settlement in enumerate(settlements):
            if settlement.token in seen:
                # One may be told twice in a call: acknowledged, cancelled, given back. The first
                # stands.
                continue
            seen.add(settlement.token)
            if settlement.action is Action.ACK:
                done.append(place)
            elif self._holds(settlement.token):
                (back if self._is_counted(settlement) else stored).append(place)
        # A server that is full takes its time to say so: these do not wait for it.
        await self._settle(settlements, done, back, outcomes)
        stored = [place for place in stored if self._holds(settlements[place].token)]
        if not stored:
            return outcomes
        problems = await self._stored([settlements[place] for place in stored])
        done = [p for p, problem in zip(stored, problems, strict=True) if problem is None]
        await self._settle(settlements, done, [], outcomes)
        back = [p for p, problem in zip(stored, problems, strict=True) if problem is not None]
        if back:
            await self._pause_behind([settlements[place] for place in stored], problems)
            await self._settle(settlements, [], back, outcomes)
        return outcomes

    async def _settle(
        self,
        settlements: Sequence[Settlement],
        done: Sequence[int],
        back: Sequence[int],
        outcomes: list[Outcome],
    ) -> None:
        """Acknowledge those that are done with, let others go back to their place."""
        acked, requeued = [], []
        for place in done:
            token = settlements[place].token
            if self._holds(token):
                acked.append(_number_of(token))
                self._nacked.pop(self._held[acked[-1]].message.id, None)
                outcomes[place] = Outcome.SETTLED
        for place in back:
            token, action = settlements[place][:2]
            if self._holds(token):
                requeued.append(_number_of(token))
                if action is Action.NACK:
                    self._note_nack(self._held[requeued[-1]].message.id)
                if action is not Action.REJECT:
                    outcomes[place] = Outcome.SETTLED
        await self._shielded(self._write(acked, requeued))

    async def _pause_behind(
        self, settlements: Sequence[Settlement], problems: Sequence[Exception | None]
    ) -> None:
        """Say what could not be stored, and wait: it comes again at once, and may fail again."""
        for settlement, problem in zip(settlements, problems, strict=True):
            # A full queue has no room for a copy, but for the message that it has.
            is_full = (
                isinstance(problem, RefusedError)
                and settlement.gives_back
                and settlement.delay <= 0
            )
            if is_full and self._holds(settlement.token):
                self._no_room.add(self._held[_number_of(settlement.token)].message.id)
            if problem is None or is_full or not self._holds(settlement.token):
                continue
            self._log.warning(
                "%s: what comes again later or is a dead letter could not be stored, and goes "
                "back to its place in %s: %s",
                self._link.address,
                self.names.main,
                problem,
                extra=about(self._held[_number_of(settlement.token)].message, settlement.attempt),
            )
            await self._clock.sleep(_LONGEST_PAUSE)
            return

    def _note_nack(self, id_: bytes) -> None:
        self._nacked[id_] = self._nacked.pop(id_, 0) + 1
        if len(self._nacked) > _MOST_NACKED:
            del self._nacked[next(iter(self._nacked))]

    def _is_counted(self, settlement: Settlement) -> bool:
        """Whether going back to its place counts the attempt as it is to be counted."""
        return (
            self._counts
            and settlement.action is Action.NACK
            and settlement.delay <= 0
            and settlement.attempt == self._attempt(self._held[_number_of(settlement.token)])
        )

    def _attempt(self, one: Received) -> int:
        """Return which attempt a hand-over is, from 1."""
        nacked = self._nacked.get(one.message.id, 0)
        return one.attempts + 1 + nacked + max(0, one.returns - nacked - _GRACE)

    async def _stored(self, settlements: Sequence[Settlement]) -> list[Exception | None]:
        """Publish what comes again, and what becomes a dead letter; say why one is not stored.

        Raises:
            UnsupportedFeatureError: A delay is too long: the caller's mistake, who holds on.
        """
        try:
            parcels = await self._parcels(settlements)
            return await self._sender.publish_surely(parcels, self.make_again)
        except UnsupportedFeatureError:
            raise
        except MessagingError as error:
            return [error] * len(settlements)

    async def _parcels(self, settlements: Sequence[Settlement]) -> list[Parcel]:
        parcels = []
        held = [self._held[_number_of(settlement.token)] for settlement in settlements]
        for settlement, one in zip(settlements, held, strict=True):
            if settlement.action is Action.REJECT:
                packed = bury(
                    one.message,
                    one.stored_at_us,
                    settlement.attempt,
                    reason=settlement.reason,
                    died_at_us=self._clock.now_us(),
                )
                parcels.append(Parcel(packed, "", self.names.dead))
                continue
            # What is counted beyond the grace is among the attempts now.
            returns = min(_GRACE, one.returns - self._nacked.get(one.message.id, 0))
            attempts = settlement.next_attempt - 1
            packed = pack(one.message, one.stored_at_us, attempts, max(0, returns))
            exchange, key = "", self.names.main
            if settlement.delay > 0:
                exchange, key = await self.ladder.address_of(settlement.delay)
            parcels.append(Parcel(packed, exchange, key))
        return parcels

    async def _write(self, acked: Sequence[int], requeued: Sequence[int]) -> None:
        """Tell the server; return when it has read it."""
        channel = self._channel
        if channel is None or not (acked or requeued):
            return
        # One after the other: what another call still has to write would be acknowledged with
        # all that is up to one of ours.
        async with self._writing:
            if not self._is_hot and not self._receivers and self._outstanding >= self._window:
                # Before there is room: it would be filled with what nobody has asked for.
                with translated(self._link.address):
                    await self._end_subscription()
            if channel is not self._channel:
                raise UnavailableError(f"{self._link.address}: the channel was lost")
            # Without an await up to the first frame.
            acked = [number for number in acked if number in self._held]
            requeued = [number for number in requeued if number in self._held]
            upto, single = self._contiguous(acked)
            if self._no_room:
                self._no_room.difference_update(self._held[each].message.id for each in acked)
            for number in (*acked, *requeued):
                self._forget(number)
            with translated(self._link.address):
                async with asyncio.timeout(ANSWER):
                    if upto:
                        await channel.basic_ack(upto, multiple=True, wait=False)
                    for number in single:
                        await channel.basic_ack(number, wait=False)
                    for number in requeued:
                        await channel.basic_nack(number, requeue=True, wait=False)
        await self._synced()

    async def _synced(self) -> None:
        """Return when the server has read all that was written on the channel.

        Acknowledging and cancelling have no answer; this has, and is read after them.
        """
        channel = self._channel
        if channel is not None and not channel.is_closed:
            with translated(self._link.address):
                async with self._answered(channel):
                    await channel.basic_qos(prefetch_count=self._prefetch)

    @contextlib.asynccontextmanager
    async def _answered(self, channel: Channel) -> AsyncIterator[None]:
        """Give up a connection on which nothing is answered: heartbeats would take minutes."""
        try:
            async with asyncio.timeout(ANSWER):
                yield
        except TimeoutError:
            if not self._link.is_blocked():
                await self._link.drop(channel.connection)
                # The client library may not come to say so: what it still has to write is in its
                # way.
                self._lose(channel)
            raise

    def _contiguous(self, acked: Collection[int]) -> tuple[int, list[int]]:
        """Return up to where all that is held is acknowledged, and what is beyond."""
        wanted, upto = set(acked), 0
        first_buried = min(self._burying, default=None)
        for number in self._held:
            if number not in wanted or (first_buried is not None and number > first_buried):
                break
            wanted.discard(number)
            upto = number
        return upto, sorted(wanted)

    def _forget(self, number: int) -> None:
        one = self._held.pop(number, None)
        if one is not None and one.consumer == self._consumer:
            self._outstanding -= 1

    def _holds(self, token: Token) -> bool:
        channel = self._channel
        return (
            token[0] == self._epoch
            and token[1] in self._held
            and channel is not None
            and not channel.is_closed
        )

    async def _bury_foreign(
        self, epoch: int, number: int, delivered: DeliveredMessage, why: str
    ) -> None:
        packed = foreign(delivered, why, died_at_us=self._clock.now_us())
        # As long as it is ours: when the channel ends it goes back, and comes to whoever is next.
        while epoch == self._epoch:
            try:
                parcel = Parcel(packed, "", self.names.dead)
                [problem] = await self._sender.publish_surely([parcel], self.make_again)
            except UnavailableError as error:
                problem = error
            channel = self._channel
            if problem is not None:
                await self._clock.sleep(_LONGEST_PAUSE)
            elif channel is not None and epoch == self._epoch:
                self._burying.discard(number)
                await channel.basic_ack(number, wait=False)
                self._log.error(
                    "%s: a message of %s became a dead letter: %s",
                    self._link.address,
                    self.names.main,
                    why,
                )
                return

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Tell what is still held: nothing runs out while the connection lives."""
        return [Outcome.EXTENDED if self._holds(t) else Outcome.LEASE_LOST for t in tokens]

    async def flush(self) -> None:
        """Nothing to do: the server has read what was settled."""

    # Looking ----------------------------------------------------------------------------

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        return await dead_letters_of(self._link, self.names, limit)

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Send dead letters back, as messages that were never tried."""
        if ids is not None and not ids:
            return 0
        return await replay_dead(self._link, self._sender, self.names, ids, limit)

    async def peek(self, limit: int) -> list[Peeked]:
        """Return nothing: a queue can only be consumed, and ``capabilities`` says so."""
        return []

    async def purge(self, *, dead: bool) -> int:
        """Remove what is ready, delayed or held here, or all dead letters."""
        if dead:
            return await purge_dead(self._link, self.names)
        await self._shielded(self._unsubscribe())
        await self._shielded(self._synced())
        own = len({one.consumer for one in self._held.values()})
        if await asked(lambda channel: consumers_of(channel, self.names.main), self._link) > own:
            raise InUseError(
                f"{self._link.address}: other consumers hold what waits in {self.names.main!r}; "
                "stop them first"
            )

        async def empty(channel: Channel) -> int:
            return (await channel.queue_purge(self.names.main)).message_count or 0

        held = len(self._held)
        self._ready.clear()
        await self._shielded(self._write(list(self._held), []))
        return held + await asked(empty, self._link) + await self.ladder.purge()

    async def close(self) -> None:
        """Give back what is held, let go of the server."""
        self._closed = True
        self._came.set()
        if self._idle is not None:
            self._idle.cancel()
        # A server that is away gives it back by itself; nothing is lost.
        with contextlib.suppress(MessagingError, TimeoutError):
            async with asyncio.timeout(_GIVE_BACK):
                await self._unsubscribe()
                await asyncio.sleep(0)
                await self.settle_batch(
                    [
                        Settlement((self._epoch, number), Action.RETURN, attempt=self._attempt(one))
                        for number, one in self._held.items()
                    ]
                )
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._link.close()
        await self._sender.close()

    # Tasks ------------------------------------------------------------------------------

    def _spawn(self, work: Any) -> "asyncio.Task[Any]":
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited was told

    async def _shielded(self, work: Any) -> Any:
        """Run to its end what may not be cut off: the client library closes the channel then."""
        return await asyncio.shield(self._spawn(work))


async def _nobody(delivered: DeliveredMessage) -> None:
    """Stand where the client library wants a callback: what comes is taken before."""


def _number_of(token: Token) -> int:
    number = token[1]
    assert isinstance(number, int)
    return number
