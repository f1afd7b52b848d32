"""Capacity, what a consumer holds, what is deleted."""

import asyncio
import time

import pytest

from molva.messaging import (
    Action,
    Delivery,
    Message,
    QueueFullError,
    SendManyError,
)
from molva.messaging.conformance.harness import Harness, Suite, lacks, needs
from molva.messaging.conformance.waiting import PATIENCE, bodies, numbered, take

__all__ = ["Flow"]


class Flow(Suite):
    """Capacity, what a consumer holds, what is deleted."""

    @needs("exact-capacity")
    async def test_a_full_topic_refuses_exactly_what_is_beyond_its_capacity(
        self, h: Harness
    ) -> None:
        topic, subscription = await h.topic(capacity=3), await h.subscription()
        for message in numbered(3):
            await topic.send(message)

        with pytest.raises(QueueFullError) as caught:
            await topic.send(Message(b"4"))

        assert caught.value.capacity == 3
        assert topic.counters.refused_full == 1
        assert topic.counters.stored == 3
        assert len(await h.rest(subscription, least=3)) == 3

    @needs("capacity")
    @lacks("exact-capacity")
    async def test_a_full_topic_refuses_what_is_beyond_its_capacity_soon(self, h: Harness) -> None:
        topic, subscription = await h.topic(capacity=10), await h.subscription()

        with pytest.raises(SendManyError) as caught:
            await topic.send_many(numbered(20 + h.capacity_slack))

        assert {type(error) for error in caught.value.failures.values()} == {QueueFullError}
        stored = len(await h.rest(subscription))
        assert 10 <= stored <= 10 + h.capacity_slack
        assert len(caught.value.failures) == 20 + h.capacity_slack - stored

    @needs("exact-capacity")
    async def test_a_batch_that_fits_in_part_is_stored_in_part(self, h: Harness) -> None:
        topic, subscription = await h.topic(capacity=3), await h.subscription()

        with pytest.raises(SendManyError) as caught:
            await topic.send_many(numbered(5))

        assert list(caught.value.failures) == [3, 4]
        assert {type(error) for error in caught.value.failures.values()} == {QueueFullError}
        assert bodies(await h.rest(subscription, least=3)) == [b"1", b"2", b"3"]

    @needs("exact-capacity")
    async def test_settling_makes_room_again(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(capacity=3), await h.subscription()
        for _ in range(4):
            await topic.send_many(numbered(3))
            first, second, third = await h.rest(subscription, least=3)
            await first.ack()
            await second.reject("bad")
            await third.ack()
            await h.pass_time(h.settle_interval)

        with pytest.raises(SendManyError) as caught:
            await topic.send_many(numbered(4))

        assert list(caught.value.failures) == [3]

    @needs("exact-capacity")
    async def test_the_slowest_subscription_decides_what_fits(self, h: Harness) -> None:
        h.stop_clock()
        topic = await h.topic(capacity=3)
        quick, slow = await h.subscription("quick"), await h.subscription("slow")
        await topic.send_many(numbered(3))
        await quick.settle([(d, Action.ACK) for d in await h.rest(quick)])
        await (await h.rest(slow))[0].ack()
        await h.pass_time(h.settle_interval)

        await topic.send(Message(b"4"))
        with pytest.raises(QueueFullError):
            await topic.send(Message(b"5"))

    @needs("lanes")
    async def test_a_consumer_never_holds_more_than_max_open(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription(max_open=3)
        await topic.send_many([Message(b"%d" % n, key=str(n)) for n in range(20)])

        first: list[Delivery] = []
        async with asyncio.timeout(PATIENCE):
            while len(first) < 3:
                first += await subscription.receive(10)
        none = await h.rest(subscription)
        await first[0].ack()
        one = await h.rest(subscription)

        assert (len(first), len(none), len(one)) == (3, 0, 1)

    @needs("lanes")
    async def test_nacked_messages_count_towards_max_open(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription(max_open=3)
        await topic.send_many([Message(b"%d" % n, key=str(n)) for n in range(20)])
        await subscription.settle([(d, Action.NACK) for d in await subscription.receive(10)])

        held = await subscription.receive(2, wait=0.0)
        held += await h.rest(subscription)

        assert len(held) == 3
        assert await h.rest(subscription) == []

    @needs("lanes")
    async def test_settling_lets_a_receive_go_on_that_waits_for_room(self, h: Harness) -> None:
        h.let_only_wake_ups_wake()
        topic, subscription = await h.topic(), await h.subscription(max_open=1)
        await topic.send_many(numbered(2))
        [first] = await subscription.receive(10)
        waiting = asyncio.create_task(subscription.receive(10, wait=3 * PATIENCE))
        await asyncio.sleep(0.02)

        await first.ack()

        async with asyncio.timeout(PATIENCE):
            assert bodies(await waiting) == [b"2"]

    async def test_a_waiting_receive_burns_no_processor(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(2))
        first, _ = await take(subscription, 2)
        await first.nack(delay=60.0)
        await subscription.receive(10, wait=0.3)  # what there is to do at the beginning

        began = time.process_time()
        assert await subscription.receive(10, wait=0.5) == []

        # Looping without rest would burn the half second, or what others leave of it.
        assert time.process_time() - began < 0.1

    @needs("deletes")
    async def test_what_everybody_has_settled_is_deleted(self, h: Harness) -> None:
        h.stop_clock()
        h.let_deleting_hurry()
        topic = await h.topic()
        subscriptions = [await h.subscription("a"), await h.subscription("b")]
        for _ in range(30):
            await topic.send_many(numbered(100))
            for subscription in subscriptions:
                deliveries = await take(subscription, 100)
                await subscription.settle([(d, Action.ACK) for d in deliveries])
            await h.pass_time(h.delete_interval)

        assert await h.kept() <= 500

    async def test_nothing_is_deleted_that_a_slow_subscription_needs(self, h: Harness) -> None:
        h.stop_clock()
        h.let_deleting_hurry()
        topic = await h.topic()
        quick, slow = await h.subscription("quick"), await h.subscription("slow")
        sent = 0
        got: list[int] = []
        for turn in range(30):
            await topic.send_many([Message(b"%d" % n, key="k") for n in range(sent, sent + 50)])
            sent += 50
            await quick.settle([(d, Action.ACK) for d in await take(quick, 50)])
            deliveries = await take(slow, min(10 + turn, sent - len(got)))
            got += [int(d.message.body) for d in deliveries]
            # The last of them stays open, and what is open must stay as well.
            await slow.settle([(d, Action.ACK) for d in deliveries])
            await h.pass_time(h.delete_interval)

        # Settled as they come: with leases, what is held for long comes again.
        while deliveries := await slow.receive(1_000, wait=h.quiet):
            got += [int(d.message.body) for d in deliveries]
            await slow.settle([(d, Action.ACK) for d in deliveries])
        # A driver may have taken more than was asked for, and given it back.
        assert (got if h.can("in-place") else sorted(got)) == list(range(sent))

    async def test_an_open_message_outlives_what_was_settled_around_it(self, h: Harness) -> None:
        h.stop_clock()
        h.let_deleting_hurry()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"%d" % n, key=str(n)) for n in range(100)])
        held, *others = await h.rest(subscription)
        await subscription.settle([(d, Action.ACK) for d in others])
        for _ in range(10):
            await h.pass_time(h.delete_interval)
            await held.extend()
            await topic.send_many([Message(b"later", key=str(n)) for n in range(100)])
            later = await take(subscription, 100)
            await subscription.settle([(d, Action.ACK) for d in later])

        await held.nack()

        assert bodies(await h.rest(subscription, least=1)) == [held.message.body]

    @needs("deletes", "earliest", "exact-stat")
    async def test_a_subscription_made_while_messages_are_deleted_misses_none(
        self, h: Harness
    ) -> None:
        h.stop_clock()
        topic, first = await h.topic(), await h.subscription("first")
        await topic.send_many(numbered(1_000))
        while deliveries := await h.rest(first):
            await first.settle([(d, Action.ACK) for d in deliveries])
        await h.pass_time(h.delete_interval)
        await topic.send(Message(b"1001", key="k"))

        second = await h.subscription("second", start="earliest")
        stat = await second.stat()
        for n in range(1_002, 1_030):
            await topic.send(Message(b"%d" % n, key="k"))
        got = [int(body) for body in bodies(await h.rest(second))]

        assert stat is not None
        assert got == list(range(1_030 - 28 - stat.pending, 1_030))

    async def test_a_message_sent_after_all_were_deleted_arrives(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription()
        for turn in range(5):
            await topic.send(Message(b"%d" % turn))
            [delivery] = await h.rest(subscription, least=1)
            assert delivery.message.body == b"%d" % turn
            await delivery.ack()
            await h.pass_time(h.delete_interval)
            if turn % 2:
                await topic.close()
                await subscription.close()
                topic, subscription = await h.topic(), await h.subscription()

    async def test_more_cannot_wait_in_this_process_than_it_can_hold(self, h: Harness) -> None:
        topic = await h.topic()
        sends = [asyncio.create_task(topic.send(Message(b"1"))) for _ in range(10_500)]

        outcomes = await asyncio.gather(*sends, return_exceptions=True)

        refused = [outcome for outcome in outcomes if outcome is not None]
        assert {type(outcome) for outcome in refused} == {QueueFullError}
        assert len(refused) == topic.counters.refused_full == 500
        assert topic.counters.stored == 10_000
