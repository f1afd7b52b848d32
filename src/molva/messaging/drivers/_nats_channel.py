"""Topics that keep nothing: core NATS, publishing and subscribing.

The consumers of one subscription are a queue group: each message comes to one of them.
"""

import asyncio
from collections.abc import Sequence
from typing import final

from nats.aio.msg import Msg

from molva._base.clock import Clock
from molva.messaging.driver import Capabilities, Outcome
from molva.messaging.drivers._channel import PAUSE, ChannelSubscription, ChannelTopic
from molva.messaging.drivers._nats_messages import (
    ForeignMessageError,
    Names,
    headers_of,
    message_of,
)
from molva.messaging.drivers._nats_opening import NATSServer
from molva.messaging.errors import MessagingError
from molva.messaging.message import Message

__all__ = ["NATSChannelSubscription", "NATSChannelTopic"]


@final
class NATSChannelTopic(ChannelTopic):
    """The sending side of a topic that keeps nothing."""

    def __init__(self, server: NATSServer, names: Names, *, capabilities: Capabilities) -> None:
        super().__init__(capabilities)
        self._link = server.link
        self._subject = names.channel

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Publish messages in their order; return when the server has them."""
        connection = await self._link.connected()
        for message in messages:
            await connection.publish(self._subject, message.body, headers=headers_of(message))
        await connection.flush()
        return [Outcome.STORED] * len(messages)

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
                await asyncio.sleep(PAUSE)

    async def _note(self, msg: Msg) -> None:
        try:
            message = message_of(msg)
        except ForeignMessageError as error:
            self._pass_over(error)
        else:
            self._take(message)
