"""NATS driver: topics and queues on JetStream, channels that keep nothing on core NATS.

URL:
    ``nats://user:password@host:4222,host2:4222?topic=ratings&subscription=process``

    ``tls://``
        The same over TLS. A server's certificate must be made out to its host's name.
    ``topic``, ``subscription``; or ``queue``
        Names inside the server: a log, and one reader of it; or a queue.
    ``capacity``
        How many messages may wait in the queue, or in the topic's slowest subscription.
        Default: no bound.
    ``lease``
        Seconds that a consumer may hold a message before it comes again, unless it extends
        its lease. Default 30. It is one for all consumers of a subscription or a queue: the
        one that was given last.
    ``start``
        Where a new subscription begins: ``earliest`` (default), the oldest message that is
        kept, or ``latest``, behind all that were stored so far.
    ``delivery``
        ``at-most-once`` makes a topic a channel of core NATS, which keeps nothing, unless it
        is there as a log: then it stays one.
    ``replicas``
        Copies of what is made, on as many servers of a cluster. Default 1.
    ``sync``
        ``always`` says that the servers are set up with ``sync_interval: always``. No client
        is told; see Delivery.
    ``prefix``
        What all names begin with. Default ``molva``. Several deployments may share a server.
    ``ca``
        File of the authorities that a server's certificate is checked against (TLS).

    Name and password may stand in ``MOLVA_NATS_USERNAME`` and ``MOLVA_NATS_PASSWORD`` instead,
    and a token in ``MOLVA_NATS_TOKEN``. ``_nats_messages`` says how messages lie in the server.

Delivery:
    At least once, oldest first; what comes again may come behind what was sent after it. A
    message that was confirmed survives kill. It survives power only where the server syncs
    before it confirms, which is not how it is shipped: it syncs every two minutes. As no client
    can ask for that, the URL has to say it (``sync=always``), and a server before 2.10, which
    cannot, is not believed. It survives node with three copies. A channel is at most once and
    survives nothing.

    Needs NATS 2.9. From 2.10.28 and 2.11.2 on, streams begin with numbers that no earlier one of
    their name had. Before, a queue that somebody deletes and makes anew while messages of it are
    held may take the acknowledgement of an old message for that of a new one: 2.9 cannot be told
    the first number, and the versions between empty a stream that was when they are killed.

Design:
    A topic is a stream that keeps everything (``limits``) until all subscriptions have settled
    it, which is when a consumer deletes it, in bulk. A subscription is a durable pull consumer
    of it. Streams that delete by themselves what nobody is interested in (``interest``) were
    rejected: what is sent before the first subscription is gone, and a consumer deleted by
    mistake takes all that waited along. A queue is a ``workqueue`` stream with one consumer,
    which deletes what is settled at once.

    A lease is the server's ``ack_wait``. The server does not fence: it takes a late
    acknowledgement for one of whoever holds the message now. So this end takes a lease for over
    a little before the server does, and then tells the server nothing. Connections never come
    back with what was not sent yet: a late word would be sent late.

    Acknowledgements go out without waiting, and the last of a batch is confirmed: a consumer
    does what it is told in order. What goes to the dead letters is stored there first.

    The server counts hand-overs. What was given back untouched is written down beside, and does
    not count (``_nats_kept``). It never gives a message up by itself (``max_deliver``): it would
    leave it where it is, and tell nobody.

    A request for messages is one-shot and short: it takes what is there and ends. A permanent
    flow of messages (``push``, or overlapping requests) is faster for one consumer and unfair
    for many: what one has in its buffer, another waits for, and leases run out there.

    Everything that a consumer was set to is looked at again, over each new connection and every
    few seconds, because the server takes any change from anybody.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, final

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva.messaging.driver import (
    Capabilities,
    DeadLetter,
    DearCalls,
    Outcome,
    QueueStat,
    SubscriptionStat,
    TopicStat,
)
from molva.messaging.drivers._nats_channel import NATSChannelSubscription, NATSChannelTopic
from molva.messaging.drivers._nats_consumer import NATSConsumer
from molva.messaging.drivers._nats_kept import Kept
from molva.messaging.drivers._nats_messages import Names
from molva.messaging.drivers._nats_opening import (
    CHANNEL_CAPABILITIES,
    QUEUE_CAPABILITIES,
    QUEUE_OPTIONS,
    TOPIC_CAPABILITIES,
    TOPIC_OPTIONS,
    NATSServer,
    ServerOptions,
)
from molva.messaging.drivers._nats_places import Place
from molva.messaging.drivers._nats_sending import Sends
from molva.messaging.drivers._nats_streams import JetStream, NoLeaderError, Stream
from molva.messaging.errors import (
    IncompatibleBrokerError,
    MessagingError,
    NotFoundError,
    QueueNotFoundError,
    TopicNotFoundError,
)
from molva.messaging.message import Message
from molva.messaging.url import BrokerURL

__all__ = [
    "CHANNEL_CAPABILITIES",
    "QUEUE_CAPABILITIES",
    "QUEUE_OPTIONS",
    "TOPIC_CAPABILITIES",
    "TOPIC_OPTIONS",
    "NATSQueue",
    "NATSSubscription",
    "NATSTopic",
    "open_queue",
    "open_subscription",
    "open_topic",
]

_logger: Final = logging.getLogger("molva.messaging")

# The client library writes each error to its own log as well.
logging.getLogger("nats").addHandler(logging.NullHandler())


async def open_topic(
    url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK
) -> "NATSTopic | NATSChannelTopic":
    """Open the sending side of the topic that the URL names."""
    options = ServerOptions(url)
    names = Names(options.prefix, "topic", url.topic or "")
    server = await NATSServer.reach(url, options)
    try:
        if await _is_channel(url, server, names):
            return NATSChannelTopic(server, names, capabilities=_channel(server))
        place = _place(url, options, server, names, clock)
        stream = await place.open()
        return NATSTopic(
            server,
            place,
            capabilities=_limited(server, TOPIC_CAPABILITIES, stream),
            options=options,
            capacity=url.capacity,
            clock=clock,
        )
    except BaseException:
        await server.link.close()
        raise


async def open_subscription(
    url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK
) -> "NATSSubscription | NATSChannelSubscription":
    """Open one consumer of the subscription that the URL names."""
    options = ServerOptions(url)
    names = Names(options.prefix, "topic", url.topic or "", url.subscription or "")
    server = await NATSServer.reach(url, options)
    try:
        if await _is_channel(url, server, names):
            channel = NATSChannelSubscription(
                server, names, capabilities=_channel(server), clock=clock
            )
            await channel.join()
            return channel
        place = _place(url, options, server, names, clock)
        stream = await place.open()
        await place.open_consumer(options.start)
        capabilities = _limited(server, TOPIC_CAPABILITIES, stream)
        subscription = NATSSubscription(server, place, capabilities=capabilities, clock=clock)
        await subscription.join()
        return subscription
    except BaseException:
        await server.link.close()
        raise


async def open_queue(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "NATSQueue":
    """Open both ends of the queue that the URL names."""
    options = ServerOptions(url)
    names = Names(options.prefix, "queue", url.queue or "")
    server = await NATSServer.reach(url, options)
    try:
        place = _place(url, options, server, names, clock)
        stream = await place.open()
        await place.open_consumer()
        queue = NATSQueue(
            server,
            place,
            capabilities=_limited(server, QUEUE_CAPABILITIES, stream),
            capacity=url.capacity,
            clock=clock,
        )
        await queue.join()
        return queue
    except BaseException:
        await server.link.close()
        raise


async def _is_channel(url: BrokerURL, server: NATSServer, names: Names) -> bool:
    """Tell whether a topic is one that keeps nothing: asked for, and not there as a log."""
    if url.delivery != "at-most-once":
        return False
    try:
        return await JetStream(server.link).stream(names.stream) is None
    except IncompatibleBrokerError:
        return True  # core NATS, which has no logs


def _place(
    url: BrokerURL, options: ServerOptions, server: NATSServer, names: Names, clock: Clock
) -> Place:
    def missing(what: str) -> NotFoundError:
        error = QueueNotFoundError if names.kind == "queue" else TopicNotFoundError
        why = "it was removed" if url.create == "auto" else "create=never was asked"
        return error(f"{url}: there is no {what}, and {why}")

    return Place(
        server,
        names,
        creates=url.create == "auto",
        replicas=options.replicas,
        lease=options.lease,
        missing=missing,
        clock=clock,
    )


def _limited(server: NATSServer, best: Capabilities, stream: Stream) -> Capabilities:
    found = server.limited(
        best, replicas=stream.replicas, in_file=stream.in_file, numbered=stream.is_numbered
    )
    if stream.is_numbered and server.empties_numbered:
        _logger.warning(
            "%s: NATS %s, when it is killed, empties the stream %s, because it was told its first "
            "number (first_seq); upgrade the server to 2.10.28 or 2.11.2, or delete the stream "
            "once nothing waits in it, to have it made anew",
            server.link.address,
            ".".join(map(str, server.version)),
            stream.settings["name"],
        )
    return found


def _channel(server: NATSServer) -> Capabilities:
    return server.limited(CHANNEL_CAPABILITIES, replicas=0, in_file=False)


def _sends(
    server: NATSServer,
    place: Place,
    count: Callable[[], Awaitable[tuple[int, int]]],
    *,
    capacity: int | None,
    clock: Clock,
) -> Sends:
    return Sends(
        server.link,
        place.names.subject,
        max_payload=server.max_payload,
        capacity=capacity,
        batches=lambda: place.takes_batches,
        count=count,
        open_again=place.look,
        clock=clock,
    )


@final
class NATSTopic:
    """The sending side of a topic."""

    def __init__(
        self,
        server: NATSServer,
        place: Place,
        *,
        capabilities: Capabilities,
        options: ServerOptions,
        capacity: int | None,
        clock: Clock,
    ) -> None:
        self.capabilities: Final = capabilities
        self.capacity: Final = capacity
        self._server = server
        self._place = place
        self._options = options
        self._clock = clock
        self._sends = _sends(server, place, self._count, capacity=capacity, clock=clock)

    @property
    def dear_calls(self) -> DearCalls | None:
        """From when on it pays to wait for more before sending."""
        return self._sends.dear_calls

    async def send_batch(self, messages: Sequence[Message]) -> "list[Outcome | MessagingError]":
        """Store messages in their order."""
        return await self._sends.send_batch(messages)

    async def _count(self) -> tuple[int, int]:
        # In this order: what is stored in between is then seen by the server.
        stream = await self._place.found_stream()
        try:
            every = await self._place.jetstream.consumers(self._place.names.stream)
        except NoLeaderError:
            every = []
        if not every:
            # All that is stored, which is never less than what waits.
            return stream.last, stream.messages
        return stream.last, max(one.pending + one.held for one in every)

    async def stat(self) -> TopicStat:
        """Return what the topic holds."""
        place = self._place
        stream = await place.jetstream.stream(place.names.stream)
        if stream is None:
            return TopicStat(0, {})
        found = {}
        for one in await place.jetstream.consumers(place.names.stream):
            kept = self._kept(one.name_of)
            pending, oldest = await place.waiting(one)
            found[one.name_of] = SubscriptionStat(pending, await kept.dead(), oldest)
        return TopicStat(stream.stored, found)

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters of a subscription, oldest first."""
        return await self._kept(subscription).dead_letters(limit)

    async def remove_subscription(self, subscription: str) -> bool:
        """Remove a subscription that nobody consumes."""
        names = self._names(subscription)
        place = Place(
            self._server,
            names,
            creates=False,
            replicas=self._options.replicas,
            lease=None,
            missing=TopicNotFoundError,
            clock=self._clock,
        )
        removed = await place.remove()
        if removed:
            # What only it had not read is needed by nobody now.
            await place.trim()
        return removed

    async def close(self) -> None:
        """Let go of the server."""
        await self._server.link.close()

    def _names(self, subscription: str) -> Names:
        return Names(self._options.prefix, "topic", self._place.names.name, subscription)

    def _kept(self, subscription: str) -> Kept:
        return Kept(
            self._server.link,
            self._names(subscription),
            replicas=self._options.replicas or 1,
        )


@final
class NATSSubscription(NATSConsumer):
    """One consumer of a named subscription."""

    async def stat(self) -> SubscriptionStat:
        """Return what waits."""
        found = await self._place.found_consumer()
        pending, oldest = await self._place.waiting(found)
        return SubscriptionStat(pending, await self._kept.dead(), oldest)


@final
class NATSQueue(NATSConsumer):
    """Both ends of a queue."""

    def __init__(
        self,
        server: NATSServer,
        place: Place,
        *,
        capabilities: Capabilities,
        capacity: int | None,
        clock: Clock,
    ) -> None:
        super().__init__(server, place, capabilities=capabilities, clock=clock)
        self.capacity: Final = capacity
        self._sends = _sends(server, place, self._count, capacity=capacity, clock=clock)

    @property
    def dear_calls(self) -> DearCalls | None:
        """From when on it pays to wait for more before sending."""
        return self._sends.dear_calls

    async def send_batch(self, messages: Sequence[Message]) -> "list[Outcome | MessagingError]":
        """Store messages in their order."""
        return await self._sends.send_batch(messages)

    async def _count(self) -> tuple[int, int]:
        stream = await self._place.found_stream()
        return stream.last, stream.messages

    async def stat(self) -> QueueStat:
        """Return what the queue holds: what is held, and what waits for its delay, as held."""
        consumer, stream = await self._place.found_consumer(), await self._place.found_stream()
        _, oldest = await self._place.waiting(consumer)
        pending = stream.messages
        held = min(pending, consumer.held)
        return QueueStat(
            pending=pending,
            ready=pending - held,
            held=held,
            delayed=0,
            dead=await self._kept.dead(),
            dropped=0,
            oldest_seconds=oldest,
        )
