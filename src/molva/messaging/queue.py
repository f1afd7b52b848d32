"""A queue: each message is handed to one consumer, under a lease. One class over any driver."""

from collections.abc import Iterable
from typing import cast, final

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva.messaging._receiving import Receiving
from molva.messaging._retry import Retries
from molva.messaging._sending import Sending
from molva.messaging._tracing import Tracing
from molva.messaging.driver import QueueDriver, QueueStat
from molva.messaging.errors import InvalidURLError, UnsupportedFeatureError
from molva.messaging.url import BrokerURL, check_features, drivers_with, load_driver

__all__ = ["Queue", "open_queue"]


async def open_queue(
    url: str,
    *,
    max_attempts: int | None = None,
    require: Iterable[str] = (),
    clock: Clock = SYSTEM_CLOCK,
    tracing: Tracing | None = None,
) -> "Queue":
    """Open a queue, to send to it, to receive from it, or both; it is made if missing.

    Consumers of one queue, in any number of processes, share its messages. Each message is
    handed to one of them under a lease: settled before the lease runs out, it is gone;
    otherwise it comes again, to whoever asks.

    Args:
        url: Names broker and queue: ``sqlite:///var/lib/molva/queue.db?queue=mails``.
        max_attempts: Hand-overs of one message before it becomes a dead letter, ≥ 1.
            None: as the URL says, or 5.
        require: Features that the broker must have, as ``Capabilities.features`` calls
            them; more can stand in the URL.
        clock: Where time comes from.
        tracing: Told of what is sent and processed, as ``telemetry.OpenTelemetry`` is.

    Raises:
        InvalidURLError: The URL or one of its options cannot be used.
        UnsupportedFeatureError: The broker has not all that is required.
        MissingExtraError: The driver's client library is not installed.
        QueueNotFoundError: It does not exist, and ``create=never`` was asked for.
        IncompatibleBrokerError: The broker is newer, damaged or something else.
        UnavailableError: The broker cannot be reached now.

    Example:
        >>> import asyncio
        >>> from molva.messaging import Message, open_queue
        >>> async def main() -> None:
        ...     async with await open_queue("memory://doc?queue=mails&lease=10") as queue:
        ...         await queue.send(Message(b"to Ann"))
        ...         [delivery] = await queue.receive()
        ...         print(delivery.message.body, delivery.attempt)
        ...         await delivery.ack()
        >>> asyncio.run(main())
        b'to Ann' 1
    """
    parsed = BrokerURL.parse(url)
    retries = Retries.of(max_attempts, parsed)
    if parsed.queue is None:
        raise InvalidURLError(f"{parsed}: names no queue; add ?queue=mails")
    module = load_driver(parsed)
    if not hasattr(module, "open_queue"):
        raise UnsupportedFeatureError(
            f"{parsed}: {parsed.scheme}:// has topics only, ?topic=ratings: no message there can "
            "be held by itself",
            feature="by-message",
            drivers=drivers_with("by-message", "queue"),
        )
    driver = cast(QueueDriver, await module.open_queue(parsed, clock=clock))
    try:
        check_features(parsed, driver.capabilities, require, "queue")
        return Queue(driver, parsed, retries=retries, clock=clock, tracing=tracing)
    except BaseException:
        await driver.close()
        raise


@final
class Queue(Sending, Receiving):
    """Sends messages to a queue and receives them from it. Open one with ``open_queue``.

    Any number of tasks may send, and any number may receive, at once. To consume, use one
    of three ways: ``receive`` for batches, ``async for`` for one after the other, ``run``
    for handlers side by side.
    """

    def __init__(
        self,
        driver: QueueDriver,
        url: BrokerURL,
        *,
        retries: Retries,
        clock: Clock,
        tracing: Tracing | None,
    ) -> None:
        super().__init__(driver, url, clock=clock, tracing=tracing)
        self._driver = driver
        self._begin_sending(driver)
        self._begin_receiving(driver, retries)

    async def stat(self) -> QueueStat | None:
        """Return what waits; None where the broker cannot tell."""
        self._check_open()
        return await self._driver.stat()

    async def close(self) -> None:
        """Store what was sent, give back what is not settled, release the broker.

        Idempotent. What was taken ahead is another consumer's at once.
        """
        self._stopping.set()
        if self._closed:
            return
        self._closed = True
        await self._end_sending()
        await self._end_receiving()
        await self._driver.close()
