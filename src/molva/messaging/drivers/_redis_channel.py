"""Topics that keep nothing: Redis's own publishing and subscribing.

What is published reaches whoever is subscribed at that moment, and is nowhere afterwards.
There are no groups: every consumer, of whatever subscription, gets everything. A consumer
that is slower than what is published loses the newest, which is counted and logged.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Final, final

from redis.asyncio.connection import Connection
from redis.exceptions import RedisError

from molva._base.clock import Clock
from molva._base.redis_server import RedisAddress
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
from molva.messaging.drivers._redis_messages import (
    ForeignEntryError,
    TopicKeys,
    message_of_string,
    string_of,
)
from molva.messaging.drivers._redis_opening import RedisServer, translated
from molva.messaging.drivers._waiting import Patience
from molva.messaging.errors import UnavailableError
from molva.messaging.message import Message

__all__ = ["RedisChannelSubscription", "RedisChannelTopic"]

_logger: Final = logging.getLogger("molva.messaging")

# Messages, and bytes of bodies, that wait here for somebody to receive them. More are
# dropped: nobody can hold up a publisher, and memory must be bounded.
_MOST_MESSAGES: Final = 10_000
_MOST_BYTES: Final = 64_000_000

# Seconds between two tries to subscribe again, and two looks whether the other side is there.
_PAUSE: Final = 0.2
_PING: Final = 5.0
# Seconds within which subscribing is confirmed, or opening fails.
_JOIN: Final = 4.0


@final
class RedisChannelTopic:
    """The sending side of a topic that keeps nothing."""

    capacity: Final = None

    def __init__(self, server: RedisServer, *, capabilities: Capabilities, keys: TopicKeys) -> None:
        self.capabilities: Final = capabilities
        self._link = server.link
        self._channel = keys.channel

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Publish messages in their order."""
        with translated():
            replies = await self._link.call_many(
                [("PUBLISH", self._channel, string_of(message)) for message in messages]
            )
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
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
class RedisChannelSubscription:
    """One subscriber: it gets what is published from when it was opened until it is closed."""

    lease: Final = None

    def __init__(
        self,
        address: RedisAddress,
        *,
        capabilities: Capabilities,
        keys: TopicKeys,
        clock: Clock,
    ) -> None:
        self.capabilities: Final = capabilities
        self._address = address
        self._channel = keys.channel
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
        self._listening = asyncio.ensure_future(self._listen())
        try:
            async with asyncio.timeout(_JOIN):
                await self._subscribed.wait()
        except TimeoutError:
            await self.close()
            raise UnavailableError(f"{self._address}: cannot subscribe now") from None

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
                    raise UnavailableError(f"{self._address}: not subscribed now; trying again")
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

    # Listening --------------------------------------------------------------------------

    async def _listen(self) -> None:
        """Be subscribed, again and again until closed."""
        while True:
            connection = self._address.connection()
            try:
                await self._listen_once(connection)
            except (RedisError, OSError, TimeoutError) as error:
                self._log.warning("%s: not subscribed: %s", self._address, error)
            finally:
                self._subscribed.clear()
                with contextlib.suppress(RedisError, OSError):
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(_PAUSE)

    async def _listen_once(self, connection: Connection) -> None:
        await connection.connect()  # type: ignore[no-untyped-call]
        await connection.send_command("SUBSCRIBE", self._channel)
        asked = False
        while True:
            # Cancelling is safe where nothing is taken by asking, and the timeout only ends
            # the waiting: what has come in part stays in the parser.
            reply = await connection.read_response(disable_decoding=True, timeout=_PING)
            if reply is None:
                if asked:
                    raise TimeoutError("no answer in time")
                asked = True
                await connection.send_command("PING", check_health=False)
                continue
            asked = False
            self._note(reply)

    def _note(self, reply: Any) -> None:
        if not isinstance(reply, list) or len(reply) != 3:
            return
        kind, _, text = reply
        if kind == b"subscribe":
            self._subscribed.set()
        if kind != b"message":
            return
        try:
            message = message_of_string(text)
        except ForeignEntryError as error:
            self._log.warning("redis: something was published that is no message: %s", error)
            return
        size = self._bytes + len(message.body)
        if len(self._ready) == _MOST_MESSAGES or (size > _MOST_BYTES and self._ready):
            self.dropped += 1
            self._log.error(
                "redis: %s: its consumer is too slow; messages are dropped", self._channel
            )
            return
        self._bytes = size
        self._number += 1
        self._ready.append(RawDelivery(message, 1, (self._number,), self._clock.now_us()))
        self._came.set()
