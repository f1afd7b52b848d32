"""The queues of the Redis driver; ``redis.py`` says why they are built this way."""

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Final, Literal, cast, final

from redis.exceptions import ResponseError

from molva._base.clock import Clock
from molva._base.redis_server import UnreachableServerError
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
from molva.messaging.drivers._redis_messages import QueueKeys, message_of_string, string_of
from molva.messaging.drivers._redis_opening import RedisServer, translated
from molva.messaging.drivers._redis_waiting import BATCH, KEEP, outcomes_of, parts_of
from molva.messaging.drivers._waiting import Patience, in_background, returns, taken_from
from molva.messaging.errors import MessagingError, QueueNotFoundError, UnavailableError
from molva.messaging.message import Message

__all__ = ["RedisQueue"]

_logger: Final = logging.getLogger("molva.messaging")

# Seconds after which a consumer that waits looks for itself: at what was held by one that
# was killed, and for what nobody woke it for.
_LOOK: Final = 1.0

# Microseconds in one step of an offset, which is when the message was stored.
_STEP_US: Final = 10


@final
class RedisQueue:
    """Both ends of a queue in a Redis server."""

    def __init__(
        self,
        server: RedisServer,
        *,
        capabilities: Capabilities,
        keys: QueueKeys,
        name: str,
        discipline: str,
        capacity: int | None,
        drops_oldest: bool,
        lease: float,
        creates: bool,
        clock: Clock,
    ) -> None:
        self.capabilities: Final = capabilities
        self._link = server.link
        # Blocks while this end waits. It takes nothing but wake-ups, so nothing is ever lost
        # with it.
        self._waits = server.another_link()
        self._functions = server.functions
        self._keys = keys
        self._name = name
        self._discipline = discipline
        self.capacity: Final = capacity
        self._drops_oldest = drops_oldest
        self.lease: Final = lease
        self._creates = creates
        self._clock = clock
        self._dice = random.Random()  # chance, no secret
        self._woken = asyncio.Event()
        self._waiting: asyncio.Task[None] | None = None
        self._receivers = 0
        self._closed = False
        self._taking: asyncio.Task[float | None] | None = None
        # Taken, and not handed over yet.
        self._ready: deque[RawDelivery] = deque()
        # What this end holds, to be given back when it closes.
        self._held: dict[int, tuple[int, int]] = {}

    # Sending ----------------------------------------------------------------------------

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Store messages in their order, as many in one call as are quickly moved."""
        head = (
            self._dice.getrandbits(31),
            "" if self.capacity is None else self.capacity,
            int(self._drops_oldest),
        )
        calls, sizes = [], []
        for part in parts_of(messages):
            words: list[Any] = []
            for message in part:
                delay = round(message.delay * 1e6) if message.delay else 0
                words += (message.priority, delay, string_of(message))
            calls.append(self._call("send", *head, *words))
            sizes.append(len(part))
        with translated():
            # One after the other where the queue is bounded: what stands behind a message
            # that found no room must find none.
            if self.capacity is None:
                stored = await self._stored(calls)
            else:
                stored = []
                for call, size in zip(calls, sizes, strict=True):
                    stored += await self._stored([call])
                    if stored[-1] < size:
                        break
        number = sum(stored)
        return [Outcome.STORED] * number + [Outcome.FULL] * (len(messages) - number)

    async def _stored(self, calls: list[tuple[Any, ...]]) -> list[int]:
        replies = await self._link.call_many(calls)
        if -1 in replies:
            await self._open_again()
            missing = [place for place, reply in enumerate(replies) if reply == -1]
            again = await self._link.call_many([calls[place] for place in missing])
            for place, reply in zip(missing, again, strict=True):
                replies[place] = reply
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return cast("list[int]", replies)

    async def _open_again(self) -> None:
        """Make the queue anew where the server has been wiped."""
        if not self._creates:
            raise QueueNotFoundError(
                f"redis: queue {self._name!r} is gone, and create=never was asked"
            )
        _logger.warning("redis: queue %r is gone from the server; made anew", self._name)
        await self._link.call(*self._functions.call("open", [self._keys.info], 1, self._discipline))

    # Receiving --------------------------------------------------------------------------

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        patience = Patience(self._clock, wait)
        self._receivers += 1
        try:
            while not self._closed:
                if self._ready:
                    return taken_from(self._ready, limit)
                try:
                    with translated():
                        # Forget earlier wake-ups before looking: one that comes after this
                        # look is then still there when we wait.
                        self._woken.clear()
                        due = await self._take(min(limit, BATCH))
                        left = patience.left()
                        if self._ready:
                            continue
                        if left <= 0:
                            return []
                        await self._wait(min(left, _LOOK, _LOOK if due is None else due))
                except UnavailableError as error:
                    await patience.after(error, self._woken)
            return []
        finally:
            self._receivers -= 1
            if not self._receivers and not self._closed and (self._ready or self._is_taking()):
                in_background(self._tidy_up())

    async def _take(self, limit: int) -> float | None:
        """Let one take come to its end; return in how many seconds something is ready."""
        if not self._is_taking():
            self._taking = in_background(self._take_some(limit))
        taking = self._taking
        assert taking is not None
        # Never cancelled: what it takes is ours by then, for whoever receives next.
        await asyncio.wait((taking,))
        return taking.result()

    async def _take_some(self, limit: int) -> float | None:
        reply = await self._ask("take", limit, round(self.lease * 1e6))
        held, ready = self._held, self._ready
        for offset, turn, attempt, text in zip(
            reply[1::4], reply[2::4], reply[3::4], reply[4::4], strict=True
        ):
            held[offset] = (turn, attempt)
            message = message_of_string(text)
            ready.append(RawDelivery(message, attempt, (offset, turn), offset * _STEP_US))
        return None if reply[0] < 0 else reply[0] / 1e6

    def _is_taking(self) -> bool:
        return self._taking is not None and not self._taking.done()

    async def _tidy_up(self) -> None:
        """Give back what a cancelled receive has taken, unless another one asks for it soon."""
        if self._taking is not None:
            await asyncio.wait((self._taking,))
        await asyncio.sleep(KEEP)
        if self._receivers or self._closed or not self._ready:
            return
        with contextlib.suppress(UnavailableError):
            await self.settle_batch(returns(taken_from(self._ready, len(self._ready))))

    async def _wait(self, seconds: float) -> None:
        """Wait until somebody says that there is something, or for so long."""
        if self._waiting is None or self._waiting.done():
            self._waiting = in_background(self._block(seconds))
        woken = asyncio.ensure_future(self._woken.wait())
        timer = asyncio.ensure_future(self._clock.sleep(seconds))
        try:
            await asyncio.wait((self._waiting, woken, timer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
            timer.cancel()
        if self._waiting.done():
            self._waiting.result()

    async def _block(self, seconds: float) -> None:
        # A list's BLPOP serves who has waited longest, and one alone.
        blocked = max(seconds, 0.001)
        got = await self._waits.call("BLPOP", self._keys.wake, blocked, patience=blocked)
        self._woken.set()
        if got is not None and not self._receivers:
            # Whoever waited here was cancelled: this one is for another consumer.
            await self._link.call("LPUSH", self._keys.wake, "")

    # Settling ---------------------------------------------------------------------------

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs, all of them together."""
        ack = Action.ACK
        if all(settlement.action is ack for settlement in settlements):
            lost = await self._call_parts("ack", [s.token for s in settlements])
        else:
            lost = await self._call_parts("settle", [_settling(s) for s in settlements])
        for settlement in settlements:
            offset, turn = cast("tuple[int, int]", settlement.token)
            if self._held.get(offset, (0, 0))[0] == turn:
                del self._held[offset]
        if any(settlement.gives_back for settlement in settlements):
            self._woken.set()
        return outcomes_of(len(settlements), lost, Outcome.SETTLED)

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Let leases run for ``seconds`` from now."""
        lost = await self._call_parts("extend", tokens, round(seconds * 1e6))
        return outcomes_of(len(tokens), lost, Outcome.EXTENDED)

    async def _call_parts(self, function: str, items: Sequence[Any], *head: Any) -> set[int]:
        """Call a function for all items; return the places of those that are lost."""
        calls = [
            self._call(function, *head, *(word for item in items[at : at + BATCH] for word in item))
            for at in range(0, len(items), BATCH)
        ]
        lost: set[int] = set()
        with translated():
            for part, reply in enumerate(await self._link.call_many(calls)):
                if isinstance(reply, ResponseError):
                    raise reply
                lost.update(part * BATCH + place for place in reply)
        return lost

    async def flush(self) -> None:
        """Nothing to do: the server has synced what it confirmed, if it ever does."""

    # Looking ----------------------------------------------------------------------------

    async def stat(self) -> QueueStat:
        """Return what the queue holds."""
        with translated():
            pending, held, delayed, dead, dropped, age = await self._ask("stat")
        return QueueStat(
            pending,
            pending - held - delayed,
            held,
            delayed,
            dead,
            dropped,
            None if age < 0 else age / 1e6,
        )

    async def peek(self, limit: int) -> list[Peeked]:
        """Return what is ready in its order, then what is not, by when it will be."""
        with translated():
            reply = await self._ask("peek", limit)
        return [
            Peeked(
                message_of_string(text),
                cast(Literal["ready", "held", "delayed"], state.decode()),
                attempts,
                offset * _STEP_US,
            )
            for state, attempts, offset, text in zip(
                reply[::4], reply[1::4], reply[2::4], reply[3::4], strict=True
            )
        ]

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        with translated():
            reply = await self._ask("dead", limit)
        return [
            DeadLetter(
                message_of_string(text),
                reason.decode(),
                attempts,
                int(died),
                f"queue {self._name}",
                offset * _STEP_US,
            )
            for attempts, died, reason, offset, text in reply
        ]

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Store dead letters once more, as messages that were never tried."""
        if ids is not None and not ids:
            return 0
        number, start = 0, b"-inf"
        with translated():
            while start and number < limit:
                some, start = await self._ask(
                    "replay", self._dice.getrandbits(31), limit - number, start, *(ids or ())
                )
                number += some
        self._woken.set()
        return number

    async def purge(self, *, dead: bool) -> int:
        """Remove all messages, also those that somebody holds, or all dead letters."""
        with translated():
            return cast(int, await self._ask("bury" if dead else "purge"))

    async def close(self) -> None:
        """Give back what is held, let go of the server."""
        self._closed = True
        self._woken.set()
        if self._taking is not None:
            await asyncio.wait((self._taking,))
        returned = [
            Settlement((offset, turn), Action.RETURN, attempt=attempt)
            for offset, (turn, attempt) in self._held.items()
        ]
        # A server that is away keeps them until their leases run out; nothing is lost.
        with contextlib.suppress(MessagingError):
            if returned:
                await self.settle_batch(returned)
        if self._waiting is not None and not self._waiting.done():
            with contextlib.suppress(UnreachableServerError, ResponseError):
                await self._link.call("CLIENT", "UNBLOCK", self._waits.client_id or 0)
        await self._waits.close()
        await self._link.close()

    def _call(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        return self._functions.call(function, self._keys.every, *arguments)

    async def _ask(self, function: str, *arguments: Any) -> Any:
        return await self._link.call(*self._call(function, *arguments))


def _settling(settlement: Settlement) -> tuple[Any, ...]:
    offset, turn = cast("tuple[int, int]", settlement.token)
    if settlement.action in (Action.ACK, Action.REJECT):
        action = "done" if settlement.action is Action.ACK else "dead"
        return (offset, turn, action, 0, settlement.attempt, settlement.reason)
    delay = max(0, round(settlement.delay * 1e6))
    return (offset, turn, "back", delay, settlement.next_attempt - 1, "")
