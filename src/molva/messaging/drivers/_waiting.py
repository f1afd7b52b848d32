"""What drivers of servers have in common: patience, and work behind the scenes."""

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterable
from typing import Any, Final, TypeVar, final

from molva._base.clock import Clock
from molva._base.waiting import first_of
from molva.messaging.driver import Action, RawDelivery, Settlement
from molva.messaging.errors import UnavailableError

__all__ = ["Patience", "in_background", "returns", "taken_from"]

T = TypeVar("T")

# Seconds before a server that was not reached is tried again: the first time, and at most.
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 0.5


@final
class Patience:
    """The time that a receive has, also to get over an outage.

    A server that comes back within it is met again without a word; only one that stays away
    for all of it is an error.
    """

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._deadline = clock.monotonic() + seconds
        self._pause = _FIRST_PAUSE

    def left(self) -> float:
        """Return the seconds that are left; less than 0 where none are."""
        return self._deadline - self._clock.monotonic()

    async def after(self, error: UnavailableError, woken: asyncio.Event) -> None:
        """Wait a little after an error that may pass; raise it where no time is left."""
        if self.left() <= self._pause:
            raise error
        await first_of(self._clock.sleep(self._pause), woken.wait())
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)


def returns(raw: Iterable[RawDelivery]) -> list[Settlement]:
    """Return the settlements by which what nobody looked at is given back."""
    return [Settlement(one.token, Action.RETURN, attempt=one.attempt) for one in raw]


def taken_from(ready: "deque[T]", limit: int) -> list[T]:
    """Take up to ``limit`` from the left."""
    if len(ready) <= limit:
        found = list(ready)
        ready.clear()
        return found
    return [ready.popleft() for _ in range(limit)]


def in_background(work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    """Run a task to its end whether or not anybody waits for it."""
    task = asyncio.ensure_future(work)
    _background.add(task)
    task.add_done_callback(_forget)
    return task


# The loop itself keeps no strong reference to its tasks.
_background: Final[set[asyncio.Task[Any]]] = set()


def _forget(task: "asyncio.Task[Any]") -> None:
    _background.discard(task)
    if not task.cancelled():
        task.exception()  # whoever waited was told; if nobody did, nobody is interested
