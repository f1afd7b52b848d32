"""A load on a cluster of which servers come and go."""

import asyncio
import contextlib
import itertools
import time
from collections import Counter

from molva.messaging import (
    Action,
    LeaseLostError,
    Message,
    Queue,
    SendManyError,
    Subscription,
    Topic,
    UnavailableError,
)

__all__ = ["ELECTION", "Load"]

# Seconds in which a cluster must have a leader again, on a machine that others use too.
ELECTION = 30.0


class Load:
    """One sends numbers, another receives and acknowledges, until told to stop.

    Attributes:
        confirmed: What was confirmed.
        received: How often each came.
        silence: The longest time in seconds without a confirmation.
    """

    def __init__(self, sender: Topic | Queue, consumer: Subscription | Queue) -> None:
        self.confirmed: set[bytes] = set()
        self.received: Counter[bytes] = Counter()
        self.silence = 0.0
        self._sender = sender
        self._consumer = consumer
        self._stopping = False
        self._sending = True

    async def send(self) -> None:
        number = itertools.count()
        last = time.monotonic()
        while not self._stopping:
            messages = [Message(b"%d" % next(number)) for _ in range(20)]
            while True:
                try:
                    await self._sender.send_many(messages)
                except (SendManyError, UnavailableError):
                    await asyncio.sleep(0.05)
                else:
                    break
            now = time.monotonic()
            self.silence, last = max(self.silence, now - last), now
            self.confirmed |= {message.body for message in messages}
            await asyncio.sleep(0.02)
        self._sending = False

    async def receive(self) -> None:
        while self._sending or not self.confirmed <= set(self.received):
            with contextlib.suppress(UnavailableError, LeaseLostError):
                deliveries = await self._consumer.receive(100, wait=0.5)
                self.received.update(delivery.message.body for delivery in deliveries)
                await self._consumer.settle([(delivery, Action.ACK) for delivery in deliveries])

    async def confirms_more(self) -> None:
        """Return when twenty more messages were confirmed."""
        before = len(self.confirmed)
        async with asyncio.timeout(ELECTION):
            while len(self.confirmed) == before:
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        """End, when what is being sent is confirmed and all that was confirmed has come."""
        self._stopping = True
