"""Redis driver: topics on streams, queues by functions, channels that keep nothing.

URL:
    ``redis://user:password@host:6379/0?topic=ratings&subscription=process``

    ``rediss://``
        The same over TLS. The server's certificate must be made out to the host's name.
    ``topic``, ``subscription``; or ``queue``
        Names inside the server: a log, and one reader of it; or a queue.
    ``capacity``
        How many messages may wait in the queue, or in the topic's slowest subscription.
        Default: no bound.
    ``lease``
        Seconds that a consumer may hold a message before it comes again, unless it extends
        its lease. Default 30. A subscription's lease is one for all its consumers: the one
        that was given last.
    ``start``
        Where a new subscription begins: ``earliest`` (default), the oldest message that is
        kept, or ``latest``, behind all that were stored so far.
    ``delivery``
        ``at-most-once`` makes a new topic a channel, which keeps nothing. A topic that is
        there stays what it is.
    ``prefix``
        What all keys begin with. Default ``molva``. Several deployments may share a server.
    ``ca``
        File of the authorities that a server's certificate is checked against (TLS).

    Name and password may stand in ``MOLVA_REDIS_USERNAME`` and ``MOLVA_REDIS_PASSWORD``
    instead. ``_redis_messages`` says how messages lie in the server.

Delivery:
    At least once, in the order of the discipline; a topic oldest first, where what comes
    again may come behind what was sent after it. What is survived is asked of the server
    when it is opened: kill and power with ``appendonly yes`` and ``appendfsync always``, else
    less (``_base.redis_server``). Never ``node``: replication is asynchronous, and a replica
    that takes over may lack what was confirmed. A channel is at most once and survives
    nothing.

    Needs Redis 7.0, or what is compatible with it. A server that evicts keys when its memory
    is full is refused. In a cluster all keys of a topic or queue lie on one node, which is
    the one to be named.

Design:
    Whatever must be atomic is a function in the server (``_redis_topic.lua``,
    ``_redis_queue.lua``), so that at every moment a message is in exactly one place, and
    never only in a client. A batch is one call, or a few that travel together.

    A topic is a stream, a subscription a group of it. The group's list of pending entries
    says who holds what, for how long, and how often it was handed over, which is the token's
    epoch: XACK alone settles what anybody holds, so a function looks first. An entry's idle
    time is its lease, and extending sets it back. What is given back belongs to nobody, a
    consumer called ``~``, until it is due, by a sorted set. It keeps its place, its id and its
    count of attempts. Nothing is copied, so nothing can be lost in between.

    Reading and taking over go side by side. A read waits in the server, on the stream and on
    a second one that tells of what was given back, which wakes one consumer and not all. A
    read that nobody waits for any more is ended by CLIENT UNBLOCK, never by cutting it off:
    what it brings is ours already. What it brought is handed to the next receive, or given
    back after a fifth of a second. Where a reply was lost, the server is asked what we hold.

    Every consumer has a name that no other ever had. One that is gone is forgotten when it
    holds nothing; forgetting it before would forget what it holds.

    What every group has settled is deleted in bulk, whole nodes of the stream at a time.
    MAXLEN would delete what a slow group still needs. The bound of a topic is counted, by
    what its slowest group has not settled.

    A queue is a hash of messages and sorted sets of their offsets: by rank what is ready, by
    when it will be ready what is held or delayed. Taking moves between them, and costs a
    logarithm in every discipline. A consumer that waits blocks on a list that has something
    in it whenever something is ready.

    Leases and delays run on the server's clock, because it is the only one that all consumers
    share; Redis has no monotonic one. Set forward, it lets leases run out early, and messages
    come again; set back, it lets what a dead consumer held wait for longer. Neither loses
    anything.

    Lists with BLPOP were rejected: they deliver at most once. So was BLMOVE to a list for
    each consumer: it has no lease, no delay and no order but its own. XAUTOCLAIM was
    rejected: it takes what was given back before it is due. Scripts by EVALSHA were rejected
    for functions, which are there again after a restart.
"""

import functools
from collections.abc import Sequence
from typing import Any, Final, cast, final

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva._base.redis_server import RedisLink
from molva.messaging.driver import Capabilities, DeadLetter, Outcome, TopicStat
from molva.messaging.drivers._redis_channel import RedisChannelSubscription, RedisChannelTopic
from molva.messaging.drivers._redis_messages import QueueKeys, TopicKeys, fields_of, meta_of
from molva.messaging.drivers._redis_opening import (
    CHANNEL_CAPABILITIES,
    QUEUE_CAPABILITIES,
    QUEUE_FUNCTIONS,
    QUEUE_OPTIONS,
    TOPIC_CAPABILITIES,
    TOPIC_FUNCTIONS,
    TOPIC_OPTIONS,
    RedisServer,
    ServerOptions,
    translated,
)
from molva.messaging.drivers._redis_queue import RedisQueue
from molva.messaging.drivers._redis_subscription import (
    RedisSubscription,
    dead_letters_of,
    stat_of,
)
from molva.messaging.drivers._redis_waiting import parts_of
from molva.messaging.errors import (
    InUseError,
    InvalidURLError,
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
    "RedisTopic",
    "open_queue",
    "open_subscription",
    "open_topic",
]

_DEFAULT_LEASE: Final = 30.0

# Bytes of a body from which on it is not handed to a function, which would copy it twice;
# below, a function stores many for the price of one command.
_LARGE_BYTES: Final = 8_192


async def open_topic(
    url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK
) -> "RedisTopic | RedisChannelTopic":
    """Open the sending side of the topic that the URL names."""
    options = ServerOptions(url)
    keys = TopicKeys(options.prefix, url.topic or "")
    server = await RedisServer.reach(url, TOPIC_FUNCTIONS)
    try:
        open_again = functools.partial(_open, url, options, keys)
        if (await open_again(server.link))[0] == b"channel":
            capabilities = server.limited(CHANNEL_CAPABILITIES)
            return RedisChannelTopic(server, capabilities=capabilities, keys=keys)
        return RedisTopic(
            server,
            capabilities=server.limited(TOPIC_CAPABILITIES),
            prefix=options.prefix,
            topic=url.topic or "",
            capacity=url.capacity,
            open_again=open_again,
        )
    except BaseException:
        await server.link.close()
        raise


async def open_subscription(
    url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK
) -> "RedisSubscription | RedisChannelSubscription":
    """Open one consumer of the subscription that the URL names."""
    options = ServerOptions(url)
    keys = TopicKeys(options.prefix, url.topic or "", url.subscription or "")
    server = await RedisServer.reach(url, TOPIC_FUNCTIONS)
    try:
        kind, *lease_ms = await _open(url, options, keys, server.link)
        if kind == b"channel":
            await server.link.close()
            channel = RedisChannelSubscription(
                server.address,
                capabilities=server.limited(CHANNEL_CAPABILITIES),
                keys=keys,
                clock=clock,
            )
            await channel.join()
            return channel
        subscription = RedisSubscription(
            server,
            capabilities=server.limited(TOPIC_CAPABILITIES),
            keys=keys,
            topic=url.topic or "",
            subscription=url.subscription or "",
            lease=int(lease_ms[0]) / 1e3,
            open_again=functools.partial(_open, url, options, keys, start="earliest"),
            clock=clock,
        )
        await subscription.join()
        return subscription
    except BaseException:
        await server.link.close()
        raise


async def open_queue(url: BrokerURL, *, clock: Clock = SYSTEM_CLOCK) -> RedisQueue:
    """Open both ends of the queue that the URL names."""
    options = ServerOptions(url)
    keys = QueueKeys(options.prefix, url.queue or "")
    server = await RedisServer.reach(url, QUEUE_FUNCTIONS)
    try:
        call = server.functions.call(
            "open", [keys.info], int(url.create == "auto"), url.discipline or "fifo"
        )
        with translated():
            found = await server.link.call(*call)
        if found is None:
            raise QueueNotFoundError(
                f"{url}: there is no queue {url.queue!r}, and create=never was asked"
            )
        discipline = found.decode()
        if url.discipline not in (None, discipline):
            raise InvalidURLError(
                f"redis: discipline={url.discipline} is refused; queue {url.queue!r} was made "
                f"with {discipline}, which cannot change"
            )
        return RedisQueue(
            server,
            capabilities=server.limited(QUEUE_CAPABILITIES),
            keys=keys,
            name=url.queue or "",
            discipline=discipline,
            capacity=url.capacity,
            drops_oldest=url.overflow == "drop-oldest",
            lease=options.lease or _DEFAULT_LEASE,
            creates=url.create == "auto",
            clock=clock,
        )
    except BaseException:
        await server.link.close()
        raise


async def _open(
    url: BrokerURL,
    options: ServerOptions,
    keys: TopicKeys,
    link: RedisLink,
    *,
    start: str | None = None,
) -> list[bytes]:
    """Find or make topic and subscription; return the topic's kind, and a log's lease."""
    call = TOPIC_FUNCTIONS.call(
        "open",
        [keys.log, keys.info, keys.wake],
        int(url.create == "auto"),
        "channel" if url.delivery == "at-most-once" else "log",
        url.subscription or "",
        start or options.start,
        "" if options.lease is None else round(options.lease * 1e3),
    )
    with translated():
        found = cast("list[bytes]", await link.call(*call))
    if found[0] == b"no topic":
        raise TopicNotFoundError(
            f"{url}: there is no topic {url.topic!r}, and create=never was asked"
        )
    if found[0] == b"no subscription":
        raise TopicNotFoundError(
            f"{url}: topic {url.topic!r} has no subscription {url.subscription!r}, and "
            "create=never was asked"
        )
    if found[0] == b"channel" and url.delivery != "at-most-once":
        raise InvalidURLError(
            f"{url}: topic {url.topic!r} was made with delivery=at-most-once and keeps nothing; "
            "ask for that, or choose another name"
        )
    return found


@final
class RedisTopic:
    """The sending side of a topic in a Redis server."""

    def __init__(
        self,
        server: RedisServer,
        *,
        capabilities: Capabilities,
        prefix: str,
        topic: str,
        capacity: int | None,
        open_again: Any,
    ) -> None:
        self.capabilities: Final = capabilities
        self._link = server.link
        self._functions = server.functions
        self._prefix = prefix
        self._topic = topic
        self._keys = TopicKeys(prefix, topic)
        self.capacity: Final = capacity
        self._open_again = open_again

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Store messages in their order, as many in one call as are quickly moved."""
        keys = (self._keys.log, self._keys.info)
        capacity = "" if self.capacity is None else self.capacity
        calls, sizes = [], []
        for part in parts_of(messages):
            if self.capacity is None and sum(len(m.body) for m in part) >= len(part) * _LARGE_BYTES:
                head = ("XADD", self._keys.log, "NOMKSTREAM", "*")
                calls += [(*head, *fields_of(message)) for message in part]
                continue
            words: list[bytes | str] = []
            for message in part:
                key = message.key
                words += (
                    message.id,
                    "" if key is None else "=" + key,
                    meta_of(message),
                    message.body,
                )
            calls.append(self._functions.call("send", keys, capacity, *words))
            sizes.append(len(part))
        with translated():
            # One after the other where the topic is bounded: what stands behind a message
            # that found no room must find none.
            if self.capacity is None:
                stored = await self._stored(calls)
            else:
                stored = []
                for call, size in zip(calls, sizes, strict=True):
                    stored += await self._stored([call])
                    if stored[-1] < size:
                        break
        number = sum(stored)
        return [Outcome.STORED] * number + [Outcome.FULL] * (len(messages) - number)

    async def _stored(self, calls: list[tuple[Any, ...]]) -> list[int]:
        """Run calls that store; return how many messages each of them stored."""
        replies = await self._link.call_many(calls)
        missing = [place for place, reply in enumerate(replies) if reply in (None, -1)]
        if missing:
            # The server was wiped: nothing goes before the topic is there again, or refused.
            await self._open_again(self._link)
            again = await self._link.call_many([calls[place] for place in missing])
            for place, reply in zip(missing, again, strict=True):
                replies[place] = reply
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return [1 if isinstance(reply, bytes) else reply for reply in replies]

    async def stat(self) -> TopicStat:
        """Return what the topic holds."""
        with translated():
            exists = await self._link.call("EXISTS", self._keys.log)
            if not exists:
                return TopicStat(0, {})
            about, groups = await self._link.call_many(
                [("XINFO", "STREAM", self._keys.log), ("XINFO", "GROUPS", self._keys.log)]
            )
            names = [_pairs(group)[b"name"].decode() for group in groups]
            calls = []
            for name in names:
                keys = TopicKeys(self._prefix, self._topic, name)
                calls.append(self._functions.call("stat", [keys.log, keys.dead], name))
            replies = await self._link.call_many(calls) if calls else []
        return TopicStat(
            _pairs(about)[b"entries-added"],
            {name: stat_of(reply) for name, reply in zip(names, replies, strict=True) if reply},
        )

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters of a subscription, oldest first."""
        keys = TopicKeys(self._prefix, self._topic, subscription)
        with translated():
            return await dead_letters_of(self._link, keys.dead, self._topic, subscription, limit)

    async def remove_subscription(self, subscription: str) -> bool:
        """Remove a subscription that nobody consumes."""
        keys = TopicKeys(self._prefix, self._topic, subscription)
        named = [keys.log, keys.info, keys.later, keys.tries, keys.wake, keys.dead, keys.members]
        with translated():
            removed = await self._link.call(*self._functions.call("remove", named, subscription))
            if removed < 0:
                raise InUseError(
                    f"redis: {-removed} consumers of subscription {subscription!r} are at work; "
                    "stop them, then remove it (one that was killed counts for 15 seconds)"
                )
            # What only it had not read is needed by nobody now.
            await self._link.call(*self._functions.call("trim", [keys.log]))
        return bool(removed)

    async def close(self) -> None:
        """Let go of the server."""
        await self._link.close()


def _pairs(flat: Sequence[Any]) -> dict[bytes, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
