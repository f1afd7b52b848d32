"""A bound on what waits, for brokers that have none of their own.

Kafka takes whatever is sent. A service that accepts more than its workers count would fill
the broker's disks, and its answers would promise what comes hours later; so each HTTP
process looks every second how much waits, and refuses while it is too much. That is not
exact: what is accepted between two looks comes on top, some tens of thousands of ratings
at most. Where the broker bounds what waits itself nothing of this runs, nor where it cannot
tell how much does (RabbitMQ): then nothing bounds it, which is said when a process starts.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, final

from molva._base.clock import Clock
from molva.messaging import Topic

__all__ = ["Admission", "bound_of", "tells"]

# Seconds between two looks. Longer, and more comes on top; shorter, and the broker is
# asked for its positions more often than anything changes.
_INTERVAL: Final = 1.0


def tells(topic: Topic) -> bool:
    """Return whether the broker can say how much waits in the topic."""
    return topic.capabilities.stat != "none"


def bound_of(topic: Topic, capacity: int | None) -> int | None:
    """Return how many may wait here: ``capacity``, unless the topic bounds it, or nobody can."""
    return capacity if topic.capacity is None and tells(topic) else None


@final
class Admission:
    """Says whether one more rating may wait.

    Args:
        capacity: How many may wait; None where nobody bounds them here.
        topic: Tells the broker's topic; None as long as it was never reached.
        pending: How many wait now; None where that is unknown.
        clock: Where time comes from.
    """

    def __init__(
        self,
        capacity: int | None,
        topic: Callable[[], Topic | None],
        pending: Callable[[], Awaitable[int | None]],
        clock: Clock,
    ) -> None:
        self._capacity = capacity
        self._topic = topic
        self._pending = pending
        self._clock = clock
        self.is_full = False

    @property
    def capacity(self) -> int | None:
        """How many may wait; None where the topic bounds that itself, or nobody can."""
        topic = self._topic()
        return self._capacity if topic is None else bound_of(topic, self._capacity)

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Keep ``is_full`` true to what waits, for the block."""
        if self.capacity is None:
            yield
            return
        watching = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait((watching,))

    async def _watch(self) -> None:
        # Asked anew each time: a topic that was away may turn out to bound what waits itself.
        while (capacity := self.capacity) is not None:
            pending = await self._pending()
            # Unknown, the broker cannot be reached: then it refuses by itself what it
            # cannot take, and our last look stays what we know.
            if pending is not None:
                self.is_full = pending >= capacity
            await self._clock.sleep(_INTERVAL)
        self.is_full = False
