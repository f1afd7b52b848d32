"""Topics that keep nothing, whichever broker publishes them.

What is published reaches whoever is subscribed at that moment, and is nowhere afterwards. So
there is nothing to settle, count, look at or send back; what differs between brokers is how one
publishes and subscribes. A consumer that is slower than what is published loses the newest,
which is counted and logged.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Sequence
from typing import Final

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
from molva.messaging.drivers._waiting import Patience
from molva.messaging.errors import UnavailableError
from molva.messaging.message import Message

__all__ = ["PAUSE", "ChannelSubscription", "ChannelTopic", "channel_capabilities"]

_logger: Final = logging.getLogger("molva.messaging")

# Messages, and bytes of bodies, that wait here for somebody to receive them. More are
# dropped: nobody can hold up a publisher, and memory must be bounded.
_MOST_MESSAGES: Final = 10_000
_MOST_BYTES: Final = 64_000_000

# Seconds between two tries to subscribe again.
PAUSE: Final = 0.2


def channel_capabilities(max_body_bytes: int) -> Capabilities:
    """Return what a topic can do that keeps nothing."""
    return Capabilities(
        delivery="at-most-once",
        ordering="in-process",
        capacity="none",
        survives=frozenset(),
        max_body_bytes=max_body_bytes,
        holding="connection",
        overflows=frozenset(),
        keeps_place=False,
        starts=frozenset({"latest"}),
        deletes=False,
        stat="none",
        peek=False,
        purge=False,
        replay=False,
    )


class ChannelTopic:
    """The sending side of a topic that keeps nothing, but for what publishes."""

    capacity: Final = None

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities: Final = capabilities

    async def stat(self) -> TopicStat | None:
        """Nothing is kept, so there is nothing to tell."""
        return None

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """There are none."""
        return []

    async def remove_subscription(self, subscription: str) -> bool:
        """There is none that outlives its consumers."""
        return False


class ChannelSubscription:
    """One subscriber: it gets what is published from when it was opened until it is closed.

    A broker's own subscribes, in ``_listen``, and hands over what comes to ``_take``.

    Attributes:
        dropped: Messages that were lost because nobody received them in time.

    Args:
        broker: What its log lines begin with.
        name: What it listens to, for the log.
        address: Where the server is, for errors.
        capabilities: What the topic can do.
        clock: Where time comes from.
    """

    lease: Final = None

    def __init__(
        self,
        broker: str,
        name: str,
        *,
        address: object,
        capabilities: Capabilities,
        clock: Clock,
    ) -> None:
        self.capabilities: Final = capabilities
        self.dropped = 0
        self._broker = broker
        self._name = name
        self._at = address
        self._clock = clock
        self._ready: deque[RawDelivery] = deque()
        self._bytes = 0
        self._came = asyncio.Event()
        self._subscribed = asyncio.Event()
        self._closed = False
        self._number = 0
        self._log = SeldomLog(_logger, clock)
        self._listening: asyncio.Task[None] | None = None

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
                    raise UnavailableError(f"{self._at}: not subscribed now; trying again")
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
            await asyncio.wait((self._listening,))

    def _pass_over(self, problem: ValueError) -> None:
        """Take note of something that somebody else has published."""
        self._log.warning(
            "%s: something was published that is no message: %s", self._broker, problem
        )

    def _take(self, message: Message) -> None:
        """Keep a message for who receives; drop it where too many wait."""
        size = self._bytes + len(message.body)
        if len(self._ready) == _MOST_MESSAGES or (size > _MOST_BYTES and self._ready):
            self.dropped += 1
            self._log.error(
                "%s: %s: its consumer is too slow; messages are dropped", self._broker, self._name
            )
            return
        self._bytes = size
        self._number += 1
        self._ready.append(RawDelivery(message, 1, (self._number,), self._clock.now_us()))
        self._came.set()
