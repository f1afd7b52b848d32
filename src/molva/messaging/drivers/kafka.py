"""Kafka driver: topics that outgrow one machine.

URL:
    ``kafka://host:9092,host2:9092?topic=ratings&subscription=process``

    ``topic``, ``subscription``
        A topic of Kafka, and a consumer group with two topics of its own for what died and
        what is tried anew. Any printable name; ``_kafka_options`` says how odd ones are
        written.
    ``lanes``
        Partitions of a new topic, 1 to 62. Default 16.
    ``replicas``
        Copies of each partition of a new topic. Default: what the brokers say.
    ``start``
        Where a new subscription begins: ``earliest`` (default) or ``latest``.
    ``max_open``
        Messages that one consumer may hold and not have settled. Default 10000.
    ``fetch_wait``
        Seconds, up to 1, that the brokers collect what comes before a consumer gets it: fewer
        and larger answers, for less work on both sides. Default 0: each comes at once.
    ``session``
        Seconds after which a consumer that died or stands still has lost its lanes.
        Default 10; Kafka's brokers take 6 at least unless they are told otherwise.
    ``grace``
        Seconds that a lane waits for what is being worked on before it moves. Default 10.
    ``timeout``
        Seconds after which a message that could not be stored fails. Default 10.
    ``tls``, ``ca``, ``cert``, ``key``
        ``tls=on`` encrypts and checks the broker's name; ``ca`` is a file of authorities to
        trust instead of the system's, ``cert`` and ``key`` are files that say who we are.
    ``sasl``
        How user and password are shown: ``plain`` (default), ``scram-sha-256``,
        ``scram-sha-512``. They come from the URL, or else from ``MOLVA_KAFKA_USERNAME`` and
        ``MOLVA_KAFKA_PASSWORD``; the password of a key from ``MOLVA_KAFKA_KEY_PASSWORD``.

Delivery:
    At least once, oldest first in each lane. A send returns when all replicas in sync have
    the message (``acks=all``, idempotent). That survives the kill of any process; the loss of
    a machine where two replicas at least confirm (``min.insync.replicas``) and no other may
    lead; a power cut only where every message is flushed (``flush.messages=1``), because
    Kafka leaves that to the system. It is found out when a topic is opened. What nobody has
    read is deleted by age, as the topic says (``retention.ms``); a consumer that finds some
    gone logs an error.

Design:
    Kafka's client, librdkafka, has threads of its own and no asyncio that could be used:
    confluent-kafka's cannot send headers. So sending is one call that only enqueues and one
    thread that waits for reports (``_kafka_producer``), receiving one thread that polls
    (``_kafka_consumer``). A partition is a lane: watermarks, fences, redelivery in order and
    the counting of deaths are those of ``_lanes``, as on SQLite.

    A key goes to the partition that Kafka's Java clients choose (murmur2), so that programs
    on other clients see one order of a key with ours; without a key, to any.

    A position is committed as the first offset that is not settled, some of them in one
    call, at most ten times a second. How many consumers in a row have died with messages of
    a lane stands beside it, in the metadata that Kafka keeps with a position: so a message
    that kills its consumers becomes a dead letter, without one write a message.

    Before a lane moves, what is being worked on has ``grace`` seconds to end, and its
    position is committed. A consumer that was taken for dead finds all its tokens stale. One
    that stood still asks Kafka before it goes on.

    A dead letter is a record of a compacted topic (``_kafka_dead``). To replay it is to store
    it in the subscription's retry topic, which only this subscription reads, beside its
    topic, and then to forget it: it is at every moment one or the other. A replayed message
    comes to whoever has that topic's one lane, outside of the order of its key.

    Left out: queues. Kafka has no lease for a message; lanes hold up what follows. Its share
    groups would give one, and are a preview in the client. A retry topic for failed
    messages: it loses the order of a key. A bound on what waits: Kafka has none, and one that
    every sender computes for itself would hold for nobody.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, final

from confluent_kafka import KafkaError, KafkaException

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva.messaging._lanes import LaneReader
from molva.messaging.driver import Capabilities, DeadLetter, Outcome, TopicStat
from molva.messaging.drivers._kafka_broker import Broker, TopicFacts, explained
from molva.messaging.drivers._kafka_dead import DEAD_SETTINGS, RETRY_SETTINGS, DeadLetters
from molva.messaging.drivers._kafka_options import (
    DEFAULT_LANES,
    TOPIC_OPTIONS,
    KafkaOptions,
    Names,
)
from molva.messaging.drivers._kafka_producer import Publisher
from molva.messaging.drivers._kafka_records import MAX_OVERHEAD_BYTES, records_of
from molva.messaging.drivers._kafka_subscription import KafkaSubscription
from molva.messaging.errors import (
    InvalidURLError,
    MessageTooLargeError,
    MessagingError,
    TopicNotFoundError,
)
from molva.messaging.message import Message
from molva.messaging.url import BrokerURL

__all__ = ["TOPIC_CAPABILITIES", "TOPIC_OPTIONS", "KafkaTopic", "open_subscription", "open_topic"]

# What the topics of dead letters take beyond the topic's own limit: a reason, and why.
_DEAD_ROOM_BYTES: Final = 65_536
# Seconds that an open waits for the group to be joined. It takes as long as those who work
# on messages of the subscription need to let go of some.
_JOIN: Final = 4.0

TOPIC_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="per-key",
    capacity="none",
    survives=frozenset({"kill", "node", "power"}),  # as the topic is set up: ``facts``
    max_body_bytes=1_048_588 - MAX_OVERHEAD_BYTES,  # Kafka's default; the topic's is asked for
    overflows=frozenset(),
    deletes=False,
)


async def open_topic(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> "KafkaTopic":
    """Open the sending side of the topic that the URL names."""
    options = KafkaOptions.of(url)
    broker = await Broker.connect(url, options)
    facts = await _find_topic(broker)
    return KafkaTopic(broker, facts, clock)


async def open_subscription(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> KafkaSubscription:
    """Open one consumer of the subscription that the URL names."""
    options = KafkaOptions.of(url)
    if url.subscription is None:
        raise InvalidURLError(f"{url}: names no subscription; add &subscription=process")
    broker = await Broker.connect(url, options)
    facts = await _find_topic(broker)
    names = Names.of(url.topic or "", url.subscription)
    await _find_subscription(broker, names, facts)
    subscription = KafkaSubscription(
        broker,
        names,
        partitions=facts.partitions,
        capabilities=_capabilities(facts),
        publisher=Publisher(options.producer(facts.max_message_bytes + _DEAD_ROOM_BYTES)),
        reader=LaneReader(max_open=options.max_open),
        clock=clock,
    )
    try:
        await subscription.join(timeout=_JOIN)
    except BaseException:
        await subscription.close()
        raise
    return subscription


async def _find_topic(broker: Broker) -> TopicFacts:
    """Return what the topic promises; make it where it is missing and may be made."""
    url, options = broker.url, broker.options
    topic = Names.of(url.topic or "").topic
    found = await broker.partitions(topic)
    if found is None:
        if url.create == "never":
            raise TopicNotFoundError(
                f"{url}: there is no topic {url.topic!r}, and create=never was asked"
            )
        await broker.make_topic(topic, options.lanes or DEFAULT_LANES, {}, options.replicas)
        found = await broker.partitions(topic)
        assert found is not None
    if options.lanes not in (None, len(found)):
        raise InvalidURLError(
            f"kafka: lanes={options.lanes} is refused; topic {url.topic!r} was made with "
            f"{len(found)}, which cannot change"
        )
    return await broker.facts(topic, found)


async def _find_subscription(broker: Broker, names: Names, facts: TopicFacts) -> None:
    """Make the subscription's position and topics where they are missing and may be made."""
    url = broker.url
    committed, dead, retry = await asyncio.gather(
        broker.committed(names.group, {names.topic: facts.partitions}),
        broker.partitions(names.dead),
        broker.partitions(names.retry),
    )
    known = bool(committed)
    if url.create == "never" and not (known and dead and retry):
        raise TopicNotFoundError(
            f"{url}: topic {url.topic!r} has no subscription {url.subscription!r}, and "
            "create=never was asked"
        )
    room = {"max.message.bytes": str(facts.max_message_bytes + _DEAD_ROOM_BYTES)}
    shared, replicas = {**facts.settings, **room}, broker.options.replicas
    makes = {names.dead: (dead, DEAD_SETTINGS), names.retry: (retry, RETRY_SETTINGS)}
    await asyncio.gather(
        *(
            broker.make_topic(topic, 1, {**shared, **own}, replicas)
            for topic, (there, own) in makes.items()
            if not there
        )
    )
    if not known:
        # Last, because this is what makes it a subscription. Written down before anybody
        # consumes: what is sent between now and then belongs to it.
        at = await broker.ends(
            {names.topic: facts.partitions}, earliest=broker.options.start == "earliest"
        )
        at |= await broker.ends({names.retry: 1}, earliest=True)
        await broker.commit_first(names.group, at)


def _capabilities(facts: TopicFacts) -> Capabilities:
    return replace(
        TOPIC_CAPABILITIES,
        survives=facts.survives,
        max_body_bytes=facts.max_message_bytes - MAX_OVERHEAD_BYTES,
    )


@final
class KafkaTopic:
    """The sending side of a topic."""

    capacity: Final = None

    def __init__(self, broker: Broker, facts: TopicFacts, clock: Clock) -> None:
        self.capabilities: Final = _capabilities(facts)
        self._broker = broker
        self._partitions = facts.partitions
        self._clock = clock
        self._name = broker.url.topic or ""
        self._topic = Names.of(self._name).topic
        self._limit = facts.max_message_bytes
        self._publisher = Publisher(broker.options.producer(facts.max_message_bytes))
        self._dead: dict[str, DeadLetters] = {}

    async def send_batch(self, messages: Sequence[Message]) -> Sequence[Outcome | MessagingError]:
        """Store messages in their order; some may fail alone."""
        self._broker.check_process()
        topic = self._topic
        results = await self._publisher.publish(records_of(topic, messages))
        if not any(results):  # not count(None): an error cannot be compared with it
            return [Outcome.STORED] * len(results)
        return [
            Outcome.STORED if error is None else self._failure(message, error)
            for message, error in zip(messages, results, strict=True)
        ]

    async def stat(self) -> TopicStat:
        """Return what the topic holds."""
        groups = await self._broker.groups(Names.groups_of(self._name))
        ends = await self._broker.ends({self._topic: self._partitions})
        found = {}
        for group in groups:
            subscription = Names.subscription_of(group)
            names = Names.of(self._name, subscription)
            dead = await self._letters(subscription).count()
            found[subscription] = await self._broker.stat(names, self._partitions, dead)
        return TopicStat(sum(ends.values()), found)

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters of a subscription, oldest first."""
        if await self._broker.partitions(Names.of(self._name, subscription).dead) is None:
            return []
        return await self._letters(subscription).look(limit)

    async def remove_subscription(self, subscription: str) -> bool:
        """Remove a subscription that nobody consumes."""
        names = Names.of(self._name, subscription)
        if not await self._broker.committed(names.group, {self._topic: self._partitions}):
            return False
        await self._broker.remove_group(names.group)
        await self._broker.remove_topics([names.dead, names.retry])
        self._dead.pop(subscription, None)
        return True

    async def close(self) -> None:
        """Let go of the connections."""
        await self._publisher.close()
        self._broker.close()

    def _letters(self, subscription: str) -> DeadLetters:
        found = self._dead.get(subscription)
        if found is None:
            origin = f"topic {self._name}, subscription {subscription}"
            dead = Names.of(self._name, subscription).dead
            found = self._dead[subscription] = DeadLetters(self._broker, dead, origin, self._clock)
        return found

    def _failure(self, message: Message, error: KafkaError) -> MessagingError:
        if error.code() in (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE):
            return MessageTooLargeError(len(message.body), self.capabilities.max_body_bytes)
        failure = explained(self._broker.url, error, self._broker.options)
        failure.__cause__ = KafkaException(error)
        return failure
