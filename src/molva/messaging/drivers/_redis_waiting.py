"""What both kinds of Redis consumers have in common: waiting, and cutting what is long."""

import asyncio
from collections import deque
from collections.abc import Collection, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar, final

from molva._base.clock import Clock
from molva._base.waiting import first_of
from molva.messaging.driver import Action, Outcome, RawDelivery, Settlement
from molva.messaging.errors import UnavailableError
from molva.messaging.message import Message

__all__ = [
    "BATCH",
    "KEEP",
    "Patience",
    "in_background",
    "outcomes_of",
    "parts_of",
    "returns",
    "taken_from",
]

T = TypeVar("T")

# Messages that one call takes or settles. Lua's stack holds 8,000 values, and some have
# two; and nobody else is served meanwhile.
BATCH: Final = 1_000

# Seconds for which messages are kept that a receive was cancelled for, until the next one
# asks; then they are given back. Longer, and others wait for them; shorter, and a consumer
# that is cancelled and asks again gives back and takes the same ones.
KEEP: Final = 0.2

# Messages, and bytes of bodies, that one call stores. Fewer, and calls cost more than
# messages; more, and others wait while the server copies them.
_SEND_MESSAGES: Final = 256
_SEND_BYTES: Final = 1_000_000

# Seconds before a server that was not reached is tried again: the first time, and at most.
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 0.5


@final
class Patience:
    """The time that a receive has, also to get over an outage.

    A server that comes back within it is met again without a word; only one that stays away
    for all of it is an error. What a receive took was confirmed by a reply, so asking again
    loses nothing.
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


def parts_of(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Cut messages into parts that one call stores."""
    start = size = 0
    for place, message in enumerate(messages):
        size += len(message.body)
        if place > start and (size > _SEND_BYTES or place - start == _SEND_MESSAGES):
            yield messages[start:place]
            start, size = place, len(message.body)
    if messages:
        yield messages[start:]


def outcomes_of(number: int, lost: Collection[int], otherwise: Outcome) -> list[Outcome]:
    """Return the outcomes of so many items, of which some are lost."""
    outcomes = [otherwise] * number
    for place in lost:
        outcomes[place] = Outcome.LEASE_LOST
    return outcomes


def returns(raw: Iterable[RawDelivery]) -> list[Settlement]:
    """Return the settlements by which what nobody looked at is given back."""
    return [Settlement(one.token, Action.RETURN, attempt=one.attempt) for one in raw]


def taken_from(ready: deque[T], limit: int) -> list[T]:
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
