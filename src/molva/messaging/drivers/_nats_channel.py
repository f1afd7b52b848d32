"""Topics that keep nothing: core NATS, publishing and subscribing.

What is published reaches whoever is subscribed at that moment, and is nowhere afterwards. The
consumers of one subscription are a queue group: each message comes to one of them. A consumer
that is slower than what is published loses the newest, which is counted and logged.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Collection, Sequence
from typing import Final, final

from nats.aio.msg import Msg

from molva._base.clock import Clock
from molva._base.seldom import SeldomLog
from molva._base.waiting import first_of
from molva.messaging.driver import (
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
from molva.messaging.drivers._nats_messages import (
    ForeignMessageError,
    Names,
    headers_of,
    message_of,
)
from molva.messaging.drivers._nats_opening import NATSServer
from molva.messaging.drivers._waiting import Patience
from molva.messaging.errors import MessagingError, UnavailableError
from molva.messaging.message import Message

__all__ = ["NATSChannelSubscription", "NATSChannelTopic"]

_logger: Final = logging.getLogger("molva.messaging")

# Messages, and bytes of bodies, that wait here for somebody to receive them. More are
# dropped: nobody can hold up a publisher, and memory must be bounded.
_MOST_MESSAGES: Final = 10_000
_MOST_BYTES: Final = 64_000_000

# Seconds between two tries to subscribe again.
_PAUSE: Final = 0.2


@final
class NATSChannelTopic:
    """The sending side of a topic that keeps nothing."""

    capacity: Final = None

    def __init__(self, server: NATSServer, names: Names, *, capabilities: Capabilities) -> None:
        self.capabilities: Final = capabilities
        self._link = server.link
        self._subject = names.channel

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Publish messages in their order; return when the server has them."""
        connection = await self._link.connected()
        for message in messages:
            await connection.publish(self._subject, message.body, headers=headers_of(message))
        await connection.flush()
        return [Outcome.STORED] * len(messages)

    async def stat(self) -> TopicStat | None:
        """Nothing is kept, so there is nothing to tell."""
        return None

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """There are none."""
        return []

    async def remove_subscription(self, subscription: str) -> bool:
        """There is none that outlives its consumers."""
        return False

    async def close(self) -> None:
        """Let go of the server."""
        await self._link.close()


@final
class NATSChannelSubscription:
    """One subscriber: it gets what is published from when it was opened until it is closed."""

    lease: Final = None

    def __init__(
        self, server: NATSServer, names: Names, *, capabilities: Capabilities, clock: Clock
    ) -> None:
        self.capabilities: Final = capabilities
        self._link = server.link
        self._names = names
        self._clock = clock
        self._ready: deque[RawDelivery] = deque()
        self._bytes = 0
        self._came = asyncio.Event()
        self._subscribed = asyncio.Event()
        self._closed = False
        self._number = 0
        self.dropped = 0
        self._log = SeldomLog(_logger, clock)
        self._listening: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Subscribe; return when the server has confirmed it."""
        await self._subscribe()
        self._listening = asyncio.ensure_future(self._listen())

    async def _subscribe(self) -> asyncio.Event:
        """Subscribe over whatever connection there is; return what tells of its end."""
        connection = await self._link.connected()
        await connection.subscribe(self._names.channel, self._note, group=self._names.consumer)
        await connection.flush()
        self._subscribed.set()
        return connection.ended

    async def _listen(self) -> None:
        """Be subscribed, again and again until closed."""
        ended = (await self._link.connected()).ended
        while True:
            await ended.wait()
            self._subscribed.clear()
            try:
                ended = await self._subscribe()
            except MessagingError as error:
                self._log.warning("%s: not subscribed: %s", self._link.address, error)
                await asyncio.sleep(_PAUSE)

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        patience = Patience(self._clock, wait)
        while not self._closed:
            self._came.clear()
            if self._ready:
                found = [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]
                self._bytes -= sum(len(raw.message.body) for raw in found)
                return found
            left = patience.left()
            if left <= 0:
                if not self._subscribed.is_set():
                    raise UnavailableError(f"{self._link.address}: not subscribed now")
                return []
            await first_of(self._clock.sleep(left), self._came.wait())
        return []

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Nothing is kept, so whatever becomes of a message is right."""
        return [Outcome.SETTLED] * len(settlements)

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """What was handed over is the consumer's for ever."""
        return [Outcome.EXTENDED] * len(tokens)

    async def flush(self) -> None:
        """Nothing to do: there is nothing that could be outlived."""

    async def stat(self) -> SubscriptionStat | None:
        """The server keeps nothing that it could tell."""
        return None

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """There are none."""
        return []

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """There is nothing to send back."""
        return 0

    async def purge(self, *, dead: bool) -> int:
        """There is nothing to remove."""
        return 0

    async def peek(self, limit: int) -> list[Peeked]:
        """There is nothing to look at."""
        return []

    async def close(self) -> None:
        """Unsubscribe."""
        self._closed = True
        self._came.set()
        if self._listening is not None:
            self._listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listening
        await self._link.close()

    async def _note(self, msg: Msg) -> None:
        try:
            message = message_of(msg)
        except ForeignMessageError as error:
            self._log.warning("nats: something was published that is no message: %s", error)
            return
        size = self._bytes + len(message.body)
        if len(self._ready) == _MOST_MESSAGES or (size > _MOST_BYTES and self._ready):
            self.dropped += 1
            self._log.error(
                "nats: %s: its consumer is too slow; messages are dropped", self._names.shown
            )
            return
        self._bytes = size
        self._number += 1
        self._ready.append(RawDelivery(message, 1, (self._number,), self._clock.now_us()))
        self._came.set()
