"""Publishes messages and waits until the server has said what became of each.

A message is safe when it is persistent, went to a queue and was confirmed. The server confirms
what goes to no queue at all, so every message is ``mandatory`` and comes back then. It confirms
many at a time and in any order, so many are under way at once, on one channel: on several they
would overtake each other. ``_amqp_batch`` writes them.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final, final

from aiormq.channel import Channel
from aiormq.exceptions import ChannelNotFoundEntity, DeliveryError, PublishError

from molva.messaging.drivers._amqp_batch import Batch, Parcel
from molva.messaging.drivers._amqp_link import AMQPLink, translated
from molva.messaging.drivers._amqp_options import AMQPAddress
from molva.messaging.errors import MessageTooLargeError, MessagingError, UnavailableError

__all__ = ["AMQPSender", "Parcel", "RefusedError", "Restore", "ReturnedError"]

# Makes again what is missing in the server, or raises.
Restore = Callable[[], Awaitable[object]]

# Messages, and bytes of bodies, that are under way at once. Fewer, and both sides wait for each
# other; more, and a server that has stopped fills our memory.
_MOST_MESSAGES: Final = 1_000
_MOST_BYTES: Final = 8_000_000
# Seconds between two looks whether there still is a connection that can answer.
_LOOK: Final = 0.25
# What RabbitMQ says of its ``max_message_size``.
_TOO_LARGE: Final = re.compile(r"larger than configured max size (\d+)")
# Bytes a second that any network carries: what is larger is waited for longer.
_SLOWEST_NETWORK: Final = 2_000_000


class ReturnedError(Exception):
    """No queue is bound where it was sent: it came back, and is stored nowhere."""


class RefusedError(Exception):
    """The server has refused it: the queue is full, or cannot store now."""


@final
class AMQPSender:
    """Publishes over a connection of its own, which a full server holds up and no other."""

    def __init__(self, address: AMQPAddress, *, timeout: float) -> None:
        self.link: Final = AMQPLink(address, "sends")
        self._timeout = timeout
        self._channel: Channel | None = None
        self._turn = asyncio.Lock()

    async def publish(self, parcels: Sequence[Parcel]) -> list[Exception | None]:
        """Publish in order; None for each that is stored, or why it is not.

        Raises:
            UnavailableError: The server cannot be reached, so that none is stored.
            InvalidURLError: It does not let us.
        """
        results: list[Exception | None] = []
        for part in _parts(parcels):
            found = await self._publish(part)
            limit = _limit_told(found)
            if limit is not None:
                found = await self._publish_smaller(part, found, limit)
            results += found
        return results

    async def publish_surely(
        self, parcels: Sequence[Parcel], restore: Restore
    ) -> list[Exception | None]:
        """Publish; where what one was sent to is gone, make it again and publish that one again.

        Args:
            parcels: What to publish, in order.
            restore: Makes what is missing, or raises, which is then the answer.
        """
        results = await self.publish(parcels)
        gone = [place for place, why in enumerate(results) if _is_gone(why, parcels[place])]
        if gone:
            again: Sequence[Exception | None]
            try:
                await restore()
                again = await self.publish([parcels[place] for place in gone])
            except MessagingError as error:
                again = [error] * len(gone)
            for place, why in zip(gone, again, strict=True):
                results[place] = why
        return results

    async def _publish_smaller(
        self, parcels: Sequence[Parcel], found: list[Exception | None], limit: int
    ) -> list[Exception | None]:
        """Publish once more what a message that was too large has taken along."""
        for place, parcel in enumerate(parcels):
            size = len(parcel.packed.body)
            if size > limit:
                found[place] = MessageTooLargeError(size, limit)
        rest = [
            place
            for place, problem in enumerate(found)
            if problem is not None and not isinstance(problem, MessageTooLargeError)
        ]
        again = await self._publish([parcels[place] for place in rest]) if rest else []
        for place, problem in zip(rest, again, strict=True):
            found[place] = problem
        return found

    async def _publish(self, parcels: Sequence[Parcel]) -> list[Exception | None]:
        channel = await self._opened()
        batch = Batch(channel, parcels)
        size = sum(len(parcel.packed.body) for parcel in parcels)
        publishing = asyncio.ensure_future(batch.publish(drained=size > _MOST_BYTES // 8))
        publishing.add_done_callback(_look_at)
        try:
            await self._answers(channel, publishing, self._timeout + size / _SLOWEST_NETWORK)
        finally:
            is_late = not publishing.done()
            publishing.cancel()
        why = "was closed before it had confirmed"
        if is_late:
            lost, blocked = _is_lost(channel), self.link.is_blocked()
            # Whatever is confirmed from now on would be taken for what comes next.
            await self.link.drop(channel.connection)
            await asyncio.wait((publishing,))
            why = f"has not confirmed within {self._timeout:g} s"
            if lost:
                why = "has not confirmed before the connection was lost"
            elif blocked:
                why = "takes no messages: its memory or disk is full, see rabbitmqctl status"
        told = None if publishing.cancelled() else publishing.exception()
        failed = told or asyncio.CancelledError()
        return [
            self._outcome(failed if answer is Batch.OPEN else answer, why)
            for answer in batch.answers
        ]

    async def _answers(
        self, channel: Channel, publishing: "asyncio.Task[None]", seconds: float
    ) -> None:
        """Wait until all are answered, for so long, or for as long as there is a connection.

        One that was reset tells some of those who wait for it, and at times not the others.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        while not publishing.done() and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait((publishing,), timeout=min(left, _LOOK))
            if not publishing.done() and _is_lost(channel):
                # What is told to all is told now; who is told nothing is not told later either.
                await asyncio.wait((publishing,), timeout=min(left, _LOOK))
                return

    def _outcome(self, error: BaseException | None, why: str) -> Exception | None:
        if error is None:
            return None
        if isinstance(error, asyncio.CancelledError):
            return UnavailableError(f"{self.link.address} {why}")
        if isinstance(error, PublishError):
            return ReturnedError(f"{self.link.address}: nobody takes {error.args[1]!r}")
        if isinstance(error, DeliveryError):
            return RefusedError(f"{self.link.address}: refused by the queue")
        try:
            with translated(self.link.address):
                raise error
        except Exception as told:  # noqa: BLE001 - it is the result
            return told

    async def _opened(self) -> Channel:
        async with self._turn:
            if self._channel is None or self._channel.is_closed:
                self._channel = await self.link.channel(confirms=True)
            return self._channel

    async def close(self) -> None:
        """Close the connection."""
        await self.link.close()


def _is_gone(problem: Exception | None, parcel: Parcel) -> bool:
    """Tell whether one was stored nowhere, because what it was sent to is not there.

    An exchange that is missing ends the channel for all that is under way on it. What was sent
    elsewhere may be stored, and would be so twice.
    """
    if isinstance(problem, ReturnedError):
        return True
    cause = problem.__cause__ if isinstance(problem, UnavailableError) else None
    return isinstance(cause, ChannelNotFoundEntity) and f"'{parcel.exchange}'" in str(cause)


def _is_lost(channel: Channel) -> bool:
    """Whether a channel's connection has ended; there may be another since."""
    return not channel.connection.is_opened


def _look_at(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        task.exception()  # it is said of each message


def _limit_told(results: Sequence[Exception | None]) -> int | None:
    """Return how many bytes the server takes, where it closed the channel to tell."""
    for problem in results:
        told = _TOO_LARGE.search(str(problem)) if problem is not None else None
        if told is not None:
            return int(told[1])
    return None


def _parts(parcels: Sequence[Parcel]) -> Iterator[Sequence[Parcel]]:
    """Cut what is sent into parts that are under way at once."""
    start = size = 0
    for place, parcel in enumerate(parcels):
        size += len(parcel.packed.body)
        if place > start and (size > _MOST_BYTES or place - start == _MOST_MESSAGES):
            yield parcels[start:place]
            start, size = place, len(parcel.packed.body)
    if parcels:
        yield parcels[start:]
