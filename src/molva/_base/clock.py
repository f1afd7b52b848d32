"""Time, passed in wherever it is needed, so that the whole path runs in a simulation.

Two kinds of time are kept apart on purpose. ``now_us`` is the wall clock: it is written
down, shown to people, and may jump when somebody sets it. ``monotonic`` never jumps and
means nothing outside its process: every wait, lease and deadline uses it.
"""

import asyncio
import heapq
import itertools
import time
from typing import Final, Protocol, final

__all__ = ["SYSTEM_CLOCK", "Clock", "ManualClock", "SystemClock"]


class Clock(Protocol):
    """Where a part takes its time from."""

    def now_us(self) -> int:
        """Return the wall clock: whole microseconds since 1970-01-01 UTC."""
        ...

    def monotonic(self) -> float:
        """Return seconds since an arbitrary point; never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait ``seconds`` of this clock's time."""
        ...


@final
class SystemClock:
    """The machine's own clock."""

    def now_us(self) -> int:
        """Return the wall clock: whole microseconds since 1970-01-01 UTC."""
        return time.time_ns() // 1_000

    def monotonic(self) -> float:
        """Return seconds since an arbitrary point; never goes back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait ``seconds``."""
        await asyncio.sleep(seconds)


SYSTEM_CLOCK: Final = SystemClock()


@final
class ManualClock:
    """A clock that stands still until ``pass_time`` moves it. For tests and simulations."""

    def __init__(self, now_us: int = 1_767_225_600_000_000) -> None:
        self._start_us = now_us
        self._elapsed = 0.0
        # (due, tie-breaker, future): sleepers wake in the order in which they are due,
        # and those due at one instant in the order in which they went to sleep.
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def now_us(self) -> int:
        """Return the wall clock: whole microseconds since 1970-01-01 UTC."""
        return self._start_us + round(self._elapsed * 1_000_000)

    def monotonic(self) -> float:
        """Return the seconds passed so far."""
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        """Wait until ``pass_time`` has moved this clock by ``seconds``."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed + seconds, next(self._order), future))
        await future

    async def pass_time(self, seconds: float) -> None:
        """Move on by ``seconds``, waking each sleeper at its own moment on the way."""
        # Whoever is about to go to sleep does so at the time before.
        await asyncio.sleep(0)
        end = self._elapsed + seconds
        while self._sleepers and self._sleepers[0][0] <= end:
            due, _, future = heapq.heappop(self._sleepers)
            self._elapsed = max(self._elapsed, due)
            if not future.done():
                future.set_result(None)
            # Let the sleeper run: it may go to sleep again before `end`.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        self._elapsed = end
        await asyncio.sleep(0)
