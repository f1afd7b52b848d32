"""What is declared in the server: exchanges, queues, and the ladder of delays.

A queue that is there with other arguments is never changed: AMQP cannot. What the URL does not
speak of is taken as it was made, what it asks for otherwise is refused.

The ladder. RabbitMQ delays by letting a message expire in a queue and go on from there, and only
the message at a queue's head expires: so all of one queue have to wait equally long. Step ``n``
of the ladder is an exchange and a queue in which messages wait 50 ms · 2ⁿ. The routing key of a
delayed message is its delay in binary; at each step its exchange looks at one digit, and sends it
through the queue or past it, to the step below. Below the lowest is the queue where it belongs.
Each queue has a ladder of its own, whose steps are made when they are first needed: a common one
stands still when the queue of one message in it is full.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar, final

from aiormq.channel import Channel
from aiormq.exceptions import ChannelNotFoundEntity
from pamqp.commands import Queue

from molva.messaging.drivers._amqp_link import ANSWER, AMQPLink, translated
from molva.messaging.drivers._amqp_options import Names
from molva.messaging.errors import (
    IncompatibleBrokerError,
    InUseError,
    InvalidURLError,
    QueueNotFoundError,
    TopicNotFoundError,
    UnsupportedFeatureError,
)
from molva.messaging.message import MAX_PRIORITY

__all__ = [
    "LONGEST_DELAY",
    "NEW_QUEUE",
    "Ladder",
    "QueueShape",
    "Topology",
    "asked",
    "consumers_of",
    "ready_in",
    "written_down",
]

T = TypeVar("T")

# Seconds of the lowest step: delays are rounded up to a multiple.
_UNIT: Final = 0.05
# The highest lets messages wait for 39 days. RabbitMQ counts 32 bits of milliseconds.
_STEPS: Final = 27
LONGEST_DELAY: Final = _UNIT * (2**_STEPS - 1)
# Binary digits that are kept of a delay, from its first 1: late by a thousandth at most, and
# through ten queues instead of twenty-seven.
_DIGITS: Final = 10

# Seconds after which RabbitMQ has written down which log is a new queue's: a second after one was
# made, in a file that 3.10 saves where it was not changed between two looks, half a second apart.
# Killed before, it gives the queue a new log, empty and with no leader for ever: what was
# confirmed is lost. Longer, and whoever makes a queue waits for nothing.
NEW_QUEUE = 1.5

# How often a message may come back to a quorum queue before the server buries it. Without a
# number RabbitMQ 4 does it after 20, also where nobody has looked at it; and with one a message
# that comes back stays near the head. Ours is counted in the messages.
_UNLIMITED: Final = 2_000_000_000

# Seconds for which who has closed may still be counted as a consumer, where the disk is slow.
_CLOSED: Final = 0.3
# Looks at a subscription, and seconds before each, until it is taken for one that nobody consumes:
# consumers are subscribed while they receive, or hold something. Fewer, and it is removed under
# the hands of a busy process; more, and whoever removes waits.
_LIFE_LOOKS: Final = 8
_LIFE_PAUSE: Final = 0.1

# How the server tells with what a queue was made: by the first argument that is not the same.
_CAPACITY: Final = re.compile(r"'x-max-length'.*current is (?:the value )?'(\d+)'")
_OF_ONE_KIND: Final = ("'x-queue-type'", "'x-max-priority'", "'x-dead-letter-strategy'")


@final
@dataclass(frozen=True, slots=True)
class QueueShape:
    """How a queue is, or is to be, made.

    Attributes:
        priority: Whether it knows priorities, and is a classic queue: those that replicate
            have them from RabbitMQ 4 on only.
        capacity: How many messages may wait; None where nothing bounds them.
    """

    priority: bool = False
    capacity: int | None = None

    def arguments(self, dead: str) -> dict[str, Any]:
        """Return what AMQP calls the arguments of the queue."""
        found: dict[str, Any] = {
            # For what others give up, by a policy or as another client. We bury ourselves.
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": dead,
            "x-overflow": "reject-publish",
        }
        if self.capacity is not None:
            found["x-max-length"] = self.capacity
        if self.priority:
            return found | {"x-queue-type": "classic", "x-max-priority": MAX_PRIORITY}
        # Handing dead letters over by confirms has the same condition: reject-publish.
        return found | _QUORUM | {"x-dead-letter-strategy": "at-least-once"}


_QUORUM: Final[dict[str, Any]] = {"x-queue-type": "quorum", "x-delivery-limit": _UNLIMITED}


@final
class Topology:
    """Finds and makes things in one server.

    Args:
        link: A connection.
        creates: Whether what is missing is made.
        shown: The URL, for errors.
    """

    def __init__(self, link: AMQPLink, *, creates: bool, shown: str) -> None:
        self._link = link
        self._creates = creates
        self._shown = shown

    async def topic(self, name: str, exchange: str, kept: str) -> bool:
        """Find or make a topic, and where what nobody subscribed to is kept.

        Returns whether that is new: then ``written_down`` has to be waited for.
        """
        if not self._creates:
            async with self._looking() as channel:
                try:
                    await channel.exchange_declare(exchange, passive=True)
                except ChannelNotFoundEntity:
                    raise TopicNotFoundError(
                        f"{self._shown}: there is no topic {name!r}, and create=never was asked"
                    ) from None
            return False
        is_new = not await self._is_there(kept)
        async with self._looking() as channel:
            await channel.exchange_declare(kept, exchange_type="fanout", durable=True)
            await channel.queue_declare(kept, durable=True, arguments=_QUORUM)
            await channel.queue_bind(kept, kept)
            await channel.exchange_declare(
                exchange,
                exchange_type="fanout",
                durable=True,
                arguments={"alternate-exchange": kept},
            )
        return is_new

    async def subscription(
        self, topic: str, subscription: str, names: Names, *, expires: float | None
    ) -> bool:
        """Find or make the queue of a subscription, which is not bound yet.

        ``expires``: seconds without a consumer after which the server removes a new one.
        Returns whether it is new: then ``written_down`` has to be waited for.
        """
        is_new = not await self._is_there(names.main)
        if not self._creates:
            if is_new:
                raise TopicNotFoundError(
                    f"{self._shown}: topic {topic!r} has no subscription {subscription!r}, "
                    "and create=never was asked"
                )
            return False
        is_new |= await self._dead(names, expires=expires)
        await self._make(names.main, QueueShape().arguments(names.dead), expires=expires)
        return is_new

    async def bind(self, names: Names, exchange: str) -> None:
        """Let what is sent to a topic come to a subscription."""
        async with self._looking() as channel:
            await channel.queue_bind(names.main, exchange)

    async def queue(
        self, name: str, names: Names, *, discipline: str | None, capacity: int | None
    ) -> QueueShape:
        """Find or make a queue; return how it is made."""
        is_new = not await self._is_there(names.main)
        if is_new and not self._creates:
            raise QueueNotFoundError(
                f"{self._shown}: there is no queue {name!r}, and create=never was asked"
            )
        is_new |= await self._dead(names)
        shape = QueueShape(discipline == "priority", capacity)
        tried: set[QueueShape] = set()
        # What a queue was made with is no mistake of who does not ask for anything else.
        while (problem := await self._declare(names, shape)) and shape not in tried:
            tried.add(shape)
            bound = _CAPACITY.search(problem)
            if bound is not None and capacity is None:
                shape = replace(shape, capacity=int(bound[1]))
            elif discipline is None and any(name in problem for name in _OF_ONE_KIND):
                shape = replace(shape, priority=not shape.priority)
        if not problem:
            await written_down(is_new=is_new)
            return shape
        if "x-max-length" in problem:
            raise InvalidURLError(
                f"{self._shown}: capacity={capacity} is refused; queue {name!r} was made with "
                f"another or none, which cannot change: leave it out, or delete {names.main!r}"
            )
        if any(name in problem for name in _OF_ONE_KIND):
            raise InvalidURLError(
                f"{self._shown}: discipline={discipline or 'fifo'} is refused; queue {name!r} was "
                f"made with another, which cannot change: leave it out, or delete {names.main!r}"
            )
        raise IncompatibleBrokerError(
            f"{self._shown}: queue {name!r} was made by somebody else: {problem}"
        )

    async def _declare(self, names: Names, shape: QueueShape) -> str:
        """Declare a queue; return what the server has against it."""
        try:
            async with self._looking() as channel:
                await channel.queue_declare(
                    names.main, durable=True, arguments=shape.arguments(names.dead)
                )
        except IncompatibleBrokerError as error:
            return str(error)
        return ""

    async def _is_there(self, queue: str) -> bool:
        async with self._looking() as channel:
            return await ready_in(channel, queue) is not None

    async def _dead(self, names: Names, *, expires: float | None = None) -> bool:
        """Find or make the queue of dead letters; return whether it is new."""
        is_new = not await self._is_there(names.dead)
        await self._make(names.dead, _QUORUM, expires=expires)
        return is_new

    async def _make(self, queue: str, arguments: dict[str, Any], *, expires: float | None) -> None:
        if expires is not None:
            arguments = arguments | {"x-expires": round(expires * 1e3)}
        try:
            async with self._looking() as channel:
                await channel.queue_declare(queue, durable=True, arguments=arguments)
        except IncompatibleBrokerError as error:
            # Who does not ask takes it as it was made.
            if expires is not None or "'x-expires'" not in str(error):
                raise

    async def remove(self, subscription: str, names: Names) -> bool:
        """Remove a subscription's queues; return whether there was one.

        Raises:
            InUseError: Somebody consumes it.
        """
        there = await self._is_there(names.main)
        if there:
            await self._check_unused(subscription, names.main)
        # Not ``if_unused``, which quorum queues do not know.
        async with self._looking() as channel:
            await channel.queue_delete(names.main)
            await channel.queue_delete(names.dead)
            for step in range(_STEPS):
                await channel.exchange_delete(names.later(step))
                await channel.queue_delete(names.later(step))
        return there

    async def _check_unused(self, subscription: str, queue: str) -> None:
        await asyncio.sleep(_CLOSED)
        for _ in range(_LIFE_LOOKS):
            await asyncio.sleep(_LIFE_PAUSE)
            if await asked(lambda channel: consumers_of(channel, queue), self._link):
                raise InUseError(
                    f"{self._shown}: subscription {subscription!r} is being consumed; stop its "
                    "consumers, then remove it"
                )

    @contextlib.asynccontextmanager
    async def _looking(self) -> AsyncIterator[Channel]:
        """Give a channel of its own: the server closes one in which something was not right."""
        channel = await self._link.channel()
        with translated(self._link.address):
            try:
                async with asyncio.timeout(2 * ANSWER):
                    yield channel
            finally:
                with contextlib.suppress(Exception):
                    await channel.close()


@final
class Ladder:
    """The delays of one queue.

    Args:
        link: A connection.
        names: What the queue is called.
    """

    def __init__(self, link: AMQPLink, names: Names) -> None:
        self._link = link
        self._names = names
        self._made = 0
        self._turn = asyncio.Lock()

    async def address_of(self, delay: float) -> tuple[str, str]:
        """Return exchange and routing key by which a message comes after ``delay`` seconds.

        Raises:
            UnsupportedFeatureError: It is longer than RabbitMQ's queues let a message wait.
        """
        if delay > LONGEST_DELAY:
            raise UnsupportedFeatureError(
                f"{self._link.address}: a delay of {delay:g} s is refused; "
                f"{LONGEST_DELAY:.0f} s is the longest there",
                feature="delay",
            )
        units = min(_rounded_up(delay), 2**_STEPS - 1)
        top = units.bit_length() - 1
        async with self._turn:
            if top >= self._made:
                await self._make(top + 1)
        return self._names.later(top), ".".join(f"{units:b}")

    async def restore(self) -> None:
        """Make again what somebody has removed of it."""
        async with self._turn:
            if self._made:
                await self._make(self._made)
                await written_down(is_new=True)

    async def purge(self) -> int:
        """Remove all that waits in the ladder; return how much it was."""
        removed = 0
        with translated(self._link.address):
            for step in range(_STEPS):
                channel = await self._link.channel()
                try:
                    async with asyncio.timeout(ANSWER):
                        found = await channel.queue_purge(self._names.later(step))
                except ChannelNotFoundEntity:
                    break  # steps are made from the lowest up
                removed += found.message_count or 0
                await channel.close()
        return removed

    async def _make(self, steps: int) -> None:
        with translated(self._link.address):
            async with asyncio.timeout(2 * ANSWER):
                is_new = await self._declare(steps)
        await written_down(is_new=is_new)
        self._made = steps

    async def _declare(self, steps: int) -> bool:
        """Declare the lowest steps; return whether one of them is new."""
        channel = await self._link.channel()
        # They are made from the lowest up.
        is_new = await ready_in(channel, self._names.later(steps - 1)) is None
        if is_new:  # the server has closed the channel
            channel = await self._link.channel()
        for step in range(steps):
            await self._make_one(channel, step)
        await channel.close()
        return is_new

    async def _make_one(self, channel: Channel, step: int) -> None:
        here, names = self._names.later(step), self._names
        await channel.exchange_declare(here, exchange_type="topic", durable=True)
        ttl = {"x-message-ttl": round(_UNIT * 2**step * 1e3), "x-overflow": "reject-publish"}
        below: dict[str, Any] = {"x-dead-letter-exchange": names.later(step - 1)}
        if step == 0:
            below = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": names.main}
        strategy = {"x-dead-letter-strategy": "at-least-once"}
        await channel.queue_declare(here, durable=True, arguments=_QUORUM | strategy | ttl | below)
        # Digits are counted from the lowest: what stands before ours is of higher steps.
        rest = ".*" * step
        await channel.queue_bind(here, here, f"#.1{rest}")
        if step:
            await channel.exchange_bind(names.later(step - 1), here, f"#.0{rest}")
        else:
            await channel.queue_bind(names.main, here, "#.0")


def _rounded_up(delay: float) -> int:
    units = max(1, -int(-delay // _UNIT))
    spare = max(0, units.bit_length() - _DIGITS)
    return -(-units >> spare) << spare


async def written_down(*, is_new: bool) -> None:
    """Wait until the server will know a queue made just now again after it was killed."""
    if is_new:
        await asyncio.sleep(NEW_QUEUE)


async def ready_in(channel: Channel, queue: str) -> int | None:
    """Return how many messages a queue has that nobody holds; None where there is no queue."""
    try:
        found = await channel.queue_declare(queue, passive=True)
    except ChannelNotFoundEntity:
        return None
    assert isinstance(found, Queue.DeclareOk)
    return found.message_count or 0


async def consumers_of(channel: Channel, queue: str) -> int:
    """Return how many consumers a queue has; 0 where there is no queue.

    One that was ended is counted for as long as something is held of what it was sent.
    """
    try:
        found = await channel.queue_declare(queue, passive=True)
    except ChannelNotFoundEntity:
        return 0
    return found.consumer_count or 0


async def asked(call: Callable[[Channel], Awaitable[T]], link: AMQPLink) -> T:
    """Return what a call over a channel of its own answers."""
    channel = await link.channel()
    with translated(link.address):
        try:
            async with asyncio.timeout(ANSWER):
                return await call(channel)
        finally:
            with contextlib.suppress(Exception):
                await channel.close()
