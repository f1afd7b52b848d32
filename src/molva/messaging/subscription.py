"""The receiving side of a topic: one concrete class over any driver."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Final, cast, final

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva.messaging._retry import Retries
from molva.messaging._running import Runner
from molva.messaging.delivery import Delivery
from molva.messaging.driver import (
    Action,
    Capabilities,
    DeadLetter,
    Outcome,
    Settlement,
    SubscriptionDriver,
    SubscriptionStat,
)
from molva.messaging.errors import (
    ClosedError,
    LeaseLostError,
    MessagingError,
    UnavailableError,
)
from molva.messaging.url import BrokerURL, load_driver

__all__ = ["Subscription", "open_subscription"]

_logger: Final = logging.getLogger("molva.messaging")

# Hand-overs of one message before it becomes a dead letter. As most brokers' users set it:
# fewer gives up on a short outage, more keeps a lane waiting behind a poisonous message.
_MAX_ATTEMPTS: Final = 5

# Seconds that one call to the driver waits for a message before it looks whether it should
# stop. Drivers wake at once; this bounds nothing that a user sees.
_WAIT: Final = 5.0

# Messages that iterating and ``run`` take ahead for each handler that runs.
_PREFETCH: Final = 64


async def open_subscription(
    url: str, *, max_attempts: int = _MAX_ATTEMPTS, clock: Clock = SYSTEM_CLOCK
) -> "Subscription":
    """Open one consumer of a named subscription, which is made if it is missing.

    Consumers of one subscription, in any number of processes, share its messages. A
    subscription gets what is stored from the moment it was made, whether or not anybody
    consumes it.

    Args:
        url: Names broker, topic and subscription:
            ``sqlite:///var/lib/molva/queue.db?topic=ratings&subscription=process``.
        max_attempts: Hand-overs of one message before it becomes a dead letter, ≥ 1.
        clock: Where time comes from.

    Raises:
        InvalidURLError: The URL or one of its options cannot be used.
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
    retries = Retries(max_attempts)
    parsed = BrokerURL.parse(url)
    driver = await load_driver(parsed).open_subscription(parsed, clock=clock)
    return Subscription(
        cast(SubscriptionDriver, driver),
        shown_url=str(parsed),
        retries=retries,
        clock=clock,
    )


@final
class Subscription:
    """Receives a subscription's messages. Open one with ``open_subscription``.

    Use one of three ways at a time: ``receive`` for batches, ``async for`` for one after
    the other, ``run`` for handlers side by side.
    """

    def __init__(
        self, driver: SubscriptionDriver, *, shown_url: str, retries: Retries, clock: Clock
    ) -> None:
        self._driver = driver
        self._shown_url = shown_url
        self._retries = retries
        self._clock = clock
        self._closed = False
        self._stopping = asyncio.Event()

    @property
    def capabilities(self) -> Capabilities:
        """What the broker can do, with the settings it was opened with."""
        return self._driver.capabilities

    async def receive(self, limit: int = 1, *, wait: float = _WAIT) -> list[Delivery]:
        """Return up to ``limit`` deliveries, oldest first; none if none came.

        Returns at once with what is there, and waits up to ``wait`` seconds only while
        there is nothing. Cancelling loses no message.

        Raises:
            UnavailableError: The broker cannot be reached now.
            ClosedError: The subscription was closed.
        """
        self._check_open()
        if limit < 1:
            raise ValueError(f"limit={limit} is refused; at least 1 is accepted")
        try:
            raw = await self._driver.receive_batch(limit, wait=wait)
        except MessagingError:
            raise
        except Exception as error:
            raise UnavailableError(f"{self._shown_url}: {error}") from error
        self._check_open()  # closed while we waited
        return [Delivery(message, attempt, token, self) for message, attempt, token in raw]

    async def settle(
        self,
        settlements: Sequence[tuple[Delivery, Action]],
        *,
        delay: float = 0.0,
        reason: str = "",
    ) -> None:
        """Settle several deliveries in one call; those settled before are passed over.

        Args:
            settlements: Each delivery with what becomes of it.
            delay: Seconds before nacked messages come again.
            reason: Why rejected ones are dead letters.

        Raises:
            LeaseLostError: At least one is no longer ours (it names the first); the
                others are settled.
            UnavailableError: The broker cannot be told; all of them may come again.
        """
        self._check_open()
        fresh = []
        for delivery, action in settlements:
            if not delivery.settled:
                # Marked before the driver is told: the first wins, also of two at once.
                delivery.settled = True
                fresh.append((delivery, action))
        if not fresh:
            return
        items = [self._settlement(delivery, action, delay, reason) for delivery, action in fresh]
        try:
            outcomes = await self._driver.settle_batch(items)
        except BaseException as error:
            for delivery, _ in fresh:
                delivery.settled = False
            if isinstance(error, MessagingError) or not isinstance(error, Exception):
                raise
            raise UnavailableError(f"{self._shown_url}: {error}") from error
        lost = None
        for (delivery, _), outcome in zip(fresh, outcomes, strict=True):
            if outcome is Outcome.LEASE_LOST and lost is None:
                lost = delivery
        if lost is not None:
            raise LeaseLostError(lost.message.id, attempt=lost.attempt)

    async def __aiter__(self) -> AsyncIterator[Delivery]:
        """Yield deliveries one after the other, until ``stop`` or ``close``."""
        ahead: deque[Delivery] = deque()
        try:
            while not self._stopping.is_set():
                ahead.extend(await self._receive_or_stop(_PREFETCH))
                while ahead and not self._stopping.is_set():
                    yield ahead.popleft()
        finally:
            await self._give_back(ahead)

    async def run(
        self, handler: Callable[[Delivery], Awaitable[object]], *, concurrency: int = 1
    ) -> None:
        """Run ``handler`` for each delivery until ``stop`` or ``close``.

        A delivery is acknowledged when its handler returns, unless the handler settled
        it. If the handler raises, the message is tried again with growing delays, and
        becomes a dead letter after the subscription's last attempt. Messages of one key
        run one after the other, in order, also across such retries, which hold up no
        other key. Cancelling cancels the handlers too, and gives their messages back.

        Args:
            handler: Called with each delivery.
            concurrency: How many handlers may run at once, ≥ 1.

        Raises:
            UnavailableError: The broker cannot be reached now.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency} is refused; at least 1 is accepted")
        runner = Runner(
            handler,
            concurrency=concurrency,
            prefetch=concurrency * _PREFETCH,
            retries=self._retries,
            give_back=self._give_back,
            stopping=self._stopping,
            clock=self._clock,
        )
        try:
            while room := await runner.room():
                for delivery in await self._receive_or_stop(room):
                    runner.start(delivery)
        except asyncio.CancelledError:
            runner.cancel()
            raise
        finally:
            await runner.finish()

    def stop(self) -> None:
        """End iterating and ``run``, after the handlers under way."""
        self._stopping.set()

    async def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        self._check_open()
        return await self._driver.dead_letters(limit)

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
        await self._driver.close()

    async def __aenter__(self) -> "Subscription":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Subscription {self._shown_url}>"

    def _settlement(
        self, delivery: Delivery, action: Action, delay: float, reason: str
    ) -> Settlement:
        if action is Action.ACK:
            return Settlement(delivery.token, action)
        if action is Action.NACK and delivery.attempt >= self._retries.max_attempts:
            action = Action.REJECT
            reason = reason or f"given back at attempt {delivery.attempt}, the last one"
        return Settlement(delivery.token, action, delay, reason, delivery.attempt)

    async def _receive_or_stop(self, limit: int) -> list[Delivery]:
        """Receive, but return nothing as soon as somebody stops us."""
        receiving = asyncio.ensure_future(self.receive(limit))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                receiving.cancel()
                await asyncio.wait((receiving,))
        except asyncio.CancelledError:
            # It may have received in the very moment in which we were cancelled.
            if not receiving.cancel() and not receiving.cancelled() and not receiving.exception():
                await self._give_back(receiving.result())
            raise
        finally:
            stopping.cancel()
        if receiving.cancelled() or (self._closed and receiving.exception()):
            return []
        return receiving.result()

    async def _give_back(self, deliveries: Iterable[Delivery], *, delay: float = 0.0) -> None:
        """Let deliveries come again that nobody worked on."""
        if self._closed:
            return
        returned = [
            Settlement(d.token, Action.RETURN, delay, attempt=d.attempt)
            for d in deliveries
            if not d.settled
        ]
        if returned:
            with contextlib.suppress(MessagingError):
                await self._driver.settle_batch(returned)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self._shown_url}: the subscription was closed")
