"""Topics that keep nothing: core NATS, publishing and subscribing.

The consumers of one subscription are a queue group: each message comes to one of them.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, final

from nats.aio.msg import Msg

from molva._base.clock import Clock
from molva._base.waiting import first_of
from molva.messaging.driver import Capabilities, Outcome
from molva.messaging.drivers._channel import PAUSE, ChannelSubscription, ChannelTopic
from molva.messaging.drivers._nats_link import Connection
from molva.messaging.drivers._nats_messages import (
    ForeignMessageError,
    Names,
    headers_of,
    message_of,
    too_large,
)
from molva.messaging.drivers._nats_opening import NATSServer
from molva.messaging.errors import MessagingError
from molva.messaging.message import Message

__all__ = ["NATSChannelSubscription", "NATSChannelTopic"]

# Seconds between two looks whether the other side is there.
_PING: Final = 5.0


@final
class NATSChannelTopic(ChannelTopic):
    """The sending side of a topic that keeps nothing."""

    def __init__(self, server: NATSServer, names: Names, *, capabilities: Capabilities) -> None:
        super().__init__(capabilities)
        self._link = server.link
        self._limit = server.max_payload
        self._subject = names.channel

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome | MessagingError]:
        """Publish messages in their order; return when the server has them."""
        connection = await self._link.connected()
        outcomes: list[Outcome | MessagingError] = []
        for message in messages:
            headers = headers_of(message)
            problem = too_large(message, headers, self._limit)
            if problem is not None:
                # The server would end the connection, with all that is behind.
                outcomes.append(problem)
                continue
            await connection.publish(self._subject, message.body, headers=headers)
            outcomes.append(Outcome.STORED)
        await connection.flush()
        return outcomes

    async def close(self) -> None:
        """Let go of the server."""
        await self._link.close()


@final
class NATSChannelSubscription(ChannelSubscription):
    """One subscriber, of a queue group."""

    def __init__(
        self, server: NATSServer, names: Names, *, capabilities: Capabilities, clock: Clock
    ) -> None:
        super().__init__(
            "nats",
            names.shown,
            address=server.link.address,
            capabilities=capabilities,
            clock=clock,
        )
        self._link = server.link
        self._names = names

    async def join(self) -> None:
        """Subscribe; return when the server has confirmed it."""
        await self._subscribe()
        self._listening = asyncio.ensure_future(self._listen())

    async def close(self) -> None:
        """Unsubscribe, and let go of the server."""
        await super().close()
        await self._link.close()

    async def _subscribe(self) -> Connection:
        """Subscribe over whatever connection there is; return which one that is."""
        connection = await self._link.connected()
        try:
            await connection.subscribe(self._names.channel, self._note, group=self._names.consumer)
            await connection.flush()
        except MessagingError:
            await connection.close()  # or the next try would be a second one, beside this
            raise
        self._subscribed.set()
        return connection

    async def _listen(self) -> None:
        """Be subscribed, again and again until closed."""
        connection = await self._link.connected()
        while True:
            try:
                await self._until_ended(connection)
                self._subscribed.clear()
                connection = await self._subscribe()
            except MessagingError as error:
                self._log.warning("%s: not subscribed: %s", self._link.address, error)
                await asyncio.sleep(PAUSE)

    async def _until_ended(self, connection: Connection) -> None:
        """Wait for the end of a connection: it ends where nothing comes back for too long."""
        while not connection.ended.is_set():
            await first_of(self._clock.sleep(_PING), connection.ended.wait())
            if not connection.ended.is_set():
                await connection.flush()

    async def _note(self, msg: Msg) -> None:
        try:
            message = message_of(msg)
        except ForeignMessageError as error:
            self._pass_over(error)
        else:
            self._take(message)
