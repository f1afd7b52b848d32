"""Ack, nack, reject: what comes again, what never does."""

import asyncio
import itertools

import pytest

from molva.messaging import (
    Action,
    Delivery,
    LeaseLostError,
    Message,
    Subscription,
    Topic,
)
from molva.messaging.conformance.harness import Harness, Suite, needs
from molva.messaging.conformance.waiting import PATIENCE, bodies, copy_of, numbered, settle, take

__all__ = ["Settling"]


class Settling(Suite):
    """Ack, nack, reject: what comes again, what never does."""

    async def test_what_was_acked_stays_settled_after_reopening(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(3))
        for delivery in await take(subscription, 3):
            await delivery.ack()
        await subscription.close()

        again = await h.subscription()
        await topic.send(Message(b"4", key="k"))

        assert bodies(await h.rest(again, least=1)) == [b"4"]

    async def test_what_was_not_acked_comes_again_after_closing(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(3))
        deliveries = await take(subscription, 3)
        await deliveries[0].ack()
        await subscription.close()

        again = await h.subscription()

        assert h.placed(bodies(await take(again, 2))) == [b"2", b"3"]

    async def test_an_open_message_is_handed_over_once(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(3))

        first, second = await take(subscription, 3), await h.rest(subscription)

        assert bodies(first) == [b"1", b"2", b"3"]
        assert second == []

    @needs("lanes")
    async def test_acks_in_any_order_lose_nothing_across_consumers(self, h: Harness) -> None:
        orders = list(itertools.permutations(range(4)))
        for order in orders if h.virtual else orders[::6]:
            await self._acked_across_consumers(h, order)

    async def _acked_across_consumers(self, h: Harness, order: tuple[int, ...]) -> None:
        name = "".join(map(str, order))
        topic = await h.topic(name, lanes=2)
        sent = [
            Message(b"%d" % n, key=h.key_in_lane(lane, 2)) for n, lane in enumerate((0, 0, 1, 0))
        ]
        await (await h.subscription(topic=name)).close()
        await topic.send_many(sent)
        left = {message.id for message in sent}

        for place in order:
            consumer = await h.subscription(topic=name)
            deliveries = {d.message.id: d for d in await h.rest(consumer)}
            assert deliveries.keys() >= left
            await deliveries[sent[place].id].ack()
            left.discard(sent[place].id)
            # Others of its lane may still be in front of it, and then it comes again.
            for settled in deliveries.keys() - left - {sent[place].id}:
                await deliveries[settled].ack()
            await consumer.close()

        assert await h.rest(await h.subscription(topic=name)) == []

    @needs("lanes")
    async def test_acks_in_any_order_within_one_consumer_lose_nothing(self, h: Harness) -> None:
        orders = list(itertools.permutations(range(5), 3))
        for name, order in enumerate(orders if h.virtual else orders[::10]):
            topic = await h.topic(str(name), lanes=1)
            subscription = await h.subscription(topic=str(name))
            await topic.send_many(numbered(5))
            deliveries = await take(subscription, 5)

            for place in order:
                await deliveries[place].ack()
            await subscription.close()

            again = bodies(await h.rest(await h.subscription(topic=str(name))))
            # Only what stands behind the first unsettled one may come twice.
            first = next(n for n in range(6) if n not in order)
            assert again == [b"%d" % n for n in range(first + 1, 6)]

    async def test_a_nacked_message_comes_again_with_its_attempt_counted(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription(max_attempts=10)
        await topic.send(Message(b"1"))
        attempts = []

        for _ in range(4):
            [delivery] = await take(subscription, 1)
            attempts.append(delivery.attempt)
            await delivery.nack()

        assert attempts == [1, 2, 3, 4]

    async def test_a_delayed_nack_does_not_come_early(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        began = h.clock.monotonic()
        await delivery.nack(delay=h.moment)

        await h.pass_time(h.moment * (0.99 if h.virtual else 0.5))
        early = await subscription.receive(1, wait=0.0)
        # Unless the machine stood still until it was due.
        assert not early or h.clock.monotonic() - began >= h.moment
        await h.pass_time(h.moment * (0.02 if h.virtual else 0.5))

        assert bodies(early or await take(subscription, 1)) == [b"1"]

    async def test_a_delayed_nack_wakes_a_receive_that_waits(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        await delivery.nack(delay=0.05)

        async with asyncio.timeout(PATIENCE):
            [again] = await subscription.receive(wait=3 * PATIENCE)

        assert again.attempt == 2

    async def test_a_nack_wakes_another_task_that_waits(self, h: Harness) -> None:
        h.let_only_wake_ups_wake()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        waiting = asyncio.create_task(subscription.receive(wait=3 * PATIENCE))
        await asyncio.sleep(0.02)

        await delivery.nack()

        async with asyncio.timeout(PATIENCE):
            [again] = await waiting
        assert again.attempt == 2

    async def test_nacked_messages_respect_the_limit_of_a_receive(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(5))
        first = await take(subscription, 5)
        await subscription.settle([(delivery, Action.NACK) for delivery in first])

        again: list[list[bytes]] = []
        while sum(map(len, again)) < 5:
            again.append(bodies(await subscription.receive(2)))

        assert max(map(len, again)) == 2
        assert h.placed([body for part in again for body in part]) == [b"1", b"2", b"3", b"4", b"5"]

    async def test_a_rejected_message_is_a_dead_letter_with_its_reason(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        message = Message(b"1\xff", key="k\0", headers={"h": "λ"})
        await topic.send(message)
        [delivery] = await take(subscription, 1)
        await delivery.nack()
        [delivery] = await take(subscription, 1)

        await delivery.reject("unreadable: 🎈")

        [dead] = await subscription.dead_letters()
        assert (dead.message, dead.reason, dead.attempts) == (message, "unreadable: 🎈", 2)
        assert abs(dead.died_at_us - h.clock.now_us()) < 60_000_000
        assert await h.rest(subscription) == []

    async def test_a_dead_letter_stays_after_reopening(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(2))
        first, second = await take(subscription, 2)
        await first.reject("bad")
        await second.ack()
        await subscription.close()

        again = await h.subscription()

        assert await h.rest(again) == []
        assert [d.message.body for d in await again.dead_letters()] == [b"1"]

    async def test_dead_letters_are_kept_for_each_subscription(self, h: Harness) -> None:
        topic = await h.topic()
        first, second = await h.subscription("a"), await h.subscription("b")
        await topic.send(Message(b"1"))

        [delivery] = await take(first, 1)
        await delivery.reject("bad")

        assert len(await first.dead_letters()) == 1
        assert await second.dead_letters() == []
        assert bodies(await take(second, 1)) == [b"1"]

    async def test_dead_letters_come_oldest_first_up_to_a_limit(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(4))
        for delivery in await take(subscription, 4):
            await delivery.reject("bad")

        dead = await subscription.dead_letters(3)

        assert [letter.message.body for letter in dead] == [b"1", b"2", b"3"]

    async def test_the_last_attempt_that_is_nacked_is_a_dead_letter(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription(max_attempts=2)
        await topic.send_many(numbered(2))
        await (await take(subscription, 2))[0].nack()
        [again] = await take(subscription, 1)

        await again.nack()

        [dead] = await subscription.dead_letters()
        assert (dead.message.body, dead.attempts) == (b"1", 2)
        assert "the last one" in dead.reason
        assert await h.rest(subscription) == []

    @pytest.mark.parametrize("first", ["ack", "nack", "reject"])
    @pytest.mark.parametrize("second", ["ack", "nack", "reject"])
    async def test_the_first_settlement_wins(self, h: Harness, first: str, second: str) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)

        for action in (first, second):
            await settle(delivery, action)

        again = await subscription.receive(wait=0.0)
        dead = await subscription.dead_letters()
        assert (len(again), len(dead)) == (int(first == "nack"), int(first == "reject"))

    async def test_the_first_of_two_settlements_at_once_wins(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)

        await asyncio.gather(delivery.reject("bad"), delivery.ack())
        await subscription.settle([(delivery, Action.ACK), (delivery, Action.NACK)])

        assert len(await subscription.dead_letters()) == 1

    async def test_a_late_ack_cannot_settle_a_later_hand_over(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        late = copy_of(delivery, subscription)
        await delivery.nack()
        [again] = await take(subscription, 1)

        with pytest.raises(LeaseLostError):
            await late.ack()

        await again.nack()
        assert bodies(await take(subscription, 1)) == [b"1"]

    @needs("lanes")
    @pytest.mark.parametrize("action", ["ack", "nack", "reject"])
    async def test_a_token_is_stale_once_its_lane_has_moved(self, h: Harness, action: str) -> None:
        h.stop_clock()
        topic, slow = await h.topic(lanes=2), await h.subscription()
        late = await self._nacked_in_both_lanes(h, topic, slow)
        quick = await h.subscription()
        [taken_over], _ = await h.share(quick, slow)

        with pytest.raises(LeaseLostError):
            await settle(late[taken_over.message.id], action)

        assert await quick.dead_letters() == []
        await taken_over.nack()
        assert bodies(await h.rest(quick, least=1)) == [b"1"]

    @needs("lanes")
    async def test_a_token_stays_stale_when_its_lane_comes_back(self, h: Harness) -> None:
        h.stop_clock()
        topic, slow = await h.topic(lanes=2), await h.subscription()
        late = await self._nacked_in_both_lanes(h, topic, slow)
        quick = await h.subscription()
        [taken_over], _ = await h.share(quick, slow)
        await quick.close()
        [got] = await h.share(slow)
        again = {delivery.message.id: delivery for delivery in got}[taken_over.message.id]

        with pytest.raises(LeaseLostError):
            await late[taken_over.message.id].ack()

        await again.nack()
        assert bodies(await h.rest(slow, least=1)) == [b"1"]

    async def _nacked_in_both_lanes(
        self, h: Harness, topic: Topic, consumer: Subscription
    ) -> dict[bytes, Delivery]:
        """Let both lanes be free to move; return tokens from before, by message."""
        await topic.send_many([Message(b"1", key=h.key_in_lane(lane, 2)) for lane in (0, 1)])
        deliveries = await take(consumer, 2)
        late = {d.message.id: copy_of(d, consumer) for d in deliveries}
        for delivery in deliveries:
            await delivery.nack()
        return late

    async def test_stale_ones_do_not_hold_up_the_others_of_a_batch(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(3))
        first, second, third = await take(subscription, 3)
        stale = copy_of(second, subscription)
        await second.nack()

        with pytest.raises(LeaseLostError) as caught:
            await subscription.settle([(d, Action.ACK) for d in (first, stale, third)])

        assert caught.value.message_id == second.message.id
        await subscription.close()
        again = bodies(await h.rest(await h.subscription()))
        # Of a lane, what was settled behind an open one comes again too.
        assert again == [b"2"] if h.can("by-message") else again[0] == b"2"
