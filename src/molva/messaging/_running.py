"""Running handlers for deliveries: side by side across keys, one after the other in a key.

A failed handler's message stays here until its next try, because its key must wait for it;
its slot is free meanwhile, because the other keys need not. A consumer of a topic owns its
lanes for as long as it lives, so no lease can run out.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol, final

from molva._base.clock import Clock
from molva._base.waiting import first_of
from molva.messaging._retry import Retries
from molva.messaging.delivery import Delivery
from molva.messaging.errors import LeaseLostError, MessagingError

__all__ = ["GiveBack", "Runner"]

_logger: Final = logging.getLogger("molva.messaging")


class GiveBack(Protocol):
    """Lets deliveries come again, in ``delay`` seconds, that nobody worked on."""

    async def __call__(self, deliveries: Iterable[Delivery], *, delay: float) -> None: ...


@final
class Runner:
    """The handlers of one ``run``: side by side across keys, in order within one.

    Args:
        handler: Called with each delivery.
        concurrency: How many handlers may run at once.
        prefetch: How many deliveries may be held, running ones among them.
        retries: How often and when a failed handler runs again.
        give_back: Lets deliveries come again that nobody worked on.
        stopping: Set when nothing more is to be received.
        clock: Where time comes from.
    """

    def __init__(
        self,
        handler: Callable[[Delivery], Awaitable[object]],
        *,
        concurrency: int,
        prefetch: int,
        retries: Retries,
        give_back: GiveBack,
        stopping: asyncio.Event,
        clock: Clock,
    ) -> None:
        self._handler = handler
        self._slots = asyncio.Semaphore(concurrency)
        self._most = prefetch
        self._retries = retries
        self._give_back = give_back
        self._stopping = stopping
        self._clock = clock
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
        stopping = self._stopping
        while self._held >= self._most and not stopping.is_set():
            self._freed.clear()
            await first_of(self._freed.wait(), stopping.wait())
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
                    await first_of(self._clock.sleep(delay), self._ending.wait())
        finally:
            del self._lines[line]
            self._held -= len(waiting)
            self._freed.set()
            await self._give_back(waiting, delay=0.0)

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
            delay = self._retries.delay(delivery.attempt)
            await self._give_back([delivery], delay=delay)
        return None

    async def _fail(self, delivery: Delivery, error: Exception) -> float | None:
        """Decide about a failed handler; return the seconds until it is to run again."""
        if delivery.settled:
            _logger.warning("the handler settled %r, then raised %r", delivery, error)
            return None
        if delivery.attempt >= self._retries.max_attempts:
            _logger.error("%r failed for the last time: %r", delivery, error)
            await delivery.reject(f"{type(error).__name__}: {error}")
            return None
        delay = self._retries.delay(delivery.attempt)
        _logger.warning("%r failed, next try in %.1f s: %r", delivery, delay, error)
        delivery.attempt += 1
        return delay
