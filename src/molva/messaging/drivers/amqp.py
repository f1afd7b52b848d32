"""RabbitMQ driver: topics on exchanges, a quorum queue for each subscription and each queue.

URL:
    ``amqp://user:password@host:5672/vhost?topic=ratings&subscription=process``

    ``amqps://``
        The same over TLS. The server's certificate must be made out to the host's name.
    ``topic``, ``subscription``; or ``queue``
        Names inside the vhost.
    ``discipline``
        ``priority`` makes a new queue a classic one, which knows priorities.
    ``capacity``
        How many messages a new queue may hold, about: the server stops taking them a little
        later. A topic has no bound.
    ``start``
        ``latest`` leaves to others what was sent while the topic had no subscription.
    ``expires``
        Seconds after which the server removes a new subscription that nobody consumes.
    ``prefix``
        What all names begin with. Default ``molva``. Several deployments may share a vhost.
    ``timeout``
        Seconds within which a message must be confirmed. Default 10.
    ``ca``
        File of the authorities that a server's certificate is checked against (TLS).

    Name and password may stand in ``MOLVA_AMQP_USERNAME`` and ``MOLVA_AMQP_PASSWORD`` instead.
    ``_amqp_options`` says what things are called in the server, ``_amqp_messages`` how messages
    look there.

Delivery:
    At least once, oldest first, where what comes again may come behind what was sent after it. A
    quorum queue has a message in its log, with an fsync, before it confirms: it survives kill and
    power. A classic queue, of priorities, survives kill. Needs RabbitMQ 3.10.

    A subscription gets what is sent from when it was made. What is sent while a topic has none is
    kept, and comes to the first that is made: an answer that a message is stored is never about one
    that nobody will get.

Design:
    A message is persistent, mandatory and confirmed, or it is an error. Hundreds are under way at
    once on one channel, which keeps their order (``_amqp_sender``), and a batch is written as one
    (``_amqp_batch``).

    A consumer holds a message until it settles it or its connection ends: there is no lease, and
    nothing to extend. It is subscribed while somebody receives, and for what was asked for
    (``_amqp_consumer``). What comes again is published anew, with its count of attempts, and the
    original acknowledged behind the confirmation: so giving back what nobody looked at counts
    nothing, and the server's own count of returns says how often a consumer went away.

    Delays are a ladder of queues in which messages expire (``_amqp_topology``).

    Sending and receiving have a connection each: a server that is full stops reading from those who
    send, acknowledgements and all.

    Streams as topics were rejected. They keep what everybody has settled, and tell nobody how far
    a consumer is but by its own book-keeping. So was the client library's own reconnecting: see
    ``_amqp_link``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, final

from aiormq.exceptions import ChannelNotFoundEntity

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva.messaging.driver import (
    Capabilities,
    DeadLetter,
    Outcome,
    QueueStat,
    SubscriptionStat,
    TopicStat,
)
from molva.messaging.drivers._amqp_consumer import AMQPConsumer
from molva.messaging.drivers._amqp_dead import dead_letters_of, move
from molva.messaging.drivers._amqp_link import AMQPLink
from molva.messaging.drivers._amqp_messages import pack
from molva.messaging.drivers._amqp_options import (
    QUEUE_CAPABILITIES,
    QUEUE_OPTIONS,
    TOPIC_CAPABILITIES,
    TOPIC_OPTIONS,
    AMQPOptions,
    Names,
)
from molva.messaging.drivers._amqp_sender import (
    AMQPSender,
    Parcel,
    RefusedError,
    Restore,
)
from molva.messaging.drivers._amqp_topology import QueueShape, Topology, written_down
from molva.messaging.errors import MessagingError, UnavailableError
from molva.messaging.message import Message
from molva.messaging.url import BrokerURL, check_features

__all__ = [
    "QUEUE_CAPABILITIES",
    "QUEUE_OPTIONS",
    "TOPIC_CAPABILITIES",
    "TOPIC_OPTIONS",
    "AMQPQueue",
    "AMQPSubscription",
    "AMQPTopic",
    "open_queue",
    "open_subscription",
    "open_topic",
]


async def open_topic(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "AMQPTopic":
    """Open the sending side of the topic that the URL names."""
    # Before anything is made: what is refused leaves nothing behind.
    check_features(url, TOPIC_CAPABILITIES, (), "topic")
    options = AMQPOptions(url)
    sender = AMQPSender(options.address, timeout=options.timeout)
    topology = Topology(sender.link, creates=url.create == "auto", shown=str(url))
    topic = url.topic or ""
    exchange = Names.exchange_of(options.prefix, topic)
    kept = Names.kept_of(options.prefix, topic)

    async def restore() -> None:
        await written_down(is_new=await topology.topic(topic, exchange, kept))

    try:
        await restore()
        return AMQPTopic(sender, topology, restore, url=url, prefix=options.prefix, clock=clock)
    except BaseException:
        await sender.close()
        raise


async def open_subscription(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "AMQPSubscription":
    """Open one consumer of the subscription that the URL names."""
    check_features(url, TOPIC_CAPABILITIES, (), "topic")
    options = AMQPOptions(url)
    link = AMQPLink(options.address, "receives")
    sender = AMQPSender(options.address, timeout=options.timeout)
    topology = Topology(link, creates=url.create == "auto", shown=str(url))
    topic, subscription = url.topic or "", url.subscription or ""
    names = Names.of_subscription(options.prefix, topic, subscription)
    exchange = Names.exchange_of(options.prefix, topic)
    kept = Names.kept_of(options.prefix, topic)

    async def restore() -> None:
        is_new = await topology.topic(topic, exchange, kept)
        is_new |= await topology.subscription(topic, subscription, names, expires=options.expires)
        await written_down(is_new=is_new)
        if url.create == "never":
            return
        # Before and behind: older messages come first, and none is left over.
        takes_over = options.start != "latest"
        if takes_over:
            await move(link, sender, kept, names.main, growing=True)
        await topology.bind(names, exchange)
        if takes_over:
            await move(link, sender, kept, names.main)

    try:
        await restore()
        return AMQPSubscription(
            link,
            sender,
            names,
            capabilities=TOPIC_CAPABILITIES,
            counts=True,
            prefetch=url.prefetch,
            restore=restore,
            clock=clock,
        )
    except BaseException:
        await link.close()
        await sender.close()
        raise


async def open_queue(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "AMQPQueue":
    """Open both ends of the queue that the URL names."""
    options = AMQPOptions(url)
    link = AMQPLink(options.address, "receives")
    sender = AMQPSender(options.address, timeout=options.timeout)
    topology = Topology(link, creates=url.create == "auto", shown=str(url))
    names = Names.of_queue(options.prefix, url.queue or "")

    async def restore() -> QueueShape:
        return await topology.queue(
            url.queue or "", names, discipline=url.discipline, capacity=url.capacity
        )

    try:
        shape = await restore()
        capabilities = QUEUE_CAPABILITIES
        if shape.priority:
            # It confirms what the system has taken, and the disk perhaps not yet.
            capabilities = replace(capabilities, survives=frozenset({"kill"}))
        else:
            capabilities = replace(capabilities, disciplines=frozenset({"fifo"}))
        return AMQPQueue(
            link,
            sender,
            names,
            capabilities=capabilities,
            capacity=url.capacity,
            is_bounded=shape.capacity is not None,
            counts=not shape.priority,
            prefetch=url.prefetch,
            restore=restore,
            clock=clock,
        )
    except BaseException:
        await link.close()
        await sender.close()
        raise


def _outcome(problem: Exception | None, *, is_bounded: bool) -> Outcome | MessagingError:
    if problem is None:
        return Outcome.STORED
    if isinstance(problem, RefusedError) and is_bounded:
        return Outcome.FULL
    return problem if isinstance(problem, MessagingError) else UnavailableError(str(problem))


@final
class AMQPTopic:
    """The sending side of a topic."""

    capabilities: Final = TOPIC_CAPABILITIES
    capacity: Final = None

    def __init__(
        self,
        sender: AMQPSender,
        topology: Topology,
        restore: Restore,
        *,
        url: BrokerURL,
        prefix: str,
        clock: Clock,
    ) -> None:
        self._sender = sender
        self._topology = topology
        self._restore = restore
        self._prefix = prefix
        self._topic = url.topic or ""
        self._exchange = Names.exchange_of(prefix, self._topic)
        self._clock = clock

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome | MessagingError]:
        """Publish messages in their order."""
        now = self._clock.now_us()
        parcels = [Parcel(pack(message, now), self._exchange, "") for message in messages]
        results = await self._sender.publish_surely(parcels, self._restore)
        return [_outcome(problem, is_bounded=False) for problem in results]

    async def stat(self) -> TopicStat | None:
        """Return nothing: the protocol tells neither subscriptions nor what they hold."""
        return None

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """Return dead letters of a subscription, oldest first."""
        names = Names.of_subscription(self._prefix, self._topic, subscription)
        try:
            return await dead_letters_of(self._sender.link, names, limit)
        except UnavailableError as error:
            if isinstance(error.__cause__, ChannelNotFoundEntity):
                return []
            raise

    async def remove_subscription(self, subscription: str) -> bool:
        """Remove the queues of a subscription that nobody consumes."""
        names = Names.of_subscription(self._prefix, self._topic, subscription)
        return await self._topology.remove(subscription, names)

    async def close(self) -> None:
        """Let go of the server."""
        await self._sender.close()


@final
class AMQPSubscription(AMQPConsumer):
    """One consumer of a subscription."""

    async def stat(self) -> SubscriptionStat | None:
        """Return nothing: the protocol tells what is ready, never what is held."""
        return None


@final
class AMQPQueue(AMQPConsumer):
    """Both ends of a queue."""

    def __init__(
        self,
        link: AMQPLink,
        sender: AMQPSender,
        names: Names,
        *,
        capabilities: Capabilities,
        capacity: int | None,
        is_bounded: bool,
        counts: bool,
        prefetch: int | None,
        restore: Restore,
        clock: Clock,
    ) -> None:
        super().__init__(
            link,
            sender,
            names,
            capabilities=capabilities,
            counts=counts,
            prefetch=prefetch,
            restore=restore,
            clock=clock,
        )
        self.capacity: Final = capacity
        self._is_bounded = is_bounded

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome | MessagingError]:
        """Publish messages in their order; delayed ones to the ladder."""
        now = self._clock.now_us()
        parcels: list[Parcel] = []
        refused: dict[int, MessagingError] = {}
        for place, message in enumerate(messages):
            exchange, key = "", self.names.main
            if message.delay > 0:
                try:
                    exchange, key = await self.ladder.address_of(message.delay)
                except MessagingError as error:
                    refused[place] = error
                    continue
            parcels.append(Parcel(pack(message, now), exchange, key))
        results = await self._sender.publish_surely(parcels, self.make_again)
        found = (_outcome(problem, is_bounded=self._is_bounded) for problem in results)
        return [refused[p] if p in refused else next(found) for p in range(len(messages))]

    async def stat(self) -> QueueStat | None:
        """Return nothing: the protocol tells what is ready, never what is held."""
        return None
