"""The brokers as an administrator sees them: topics, groups, positions, settings.

Every call is bounded, and what goes wrong is raised as one of messaging's errors that says
what librdkafka said on the way: a time-out alone tells nobody that the password was wrong.
"""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, final

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from molva.messaging.driver import SubscriptionStat
from molva.messaging.drivers._kafka_options import KafkaOptions, Names
from molva.messaging.errors import (
    ForkedError,
    IncompatibleBrokerError,
    InUseError,
    InvalidURLError,
    MessagingError,
    TopicNotFoundError,
    UnavailableError,
)
from molva.messaging.url import BrokerURL

__all__ = ["Broker", "TopicFacts", "explained"]

T = TypeVar("T")

# Seconds that one question may take. An open asks several and must fail within 5 s where no
# broker answers, so the first one has less.
_REQUEST: Final = 10.0
_FIRST_REQUEST: Final = 4.0
# Seconds between two looks whether a new topic can be used, and for how long at most.
_LOOK: Final = 0.02
_READY: Final = 10.0
# Seconds for which a group that a consumer just left may still be told to have members.
_LEAVING: Final = 2.0

_MISSING: Final = (
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
)
_NO_GROUP: Final = (KafkaError.GROUP_ID_NOT_FOUND,)
# What a coordinator answers that is about to know its groups: after a start, or a move.
_LOADING: Final = (
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
)
# What a partition answers that has only just been made, or whose leader has just gone.
_LEADERLESS: Final = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.KAFKA_STORAGE_ERROR,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.FENCED_LEADER_EPOCH,
    # Until all brokers have heard of it.
    KafkaError.UNKNOWN_TOPIC_OR_PART,
)
# The times for which Kafka's protocol answers with the first and with the next offset.
_EARLIEST: Final = -2
_LATEST: Final = -1
# Errors that say more than the time-out which follows them, the most telling first.
_TELLING: Final = (
    KafkaError._AUTHENTICATION,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError._SSL,
    KafkaError._RESOLVE,
    KafkaError._UNSUPPORTED_FEATURE,
    KafkaError._TRANSPORT,
)


@final
@dataclass(frozen=True, slots=True)
class TopicFacts:
    """What was found out about a topic.

    Attributes:
        partitions: How many it has.
        survives: What a stored message outlives.
        max_message_bytes: The largest batch of records that it takes.
        settings: Those that its dead letters must share, as text.
    """

    partitions: int
    survives: frozenset[str]
    max_message_bytes: int
    settings: Mapping[str, str]


@final
class Broker:
    """The brokers behind a URL. ``connect`` makes one."""

    def __init__(self, url: BrokerURL, options: KafkaOptions) -> None:
        self.url: Final = url
        self.options: Final = options
        self._pid = os.getpid()
        self._told: dict[int, KafkaError] = {}
        settings: dict[str, Any] = {**options.connection, "error_cb": self._hear}
        self._admin = AdminClient(settings)
        # One thread at a time may use a consumer.
        self._looking = threading.Lock()
        self._looker: Consumer | None = None
        self._looks_as = ""

    @classmethod
    async def connect(cls, url: BrokerURL, options: KafkaOptions) -> "Broker":
        """Return the brokers once one has answered; raise within 5 s where none does."""
        try:
            broker = cls(url, options)
        except KafkaException as error:  # a certificate that cannot be read, say
            raise InvalidURLError(f"{url}: {options.log.clean(str(error.args[0]))}") from error
        await broker._ask(broker._admin.describe_cluster(request_timeout=_FIRST_REQUEST))
        return broker

    def close(self) -> None:
        """Let go of the connections, which end when the last reference does."""
        del self._admin
        self._looker = None

    def check_process(self) -> None:
        """Raise ForkedError in a fork: threads and connections stayed with its parent."""
        if os.getpid() != self._pid:
            raise ForkedError(
                f"{self.url}: it was opened in process {self._pid}, of which this one is a fork; "
                "open it anew"
            )

    # Topics -----------------------------------------------------------------------------

    async def partitions(self, topic: str) -> list[tuple[int, int]] | None:
        """Return (partition, replicas) of each partition; None where there is no topic."""
        try:
            found = await self._ask_one(
                self._admin.describe_topics(TopicCollection([topic]), request_timeout=_REQUEST)
            )
        except TopicNotFoundError:
            return None
        return [(each.id, len(each.replicas)) for each in found.partitions]

    async def make_topic(
        self, topic: str, partitions: int, settings: Mapping[str, str], replicas: int
    ) -> None:
        """Make a topic, unless somebody was quicker, and wait until it can be used."""
        new = NewTopic(topic, partitions, replicas, config=dict(settings))
        try:
            await self._ask_one(self._admin.create_topics([new], request_timeout=_REQUEST))
        except _RefusedError as failure:
            if failure.code != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
        async with asyncio.timeout(_READY):
            while not await self.partitions(topic):  # noqa: ASYNC110 - Kafka tells nobody
                await asyncio.sleep(_LOOK)

    async def remove_topics(self, topics: Iterable[str]) -> None:
        """Remove topics; those that are not there are passed over."""
        for future in self._admin.delete_topics(list(topics), request_timeout=_REQUEST).values():
            try:
                await self._ask(future)
            except TopicNotFoundError:
                continue

    async def facts(self, topic: str, partitions: list[tuple[int, int]]) -> TopicFacts:
        """Return what the topic's settings promise, as the brokers tell them."""
        resource = ConfigResource(ResourceType.TOPIC, topic)
        entries = await self._ask_one(
            self._admin.describe_configs([resource], request_timeout=_REQUEST)
        )
        value = {name: entry.value for name, entry in entries.items()}
        survives = {"kill"}
        replicas = min(number for _, number in partitions)
        # A message that ``acks=all`` confirmed is on as many brokers as this at least.
        in_sync = min(replicas, int(value["min.insync.replicas"]))
        if in_sync >= 2 and value["unclean.leader.election.enable"] == "false":
            survives.add("node")
        # Kafka leaves flushing to the system unless every message is to be flushed.
        if value["flush.messages"] == "1":
            survives.add("power")
        shared = ("min.insync.replicas", "flush.messages", "unclean.leader.election.enable")
        return TopicFacts(
            len(partitions),
            frozenset(survives),
            int(value["max.message.bytes"]),
            {name: value[name] for name in shared},
        )

    # Positions --------------------------------------------------------------------------

    async def ends(
        self, topics: Mapping[str, int], *, earliest: bool = False
    ) -> dict[tuple[str, int], int]:
        """Return where each partition ends, or begins: the next offset, or the first one.

        Args:
            topics: The number of partitions of each topic.
            earliest: Ask for where they begin.
        """
        moment = _EARLIEST if earliest else _LATEST
        asked = [
            TopicPartition(topic, partition, moment)
            for topic, number in topics.items()
            for partition in range(number)
        ]
        found: dict[tuple[str, int], int] = {}
        deadline = asyncio.get_running_loop().time() + _REQUEST
        while asked:
            try:
                answers = await asyncio.to_thread(self._look_up, asked)
            except KafkaException as error:
                late = asyncio.get_running_loop().time() >= deadline
                if error.args[0].code() not in _LEADERLESS or late:
                    raise self._translated(error) from error
                await asyncio.sleep(_LOOK)
                continue
            asked = []
            for at in answers:
                if at.error is None:
                    found[at.topic, at.partition] = at.offset
                    continue
                late = asyncio.get_running_loop().time() >= deadline
                if at.error.code() not in _LEADERLESS or late:
                    raise self._translated(KafkaException(at.error))
                asked.append(TopicPartition(at.topic, at.partition, moment))
            if asked:
                await asyncio.sleep(_LOOK)
        return found

    def _look_up(self, asked: list[TopicPartition]) -> list[TopicPartition]:
        """Ask for offsets by time, of which the first and the next one are special cases.

        With a consumer that joins nothing, and not with the administrator's ``list_offsets``:
        there librdkafka 2.16 has ended the process with a segmentation fault, twice in some
        200 opens of topics that had only just been made.
        """
        with self._looking:
            return self._looking_as(None).offsets_for_times(asked, timeout=_REQUEST)

    def _looking_as(self, group: str | None) -> Consumer:
        """Return a consumer that joins nothing: of this group, or of any. Hold the lock.

        One is kept: a subscription only ever asks as its own group, and to connect anew each
        time costs more than what is asked.
        """
        if self._looker is not None and group in (None, self._looks_as):
            return self._looker
        self._looks_as = group or "molva-looks"
        settings = {
            **self.options.consumer(self._looks_as),
            # What is in an open transaction counts as stored.
            "isolation.level": "read_uncommitted",
        }
        before, self._looker = self._looker, Consumer(settings)
        if before is not None:
            before.close()
        return self._looker

    async def committed(self, group: str, topics: Mapping[str, int]) -> dict[tuple[str, int], int]:
        """Return the positions of a group; empty where there is no such group."""
        found = await self._as_group(
            group, lambda consumer: consumer.committed(_all_of(topics), timeout=_REQUEST)
        )
        return {(at.topic, at.partition): at.offset for at in found if at.offset >= 0}

    async def commit_first(self, group: str, positions: Mapping[tuple[str, int], int]) -> None:
        """Write down where a new group begins, unless somebody consumes it already."""
        at = [
            TopicPartition(topic, number, offset) for (topic, number), offset in positions.items()
        ]
        try:
            await self._as_group(
                group, lambda consumer: consumer.commit(offsets=at, asynchronous=False)
            )
        except _RefusedError as refused:
            if refused.code not in (KafkaError.NON_EMPTY_GROUP, KafkaError.UNKNOWN_MEMBER_ID):
                raise

    async def _as_group(
        self, group: str, ask: Callable[[Consumer], list[TopicPartition]]
    ) -> list[TopicPartition]:
        """Ask for a group's positions with a consumer that does not join it.

        The administrator's client could be asked too. But librdkafka 2.16 aborts the process
        (``eonce->refcnt > 0``) where a connection is lost while it asks a group's coordinator:
        seen within seconds with connections cut all the time.
        """

        def work() -> list[TopicPartition]:
            with self._looking:
                found = ask(self._looking_as(group))
            for at in found:
                if at.error is not None:
                    raise KafkaException(at.error)
            return found

        deadline = asyncio.get_running_loop().time() + _FIRST_REQUEST
        while True:
            try:
                return await asyncio.to_thread(work)
            except KafkaException as error:
                late = asyncio.get_running_loop().time() >= deadline
                if error.args[0].code() not in _LOADING or late:
                    raise self._translated(error) from error
            await asyncio.sleep(_LOOK)

    # Groups -----------------------------------------------------------------------------

    async def groups(self, prefix: str) -> list[str]:
        """Return the groups whose names begin so."""
        listed = await self._ask(self._admin.list_consumer_groups(request_timeout=_REQUEST))
        return sorted(g.group_id for g in listed.valid if g.group_id.startswith(prefix))

    async def members(self, group: str) -> int:
        """Return how many consumers a group has."""
        found = await self._ask_coordinator(
            lambda: self._admin.describe_consumer_groups([group], request_timeout=_REQUEST)
        )
        return len(found.members)

    async def remove_group(self, group: str) -> None:
        """Remove a group; raise InUseError where somebody consumes it."""
        deadline = asyncio.get_running_loop().time() + _LEAVING
        while True:
            try:
                await self._ask_coordinator(
                    lambda: self._admin.delete_consumer_groups([group], request_timeout=_REQUEST)
                )
                return
            except _RefusedError as failure:
                if failure.code in _NO_GROUP:
                    return
                if failure.code != KafkaError.NON_EMPTY_GROUP:
                    raise
                if asyncio.get_running_loop().time() < deadline:
                    await asyncio.sleep(0.1)
                    continue
                raise InUseError(
                    f"{self.url}: {await self.members(group)} consumers of subscription "
                    f"{Names.subscription_of(group)!r} are at work; stop them, then remove it"
                ) from failure

    async def stat(self, names: Names, partitions: int, dead: int) -> SubscriptionStat:
        """Return what waits in a subscription."""
        topics = {names.topic: partitions, names.retry: 1}
        ends, starts, positions = await asyncio.gather(
            self.ends(topics),
            self.ends(topics, earliest=True),
            self.committed(names.group, topics),
        )
        # What retention has deleted does not wait any more.
        pending = sum(
            max(0, end - max(positions.get(at, 0), starts[at])) for at, end in ends.items()
        )
        return SubscriptionStat(pending, dead, None)

    # Reading ----------------------------------------------------------------------------

    async def read(
        self, ranges: Mapping[tuple[str, int], tuple[int, int]], limit: int | None = None
    ) -> list[Any]:
        """Read partitions from offset to offset (excluded), without being a consumer.

        Args:
            ranges: For each (topic, partition) where to begin and where to end.
            limit: At most so many of each partition.
        """
        wanted = {at: part for at, part in ranges.items() if part[0] < part[1]}
        return await asyncio.to_thread(self._read, wanted, limit) if wanted else []

    def _read(self, ranges: Mapping[tuple[str, int], tuple[int, int]], limit: int | None) -> Any:
        settings = {**self.options.consumer("molva-looks"), "enable.partition.eof": True}
        consumer = Consumer(settings)
        found: list[Any] = []
        try:
            consumer.assign([TopicPartition(t, p, first) for (t, p), (first, _) in ranges.items()])
            # How many more to take of each; without a limit, as many as there are offsets.
            left = {at: limit or end - first for at, (first, end) in ranges.items()}
            while left:
                record = consumer.poll(_REQUEST)
                if record is None:
                    raise UnavailableError(f"{self.url}: no answer within {_REQUEST:g} s")
                at = (record.topic() or "", record.partition() or 0)
                error = record.error()
                if error is not None:
                    if error.code() != KafkaError._PARTITION_EOF:
                        raise self._translated(KafkaException(error))
                    left.pop(at, None)  # its last offsets hold no record
                elif at in left:
                    end, offset = ranges[at][1], record.offset() or 0
                    if offset < end:
                        found.append(record)
                        left[at] -= 1
                    if offset >= end - 1 or not left[at]:
                        del left[at]
        finally:
            consumer.close()
        return found

    # Asking -----------------------------------------------------------------------------

    async def _ask_coordinator(
        self, ask: "Callable[[], Mapping[Any, concurrent.futures.Future[T]]]"
    ) -> T:
        """Ask for a group, again while whoever keeps it has only just begun to."""
        deadline = asyncio.get_running_loop().time() + _FIRST_REQUEST
        while True:
            try:
                return await self._ask_one(ask())
            except _RefusedError as failure:
                late = asyncio.get_running_loop().time() >= deadline
                if failure.code not in _LOADING or late:
                    raise
            await asyncio.sleep(_LOOK)

    async def _ask_one(self, futures: Mapping[Any, "concurrent.futures.Future[T]"]) -> T:
        [future] = futures.values()
        return await self._ask(future)

    async def _ask(self, future: "concurrent.futures.Future[T]") -> T:
        try:
            return await asyncio.wrap_future(future)
        except KafkaException as error:
            raise self._translated(error) from error

    def _hear(self, error: KafkaError) -> None:
        """Remember what went wrong on the way."""
        self._told[error.code()] = error

    def _translated(self, error: KafkaException) -> MessagingError:
        told: KafkaError = error.args[0]
        if told.code() in (
            KafkaError._TIMED_OUT,
            KafkaError._TRANSPORT,
            KafkaError._TIMED_OUT_QUEUE,
        ):
            self._admin.poll(0)  # now it says what it has heard meanwhile
            told = next((self._told[code] for code in _TELLING if code in self._told), told)
        return explained(self.url, told, self.options)


def _all_of(topics: Mapping[str, int]) -> list[TopicPartition]:
    """Return all partitions of topics, given the number of each."""
    return [TopicPartition(topic, n) for topic, number in topics.items() for n in range(number)]


@final
class _RefusedError(UnavailableError):
    """A broker refused; ``code`` says why, for whoever asked."""

    def __init__(self, problem: str, code: int) -> None:
        super().__init__(problem)
        self.code = code


_HINTS: Final = {
    KafkaError._AUTHENTICATION: "user or password is wrong, or sasl= is not what the broker takes",
    KafkaError.SASL_AUTHENTICATION_FAILED: "user or password is wrong",
    KafkaError._SSL: "see tls, ca, cert and key, and the name in the broker's certificate",
    KafkaError._RESOLVE: "the host's name is not known",
    KafkaError._TRANSPORT: "no broker answers there; see host, port and tls",
    KafkaError._TIMED_OUT: "no broker answers there; see host, port and tls",
    KafkaError._ALL_BROKERS_DOWN: "no broker answers there; see host, port and tls",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "this user may not use the topic",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "this user may not use the subscription's group",
    KafkaError.INVALID_REPLICATION_FACTOR: "there are fewer brokers than replicas=",
}


def explained(url: BrokerURL, error: KafkaError, options: KafkaOptions) -> MessagingError:
    """Return Kafka's error as one of messaging's, with what to do about it."""
    code, text = error.code(), options.log.clean(error.str())
    if code in _MISSING:
        return TopicNotFoundError(f"{url}: topic {url.topic!r} is not there ({text})")
    if code in (KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_VERSION):
        return IncompatibleBrokerError(f"{url}: {text}; Kafka 2.4 or newer is needed")
    hint = _HINTS.get(code)
    return _RefusedError(f"{url}: {error.name()}: {text}" + (f"; {hint}" if hint else ""), code)
