"""Topics that keep nothing: Redis's own publishing and subscribing.

There are no groups: every consumer, of whatever subscription, gets everything.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Final, final

from redis.asyncio.connection import Connection
from redis.exceptions import RedisError

from molva._base.clock import Clock
from molva._base.redis_server import RedisAddress
from molva.messaging.driver import Capabilities, Outcome
from molva.messaging.drivers._channel import PAUSE, ChannelSubscription, ChannelTopic
from molva.messaging.drivers._redis_messages import (
    ForeignEntryError,
    TopicKeys,
    message_of_string,
    string_of,
)
from molva.messaging.drivers._redis_opening import RedisServer, translated
from molva.messaging.errors import UnavailableError
from molva.messaging.message import Message

__all__ = ["RedisChannelSubscription", "RedisChannelTopic"]

# Seconds between two looks whether the other side is there.
_PING: Final = 5.0
# Seconds within which subscribing is confirmed, or opening fails.
_JOIN: Final = 4.0


@final
class RedisChannelTopic(ChannelTopic):
    """The sending side of a topic that keeps nothing."""

    def __init__(self, server: RedisServer, *, capabilities: Capabilities, keys: TopicKeys) -> None:
        super().__init__(capabilities)
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

    async def close(self) -> None:
        """Let go of the server."""
        await self._link.close()


@final
class RedisChannelSubscription(ChannelSubscription):
    """One subscriber, over a connection of its own."""

    def __init__(
        self,
        address: RedisAddress,
        *,
        capabilities: Capabilities,
        keys: TopicKeys,
        clock: Clock,
    ) -> None:
        super().__init__(
            "redis", keys.channel, address=address, capabilities=capabilities, clock=clock
        )
        self._address = address
        self._channel = keys.channel

    async def join(self) -> None:
        """Subscribe; return when the server has confirmed it."""
        self._listening = asyncio.ensure_future(self._listen())
        try:
            async with asyncio.timeout(_JOIN):
                await self._subscribed.wait()
        except TimeoutError:
            await self.close()
            raise UnavailableError(f"{self._address}: cannot subscribe now") from None

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
            await asyncio.sleep(PAUSE)

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
            self._pass_over(error)
        else:
            self._take(message)
