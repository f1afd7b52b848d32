"""One consumer of a subscription in Redis; ``redis.py`` says why it is built this way."""

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import repeat
from typing import Any, Final, Literal, cast, final

from redis.exceptions import ResponseError

from molva._base.clock import Clock
from molva._base.ids import ID_BYTES
from molva._base.redis_server import RedisLink, RedisServerError
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
)
from molva.messaging.drivers._redis_messages import (
    ForeignEntryError,
    TopicKeys,
    fields_text,
    message_of_fields,
)
from molva.messaging.drivers._redis_opening import RedisServer, new_consumer_name, translated
from molva.messaging.drivers._redis_waiting import BATCH, KEEP, outcomes_of
from molva.messaging.drivers._waiting import Patience, in_background, returns, taken_from
from molva.messaging.errors import TopicNotFoundError, UnavailableError
from molva.messaging.message import Message

__all__ = ["RedisSubscription", "dead_letters_of", "stat_of"]

_logger: Final = logging.getLogger("molva.messaging")

# A hand-over of a tuple of its fields: one is made for every message, and so it takes half
# the time.
_raw_delivery_of = cast(
    Callable[[tuple[Message, int, Token, int]], RawDelivery],
    partial(tuple.__new__, RawDelivery),
)

# Seconds after which a consumer looks for what others held that have died, or gave back
# while nobody waited; and after which what is settled is deleted.
_LOOK: Final = 1.0

# Seconds for which a consumer is taken for alive after it said so, and between two such.
# It matters for removing a subscription, and for forgetting consumers that hold nothing.
_ALIVE: Final = 15.0
_BEAT: Final = 4.0


# A caller that takes so many at once, and comes again within so many seconds, has the next
# batch fetched while it works on this one. Fewer or slower, and others would be kept waiting
# for what it is not ready for.
_AHEAD: Final = 64
_QUICK: Final = 0.05


@final
class RedisSubscription:
    """One consumer of a named subscription."""

    def __init__(
        self,
        server: RedisServer,
        *,
        capabilities: Capabilities,
        keys: TopicKeys,
        topic: str,
        subscription: str,
        lease: float,
        open_again: Callable[[RedisLink], Any],
        clock: Clock,
    ) -> None:
        self.capabilities: Final = capabilities
        self._link = server.link
        # Blocks while this consumer waits; nothing else goes over it.
        self._reads = server.another_link()
        self._functions = server.functions
        self._keys = keys
        self._topic = topic
        self._group = subscription
        self._consumer = new_consumer_name()
        self.lease: Final = lease
        self._open_again = open_again
        self._clock = clock
        # Read by the server's account, and not handed over yet.
        self._ready: deque[RawDelivery] = deque()
        # The tokens of what is ours, ready or handed over.
        self._held: set[str] = set()
        self._reading: asyncio.Task[None] | None = None
        self._blocks = False
        self._receivers = 0
        # Counts receives, and when the last one ended.
        self._round = 0
        self._handed_at = 0.0
        # Whether the reply to a read was lost, and with it what the server has given us.
        self._lost_reply = False
        # Whether something may be there that the stream does not tell of, and when it is due.
        self._must_look = True
        self._next_look = 0.0
        self._must_trim = False
        self._next_trim = 0.0
        self._woken = asyncio.Event()
        self._wakes: list[bytes] = []
        self._closed = False
        self._beating: asyncio.Task[None] | None = None

    # Receiving --------------------------------------------------------------------------

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        patience = Patience(self._clock, wait)
        limit = min(limit, BATCH)
        self._receivers += 1
        self._round += 1
        quick = self._clock.monotonic() - self._handed_at < _QUICK
        try:
            while not self._closed:
                if self._ready:
                    found = taken_from(self._ready, limit)
                    if quick and len(found) >= _AHEAD and not self._ready:
                        self._read_ahead(limit)
                    return found
                try:
                    with translated():
                        left = patience.left()
                        if not await self._read(limit, left):
                            continue
                except UnavailableError as error:
                    await patience.after(error, self._woken)
                else:
                    if left <= 0 and not self._ready:
                        return []
            return []
        finally:
            self._receivers -= 1
            self._handed_at = self._clock.monotonic()
            if not self._receivers and not self._closed and (self._ready or self._is_reading()):
                in_background(self._tidy_up(self._round))

    def _read_ahead(self, limit: int) -> None:
        """Let the server fetch the next batch while the caller works on this one."""
        if not self._is_reading():
            self._reading = in_background(self._read_some(limit, 0.0))

    async def _read(self, limit: int, wait: float) -> bool:
        """Let one read come to its end; return whether it was ours or another receive's."""
        ours = self._reading is None or self._reading.done()
        if ours:
            self._reading = in_background(self._read_some(limit, wait))
        elif self._blocks and (wait <= 0 or self._must_look or self._receivers == 1):
            # Begun by a receive that was cancelled, or that has more time than we have.
            await self._unblock()
        reading = self._reading
        assert reading is not None
        self._woken.clear()
        woken = asyncio.ensure_future(self._woken.wait())
        try:
            # Never cancelled: what a read brings is ours by then.
            await asyncio.wait((reading, woken), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                await self._unblock()
                await asyncio.wait((reading,))
        finally:
            woken.cancel()
        reading.result()
        return ours

    async def _read_some(self, limit: int, wait: float) -> None:
        now = self._clock.monotonic()
        try:
            if self._lost_reply:
                await self._recover()
            if self._must_look or now >= self._next_look:
                await self._look(limit)
            if self._ready:
                return
            block = min(wait, max(0.0, self._next_look - now))
            reply = await self._ask_for_more(limit, block)
            if reply:
                await self._note(reply, limit)
        except ResponseError as error:
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
            await self._begin_anew()

    async def _ask_for_more(self, limit: int, block: float) -> Any:
        keys = self._keys
        self._blocks = block > 0
        blocking = ("BLOCK", max(1, round(block * 1e3))) if self._blocks else ()
        self._lost_reply = True
        reply = await self._reads.call(
            *("XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", limit, *blocking),
            *("STREAMS", keys.wake, keys.log, ">", ">"),
            patience=block,
        )
        self._lost_reply = False
        return reply

    async def _note(self, reply: list[Any], limit: int) -> None:
        """Take note of what a read brought: messages, and word of some that came again."""
        log = self._keys.log.encode()
        fresh: list[list[Any]] = []
        for name, entries in reply:
            if name == log:
                fresh = entries
            else:
                self._wakes += [id_ for id_, _ in entries]
                self._must_look = True
        bad = self._add_fresh(fresh)
        if self._must_look:
            # What came again is older than what was read now.
            read = taken_from(self._ready, len(self._ready))
            try:
                await self._look(limit)
            finally:
                self._ready.extend(read)
        await self._settle_foreign(bad)

    def _add_fresh(self, entries: list[list[Any]]) -> list[Settlement]:
        """Add what was read for the first time; return how those end that are none of ours."""
        # All of them at once, column by column: this is run for every message.
        rows = [fields for _, fields in entries]
        sizes = list(map(len, rows))
        keyed = sizes.count(6)
        usual = (
            sizes.count(4) + keyed == len(rows)
            and [row[2] for row in rows].count(b"body") == len(rows)
            and {ID_BYTES} >= {len(row[1]) for row in rows}
            and [row[4] for row in rows if len(row) == 6].count(b"key") == keyed
        )
        if not usual:
            return [end for id_, row in entries for end in self._add(id_.decode(), 1, 1, row)]
        ids, bodies = [row[1] for row in rows], [row[3] for row in rows]
        keys = [row[5].decode(errors="replace") if len(row) == 6 else None for row in rows]
        tokens = [id_.decode() for id_, _ in entries]
        messages = map(Message, bodies, ids, keys)
        taken = zip(messages, repeat(1), tokens, _stored_at_us_of(tokens))
        self._ready.extend(map(_raw_delivery_of, taken))
        self._held.update(tokens)
        return []

    def _add(self, id_: str, turn: int, attempt: int, fields: Sequence[bytes]) -> list[Settlement]:
        """Add one entry; return how it ends where it is none of ours."""
        token = _token(id_, turn)
        self._held.add(token)
        try:
            message, only = message_of_fields(fields)
        except ForeignEntryError as error:
            reason = f"undecodable: {error}"
            return [Settlement(token, Action.REJECT, reason=reason, attempt=attempt)]
        if only is not None and only != self._group:
            return [Settlement(token, Action.ACK)]
        stored_at_us = int(id_.partition("-")[0]) * 1000
        self._ready.append(RawDelivery(message, attempt, token, stored_at_us))
        return []

    async def _settle_foreign(self, bad: list[Settlement]) -> None:
        if not bad:
            return
        await self.settle_batch(bad)
        for settlement in bad:
            if settlement.action is Action.REJECT:
                _logger.error(
                    "redis: an entry of topic %r became a dead letter: %s",
                    self._topic,
                    settlement.reason,
                )

    async def _look(self, limit: int) -> None:
        """Take what was given back and is due, and what others held for too long."""
        wakes, self._wakes = self._wakes, []
        # Before the call: what is given back during it must be looked for again.
        self._must_look = False
        self._lost_reply = True
        due_ms, taken = await self._ask(
            "look",
            ("log", "info", "later", "tries", "wake"),
            self._group,
            self._consumer,
            limit,
            *wakes,
        )
        self._lost_reply = False
        now = self._clock.monotonic()
        due = _LOOK if due_ms < 0 else min(_LOOK, due_ms / 1e3 + 0.001)
        self._next_look = now + due
        for id_, turn, attempt, fields in taken:
            await self._settle_foreign(self._add(id_.decode(), turn, attempt, fields))
        if self._must_trim and now >= self._next_trim:
            self._must_trim, self._next_trim = False, now + _LOOK
            await self._ask("trim", ("log",))

    async def _recover(self) -> None:
        """Find what the server gave us while its reply was lost."""
        start = "-"
        while True:
            page = await self._ask("mine", ("log", "tries"), self._group, self._consumer, start)
            unknown = [one for one in page if _token(one[0].decode(), one[1]) not in self._held]
            replies = await self._link.call_many(
                [("XRANGE", self._keys.log, id_, id_) for id_, _, _ in unknown]
            )
            for (id_, turn, attempt), reply in zip(unknown, replies, strict=True):
                if isinstance(reply, Exception):
                    raise reply
                if reply:
                    bad = self._add(id_.decode(), turn, attempt, reply[0][1])
                    await self._settle_foreign(bad)
            if len(page) < 500:
                break
            start = f"({page[-1][0].decode()}"
        self._lost_reply = False

    async def _begin_anew(self) -> None:
        """Make the subscription anew where the server has been wiped."""
        self._held.clear()
        self._ready.clear()
        await self._open_again(self._link)
        _logger.warning(
            "redis: subscription %r of topic %r was gone from the server; made anew",
            self._group,
            self._topic,
        )
        self._must_look, self._lost_reply = True, False

    async def _unblock(self) -> None:
        """End a read that blocks; it returns what it has, or nothing."""
        if self._reads.client_id is not None:
            with contextlib.suppress(Exception):
                await self._link.call("CLIENT", "UNBLOCK", self._reads.client_id)

    def _is_reading(self) -> bool:
        return self._reading is not None and not self._reading.done()

    async def _tidy_up(self, round_: int) -> None:
        """Give back what nobody has received, unless another receive asks for it soon."""
        if self._is_reading() and self._blocks:
            await self._unblock()
        await asyncio.sleep(KEEP)
        if self._round != round_ or self._closed or not self._ready:
            return
        with contextlib.suppress(UnavailableError):
            await self.settle_batch(returns(taken_from(self._ready, len(self._ready))))

    # Settling ---------------------------------------------------------------------------

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs, all of them together."""
        tokens = cast(list[str], [settlement.token for settlement in settlements])
        actions = [settlement.action for settlement in settlements]
        if actions.count(Action.ACK) == len(actions):
            lost = await self._ack(tokens)
        else:
            keys = ("log", "later", "tries", "wake", "dead")
            lost = await self._call_parts("settle", keys, [_settling(s) for s in settlements])
            if any(settlement.gives_back for settlement in settlements):
                self._must_look = True
                self._woken.set()
        self._held.difference_update(tokens)
        self._must_trim = True
        return outcomes_of(len(settlements), lost, Outcome.SETTLED)

    async def _ack(self, tokens: list[str]) -> set[int]:
        """Settle as done; return the places of those that are lost."""
        # Those of a batch come one after the other, and so few others stand between them.
        look = "range" if 4 * len(tokens) > len(self._held) else "each"
        return await self._call_parts(
            "ack", ("log", "later", "tries"), [(token,) for token in tokens], look
        )

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Hold for ``seconds`` from now."""
        words = [_parts(token) for token in tokens]
        keys = ("log", "info", "later")
        lost = await self._call_parts("extend", keys, words, round(seconds * 1e3))
        self._held.difference_update(cast(str, tokens[place]) for place in lost)
        return outcomes_of(len(tokens), lost, Outcome.EXTENDED)

    async def _call_parts(
        self, function: str, keys: Sequence[str], items: Sequence[Sequence[Any]], *head: Any
    ) -> set[int]:
        """Call a function for all items; return the places of those that are lost."""
        named = [getattr(self._keys, key) for key in keys]
        head = (self._group, self._consumer, *head)
        calls = []
        for at in range(0, len(items), BATCH):
            words = itertools.chain.from_iterable(items[at : at + BATCH])
            calls.append(self._functions.call(function, named, *head, *words))
        lost: set[int] = set()
        with translated():
            for part, reply in enumerate(await self._link.call_many(calls)):
                if isinstance(reply, ResponseError):
                    if "NOGROUP" not in str(reply):
                        raise reply
                    # The server was wiped: nothing of it is ours any more.
                    reply = range(min(BATCH, len(items) - part * BATCH))
                lost.update(part * BATCH + place for place in reply)
        return lost

    async def flush(self) -> None:
        """Nothing to do: the server has synced what it confirmed, if it ever does."""

    # Looking ----------------------------------------------------------------------------

    async def stat(self) -> SubscriptionStat:
        """Return what waits."""
        with translated():
            reply = await self._ask("stat", ("log", "dead"), self._group)
        if not reply:
            raise TopicNotFoundError(
                f"redis: subscription {self._group!r} of topic {self._topic!r} is gone"
            )
        return stat_of(reply)

    async def peek(self, limit: int) -> list[Peeked]:
        """Return what waits, oldest first."""
        with translated():
            reply = await self._ask("peek", ("log", "info", "later", "tries"), self._group, limit)
        found = []
        for state, attempts, id_, fields in reply:
            with contextlib.suppress(ForeignEntryError):
                message, only = message_of_fields(fields)
                if only is None or only == self._group:
                    known = cast(Literal["ready", "held", "delayed"], state.decode())
                    found.append(Peeked(message, known, attempts, _stored_at_us(id_)))
        return found

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        with translated():
            return await dead_letters_of(
                self._link, self._keys.dead, self._topic, self._group, limit
            )

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Send dead letters back through the log, marked as this subscription's only."""
        if ids is not None and not ids:
            return 0
        number, start = 0, b"-"
        with translated():
            while start and number < limit:
                some, start = await self._ask(
                    "replay", ("log", "dead"), self._group, limit - number, start, *(ids or ())
                )
                number += some
        return number

    async def purge(self, *, dead: bool) -> int:
        """Settle all that waits, also what somebody holds, or remove all dead letters."""
        with translated():
            if dead:
                length, _ = await self._link.call_many(
                    [("XLEN", self._keys.dead), ("UNLINK", self._keys.dead)]
                )
                return cast(int, length)
            number = await self._ask("purge", ("log", "later", "tries"), self._group)
        self._ready.clear()
        self._must_trim = True
        return cast(int, number)

    # Being there ------------------------------------------------------------------------

    async def join(self) -> None:
        """Say that this consumer is there, now and from time to time."""
        with translated():
            await self._say_here()
        self._beating = in_background(self._beat())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT)
            # Reading tells of trouble, and ends it.
            with contextlib.suppress(RedisServerError, ResponseError):
                await self._say_here()

    async def _say_here(self) -> None:
        keys = ("log", "wake", "members")
        await self._ask("beat", keys, self._group, self._consumer, round(_ALIVE * 1e3))

    async def close(self) -> None:
        """Give back what is held, let go of the server."""
        self._closed = True
        self._woken.set()
        if self._beating is not None:
            self._beating.cancel()
        reading = self._reading
        # A server that is away keeps what we hold until its lease runs out.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_ALIVE):
                while reading is not None and not reading.done():
                    await self._unblock()
                    await asyncio.wait((reading,), timeout=0.05)
                keys = ("log", "later", "tries", "wake", "members")
                await self._ask("leave", keys, self._group, self._consumer)
                await self._ask("trim", ("log",))
        await self._reads.close()
        await self._link.close()

    async def _ask(self, function: str, keys: Sequence[str], *arguments: Any) -> Any:
        named = [getattr(self._keys, key) for key in keys]
        return await self._link.call(*self._functions.call(function, named, *arguments))


def stat_of(reply: Sequence[int]) -> SubscriptionStat:
    """Return what the function ``stat`` tells."""
    pending, dead, age = reply
    return SubscriptionStat(pending, dead, None if age < 0 else age / 1e3)


async def dead_letters_of(
    link: RedisLink, key: str, topic: str, subscription: str, limit: int
) -> list[DeadLetter]:
    """Return up to ``limit`` dead letters of a subscription, oldest first."""
    found = []
    for id_, fields in await link.call("XRANGE", key, "-", "+", "COUNT", limit):
        _, reason, _, attempts, _, entry, *rest = fields
        try:
            message, _ = message_of_fields(rest)
        except ForeignEntryError:
            # Never ours; shown as it is, under an id that stays the same.
            message = Message(fields_text(rest), entry[-ID_BYTES:].rjust(ID_BYTES, b"0"))
        found.append(
            DeadLetter(
                message,
                reason.decode(),
                int(attempts),
                _stored_at_us(id_),
                f"topic {topic}, subscription {subscription}",
                _stored_at_us(entry),
            )
        )
    return found


def _token(id_: str, turn: int) -> str:
    """Return what names one hand-over: nearly every one is the first."""
    return id_ if turn == 1 else f"{id_}/{turn}"


def _parts(token: Token) -> tuple[str, str]:
    """Return the id and the turn that a token names."""
    id_, _, turn = cast(str, token).partition("/")
    return id_, turn or "1"


def _stored_at_us(id_: bytes) -> int:
    return int(id_.partition(b"-")[0]) * 1000


def _stored_at_us_of(tokens: Sequence[str]) -> list[int]:
    """Return when each was stored: those of one millisecond come one after the other."""
    found = []
    last_ms, stored_at_us = "-", 0
    for token in tokens:
        if not token.startswith(last_ms):
            ms = token[: token.index("-")]
            last_ms, stored_at_us = ms + "-", int(ms) * 1000
        found.append(stored_at_us)
    return found


def _settling(settlement: Settlement) -> tuple[Any, ...]:
    id_, turn = _parts(settlement.token)
    if settlement.action in (Action.ACK, Action.REJECT):
        action = "done" if settlement.action is Action.ACK else "dead"
        return (id_, turn, action, 0, settlement.attempt, settlement.reason)
    delay = max(0, round(settlement.delay * 1e3))
    return (id_, turn, "back", delay, settlement.next_attempt - 1, "")
