"""The receiving side of a topic: one concrete class over any driver."""

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Final, cast, final

from molva._base.clock import SYSTEM_CLOCK, Clock
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

# Seconds before the second attempt, doubled for each further one up to the limit. A
# quarter of it is random, so that consumers that failed together do not return together.
_FIRST_DELAY: Final = 0.5
_LONGEST_DELAY: Final = 60.0

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
    if max_attempts < 1:
        raise ValueError(f"max_attempts={max_attempts} is refused; at least 1 is accepted")
    parsed = BrokerURL.parse(url)
    driver = await load_driver(parsed).open_subscription(parsed, clock=clock)
    return Subscription(
        cast(SubscriptionDriver, driver),
        shown_url=str(parsed),
        max_attempts=max_attempts,
        clock=clock,
    )


@final
class Subscription:
    """Receives a subscription's messages. Open one with ``open_subscription``.

    Use one of three ways at a time: ``receive`` for batches, ``async for`` for one after
    the other, ``run`` for handlers side by side.
    """

    def __init__(
        self, driver: SubscriptionDriver, *, shown_url: str, max_attempts: int, clock: Clock
    ) -> None:
        self._driver = driver
        self._shown_url = shown_url
        self._max_attempts = max_attempts
        self._clock = clock
        self._random = random.Random()  # jitter, no secret
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
        runner = _Runner(self, handler, concurrency)
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

    def retry_delay(self, attempt: int) -> float:
        """Return the seconds to wait after the failed ``attempt``, with jitter."""
        longest = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** (attempt - 1))
        return longest * (0.75 + 0.25 * self._random.random())

    def _settlement(
        self, delivery: Delivery, action: Action, delay: float, reason: str
    ) -> Settlement:
        if action is Action.ACK:
            return Settlement(delivery.token, action)
        if action is Action.NACK and delivery.attempt >= self._max_attempts:
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


@final
class _Runner:
    """The handlers of one ``run``: side by side across keys, in order within one."""

    def __init__(
        self,
        subscription: Subscription,
        handler: Callable[[Delivery], Awaitable[object]],
        concurrency: int,
    ) -> None:
        self._subscription = subscription
        self._handler = handler
        self._slots = asyncio.Semaphore(concurrency)
        self._most = concurrency * _PREFETCH
        # For each key the deliveries that wait for the one that runs, oldest first.
        self._lines: dict[object, deque[Delivery]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._held = 0
        self._freed = asyncio.Event()
        # Set when no further handler may begin.
        self._ending = asyncio.Event()

    async def room(self) -> int:
        """Return how many more deliveries may be started; wait until it is at least one.

        Zero once the subscription was stopped.
        """
        stopping = self._subscription._stopping
        while self._held >= self._most and not stopping.is_set():
            self._freed.clear()
            await _first_of(self._freed.wait(), stopping.wait())
        return 0 if stopping.is_set() else self._most - self._held

    def start(self, delivery: Delivery) -> None:
        """Run the handler for a delivery, behind those of its key."""
        self._held += 1
        key = delivery.message.key
        # Without a key there is no order to keep: every message is a line of its own.
        line: object = delivery.message.id if key is None else key
        waiting = self._lines.get(line)
        if waiting is not None:
            waiting.append(delivery)
            return
        waiting = self._lines[line] = deque([delivery])
        task = asyncio.get_running_loop().create_task(self._work_off(line, waiting))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Cancel the handlers under way."""
        for task in self._tasks:
            task.cancel()

    async def finish(self) -> None:
        """Let the handlers under way end; what waits for its turn is given back."""
        self._ending.set()
        if self._tasks:
            try:
                await asyncio.wait(self._tasks)
            except asyncio.CancelledError:
                self.cancel()
                await asyncio.wait(self._tasks)
                raise

    async def _work_off(self, line: object, waiting: deque[Delivery]) -> None:
        try:
            while waiting:
                async with self._slots:
                    if self._ending.is_set():
                        return
                    delay = await self._handle(waiting[0])
                if delay is None:
                    waiting.popleft()
                    self._held -= 1
                    self._freed.set()
                else:
                    # The message stays with us, since its key must wait for it; its slot
                    # is free meanwhile, since the others need not.
                    clock = self._subscription._clock
                    await _first_of(clock.sleep(delay), self._ending.wait())
        finally:
            del self._lines[line]
            self._held -= len(waiting)
            self._freed.set()
            await self._subscription._give_back(waiting)

    async def _handle(self, delivery: Delivery) -> float | None:
        """Run the handler once; return the seconds until it is to run again, if it is."""
        try:
            try:
                await self._handler(delivery)
            except Exception as error:  # noqa: BLE001 - the handler's, whatever it is
                return await self._fail(delivery, error)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and not task.cancelling():
                    # The handler's own doing, which counts: it may do so every time.
                    await delivery.nack()
                raise
            await delivery.ack()
        except LeaseLostError as error:
            _logger.warning("%s", error)
        except MessagingError as error:
            _logger.warning("%r could not be settled and will come again: %s", delivery, error)
            subscription = self._subscription
            delay = subscription.retry_delay(delivery.attempt)
            await subscription._give_back([delivery], delay=delay)
        return None

    async def _fail(self, delivery: Delivery, error: Exception) -> float | None:
        """Decide about a failed handler; return the seconds until it is to run again."""
        if delivery.settled:
            _logger.warning("the handler settled %r, then raised %r", delivery, error)
            return None
        subscription = self._subscription
        if delivery.attempt >= subscription._max_attempts:
            _logger.error("%r failed for the last time: %r", delivery, error)
            await delivery.reject(f"{type(error).__name__}: {error}")
            return None
        delay = subscription.retry_delay(delivery.attempt)
        _logger.warning("%r failed, next try in %.1f s: %r", delivery, delay, error)
        delivery.attempt += 1
        return delay


async def _first_of(*waits: Coroutine[object, object, object]) -> None:
    """Wait until the first of several waits is over; give up the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
