"""Who gets what: subscriptions and the consumers of one."""

import asyncio
import contextlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest

from molva.messaging import (
    Action,
    Delivery,
    LeaseLostError,
    Message,
    Subscription,
)
from molva.messaging.conformance.harness import Harness, Suite, needs
from molva.messaging.conformance.waiting import (
    PATIENCE,
    bodies,
    eventually,
    numbered,
    running_with,
    take,
)

__all__ = ["Groups"]


class Groups(Suite):
    """Who gets what: subscriptions and the consumers of one."""

    async def test_two_subscriptions_each_get_everything(self, h: Harness) -> None:
        topic = await h.topic()
        first, second = await h.subscription("a"), await h.subscription("b")

        await topic.send_many(numbered(20))

        expected = [b"%d" % n for n in range(1, 21)]
        assert bodies(await take(first, 20)) == expected
        assert bodies(await take(second, 20)) == expected

    async def test_what_was_sent_before_a_consumer_came_waits_for_it(self, h: Harness) -> None:
        topic = await h.topic()
        await (await h.subscription()).close()

        await topic.send_many(numbered(20))

        assert len(await take(await h.subscription(), 20)) == 20

    async def test_a_receive_that_waits_gets_what_is_sent(self, h: Harness) -> None:
        h.let_only_wake_ups_wake()
        topic, subscription = await h.topic(), await h.subscription()

        for number in range(5):
            waiting = asyncio.create_task(subscription.receive(wait=3 * PATIENCE))
            await asyncio.sleep(0.005)
            await topic.send(Message(b"%d" % number))

            async with asyncio.timeout(PATIENCE):
                assert bodies(await waiting) == [b"%d" % number]

    async def test_two_tasks_may_receive_at_once(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        waiting = [asyncio.create_task(subscription.receive(wait=3 * PATIENCE)) for _ in range(2)]
        await asyncio.sleep(0.01)

        await topic.send(Message(b"1"))
        await asyncio.sleep(0.01)
        await topic.send(Message(b"2"))

        async with asyncio.timeout(PATIENCE):
            got = bodies(await waiting[0]) + bodies(await waiting[1])
        assert sorted(got) == [b"1", b"2"]

    @needs("lanes")
    async def test_a_lane_stays_with_its_owner_while_it_works_on_a_message(
        self, h: Harness
    ) -> None:
        h.stop_clock()
        for name in ("a", "b", "c"):
            if await self._keeps_its_lanes(h, name):
                return
        raise AssertionError("the machine stood still for as long as a lane waits, three times")

    async def _keeps_its_lanes(self, h: Harness, name: str) -> bool:
        """Look at one topic; False where a busy machine used up what a lane waits for."""
        topic, owner = await h.topic(name, lanes=2), await h.subscription(topic=name)
        await topic.send_many([Message(b"1", key=h.key_in_lane(lane, 2)) for lane in (0, 1)])
        deliveries = await take(owner, 2)
        loop = asyncio.get_running_loop()
        began = loop.time()
        newcomer = await h.subscription(topic=name)
        await topic.send_many([Message(b"2", key=h.key_in_lane(lane, 2)) for lane in (0, 1)])

        meanwhile = []
        grace = 3 * h.share_interval if h.lane_grace is None else h.lane_grace / 2
        for _ in range(3):
            await h.pass_time(grace / 3)
            meanwhile += await newcomer.receive(wait=0.0)

        def is_late() -> bool:
            return h.lane_grace is not None and loop.time() - began > h.lane_grace * 0.9

        if meanwhile and is_late():
            return False
        try:
            for delivery in deliveries:
                await delivery.ack()
        except LeaseLostError:
            if is_late():
                return False
            raise
        afterwards, _ = await h.share(newcomer, owner)

        assert meanwhile == []
        assert bodies(afterwards) == [b"2"]
        return True

    @needs("earliest")
    async def test_start_earliest_gets_what_was_stored_before(self, h: Harness) -> None:
        topic = await h.topic()
        await topic.send_many(numbered(3))

        subscription = await h.subscription(start="earliest")
        await topic.send(Message(b"4", key="k"))

        assert bodies(await take(subscription, 4)) == [b"1", b"2", b"3", b"4"]

    @needs("latest")
    async def test_start_latest_gets_only_what_is_stored_after(self, h: Harness) -> None:
        topic = await h.topic()
        await topic.send_many(numbered(3))

        subscription = await h.subscription(start="latest")
        await topic.send(Message(b"4", key="k"))

        assert bodies(await subscription.receive(10)) == [b"4"]
        if h.can("exact-stat"):
            stat = await subscription.stat()
            assert stat is not None
            assert stat.pending == 1

    @needs("latest")
    async def test_start_matters_only_where_the_subscription_is_made(self, h: Harness) -> None:
        topic = await h.topic()
        await (await h.subscription()).close()
        await topic.send_many(numbered(3))

        again = await h.subscription(start="latest")

        assert len(await take(again, 3)) == 3

    async def test_consumers_of_one_subscription_share_without_overlap(self, h: Harness) -> None:
        topic = await h.topic()
        consumers = [await h.subscription() for _ in range(3)]
        await h.share(*consumers)
        messages = [Message(b"%d" % n, key=str(n)) for n in range(300)]
        await topic.send_many(messages)
        got: dict[int, list[bytes]] = defaultdict(list)

        def worker(consumer: Subscription) -> Callable[[Delivery], object]:
            async def work(delivery: Delivery) -> None:
                got[id(consumer)].append(delivery.message.id)
                await asyncio.sleep(0.005)  # nobody can do it all

            return work

        async with contextlib.AsyncExitStack() as stack:
            for consumer in consumers:
                await stack.enter_async_context(running_with(consumer, worker(consumer)))
            await eventually(lambda: sum(map(len, got.values())) >= 300)

        assert Counter(itertools.chain(*got.values())) == Counter(m.id for m in messages)
        assert [len(ids) > 20 for ids in got.values()] == [True] * 3

    async def test_nothing_is_lost_while_consumers_come_and_go(self, h: Harness) -> None:
        topic = await h.topic()
        staying = await h.subscription()
        sent: set[bytes] = set()
        handled: set[bytes] = set()
        times: Counter[bytes] = Counter()
        before: list[int] = []
        enough = asyncio.Event()

        async def handle(delivery: Delivery) -> None:
            await asyncio.sleep(0.001)
            handled.add(delivery.message.id)
            times[delivery.message.id] += 1

        async def send() -> None:
            while not enough.is_set():
                batch = [Message(b"1", key=str(n)) for n in range(20)]
                await topic.send_many(batch)
                sent.update(message.id for message in batch)
                await asyncio.sleep(0.01)

        sending = asyncio.create_task(send())
        async with running_with(staying, handle, concurrency=4):
            for _ in range(3):
                visitor = await h.subscription()
                seen = len(handled)
                async with running_with(visitor, handle, concurrency=4):
                    await asyncio.sleep(h.share_interval + 0.05)
                await visitor.close()
                before.append(seen)
                await eventually(lambda: len(handled) > before[-1])
            enough.set()
            await sending
            await eventually(lambda: handled >= sent)

        assert handled == sent
        # What was settled behind an open message comes again where a lane moves; nobody died.
        most = 0 if h.can("by-message") else len(sent)
        h.count_duplicates(times.elements(), most=most, why="coming and going")

    @needs("exact-stat")
    async def test_stat_counts_what_waits(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(5))
        await h.pass_time(h.moment)
        deliveries = await take(subscription, 5)
        await deliveries[0].ack()
        await deliveries[1].reject("bad")
        await h.pass_time(h.settle_interval)

        stat = await subscription.stat()

        assert stat is not None
        assert (stat.pending, stat.dead) == (3, 1)
        if stat.oldest_seconds is not None:  # a broker may not know
            age = h.moment + h.settle_interval
            assert stat.oldest_seconds == pytest.approx(age, abs=h.slack)
        whole = await topic.stat()
        assert whole is not None
        of_each = {name: (s.pending, s.dead) for name, s in whole.subscriptions.items()}
        assert (whole.stored, of_each) == (5, {"s": (3, 1)})

    @needs("exact-stat")
    async def test_stat_of_an_empty_subscription_is_zero(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"%d" % n, key=str(n)) for n in range(50)])
        await subscription.settle([(d, Action.ACK) for d in await take(subscription, 50)])
        await h.pass_time(h.settle_interval)

        stat = await subscription.stat()

        assert stat is not None
        assert (stat.pending, stat.dead, stat.oldest_seconds) == (0, 0, None)
