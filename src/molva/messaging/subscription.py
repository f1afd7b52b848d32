"""The receiving side of a topic: one concrete class over any driver."""

from collections.abc import Iterable
from typing import cast, final

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva.messaging._receiving import ReceiveCounters, Receiving
from molva.messaging._retry import Retries
from molva.messaging._tracing import Tracing
from molva.messaging.driver import SubscriptionDriver, SubscriptionStat
from molva.messaging.errors import InvalidURLError
from molva.messaging.url import BrokerURL, check_features, load_driver

__all__ = ["ReceiveCounters", "Subscription", "open_subscription"]


async def open_subscription(
    url: str,
    *,
    max_attempts: int | None = None,
    require: Iterable[str] = (),
    clock: Clock = SYSTEM_CLOCK,
    tracing: Tracing | None = None,
) -> "Subscription":
    """Open one consumer of a named subscription, which is made if it is missing.

    Consumers of one subscription, in any number of processes, share its messages. A
    subscription gets what is stored from the moment it was made, whether or not anybody
    consumes it.

    Args:
        url: Names broker, topic and subscription:
            ``sqlite:///var/lib/molva/queue.db?topic=ratings&subscription=process``.
        max_attempts: Hand-overs of one message before it becomes a dead letter, ≥ 1.
            None: as the URL says, or 5.
        require: Features that the broker must have, as ``Capabilities.features`` calls
            them; more can stand in the URL.
        clock: Where time comes from.
        tracing: Told of each message that is processed, as ``telemetry.OpenTelemetry`` is.

    Raises:
        InvalidURLError: The URL or one of its options cannot be used.
        UnsupportedFeatureError: The broker has not all that is required.
        MissingExtraError: The driver's client library is not installed.
        TopicNotFoundError: It does not exist, and ``create=never`` was asked for.
        IncompatibleBrokerError: The broker is newer, damaged or something else.
        UnavailableError: The broker cannot be reached now.

    Example:
        >>> import asyncio
        >>> from molva.messaging import Message, open_subscription, open_topic
        >>> async def main() -> None:
        ...     url = "memory://example?topic=ratings"
        ...     async with (
        ...         await open_topic(url) as topic,
        ...         await open_subscription(url + "&subscription=process") as subscription,
        ...     ):
        ...         await topic.send(Message(b"7"))
        ...         async for delivery in subscription:
        ...             print(delivery.message.body)
        ...             await delivery.ack()
        ...             break
        >>> asyncio.run(main())
        b'7'
    """
    parsed = BrokerURL.parse(url)
    retries = Retries.of(max_attempts, parsed)
    if parsed.topic is None or parsed.subscription is None:
        raise InvalidURLError(
            f"{parsed}: names no topic and subscription; add ?topic=ratings&subscription=process"
        )
    driver = cast(
        SubscriptionDriver, await load_driver(parsed).open_subscription(parsed, clock=clock)
    )
    try:
        check_features(parsed, driver.capabilities, require, "topic")
        return Subscription(driver, parsed, retries=retries, clock=clock, tracing=tracing)
    except BaseException:
        await driver.close()
        raise


@final
class Subscription(Receiving):
    """Receives a subscription's messages. Open one with ``open_subscription``.

    Use one of three ways at a time: ``receive`` for batches, ``async for`` for one after
    the other, ``run`` for handlers side by side.
    """

    def __init__(
        self,
        driver: SubscriptionDriver,
        url: BrokerURL,
        *,
        retries: Retries,
        clock: Clock,
        tracing: Tracing | None,
    ) -> None:
        super().__init__(driver, url, clock=clock, tracing=tracing)
        self._driver = driver
        self._begin_receiving(driver, retries)

    async def stat(self) -> SubscriptionStat | None:
        """Return what waits; None where the broker cannot tell."""
        self._check_open()
        return await self._driver.stat()

    async def close(self) -> None:
        """Give back what is not settled, and release the broker. Idempotent."""
        self._stopping.set()
        if self._closed:
            return
        self._closed = True
        await self._end_receiving()
        await self._driver.close()
