"""The sending side of a topic: one concrete class over any driver."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, cast, final

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva._base.ids import ID_BYTES
from molva.messaging._batching import Batcher
from molva.messaging.driver import Capabilities, DeadLetter, Outcome, TopicDriver, TopicStat
from molva.messaging.errors import (
    ClosedError,
    MessageTooLargeError,
    MessagingError,
    QueueFullError,
    SendManyError,
    UnavailableError,
)
from molva.messaging.message import Message
from molva.messaging.url import BrokerURL, load_driver

__all__ = ["SendCounters", "Topic", "open_topic"]

# Messages that may wait in this process for the call under way. At 50,000 messages a
# second this is a fifth of a second's worth: more would only wait longer, and a broker that
# has stopped must not fill our memory.
_MAX_WAITING: Final = 10_000

# Messages that travel in one call. Larger batches gain nothing measurable on SQLite, and
# hold up whoever comes next.
_MAX_BATCH: Final = 1_000


@final
@dataclass(slots=True)
class SendCounters:
    """What a topic has done since it was opened; numbers only ever grow.

    ``stored``, ``refused_full`` and ``failed`` count messages, ``batches`` the driver's
    calls and ``busy_seconds`` the time spent in them.
    """

    stored: int = 0
    refused_full: int = 0
    failed: int = 0
    batches: int = 0
    busy_seconds: float = 0.0


async def open_topic(url: str, *, clock: Clock = SYSTEM_CLOCK) -> "Topic":
    """Open the sending side of a topic.

    Args:
        url: Names broker and topic: ``sqlite:///var/lib/molva/queue.db?topic=ratings``.
        clock: Where time comes from.

    Raises:
        InvalidURLError: The URL or one of its options cannot be used.
        MissingExtraError: The driver's client library is not installed.
        TopicNotFoundError: There is no such topic, and ``create=never`` was asked for.
        IncompatibleBrokerError: The broker is newer, damaged or something else.
        UnavailableError: The broker cannot be reached now.

    Example:
        >>> import asyncio
        >>> from molva.messaging import Message, open_topic
        >>> async def main() -> None:
        ...     async with await open_topic("memory://doc?topic=ratings") as topic:
        ...         await topic.send(Message(b"7"))
        ...         print(topic.counters.stored)
        >>> asyncio.run(main())
        1
    """
    parsed = BrokerURL.parse(url)
    driver = await load_driver(parsed).open_topic(parsed, clock=clock)
    return Topic(cast(TopicDriver, driver), shown_url=str(parsed), clock=clock)


@final
class Topic:
    """Sends messages to a topic. Open one with ``open_topic``; close it when done.

    Any number of tasks may send at once: what is sent while a call to the broker is under
    way travels together in the next one.
    """

    def __init__(self, driver: TopicDriver, *, shown_url: str, clock: Clock) -> None:
        self._driver = driver
        self._shown_url = shown_url
        self._clock = clock
        self._max_body_bytes = driver.capabilities.max_body_bytes
        self._batcher = Batcher(self._send_batch, max_items=_MAX_BATCH)
        self._closed = False
        self.counters: Final = SendCounters()

    @property
    def capabilities(self) -> Capabilities:
        """What the broker can do, with the settings it was opened with."""
        return self._driver.capabilities

    @property
    def capacity(self) -> int | None:
        """How many messages may wait; None where nothing bounds them."""
        return self._driver.capacity

    async def send(self, message: Message) -> None:
        """Store one message. When this returns, it outlives ``capabilities.survives``.

        Cancelling leaves open whether the message is stored; sending it again with the
        same id lets the consumer tell.

        Raises:
            QueueFullError: There is no room; the message was not stored.
            MessageTooLargeError: The body is larger than the broker takes.
            UnavailableError: The broker cannot store now; whether it did is unknown.
            ClosedError: The topic was closed.
        """
        self._check(message)
        outcome = await self._batcher.submit(message)
        if outcome is not Outcome.STORED:
            raise self._full()

    async def send_many(self, messages: Iterable[Message]) -> None:
        """Store many messages, in their order; faster than one at a time.

        Raises:
            SendManyError: Some were not stored, all others were; ``failures`` tells which
                and why. A body that is too large fails alone.
            ClosedError: The topic was closed; nothing was stored.
        """
        every = list(messages)
        failures: dict[int, MessagingError] = {}
        for place, message in enumerate(every):
            try:
                self._check(message, queueing=False)
            except MessageTooLargeError as error:
                failures[place] = error
        good = [m for place, m in enumerate(every) if place not in failures] if failures else every
        results = await self._batcher.submit_many(good)
        if not failures and results.count(Outcome.STORED) == len(every):
            return
        places = [place for place in range(len(every)) if place not in failures]
        for place, result in zip(places, results, strict=True):
            if isinstance(result, MessagingError):
                failures[place] = result
            elif isinstance(result, BaseException):
                raise result
            elif result is not Outcome.STORED:
                failures[place] = self._full()
        raise SendManyError(dict(sorted(failures.items())), len(every))

    async def stat(self) -> TopicStat | None:
        """Return what the topic holds; None where the broker cannot tell."""
        self._check_open()
        return await self._driver.stat()

    async def dead_letters(self, subscription: str, limit: int = 100) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters of a subscription, oldest first.

        Looking from here takes nothing from those who consume.
        """
        self._check_open()
        return await self._driver.dead_letters(subscription, limit)

    async def close(self) -> None:
        """Store what was sent, then release the broker. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self._batcher.drain()
        await self._driver.close()

    async def __aenter__(self) -> "Topic":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Topic {self._shown_url}>"

    def _check(self, message: Message, *, queueing: bool = True) -> None:
        if self._closed:
            raise ClosedError(f"{self._shown_url}: the topic was closed")
        key = message.key
        if (
            type(message.body) is not bytes
            or type(message.id) is not bytes
            or len(message.id) != ID_BYTES
            or (key is not None and not (type(key) is str and key.isascii()))
            or message.headers
        ):
            # Not plainly right; the long way round says what is wrong, if anything is.
            message.check()
        if len(message.body) > self._max_body_bytes:
            raise MessageTooLargeError(len(message.body), self._max_body_bytes)
        if queueing and self._batcher.waiting >= _MAX_WAITING:
            self.counters.refused_full += 1
            raise QueueFullError(_MAX_WAITING)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self._shown_url}: the topic was closed")

    def _full(self) -> QueueFullError:
        return QueueFullError(self._driver.capacity or 0)

    async def _send_batch(self, messages: list[Message]) -> Sequence[Outcome]:
        counters = self.counters
        started = self._clock.monotonic()
        try:
            outcomes = await self._driver.send_batch(messages)
        except MessagingError:
            counters.failed += len(messages)
            raise
        except (Exception, asyncio.CancelledError) as error:
            counters.failed += len(messages)
            if isinstance(error, asyncio.CancelledError):
                raise
            raise UnavailableError(f"{self._shown_url}: {error}") from error
        finally:
            counters.batches += 1
            counters.busy_seconds += self._clock.monotonic() - started
        full = outcomes.count(Outcome.FULL)
        counters.refused_full += full
        counters.stored += len(outcomes) - full
        return outcomes
