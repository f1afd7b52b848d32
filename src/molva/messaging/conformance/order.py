"""The order of a lane and of a key."""

import asyncio
import random
from collections import defaultdict

from molva.messaging import (
    Delivery,
    Message,
)
from molva.messaging.conformance.harness import Harness, Suite, needs
from molva.messaging.conformance.waiting import bodies, eventually, numbered, running_with, take

__all__ = ["Order"]


class Order(Suite):
    """The order of a lane and of a key."""

    @needs("in-process")
    async def test_messages_of_one_lane_come_in_the_order_sent(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()

        for message in numbered(30):
            await topic.send(message)

        assert bodies(await take(subscription, 30)) == [b"%d" % n for n in range(1, 31)]

    @needs("in-process")
    async def test_concurrent_sends_of_one_task_keep_their_order(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()

        await asyncio.gather(*(topic.send(message) for message in numbered(2_500)))

        assert bodies(await take(subscription, 2_500)) == [b"%d" % n for n in range(1, 2_501)]

    @needs("lanes")
    async def test_what_was_nacked_together_comes_again_in_order(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(4))
        deliveries = await take(subscription, 3)
        for delivery, part in zip(deliveries, (3, 1, 2), strict=True):
            await delivery.nack(delay=part * h.moment / 3)

        order = []
        for _ in range(4):
            order += bodies(await h.rest(subscription))
            await h.pass_time(h.moment / 3)

        assert order == [b"1", b"2", b"3", b"4"]

    @needs("lanes")
    async def test_a_nacked_message_is_not_overtaken_by_what_follows_it(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(2))
        [delivery] = await take(subscription, 1)
        await delivery.nack(delay=h.moment)
        await topic.send_many([Message(b"3", key="k")])

        meanwhile = await subscription.receive(10, wait=0.0)
        await h.pass_time(h.moment)
        afterwards = await take(subscription, 3)

        assert meanwhile == []
        assert bodies(afterwards) == [b"1", b"2", b"3"]

    @needs("per-key")
    async def test_keys_keep_their_order_over_consumers_of_any_speed(self, h: Harness) -> None:
        topic = await h.topic()
        consumers = [await h.subscription() for _ in range(2)]
        await h.share(*consumers)
        seen: dict[str | None, list[int]] = defaultdict(list)
        rng = random.Random(1)

        async def handle(delivery: Delivery) -> None:
            await asyncio.sleep(rng.random() * 0.004)
            seen[delivery.message.key].append(int(delivery.message.body))

        await topic.send_many([Message(b"%d" % n, key=str(n % 10)) for n in range(200)])
        async with (
            running_with(consumers[0], handle, concurrency=4),
            running_with(consumers[1], handle, concurrency=4),
        ):
            await eventually(lambda: sum(map(len, seen.values())) >= 200)

        assert seen == {str(k): list(range(k, 200, 10)) for k in range(10)}
