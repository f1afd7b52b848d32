"""What tests are written with: sending, receiving, waiting, running a handler for a while."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeVar

from molva.messaging._lanes import lane_of
from molva.messaging.delivery import Delivery
from molva.messaging.errors import BrokenBrokerError, UnavailableError
from molva.messaging.message import Message
from molva.messaging.queue import Queue
from molva.messaging.subscription import Subscription

__all__ = [
    "PATIENCE",
    "bodies",
    "collector",
    "copy_of",
    "eventually",
    "key_in_lane",
    "no_handler",
    "numbered",
    "patiently",
    "running_with",
    "settle",
    "take",
]

# Seconds after which a test that waits for something gives up. Nothing here takes long;
# a busy machine may.
PATIENCE: Final = 60.0

# Seconds within which a failure is none of a machine that is busy.
_QUICK: Final = 1.0

_Answer = TypeVar("_Answer")


def numbered(number: int, *, key: str | None = "k") -> list[Message]:
    """Return messages whose bodies are 1, 2, 3 …, of one key."""
    return [Message(b"%d" % n, key=key) for n in range(1, number + 1)]


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    """Return what was delivered."""
    return [delivery.message.body for delivery in deliveries]


async def take(consumer: Subscription | Queue, number: int) -> list[Delivery]:
    """Receive exactly ``number`` deliveries, however many calls that takes."""
    found: list[Delivery] = []
    async with asyncio.timeout(PATIENCE):
        while len(found) < number:
            left = number - len(found)
            found += await patiently(lambda: consumer.receive(left, wait=0.5))  # noqa: B023
    return found


async def eventually(holds: Callable[[], object]) -> None:
    """Wait until ``holds()`` is true."""
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.001)


async def patiently(ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
    """Ask a broker; again where a busy machine's server had no time to answer, and none else.

    That takes as long as a driver waits for it. A driver that fails sooner is wrong.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while True:
        began = loop.time()
        try:
            return await ask()
        except BrokenBrokerError:
            raise
        except UnavailableError:
            if loop.time() - began < _QUICK or loop.time() > deadline:
                raise
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def running_with(
    consumer: Subscription | Queue,
    handler: Callable[[Delivery], object],
    *,
    concurrency: int = 1,
) -> AsyncIterator["asyncio.Task[None]"]:
    """Run a handler for the length of the block. It may be a plain function."""

    async def handle(delivery: Delivery) -> None:
        result = handler(delivery)
        if asyncio.iscoroutine(result):
            await result

    task = asyncio.create_task(consumer.run(handle, concurrency=concurrency))
    try:
        yield task
    finally:
        consumer.stop()
        if not task.done():
            async with asyncio.timeout(PATIENCE):
                await asyncio.wait([task])
        if not task.cancelled():
            task.result()


def key_in_lane(lane: int, lanes: int) -> str:
    """Return a key whose messages travel in ``lane``."""
    return next(key for key in map(str, itertools.count()) if lane_of(key, b"", lanes) == lane)


async def no_handler(_: Delivery) -> None:
    """Fail: nothing was sent."""
    raise AssertionError("nothing was sent")


def collector(got: list[bytes]) -> Callable[[Delivery], object]:
    """Return a handler that notes the ids of what it gets."""

    def handle(delivery: Delivery) -> None:
        got.append(delivery.message.id)

    return handle


def copy_of(delivery: Delivery, consumer: Subscription | Queue) -> Delivery:
    """Return what a consumer holds that does not know yet how its delivery ended."""
    return Delivery(
        delivery.message, delivery.attempt, delivery.token, delivery.stored_at_us, consumer
    )


async def settle(delivery: Delivery, action: str) -> None:
    """Settle by the name of the action."""
    if action == "ack":
        await delivery.ack()
    elif action == "nack":
        await delivery.nack()
    else:
        await delivery.reject("bad")
