"""The sending side of a topic: one concrete class over any driver."""

from collections.abc import Iterable
from typing import cast, final

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva.messaging._sending import SendCounters, Sending
from molva.messaging._tracing import Tracing
from molva.messaging.driver import DeadLetter, TopicDriver, TopicStat
from molva.messaging.errors import InvalidURLError
from molva.messaging.url import BrokerURL, check_features, load_driver

__all__ = ["SendCounters", "Topic", "open_topic"]


async def open_topic(
    url: str,
    *,
    require: Iterable[str] = (),
    clock: Clock = SYSTEM_CLOCK,
    tracing: Tracing | None = None,
) -> "Topic":
    """Open the sending side of a topic.

    Args:
        url: Names broker and topic: ``sqlite:///var/lib/molva/queue.db?topic=ratings``.
        require: Features that the broker must have, as ``Capabilities.features`` calls
            them; more can stand in the URL.
        clock: Where time comes from.
        tracing: Told of each send, as ``telemetry.OpenTelemetry`` is.

    Raises:
        InvalidURLError: The URL or one of its options cannot be used.
        UnsupportedFeatureError: The broker has not all that is required.
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
    if parsed.topic is None:
        raise InvalidURLError(f"{parsed}: names no topic; add ?topic=ratings")
    driver = cast(TopicDriver, await load_driver(parsed).open_topic(parsed, clock=clock))
    try:
        check_features(parsed, driver.capabilities, require, "topic")
        return Topic(driver, parsed, clock=clock, tracing=tracing)
    except BaseException:
        await driver.close()
        raise


@final
class Topic(Sending):
    """Sends messages to a topic. Open one with ``open_topic``; close it when done."""

    def __init__(
        self, driver: TopicDriver, url: BrokerURL, *, clock: Clock, tracing: Tracing | None
    ) -> None:
        super().__init__(driver, url, clock=clock, tracing=tracing)
        self._driver = driver
        self._begin_sending(driver)

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

    async def remove_subscription(self, subscription: str) -> bool:
        """Remove a subscription, all that waits in it and its dead letters.

        Nothing waits for a removed subscription: what only it had not read is deleted.

        Returns:
            Whether there was one.

        Raises:
            InUseError: Somebody consumes it.
        """
        self._check_open()
        return await self._driver.remove_subscription(subscription)

    async def close(self) -> None:
        """Store what was sent, then release the broker. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self._end_sending()
        await self._driver.close()
