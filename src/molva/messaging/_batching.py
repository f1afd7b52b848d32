"""A batcher that needs no timer.

While one call is under way, items pile up; the next call takes them all. A lone item
waits for nothing, a flood travels in large batches, and nothing has to be tuned. Batchers
with a linger make every lone item pay for the flood that may come; where a call is dear,
a cloud's that is paid by the call, one can be asked for. Where a call costs the broker much
beside what is in it, the driver says so, and a call waits for who was answered by the last.

One call runs at a time, so items are stored in the order in which they were submitted.
Every item gets a result of its own; where the whole call raised, every item of that call
gets the exception. Where a call took long and failed, what piled up behind it can fail with it,
so that nobody waits for two calls that run out of time.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar, final

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva._base.waiting import first_of, is_being_cancelled
from molva.messaging.driver import DearCalls

__all__ = ["Batcher"]

# Seconds after which a call took long, for ``give_up``. Shorter, and what piled up fails with a
# call that failed for a moment only; longer, and it may wait for as long a second time.
_LONG_CALL: Final = 1.0

T = TypeVar("T")
R = TypeVar("R")


@final
class _Group(Generic[R]):
    """The items of one slice of ``submit_many``, which travel in one call."""

    __slots__ = ("future", "size")

    def __init__(self, size: int, future: "asyncio.Future[Sequence[R | BaseException]]") -> None:
        self.size = size
        self.future = future


@final
class Batcher(Generic[T, R]):
    """Collects items into calls of ``call``, one call at a time.

    Args:
        call: Takes the items, returns a result for each, in their order.
        max_items: Items after which a call is full. A slice of ``submit_many``, which has
            at most as many, is not torn apart for it.
        linger: Seconds that the first item of a call waits for others.
        dear: Where calls are dear. Behind a call of so many items the next waits for as many,
            but for so many seconds only: who was answered is about to come again, and would
            need a call of their own. None where they are cheap.
        give_up: Asked behind a call that took longer than a second: the error by which
            what piled up meanwhile fails at once, None where it travels in the next call.
        clock: Where time comes from.
    """

    def __init__(
        self,
        call: Callable[[list[T]], Awaitable[Sequence[R]]],
        *,
        max_items: int = 1_000,
        linger: float = 0.0,
        dear: DearCalls | None = None,
        give_up: Callable[[Sequence[R | BaseException]], BaseException | None] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._call = call
        self._max_items = max_items
        self._linger = linger
        self._dear = dear
        # How many items the last call had, and how many a call waits for; 0 while none does.
        self._last = 0
        self._wanted = 0
        self._enough = asyncio.Event()
        self._give_up = give_up
        self._clock = clock
        self._items: list[T] = []
        # Who waits for them, in the same order: a future for one, a group for several.
        self._waiters: list[asyncio.Future[R] | _Group[R]] = []
        # Those whose items are in the call under way.
        self._answering: Sequence[asyncio.Future[R] | _Group[R]] = ()
        # How many of the waiters may have been cancelled, where the items go with them.
        self._cancelled = 0
        # When the call under way began.
        self._began: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._draining = False
        # How many calls of submit_many still have items to hand over.
        self._slicing = 0
        self._loop = asyncio.get_running_loop()
        # Set while the task has nothing to do; resolving it starts the next call in the
        # next iteration of the loop, behind every callback that is ready now. Whatever
        # these submit travels with it.
        self._idle: asyncio.Future[None] | None = None

    @property
    def waiting(self) -> int:
        """How many items wait for a call to take them."""
        return len(self._items)

    @property
    def busy(self) -> bool:
        """Whether a call is under way, or items wait for one."""
        return self._began is not None or bool(self._items)

    @property
    def call_seconds(self) -> float:
        """How long the call under way has taken so far; 0 where none is."""
        return 0.0 if self._began is None else self._clock.monotonic() - self._began

    def submit(self, item: T) -> "asyncio.Future[R]":
        """Hand over one item; return the future of its result.

        Cancelling the future stops the waiting, not the item: it may be in a call already.
        """
        future: asyncio.Future[R] = self._loop.create_future()
        self._items.append(item)
        self._waiters.append(future)
        idle = self._idle
        if idle is not None and not idle.done():
            idle.set_result(None)
        elif self._task is None:
            self._wake()
        elif self._wanted and len(self._items) >= self._wanted:
            self._enough.set()
        return future

    async def submit_many(self, items: Sequence[T]) -> list[R | BaseException]:
        """Hand over many items; return a result or an exception for each, in order."""
        results: list[R | BaseException] = []
        self._slicing += 1
        try:
            # A slice at a time: taking a thousand from the front of a million, again and
            # again, would copy the rest each time.
            for start in range(0, len(items), self._max_items):
                part = items[start : start + self._max_items]
                group: _Group[R] = _Group(len(part), self._loop.create_future())
                self._items.extend(part)
                self._waiters.append(group)
                self._wake()
                results += await group.future
        finally:
            self._slicing -= 1
            if self._draining and self._task is not None:
                self._wake()
        return results

    def drop_cancelled(self) -> None:
        """Drop what waits for a call and whose waiter was cancelled, before the next call.

        Call this once for each that was cancelled. Where it is called for none, a cancelled
        waiter's items travel all the same.
        """
        self._cancelled += 1
        # A call can take for ever. Half of what waits may be dead, not more, and then each
        # cancellation costs a constant.
        if 2 * self._cancelled > len(self._waiters):
            self._drop()

    def abandoned(self) -> set[int]:
        """Return the places in the call under way whose results nobody waits for any more."""
        found: set[int] = set()
        at = 0
        for waiter in self._answering:
            size, future = _size_and_future(waiter)
            if future.cancelled():
                found.update(range(at, at + size))
            at += size
        return found

    def fail(self, error: BaseException) -> int:
        """Give everybody who waits ``error`` now, in their order; return how many items that are.

        What waits for a call is dropped. The call under way goes on to its end, and its
        results are nobody's; what is submitted meanwhile waits for that end.
        """
        answering, self._answering = self._answering, ()
        waiters, self._waiters = self._waiters, []
        self._items = []
        every = [*answering, *waiters]
        number = sum(_size_and_future(waiter)[0] for waiter in every)
        self._answer(every, [error] * number)
        return number

    async def drain(self) -> None:
        """Wait until every item that was handed over has its result; then stop."""
        self._draining = True
        if self._task is not None:
            self._wake()
            await asyncio.shield(self._task)

    def _wake(self) -> None:
        self._enough.set()
        if self._task is None:
            self._task = self._loop.create_task(self._run())
        elif self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def _run(self) -> None:
        while True:
            if not self._items:
                if self._draining and not self._slicing:
                    return
                self._idle = self._loop.create_future()
                await self._idle
                self._idle = None
                continue
            await self._gather()
            if self._cancelled:
                self._drop()
                if not self._items:
                    continue
            items, waiters = self._take()
            self._last = len(items)
            self._answering = waiters
            began = self._began = self._clock.monotonic()
            try:
                results: Sequence[R | BaseException] = await self._call(items)
                if len(results) != len(items):
                    raise RuntimeError(f"{len(results)} results for {len(items)} items")
            except asyncio.CancelledError:
                if is_being_cancelled():
                    raise
                results = [ConnectionError("what would have answered has ended")] * len(items)
            except Exception as error:  # noqa: BLE001 - it is every waiter's answer
                results = [error] * len(items)
            self._answering = ()
            self._began = None
            self._answer(waiters, results)
            if self._give_up is not None and self._clock.monotonic() - began > _LONG_CALL:
                given_up = self._give_up(results)
                if given_up is not None:
                    items, waiters = self._items, self._waiters
                    self._items, self._waiters = [], []
                    self._answer(waiters, [given_up] * len(items))

    def _drop(self) -> None:
        self._cancelled = 0
        items, waiters = self._items, self._waiters
        self._items, self._waiters = [], []
        at = 0
        for waiter in waiters:
            size, future = _size_and_future(waiter)
            if not future.cancelled():
                self._items += items[at : at + size]
                self._waiters.append(waiter)
            at += size

    @staticmethod
    def _answer(
        waiters: "Sequence[asyncio.Future[R] | _Group[R]]", results: "Sequence[R | BaseException]"
    ) -> None:
        at = 0
        for waiter in waiters:
            if isinstance(waiter, _Group):
                if not waiter.future.done():
                    waiter.future.set_result(results[at : at + waiter.size])
                at += waiter.size
                continue
            result = results[at]
            at += 1
            if waiter.done():
                continue  # cancelled: nobody waits any more
            if isinstance(result, BaseException):
                waiter.set_exception(result)
            else:
                waiter.set_result(result)

    async def _gather(self) -> None:
        """Let the loop go round as long as each round brings more items."""
        if self._linger and len(self._items) < self._max_items and not self._draining:
            await self._clock.sleep(self._linger)
        elif self._dear is not None:
            await self._wait_for_as_many(self._dear)
        seen = 0
        while seen != len(self._items) < self._max_items:
            seen = len(self._items)
            await asyncio.sleep(0)

    async def _wait_for_as_many(self, dear: DearCalls) -> None:
        """Let those come again whom the last call has answered."""
        if len(self._items) >= self._last or self._last < dear.fewest or self._draining:
            return
        self._enough.clear()
        self._wanted = self._last
        await first_of(self._clock.sleep(dear.seconds), self._enough.wait())
        self._wanted = 0

    def _take(self) -> "tuple[list[T], list[asyncio.Future[R] | _Group[R]]]":
        if len(self._items) <= self._max_items:
            items, self._items = self._items, []
            waiters, self._waiters = self._waiters, []
            return items, waiters
        size = taken = 0
        while size < self._max_items:
            waiter = self._waiters[taken]
            size += waiter.size if isinstance(waiter, _Group) else 1
            taken += 1
        items, self._items = self._items[:size], self._items[size:]
        waiters, self._waiters = self._waiters[:taken], self._waiters[taken:]
        return items, waiters


def _size_and_future(
    waiter: "asyncio.Future[R] | _Group[R]",
) -> "tuple[int, asyncio.Future[R] | asyncio.Future[Sequence[R | BaseException]]]":
    return (waiter.size, waiter.future) if isinstance(waiter, _Group) else (1, waiter)
