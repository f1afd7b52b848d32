"""One consumer of a subscription or a queue; ``nats.py`` says why it is built this way."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, cast

from nats.aio.msg import Msg

from molva._base.clock import Clock
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
from molva.messaging.drivers._nats_kept import Kept
from molva.messaging.drivers._nats_link import Connection, Question, status_of
from molva.messaging.drivers._nats_messages import (
    ForeignMessageError,
    Names,
    foreign,
    message_of,
    only_of,
)
from molva.messaging.drivers._nats_opening import NATSServer
from molva.messaging.drivers._nats_places import Place
from molva.messaging.drivers._nats_pulling import ConsumerGoneError, Pulls
from molva.messaging.drivers._waiting import Patience, in_background, returns, taken_from
from molva.messaging.errors import MessagingError, UnavailableError

__all__ = ["NATSConsumer"]

_logger: Final = logging.getLogger("molva.messaging")

# Messages that one request asks for.
_BATCH: Final = 1_000

# Seconds for which messages are kept that a receive was cancelled for, until the next one
# asks; then they are given back. Longer, and others wait for them; shorter, and a consumer
# that is cancelled and asks again gives back and takes the same ones.
_KEEP: Final = 0.2

# Seconds between two looks at the consumer: whether somebody changed it, and what all have
# settled, which is deleted then.
_LOOK: Final = 1.0

# The part of a lease at whose end we take it for over. The server's began before we heard of
# it: an acknowledgement that comes late would settle what another consumer holds by then.
_MARGIN: Final = 0.05

# A caller that takes so many at once, and comes again within so many seconds, has the next
# batch fetched while it works on this one. Fewer or slower, and others would be kept waiting
# for what it is not ready for.
_AHEAD: Final = 64
_QUICK: Final = 0.05

# Seconds for closing in order, beyond which leases are left to run out.
_GOODBYE: Final = 5.0

# What a message is told the server with.
_ACK: Final = b"+ACK"
_TERM: Final = b"+TERM"
_PROGRESS: Final = b"+WPI"

# Words of the subject by which a message is acknowledged; newer servers put two before them.
_OLD_WORDS: Final = 9


@dataclass(slots=True)
class _Held:
    """What one hand-over is of, and until when it is ours."""

    raw: RawDelivery
    # The subject by which the server is told of it.
    subject: str
    deadline: float
    sequence: int
    # Hand-overs of this message so far, as the server counts, and those that count not.
    handed: int
    uncounted: int


class NATSConsumer:
    """One consumer: what subscriptions and queues have in common."""

    def __init__(
        self,
        server: NATSServer,
        place: Place,
        *,
        capabilities: Capabilities,
        clock: Clock,
    ) -> None:
        self.capabilities: Final = capabilities
        self._server = server
        self._link = server.link
        self._place = place
        self._names: Names = place.names
        self._kept: Kept = place.kept
        self._clock = clock
        self._pulls: Pulls | None = None
        # Over which connection the consumer was last found to be the one that it was.
        self._seen_over: Connection | None = None
        self._looking = asyncio.Lock()
        # Come and not looked at; ready to be handed over.
        self._came: list[tuple[Msg, float]] = []
        self._ready: deque[RawDelivery] = deque()
        self._held: dict[str, _Held] = {}
        # How many consumers of our name there have been: each begins to count anew.
        self._epoch = 0
        # Leases that were extended beyond what the server gives: until when.
        self._longer: dict[str, float] = {}
        self._pulling: asyncio.Task[None] | None = None
        self._receivers = 0
        # Counts receives, and when the last one ended.
        self._round = 0
        self._handed_at = 0.0
        self._closing = asyncio.Event()
        self._closed = False
        self._beating: asyncio.Task[None] | None = None

    @property
    def lease(self) -> float | None:
        """Seconds that a message is held without being extended."""
        return self._place.lease

    async def join(self) -> None:
        """Begin to look after the consumer."""
        self._seen_over = await self._link.connected()
        self._beating = in_background(self._beat())

    # Receiving --------------------------------------------------------------------------

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        patience = Patience(self._clock, wait)
        limit = min(limit, _BATCH)
        self._receivers += 1
        self._round += 1
        quick = self._clock.monotonic() - self._handed_at < _QUICK
        try:
            while not self._closed:
                if self._ready:
                    found = taken_from(self._ready, limit)
                    if (
                        quick
                        and len(found) >= _AHEAD
                        and not self._ready
                        and not self._is_pulling()
                    ):
                        self._pulling = in_background(self._pull_some(limit, 0.0))
                    return found
                try:
                    left = patience.left()
                    ours = await self._pull(limit, left)
                except UnavailableError as error:
                    await patience.after(error, self._closing)
                else:
                    if ours and left <= 0 and not self._ready:
                        return []
            return []
        finally:
            self._receivers -= 1
            self._handed_at = self._clock.monotonic()
            if not self._receivers and not self._closed and (self._ready or self._is_pulling()):
                in_background(self._tidy_up(self._round))

    async def _pull(self, limit: int, wait: float) -> bool:
        """Let one request come to its end; return whether it was as good as our own."""
        ours = not self._is_pulling()
        if ours:
            self._pulling = in_background(self._pull_some(limit, max(0.0, wait)))
        pulling = self._pulling
        assert pulling is not None
        # Never cancelled: what it brings is ours by then. Another receive's may have been there
        # before what we ask for, unless it goes on for as long as we have.
        await asyncio.wait((pulling,), timeout=wait if not ours and wait > 0 else None)
        if not pulling.done():
            return True
        pulling.result()
        return ours

    async def _pull_some(self, limit: int, wait: float) -> None:
        if not self._came:
            connection = await self._sure()
            pulls = self._pulls
            if pulls is None or pulls.connection is not connection:
                pulls = self._pulls = Pulls(
                    connection,
                    self._names.stream,
                    self._names.consumer,
                    max_payload=self._server.max_payload,
                    clock=self._clock,
                )
            try:
                pull = await pulls.pull(limit, wait)
            except ConsumerGoneError:
                self._seen_over = None
                return
            self._came.extend((msg, pull.first_at) for msg in pull.messages)
        await self._sort_out()

    def _is_pulling(self) -> bool:
        return self._pulling is not None and not self._pulling.done()

    async def _tidy_up(self, round_: int) -> None:
        """Give back what nobody has received, unless another receive asks for it soon."""
        await asyncio.sleep(_KEEP)
        if self._pulling is not None:
            await asyncio.wait((self._pulling,))
        if self._is_idle_since(round_) and self._ready:
            with contextlib.suppress(UnavailableError):
                await self.settle_batch(returns(taken_from(self._ready, len(self._ready))))

    def _is_idle_since(self, round_: int) -> bool:
        return self._round == round_ and not self._receivers and not self._closed

    # What came --------------------------------------------------------------------------

    async def _sort_out(self) -> None:
        """Make deliveries of what has come; settle what is not for us, or is no message."""
        counts = [_counts_of(msg.reply) for msg, _ in self._came]
        which = [
            (_id_of(msg), sequence)
            for (msg, _), (handed, sequence, _) in zip(self._came, counts, strict=True)
            if handed > 1
        ]
        known: dict[int, int] = {}
        if which:
            # Before anything is taken from what has come: it stays there should this fail.
            numbers = await self._kept.uncounted(which)
            known = {one[1]: number for one, number in zip(which, numbers, strict=True)}
        # Nothing came meanwhile: it is this task that asks. It may have been purged.
        came, self._came = self._came, []
        ends: list[Settlement] = []
        lease = self._place.lease * (1 - _MARGIN)
        for (msg, at), (handed, sequence, stored_ns) in zip(came, counts, strict=False):
            subject = msg.reply
            token = f"{subject} {self._epoch}" if self._epoch else subject
            uncounted = known.get(sequence, 0)
            attempt = max(1, handed - uncounted)
            try:
                message = message_of(msg)
                only = only_of(msg)
            except ForeignMessageError as error:
                message, only = foreign(msg, sequence), None
                reason = f"undecodable: {error}"
                ends.append(Settlement(token, Action.REJECT, reason=reason, attempt=attempt))
                _logger.error(
                    "nats: a message of %s became a dead letter: %s", self._names.shown, reason
                )
            else:
                if only is not None and only != self._names.consumer_name:
                    ends.append(Settlement(token, Action.ACK))
            raw = RawDelivery(message, attempt, token, stored_ns // 1000)
            self._held[token] = _Held(raw, subject, at + lease, sequence, handed, uncounted)
            if not ends or ends[-1].token is not token:
                self._ready.append(raw)
        if ends:
            await self.settle_batch(ends)

    # Settling ---------------------------------------------------------------------------

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs, all of them together."""
        connection = await self._sure()
        now = self._clock.monotonic()
        going: list[tuple[Settlement, _Held]] = []
        outcomes = []
        for settlement in settlements:
            held = self._held.get(cast(str, settlement.token))
            if held is None or held.deadline <= now:
                self._let_go(settlement.token)
                outcomes.append(Outcome.LEASE_LOST)
            else:
                going.append((settlement, held))
                outcomes.append(Outcome.SETTLED)
        if not going:
            return outcomes
        await self._write_down(going)
        if not await self._tell(connection, [(h.subject, _word_of(s)) for s, h in going]):
            for settlement, _ in going:
                self._let_go(settlement.token)
            return [Outcome.LEASE_LOST] * len(settlements)
        done = []
        for settlement, held in going:
            self._let_go(settlement.token)
            if held.uncounted and not settlement.gives_back:
                done.append((held.raw.message.id.hex(), held.sequence))
        self._place.must_trim = True
        if done:
            with contextlib.suppress(MessagingError):
                await self._kept.forget(done)
        return outcomes

    async def _write_down(self, going: Sequence[tuple[Settlement, _Held]]) -> None:
        """Keep what must outlive a message that is settled, before it is."""
        dead, uncounted = [], []
        for settlement, held in going:
            raw = held.raw
            if settlement.action is Action.REJECT:
                letter = DeadLetter(
                    raw.message,
                    settlement.reason,
                    settlement.attempt,
                    self._clock.now_us(),
                    self._names.origin,
                    raw.stored_at_us,
                )
                dead.append((letter, held.sequence))
            elif settlement.gives_back:
                number = held.handed + 1 - settlement.next_attempt
                if number != held.uncounted:
                    uncounted.append((raw.message.id.hex(), held.sequence, number))
        if dead:
            await self._kept.bury(dead)
        if uncounted:
            await self._kept.note_uncounted(uncounted)

    async def _tell(self, connection: Connection, told: Sequence[tuple[str, bytes]]) -> bool:
        """Tell the server what becomes of hand-overs; return whether the consumer is there.

        It does what it is told over one connection in its order, so the answer to the last is
        one to all.
        """
        *others, (last, word) = told
        for subject, other in others:
            await connection.publish(subject, other)
        [answer] = await connection.ask([Question(last, word)])
        if status_of(answer) is None:
            return True
        self._seen_over = None
        return False

    def _let_go(self, token: Token) -> None:
        self._held.pop(cast(str, token), None)
        self._longer.pop(cast(str, token), None)

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Hold for ``seconds`` from now."""
        connection = await self._sure()
        now = self._clock.monotonic()
        names = cast("Sequence[str]", tokens)
        going = [t for t in names if (h := self._held.get(t)) is not None and h.deadline > now]
        if going and not await self._tell(connection, self._progress(going)):
            going = []
        for token in going:
            held = self._held.get(token)
            if held is not None:
                held.deadline = now + seconds * (1 - _MARGIN)
                if seconds > self._place.lease:
                    self._longer[token] = held.deadline
        extended = set(going)
        return [Outcome.EXTENDED if t in extended else Outcome.LEASE_LOST for t in names]

    def _progress(self, tokens: Iterable[str]) -> list[tuple[str, bytes]]:
        held = self._held
        return [(held[token].subject, _PROGRESS) for token in tokens if token in held]

    async def flush(self) -> None:
        """Nothing to do: what was settled is confirmed, and survives what the stream does."""

    # Looking ----------------------------------------------------------------------------

    async def peek(self, limit: int) -> list[Peeked]:
        """There is nothing to look at: see ``Capabilities.peek``."""
        return []

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        return await self._kept.dead_letters(limit)

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Store dead letters once more, marked as this subscription's only."""
        return await self._kept.replay(ids, limit)

    async def purge(self, *, dead: bool) -> int:
        """Remove all that waits, also what somebody holds, or all dead letters."""
        if dead:
            return await self._kept.purge()
        number = await self._place.purge()
        self._forget_all()
        return number

    def _forget_all(self) -> None:
        """Hold nothing any more: it was removed, or is of a consumer that is gone."""
        for held in (self._came, self._ready, self._held, self._longer):
            held.clear()
        self._epoch += 1

    # Being there ------------------------------------------------------------------------

    async def _sure(self) -> Connection:
        """Return a connection over which the consumer was found to be what it was."""
        connection = await self._link.connected()
        if self._seen_over is not connection:
            async with self._looking:
                if self._seen_over is not connection:
                    if await self._place.look():
                        # Another consumer of our name: what we hold is none of its hand-overs.
                        self._forget_all()
                    self._seen_over = connection
        return connection

    async def _beat(self) -> None:
        """Look after the consumer, and after leases that are longer than the server's."""
        while True:
            pause = min(_LOOK, self._place.lease / 3)
            await asyncio.sleep(pause)
            self._drop_lost()
            # Receiving tells of trouble, and ends it.
            with contextlib.suppress(MessagingError):
                await self._keep_longer(pause)
                if self._link.is_connected and await self._place.look_after():
                    self._forget_all()

    async def _keep_longer(self, pause: float) -> None:
        """Extend what was extended beyond the lease that the server gives."""
        now = self._clock.monotonic()
        going = [t for t, until in self._longer.items() if until > now + pause and t in self._held]
        for token in self._longer.keys() - set(going):
            del self._longer[token]
        if not going:
            return
        connection = await self._sure()
        # It may have been settled meanwhile, or be of a consumer that is gone.
        if told := self._progress(going):
            await self._tell(connection, told)

    def _drop_lost(self) -> None:
        """Let go of what nobody settled in time: whoever still does is told that it is lost."""
        now = self._clock.monotonic()
        for token in [token for token, held in self._held.items() if held.deadline <= now]:
            self._let_go(token)

    async def close(self) -> None:
        """Give back what is held, let go of the server."""
        self._closed = True
        self._closing.set()
        if self._beating is not None:
            self._beating.cancel()
        # A server that is away keeps what we hold until its lease runs out.
        with contextlib.suppress(MessagingError, TimeoutError):
            async with asyncio.timeout(_GOODBYE):
                if self._pulling is not None:
                    await asyncio.wait((self._pulling,))
                raw: Iterable[RawDelivery] = [held.raw for held in self._held.values()]
                if raw:
                    await self.settle_batch(returns(raw))
                await self._place.trim()
        await self._link.close()


def _word_of(settlement: Settlement) -> bytes:
    if settlement.action is Action.ACK:
        return _ACK
    if settlement.action is Action.REJECT:
        return _TERM
    delay = max(0, round(settlement.delay * 1e9))
    return b'-NAK {"delay": %d}' % delay if delay else b"-NAK"


def _counts_of(reply: str) -> tuple[int, int, int]:
    """Return how often a message was handed over, its sequence number, and when it was stored."""
    words = reply.split(".")
    at = 4 if len(words) == _OLD_WORDS else 6
    return int(words[at]), int(words[at + 1]), int(words[at + 3])


def _id_of(msg: Msg) -> str:
    try:
        return message_of(msg).id.hex()
    except ForeignMessageError:
        return "none"
