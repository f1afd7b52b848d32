"""What a subscription keeps: dead letters to replay, what waits to be looked at or purged."""

import asyncio

import pytest

from molva.messaging import (
    InUseError,
    InvalidURLError,
    LeaseLostError,
    Message,
    TopicNotFoundError,
    UnsupportedFeatureError,
)
from molva.messaging.conformance.harness import Harness, Suite, lacks, needs
from molva.messaging.conformance.waiting import bodies, numbered, take

__all__ = ["Keeping"]


class Keeping(Suite):
    """What a subscription keeps: dead letters, what waits, what is removed."""

    @needs("replay")
    async def test_a_replayed_message_comes_to_its_own_subscription_only(self, h: Harness) -> None:
        topic = await h.topic()
        one, two = await h.subscription("one"), await h.subscription("two")
        await topic.send_many(numbered(3))
        deliveries = await take(one, 3)
        await deliveries[1].reject("bad")
        for delivery in (deliveries[0], deliveries[2], *await take(two, 3)):
            await delivery.ack()

        assert await one.replay() == 1

        [again] = await take(one, 1)
        assert (again.message, again.attempt) == (deliveries[1].message, 1)
        assert await h.rest(two) == []
        await again.ack()
        assert await one.dead_letters() == []
        await asyncio.sleep(h.settle_interval)
        if h.can("exact-stat"):
            stat = await topic.stat()
            assert stat is not None
            pending = {name: s.pending for name, s in stat.subscriptions.items()}
            assert pending == {"one": 0, "two": 0}

    @needs("replay")
    async def test_only_the_messages_named_are_replayed(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(3))
        deliveries = await take(subscription, 3)
        for delivery in deliveries:
            await delivery.reject("bad")
        assert await subscription.replay([deliveries[2].message.id]) == 1
        assert bodies(await take(subscription, 1)) == [b"3"]
        assert [d.message.body for d in await subscription.dead_letters()] == [b"1", b"2"]

    async def test_a_dead_letter_says_where_it_waited(self, h: Harness) -> None:
        topic, subscription = await h.topic("orders"), await h.subscription(topic="orders")
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        await delivery.reject("bad")
        [letter] = await topic.dead_letters("s")
        assert letter.origin == f"topic {h.prefix}orders, subscription s"
        assert letter.stored_at_us == delivery.stored_at_us

    @needs("purge")
    async def test_purging_settles_all_that_waits(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"%d" % n, key=f"k{n}") for n in range(20)])
        held = await take(subscription, 5)
        await held[0].ack()
        assert await subscription.purge() in (19, 20)  # an ack behind a gap counts as waiting
        with pytest.raises(LeaseLostError):
            await held[1].ack()
        if h.can("exact-stat"):
            stat = await subscription.stat()
            assert stat is not None
            assert stat.pending == 0
        await topic.send(Message(b"new"))
        assert bodies(await take(subscription, 1)) == [b"new"]

    @needs("purge", "lanes")
    async def test_what_another_consumer_holds_cannot_be_purged(self, h: Harness) -> None:
        subscription, _ = await h.subscription(), await h.subscription()
        with pytest.raises(InUseError, match="hold"):
            await subscription.purge()

    @needs("purge")
    async def test_purging_dead_letters_leaves_what_waits(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(2))
        [first] = await take(subscription, 1)
        await first.reject("bad")
        assert await subscription.purge(dead=True) == 1
        assert await subscription.dead_letters() == []
        assert bodies(await take(subscription, 1)) == [b"2"]

    @needs("peek")
    async def test_peeking_takes_nothing(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(3))
        [first] = await take(subscription, 1)
        seen = await subscription.peek()
        assert sorted((p.message.body, p.state) for p in seen) == [
            (b"1", "held"),
            (b"2", "ready"),
            (b"3", "ready"),
        ]
        assert len(await subscription.peek(2)) == 2
        await first.ack()
        assert bodies(await take(subscription, 2)) == [b"2", b"3"]

    @needs("exact-capacity", "exact-stat")
    async def test_a_removed_subscription_holds_nothing(self, h: Harness) -> None:
        topic = await h.topic(capacity=3)
        used, forgotten = await h.subscription("used"), await h.subscription("forgotten")
        await forgotten.close()
        await topic.send_many(numbered(3))
        for delivery in await take(used, 3):
            await delivery.ack()
        await asyncio.sleep(h.settle_interval)

        assert await topic.remove_subscription("forgotten")

        assert not await topic.remove_subscription("forgotten")
        await topic.send_many(numbered(3))
        stat = await topic.stat()
        assert stat is not None
        assert list(stat.subscriptions) == ["used"]

    @needs("lanes")
    async def test_a_subscription_in_use_cannot_be_removed(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        with pytest.raises(InUseError):
            await topic.remove_subscription("s")
        await topic.send(Message(b"1"))
        assert bodies(await take(subscription, 1)) == [b"1"]

    async def test_a_subscription_that_is_received_from_cannot_be_removed(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        receiving = asyncio.create_task(take(subscription, 1))
        await asyncio.sleep(h.quiet)
        with pytest.raises(InUseError):
            await topic.remove_subscription("s")
        await topic.send(Message(b"1"))
        assert bodies(await receiving) == [b"1"]

    async def test_a_subscription_that_was_removed_is_there_no_more(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await subscription.close()
        assert await topic.remove_subscription("s")
        assert not await topic.remove_subscription("s")
        with pytest.raises(TopicNotFoundError):
            await h.subscription(create="never")

    async def test_an_expired_message_is_a_dead_letter(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(
            [Message(b"old", key="k", ttl=h.moment / 2), Message(b"new", key="k")]
        )
        await h.pass_time(h.moment)
        assert bodies(await h.rest(subscription, least=1)) == [b"new"]
        [letter] = await subscription.dead_letters()
        assert "expired" in letter.reason

    async def test_at_most_once_never_hands_over_twice(self, h: Harness) -> None:
        topic = await h.topic()
        subscription = await h.subscription(delivery="at-most-once")
        await topic.send_many(numbered(3))
        assert len(await take(subscription, 2)) == 2
        again = await h.subscription()
        await subscription.close()
        await asyncio.sleep(h.share_interval)
        assert bodies(await take(again, 1)) == [b"3"]

    @lacks("delay", "priority")
    async def test_what_a_topic_would_not_heed_is_refused(self, h: Harness) -> None:
        topic = await h.topic()
        with pytest.raises(UnsupportedFeatureError) as refused:
            await topic.send(Message(b"", delay=1.0))
        assert refused.value.feature == "delay"
        with pytest.raises(UnsupportedFeatureError, match="priority=3"):
            await topic.send(Message(b"", priority=3))

    @lacks("lifo")
    async def test_an_order_that_topics_have_not_names_none_that_could(self, h: Harness) -> None:
        with pytest.raises(UnsupportedFeatureError, match="lifo"):
            await h.topic(discipline="lifo")

    @lacks("leases")
    async def test_an_option_of_queues_is_named_as_such(self, h: Harness) -> None:
        with pytest.raises(InvalidURLError, match="for a queue"):
            await h.subscription(lease=3)

    async def test_extending_tells_what_is_still_held(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        await delivery.extend()
        await delivery.ack()
        with pytest.raises(LeaseLostError):
            await delivery.extend()
