"""Running handlers for deliveries: side by side across keys, one after the other in a key.

A failed handler's message that has a key, or comes from a lane, stays here until its next
try, because what follows it must wait for it; its slot is free meanwhile, because the other
keys need not. Any other message goes back to the broker, which hands it to whoever is free
then. What is held here under a lease is kept alive (``_leases``).

There are never more tasks at work than slots, and one takes key after key. A task for each
key was simpler, and was rejected: it costs a quarter of what a message costs, and with
100,000 keys the loop had thousands of handlers to go through before it came to anything
else. Where a handler leaves a context variable changed its task ends, so that nothing of
it reaches the handlers of other keys.
"""

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from typing import Final, Protocol, final

from molva._base.clock import Clock
from molva._base.waiting import first_of
from molva.messaging._about import about
from molva.messaging._ahead import Ahead
from molva.messaging._leases import LeaseKeeper
from molva.messaging._retry import Retries
from molva.messaging.delivery import Delivery
from molva.messaging.errors import LeaseLostError, MessagingError, RejectError

__all__ = ["GiveBack", "Runner"]

_logger: Final = logging.getLogger("molva.messaging")

# Handlers that end without ever waiting, after which a task lets the loop go round. Many more,
# and timers and heartbeats come late; fewer, and each message pays for it.
_TURN: Final = 8


class GiveBack(Protocol):
    """Lets deliveries come again, in ``delay`` seconds, that nobody worked on."""

    async def __call__(self, deliveries: Iterable[Delivery], *, delay: float) -> None: ...


class _Counters(Protocol):
    handled: int
    failed: int
    handler_seconds: float


@final
class _TimedOutError(Exception):
    """A handler took longer than it may."""


@final
class Runner:
    """The handlers of one ``run``: side by side across keys, in order within one.

    Args:
        handler: Called with each delivery.
        name: What the handler is called, for people.
        concurrency: How many handlers may run at once.
        timeout: Seconds after which a handler is cancelled; None for never.
        ahead: How many deliveries may be held, running ones among them.
        leased: Whether a failed message without a key goes back to the broker.
        keeper: Keeps the leases of what is held.
        retries: How often and when a failed handler runs again.
        give_back: Lets deliveries come again that nobody worked on.
        stopping: Set when nothing more is to be received.
        clock: Where time comes from.
        counters: Told of handlers that ran.
    """

    def __init__(
        self,
        handler: Callable[[Delivery], Awaitable[object]],
        *,
        name: str,
        concurrency: int,
        timeout: float | None,
        ahead: Ahead,
        leased: bool,
        keeper: LeaseKeeper,
        retries: Retries,
        give_back: GiveBack,
        stopping: asyncio.Event,
        clock: Clock,
        counters: _Counters,
    ) -> None:
        self._handler = handler
        self._name = name
        self._task_name = f"handler {name}"
        self._context = contextvars.copy_context()
        self._free_slots = concurrency
        self._timeout = timeout
        self._ahead = ahead
        self._leased = leased
        self._keeper = keeper
        self._retries = retries
        self._give_back = give_back
        self._stopping = stopping
        self._clock = clock
        self._counters = counters
        # For each key its deliveries, oldest first: the one that runs, and what waits for it.
        self._lines: dict[object, deque[Delivery]] = {}
        # The keys that wait for a slot, longest first.
        self._ready: deque[object] = deque()
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
        while self._held >= self._ahead.size and not stopping.is_set():
            self._freed.clear()
            await first_of(self._freed.wait(), stopping.wait())
        return 0 if stopping.is_set() else self._ahead.size - self._held

    async def idle(self) -> None:
        """Wait until nothing is held any more."""
        while self._held:
            self._freed.clear()
            await self._freed.wait()

    def start(self, delivery: Delivery) -> None:
        """Run the handler for a delivery, behind those of its key."""
        self._held += 1
        self._keeper.hold(delivery)
        key = delivery.message.key
        # Without a key there is no order to keep: every message is a line of its own.
        line: object = delivery.message.id if key is None else key
        waiting = self._lines.get(line)
        if waiting is not None:
            waiting.append(delivery)
            return
        self._lines[line] = deque([delivery])
        self._ready.append(line)
        self._fill_slots()

    def cancel(self) -> None:
        """Cancel the handlers under way."""
        for task in self._tasks:
            task.cancel()

    async def finish(self, timeout: float | None = None) -> None:
        """Let the handlers under way end; what waits for its turn is given back.

        Those that still run after ``timeout`` seconds are cancelled, and what they were
        working on is given back too.
        """
        self._ending.set()
        self._begin(self._give_back_ready())
        try:
            if timeout is None:
                await self._all_ended()
            else:
                await first_of(self._all_ended(), self._clock.sleep(timeout))
        except asyncio.CancelledError:
            self.cancel()
            await self._all_ended()
            raise
        if self._tasks:
            _logger.warning(
                "%d handlers %s did not end within %s s; they are cancelled",
                len(self._tasks),
                self._name,
                timeout,
            )
            self.cancel()
            await self._all_ended()

    async def _all_ended(self) -> None:
        # The last may have ended just as its end was awaited, or begun another, which gives back.
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _fill_slots(self) -> None:
        while self._free_slots and self._ready and not self._over():
            self._free_slots -= 1
            self._begin(self._work())

    def _over(self) -> bool:
        # Whoever stopped us may run long before `finish` does, and no handler begins after.
        return self._ending.is_set() or self._stopping.is_set()

    def _begin(self, work: Coroutine[object, object, None]) -> None:
        # Not in the context of whoever asks, which may be a task that a handler has changed.
        task = asyncio.get_running_loop().create_task(
            work, name=self._task_name, context=self._context.copy()
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self) -> None:
        """Work in a slot: handle a delivery of the key that waits longest, and so on."""
        handled = 0
        try:
            while self._ready and not self._over():
                await self._handle_first(self._ready.popleft())
                handled += 1
                if handled % _TURN == 0:
                    await asyncio.sleep(0)
                # Two that nobody has changed since share what they hold: no cost to compare.
                if contextvars.copy_context() != self._context:
                    return
        finally:
            self._free_slots += 1
            await self._go_on()

    async def _handle_first(self, line: object) -> None:
        """Handle the oldest delivery of a key; the key then waits behind the others."""
        waiting = self._lines[line]
        try:
            delay = None if waiting[0].lost else await self._handle(waiting[0])
        except BaseException:
            await self._let_go(self._lines.pop(line))
            raise
        if delay is not None:
            # The message stays with us, since its key must wait for it; its slot is free
            # meanwhile, since the others need not.
            self._begin(self._wait(line, delay))
            return
        self._done(waiting)
        if waiting:
            self._ready.append(line)
        else:
            del self._lines[line]

    async def _wait(self, line: object, delay: float) -> None:
        """Let a key wait for its next try."""
        try:
            await first_of(self._clock.sleep(delay), self._ending.wait())
        finally:
            self._ready.append(line)
            await self._go_on()

    async def _go_on(self) -> None:
        if self._ending.is_set():
            await self._give_back_ready()
        else:
            self._fill_slots()

    async def _give_back_ready(self) -> None:
        lines = [self._lines.pop(line) for line in self._ready]
        self._ready.clear()
        if lines:
            await self._let_go([delivery for waiting in lines for delivery in waiting])

    async def _let_go(self, deliveries: Collection[Delivery]) -> None:
        """Give back what nobody works on any more."""
        self._held -= len(deliveries)
        self._freed.set()
        for delivery in deliveries:
            self._keeper.let_go(delivery)
        await self._give_back(deliveries, delay=0.0)

    def _done(self, waiting: deque[Delivery]) -> None:
        self._keeper.let_go(waiting.popleft())
        self._held -= 1
        self._freed.set()

    async def _handle(self, delivery: Delivery) -> float | None:
        """Run the handler once; return the seconds until it is to run again, if it is."""
        began = self._clock.monotonic()
        try:
            try:
                if self._timeout is None:
                    await self._handler(delivery)
                else:
                    await self._handle_in_time(delivery, self._timeout)
            except Exception as error:  # noqa: BLE001 - the handler's, whatever it is
                self._counters.failed += 1
                return await self._fail(delivery, error)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and not task.cancelling():
                    # The handler's own doing, which counts: it may do so every time.
                    self._counters.failed += 1
                    await delivery.nack()
                raise
            finally:
                seconds = self._clock.monotonic() - began
                self._ahead.note(seconds)
                self._counters.handler_seconds += seconds
            self._counters.handled += 1
            await delivery.ack()
        except LeaseLostError as error:
            _logger.warning("%s", error, extra=about(delivery.message, delivery.attempt))
        except MessagingError as error:
            _logger.warning(
                "%r could not be settled and will come again: %s",
                delivery,
                error,
                extra=about(delivery.message, delivery.attempt),
            )
            delay = self._retries.delay(delivery.attempt)
            await self._give_back([delivery], delay=delay)
        return None

    async def _handle_in_time(self, delivery: Delivery, timeout: float) -> None:
        task = asyncio.get_running_loop().create_task(
            _ended(self._handler(delivery)), name=f"handler {self._name}"
        )
        try:
            await first_of(asyncio.wait([task]), self._clock.sleep(timeout))
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
                if task.cancelled():
                    raise _TimedOutError(f"{self._name} took longer than {timeout:g} s")
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise
        task.result()

    async def _fail(self, delivery: Delivery, error: Exception) -> float | None:
        """Decide about a failed handler; return the seconds until it is to run again."""
        fields = about(delivery.message, delivery.attempt)
        if delivery.settled:
            _logger.warning(
                "%s settled %r, then raised %r", self._name, delivery, error, extra=fields
            )
            return None
        if isinstance(error, RejectError):
            _logger.error("%r was rejected: %s", delivery, error, extra=fields)
            await delivery.reject(str(error))
            return None
        if delivery.attempt >= self._retries.max_attempts:
            _logger.error("%r failed for the last time: %r", delivery, error, extra=fields)
            await delivery.reject(f"{type(error).__name__}: {error}")
            return None
        delay = self._retries.delay(delivery.attempt)
        _logger.warning("%r failed, next try in %.1f s: %r", delivery, delay, error, extra=fields)
        if self._leased and delivery.message.key is None:
            await delivery.nack(delay=delay)
            return None
        delivery.attempt += 1
        return delay


async def _ended(handling: Awaitable[object]) -> None:
    await handling
