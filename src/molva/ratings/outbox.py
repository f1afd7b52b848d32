"""An outbox: ratings in a file of this machine, on their way to the broker.

It is nothing but a topic in a queue file of ``sqlite://``, of one lane, with one subscription:
stored with an fsync, checksummed, bounded, in order, and what was handed over and not
acknowledged comes again, in the same order. It adds one rule: **a rating is acknowledged here
after the broker has confirmed it, never before.** A kill in between sends it twice under one
id, which the ledger counts once.
"""

import logging
from collections.abc import Mapping
from typing import Final, NamedTuple, Self, final

from molva._base.clock import Clock
from molva._base.ids import format_id
from molva.messaging import (
    BrokenBrokerError,
    Capabilities,
    Delivery,
    IncompatibleBrokerError,
    LeaseLostError,
    Message,
    MessageTooLargeError,
    MessagingError,
    SendManyError,
    Subscription,
    SubscriptionStat,
    Topic,
    TopicNotFoundError,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.driver import Action
from molva.messaging.url import BrokerURL, load_driver

__all__ = [
    "OUTBOX_SUBSCRIPTION",
    "OUTBOX_TOPIC",
    "Outbox",
    "OutboxDamagedError",
    "Progress",
    "look_into",
    "outboxes_survive",
]

_logger: Final = logging.getLogger("molva.ratings")

# The names inside the file.
OUTBOX_TOPIC: Final = "ratings"
OUTBOX_SUBSCRIPTION: Final = "broker"

# Hand-overs after which a rating would become a dead letter: never. Here a process that dies
# with what it holds is no sign of a bad rating; it was killed while the broker was away.
_ATTEMPTS: Final = 1_000_000_000
# Seconds that one look for ratings waits, where none is there yet.
_WAIT: Final = 0.25


class Progress(NamedTuple):
    """How far ``forward`` came.

    Attributes:
        gone: Ratings that left the outbox.
        obstacle: What kept the next one here; None where nothing did.
    """

    gone: int
    obstacle: MessagingError | None


@final
class OutboxDamagedError(MessagingError):
    """What lies in an outbox cannot be read; what comes behind it would wait for ever.

    Attributes:
        reason: What its queue file said.
    """

    def __init__(self, reason: IncompatibleBrokerError) -> None:
        super().__init__(str(reason))
        self.reason: Final = reason


@final
class Outbox:
    """Keeps ratings, and sends them on in the order in which they came."""

    def __init__(self, topic: Topic, subscription: Subscription, clock: Clock) -> None:
        self._topic = topic
        self._subscription = subscription
        self._clock = clock
        self._found = 0
        self._gone = 0
        # Handed over to us, and not confirmed by the broker.
        self._held: list[Delivery] = []
        self._oldest_at_us: int | None = None
        # Ratings that the broker refused for good.
        self.dead = 0

    @classmethod
    async def open(cls, url: str, *, limit: int | None, clock: Clock) -> Self:
        """Open an outbox, with what is in it.

        Args:
            url: Its queue file, without a topic.
            limit: How many ratings it may hold; None for any number.
            clock: Where time comes from.

        Raises:
            MessagingError: The file cannot be used.
        """
        named = with_options(url, topic=OUTBOX_TOPIC, lanes="1")
        subscription = await open_subscription(
            with_options(named, subscription=OUTBOX_SUBSCRIPTION),
            max_attempts=_ATTEMPTS,
            clock=clock,
        )
        try:
            bounded = named if limit is None else with_options(named, capacity=str(limit))
            topic = await open_topic(bounded, clock=clock)
        except BaseException:
            await subscription.close()
            raise
        outbox = cls(topic, subscription, clock)
        try:
            await outbox.recount()
        except BaseException:
            await outbox.close()
            raise
        return outbox

    @property
    def survives(self) -> frozenset[str]:
        """What a rating in it outlives: never the loss of the machine."""
        return self._topic.capabilities.survives

    @property
    def length(self) -> int:
        """How many ratings are in it."""
        return self._found + self._topic.counters.stored - self._gone

    @property
    def stored(self) -> int:
        """How many ratings were stored since it was opened."""
        return self._topic.counters.stored

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it, and nothing on its way into it."""
        # What is on its way counts whether or not anybody waits for it any more: a request
        # that was cancelled may still be stored.
        return not self._topic.sending and self.length == 0

    @property
    def oldest_at_us(self) -> int | None:
        """When the oldest rating was stored, microseconds UTC; None where none is there."""
        return self._oldest_at_us if self.length else None

    async def store(self, message: Message) -> None:
        """Keep a rating. When this returns it outlives what ``survives`` says.

        Raises what ``Topic.send`` raises.
        """
        if self.is_empty:
            self._oldest_at_us = self._clock.now_us()
        await self._topic.send(message)

    async def forward(self, broker: Topic, limit: int) -> Progress:
        """Send up to ``limit`` ratings on, oldest first; say what keeps the others.

        Raises:
            BrokenBrokerError: This process may not write to the file, or to the broker, again.
            OutboxDamagedError: The next rating in the file cannot be read.
            MessagingError: The file cannot be read or written now.
        """
        if not self._held:
            self._held = await self._receive(limit)
        if not self._held:
            if self.length and not self._topic.sending:
                await self.recount()
            return Progress(0, None)
        self._oldest_at_us = self._held[0].stored_at_us
        part, rest = self._held[:limit], self._held[limit:]
        failures = await _send(broker, part)
        kept = [part[place] for place, error in failures.items() if not _is_final(error)]
        # Behind the broker's confirmation, never before: see the head of this file.
        done = [(one, Action.ACK) for place, one in enumerate(part) if place not in failures]
        try:
            await self._subscription.settle(done)
            for place, error in failures.items():
                if _is_final(error):
                    refused = [(part[place], Action.REJECT)]
                    await self._subscription.settle(refused, reason=str(error))
                    self.dead += 1
                    _logger.warning(
                        "%r: the broker refused %s for good, it is a dead letter here: %s",
                        self._subscription,
                        format_id(part[place].message.id),
                        error,
                    )
        except LeaseLostError:
            # Somebody who looks into the file (`molva sub`) had its lane for a moment. What was
            # not settled comes again, and the ledger knows its ids.
            self._held = []
            await self.recount()
            return Progress(0, None)
        self._held = kept + rest
        self._gone += len(part) - len(kept)
        obstacles = (error for error in failures.values() if not _is_final(error))
        return Progress(len(part) - len(kept), next(obstacles, None))

    async def _receive(self, limit: int) -> list[Delivery]:
        try:
            return await self._subscription.receive(limit, wait=_WAIT)
        except IncompatibleBrokerError as error:
            raise OutboxDamagedError(error) from error

    async def recount(self) -> None:
        """Ask the file what is in it, where somebody else may have changed that.

        It never tells too few; for a quarter of a second it may tell too many, and then is
        asked again, because nothing comes. Not to be called while ``forward`` runs.
        """
        # What is stored meanwhile counts on top, whether or not the file tells of it already.
        stored = self._topic.counters.stored
        stat = await self._subscription.stat()
        assert stat is not None, "a queue file can always tell what waits"
        self._found, self._gone, self.dead = stat.pending, stored, stat.dead
        self._oldest_at_us = self._clock.now_us() - round((stat.oldest_seconds or 0.0) * 1e6)

    async def close(self) -> None:
        """Note how far it is emptied; release the file."""
        try:
            await self._topic.close()
        finally:
            await self._subscription.close()


def outboxes_survive() -> frozenset[str]:
    """Return what a rating in any outbox outlives: for these files the driver has fixed it."""
    driver = load_driver(BrokerURL.parse("sqlite:///outbox.db"))
    capabilities: Capabilities = driver.TOPIC_CAPABILITIES
    return capabilities.survives


async def look_into(url: str) -> SubscriptionStat:
    """Return what waits in an outbox that another process may have open.

    Args:
        url: Its queue file, without a topic.

    Raises:
        MessagingError: It cannot be read.
    """
    named = with_options(url, topic=OUTBOX_TOPIC, create="never")
    try:
        async with await open_topic(named) as topic:
            stat = await topic.stat()
    except TopicNotFoundError:
        stat = None  # it is being made
    found = None if stat is None else stat.subscriptions.get(OUTBOX_SUBSCRIPTION)
    return found or SubscriptionStat(0, 0, None)


async def _send(broker: Topic, part: list[Delivery]) -> Mapping[int, MessagingError]:
    """Send ratings on, each under its id; return the place and the error of each that failed."""
    try:
        await broker.send_many([delivery.message for delivery in part])
    except SendManyError as error:
        for failure in error.failures.values():
            if isinstance(failure, BrokenBrokerError):
                raise failure from error
        return error.failures
    return {}


def _is_final(error: MessagingError) -> bool:
    """Return whether sending this rating again can never help: it becomes a dead letter here."""
    return isinstance(error, MessageTooLargeError)
