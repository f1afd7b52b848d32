"""What a driver brings to the suite, and what its tests are written with."""

import asyncio
import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import ClassVar, Final

import pytest

from molva._base.clock import SYSTEM_CLOCK, Clock, ManualClock
from molva.messaging import (
    Delivery,
    Message,
    Subscription,
    Topic,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging._lanes import lane_of

__all__ = [
    "PATIENCE",
    "Suite",
    "TopicHarness",
    "bodies",
    "collector",
    "copy_of",
    "eventually",
    "key_in_lane",
    "no_handler",
    "numbered",
    "pass_until",
    "running_with",
    "settle",
    "take",
]

# Seconds after which a test that waits for something gives up. Nothing here takes long;
# a busy machine may.
PATIENCE: Final = 20.0


class TopicHarness(ABC):
    """What the suite needs of a driver: URLs of one fresh broker, and its time."""

    # Seconds after which a settled message has made room for another.
    settle_interval: ClassVar[float]
    # Seconds after which lanes have moved to a consumer that joined or whose peer left.
    share_interval: ClassVar[float]

    def __init__(self) -> None:
        self.clock: Clock = SYSTEM_CLOCK
        self._opened: list[Topic | Subscription] = []

    @abstractmethod
    def base_url(self) -> str:
        """Return the URL of one broker, which is empty at first."""

    @abstractmethod
    async def kept(self, topic: str = "t") -> int:
        """Return how many messages of a topic are stored, settled or not."""

    def url(self, topic: str = "t", subscription: str | None = None, **options: object) -> str:
        named = {"topic": topic, **options}
        if subscription is not None:
            named["subscription"] = subscription
        return with_options(self.base_url(), **{name: str(named[name]) for name in named})

    @abstractmethod
    def let_only_wake_ups_wake(self) -> None:
        """Keep consumers opened from now on from looking by themselves, if they do."""

    def use_manual_clock(self) -> ManualClock:
        """Let time stand still for whatever is opened from now on."""
        self.clock = clock = ManualClock()
        return clock

    async def topic(self, topic: str = "t", **options: object) -> Topic:
        opened = await open_topic(self.url(topic, None, **options), clock=self.clock)
        self._opened.append(opened)
        return opened

    async def subscription(
        self, name: str = "s", *, topic: str = "t", max_attempts: int = 5, **options: object
    ) -> Subscription:
        url = self.url(topic, name, **options)
        opened = await open_subscription(url, max_attempts=max_attempts, clock=self.clock)
        self._opened.append(opened)
        return opened

    async def close(self) -> None:
        for opened in self._opened:
            await opened.close()


async def take(subscription: Subscription, number: int) -> list[Delivery]:
    """Receive exactly ``number`` deliveries, however many calls that takes."""
    found: list[Delivery] = []
    async with asyncio.timeout(PATIENCE):
        while len(found) < number:
            found += await subscription.receive(number - len(found), wait=0.5)
    return found


async def eventually(holds: Callable[[], object]) -> None:
    """Wait until ``holds()`` is true."""
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.001)


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.message.body for delivery in deliveries]


def key_in_lane(lane: int, lanes: int) -> str:
    """Return a key whose messages travel in ``lane``."""
    return next(key for key in map(str, itertools.count()) if lane_of(key, b"", lanes) == lane)


def numbered(number: int, *, key: str | None = "k") -> list[Message]:
    return [Message(b"%d" % n, key=key) for n in range(1, number + 1)]


@contextlib.asynccontextmanager
async def running_with(
    subscription: Subscription,
    handler: Callable[[Delivery], object],
    *,
    concurrency: int = 1,
) -> AsyncIterator["asyncio.Task[None]"]:
    """Run a handler for the length of the block. It may be a plain function."""

    async def handle(delivery: Delivery) -> None:
        result = handler(delivery)
        if asyncio.iscoroutine(result):
            await result

    task = asyncio.create_task(subscription.run(handle, concurrency=concurrency))
    try:
        yield task
    finally:
        subscription.stop()
        if not task.done():
            async with asyncio.timeout(PATIENCE):
                await asyncio.wait([task])
        if not task.cancelled():
            task.result()


class Suite:
    """What the parts of the suite share. Subclasses bring the fixture ``harness``."""

    @pytest.fixture
    async def h(self, harness: TopicHarness) -> AsyncIterator[TopicHarness]:
        yield harness
        await harness.close()


async def no_handler(_: Delivery) -> None:
    raise AssertionError("nothing was sent")


def collector(got: list[bytes]) -> Callable[[Delivery], object]:
    def handle(delivery: Delivery) -> None:
        got.append(delivery.message.id)

    return handle


def copy_of(delivery: Delivery, subscription: Subscription) -> Delivery:
    """Return what a consumer holds that does not know yet how its delivery ended."""
    return Delivery(
        delivery.message, delivery.attempt, delivery.token, delivery.stored_at_us, subscription
    )


async def settle(delivery: Delivery, action: str) -> None:
    if action == "ack":
        await delivery.ack()
    elif action == "nack":
        await delivery.nack()
    else:
        await delivery.reject("bad")


async def pass_until(clock: ManualClock, holds: Callable[[], object]) -> None:
    """Move time on in small steps until ``holds()`` is true."""
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.001)
            await clock.pass_time(0.05)
