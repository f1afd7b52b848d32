"""What every queue does: one consumer a message, leases, orders, bounds, dead letters."""

import asyncio
import itertools
import json
import logging
import random

import pytest

from molva.messaging import (
    Action,
    ClosedError,
    Delivery,
    InvalidURLError,
    LeaseLostError,
    Message,
    MessageTooLargeError,
    QueueFullError,
    QueueNotFoundError,
    RejectError,
    SendManyError,
    UnsupportedFeatureError,
)
from molva.messaging.conformance.harness import Harness, Suite
from molva.messaging.conformance.waiting import PATIENCE, bodies, eventually, numbered, take

__all__ = ["Queues"]


class Queues(Suite):
    """What every queue does."""

    # Basics -----------------------------------------------------------------------------

    async def test_every_field_of_a_message_comes_back(self, h: Harness) -> None:
        queue = await h.queue(discipline="priority")
        odd = {"a/../b": "\\ '\" \x00\x7f", "é": "日本", "": ""}
        message = Message(b"\xff\x00", key="k y", headers=odd, priority=9, ttl=60.0)

        await queue.send(message)

        [delivery] = await take(queue, 1)
        assert delivery.message == message
        assert (delivery.attempt, delivery.redelivered) == (1, False)

    @pytest.mark.parametrize("size", [0, 1, 256 * 1024])
    async def test_a_body_of_any_size_comes_back(self, h: Harness, size: int) -> None:
        queue = await h.queue()
        body = random.Random(size).randbytes(size)
        await queue.send(Message(body))
        assert bodies(await take(queue, 1)) == [body]

    async def test_a_body_that_is_too_large_fails_alone(self, h: Harness) -> None:
        queue = await h.queue()
        queue._max_body_bytes = 10

        with pytest.raises(SendManyError) as failed:
            await queue.send_many([Message(b"a"), Message(bytes(11)), Message(b"b")])

        assert list(failed.value.failures) == [1]
        assert isinstance(failed.value.failures[1], MessageTooLargeError)
        assert bodies(await take(queue, 2)) == [b"a", b"b"]

    async def test_json_that_looks_like_an_envelope_is_left_alone(self, h: Harness) -> None:
        queue = await h.queue()
        body = json.dumps({"id": "x", "headers": {}, "body": "eA==", "Message": "y"}).encode()
        await queue.send(Message(body))
        assert bodies(await take(queue, 1)) == [body]

    async def test_queues_of_odd_names_do_not_mix(self, h: Harness) -> None:
        names = ["a", "a'b", 'a"; DROP TABLE queue', "a b/..%", "日本"]
        queues = [await h.queue(name) for name in names]
        for queue, name in zip(queues, names, strict=True):
            await queue.send(Message(name.encode()))
        for queue, name in zip(queues, names, strict=True):
            assert bodies(await h.rest(queue)) == [name.encode()]

    async def test_a_missing_queue_is_an_error_where_none_may_be_made(self, h: Harness) -> None:
        await h.queue("other")
        with pytest.raises(QueueNotFoundError, match="missing"):
            await h.queue("missing", create="never")

    async def test_use_after_close_is_an_error_and_closing_twice_is_none(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.close()
        await queue.close()
        with pytest.raises(ClosedError):
            await queue.send(Message(b""))
        with pytest.raises(ClosedError):
            await queue.receive()
        with pytest.raises(ClosedError):
            await queue.stat()

    async def test_an_unknown_option_suggests_the_nearest(self, h: Harness) -> None:
        with pytest.raises(InvalidURLError, match=r"'leese'; did you mean 'lease'\?"):
            await h.queue(leese=3)

    async def test_an_option_of_topics_is_named_as_such(self, h: Harness) -> None:
        with pytest.raises(InvalidURLError, match="for a topic"):
            await h.queue(lanes=3)

    async def test_what_is_missing_is_refused_at_open_and_who_has_it_is_named(
        self, h: Harness
    ) -> None:
        with pytest.raises(UnsupportedFeatureError) as refused:
            await h.queue(require="node")
        assert refused.value.feature == "node"
        with pytest.raises(UnsupportedFeatureError):
            await h.queue(require="per-key,leases")
        with pytest.raises(InvalidURLError, match=r"did you mean 'priority'\?"):
            await h.queue(require="prioriti")

    async def test_two_opens_share_no_options(self, h: Harness) -> None:
        bounded, unbounded = await h.queue(capacity=1), await h.queue()
        await unbounded.send_many(numbered(3))
        with pytest.raises(QueueFullError):
            await bounded.send(Message(b"4"))
        assert unbounded.capacity is None

    async def test_messages_outlive_those_who_sent_them(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send_many(numbered(3))
        await queue.close()
        assert bodies(await take(await h.queue(), 3)) == [b"1", b"2", b"3"]

    # One consumer a message -------------------------------------------------------------

    async def test_consumers_share_the_messages(self, h: Harness) -> None:
        queues = [await h.queue() for _ in range(3)]
        await queues[0].send_many(numbered(30))
        found = [bodies(await take(queue, 10)) for queue in queues]
        assert sorted(int(b) for part in found for b in part) == list(range(1, 31))

    async def test_many_receivers_of_one_queue_each_get_their_own(self, h: Harness) -> None:
        queue = await h.queue()
        waiting = [asyncio.create_task(queue.receive(1, wait=PATIENCE)) for _ in range(64)]
        await asyncio.sleep(0.01)

        await queue.send_many(numbered(64))

        found = [bodies(deliveries) for deliveries in await asyncio.gather(*waiting)]
        assert sorted(int(b) for [b] in found) == list(range(1, 65))

    async def test_an_idle_consumer_gets_a_message_within_50_ms(self, h: Harness) -> None:
        sender, queue = await h.queue(), await h.queue()
        loop = asyncio.get_running_loop()
        quickest = 1.0
        for _ in range(5):  # the machine may be busy; the driver may not sleep
            waiting = asyncio.create_task(queue.receive(1, wait=PATIENCE))
            await asyncio.sleep(0.1)
            began = loop.time()
            await sender.send(Message(b"1"))
            [delivery] = await waiting
            quickest = min(quickest, loop.time() - began)
            await delivery.ack()
        assert quickest < 0.05

    async def test_receives_cancelled_a_thousand_times_lose_nothing(self, h: Harness) -> None:
        queue = await h.queue()
        dice = random.Random(7)
        got: list[bytes] = []

        async def receive() -> None:
            for delivery in await queue.receive(3, wait=PATIENCE):
                got.append(delivery.message.body)
                await delivery.ack()

        for number in range(1_000):
            task = asyncio.create_task(receive())
            if number % 5 == 0:
                await queue.send(Message(b"%d" % number))
            for _ in range(dice.randrange(6)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        while deliveries := await queue.receive(100, wait=0.2):
            for delivery in deliveries:
                got.append(delivery.message.body)
                await delivery.ack()

        # One that was cancelled between its handing over and its ack comes again.
        stat = await queue.stat()
        assert stat is not None
        held = stat.pending
        await queue.close()
        rest = bodies(await h.rest(await h.queue()))
        assert held == len(rest)
        assert {int(b) for b in (*got, *rest)} == set(range(0, 1_000, 5))

    # Leases -----------------------------------------------------------------------------

    async def test_an_acknowledged_message_never_comes_again(self, h: Harness) -> None:
        h.stop_clock()
        queue = await h.queue()
        await queue.send(Message(b"1"))
        [delivery] = await take(queue, 1)
        await delivery.ack()
        await h.pass_time(3 * h.lease)
        await queue.close()
        assert await h.rest(await h.queue()) == []

    async def test_a_message_whose_lease_ran_out_comes_to_another(self, h: Harness) -> None:
        h.stop_clock()
        slow, quick = await h.queue(), await h.queue()
        await slow.send(Message(b"1"))
        await take(slow, 1)
        await h.pass_time(h.lease - 0.1)
        assert await h.rest(quick) == []
        await h.pass_time(0.2)
        [again] = await take(quick, 1)
        assert (again.message.body, again.attempt) == (b"1", 2)

    @pytest.mark.parametrize("action", list(Action))
    async def test_a_late_settlement_cannot_touch_what_another_holds(
        self, h: Harness, action: Action
    ) -> None:
        h.stop_clock()
        slow, quick = await h.queue(), await h.queue()
        await slow.send(Message(b"1"))
        [late] = await take(slow, 1)
        await h.pass_lease()
        [timely] = await take(quick, 1)

        with pytest.raises(LeaseLostError):
            await slow.settle([(late, action)])

        assert late.lost
        assert await quick.dead_letters() == []
        await timely.ack()
        stat = await quick.stat()
        assert stat is not None
        assert (stat.pending, slow.received.lost) == (0, 1)

    async def test_each_of_a_batch_has_its_own_result(self, h: Harness) -> None:
        h.stop_clock()
        queue, other = await h.queue(), await h.queue()
        await queue.send_many(numbered(2))
        [stale] = await take(queue, 1)
        await h.pass_lease()
        [again, second] = await take(other, 2)
        await other.settle([(again, Action.NACK)])
        [fresh] = await take(queue, 1)

        with pytest.raises(LeaseLostError):
            await queue.settle([(stale, Action.ACK), (fresh, Action.ACK)])

        await second.ack()
        stat = await queue.stat()
        assert stat is not None
        assert stat.pending == 0

    async def test_extending_keeps_a_message_beyond_three_leases(self, h: Harness) -> None:
        h.stop_clock()
        queue, other = await h.queue(), await h.queue()
        await queue.send(Message(b"1"))
        [delivery] = await take(queue, 1)
        for _ in range(5):
            await h.pass_time(0.8 * h.lease)
            await delivery.extend()
            assert await h.rest(other) == []
        await delivery.ack()
        with pytest.raises(LeaseLostError):
            await delivery.extend()

    async def test_run_keeps_leases_while_a_handler_works(self, h: Harness) -> None:
        h.stop_clock()
        queue, other = await h.queue(), await h.queue()
        await queue.send(Message(b"1"))
        ended = asyncio.Event()
        began = asyncio.Event()

        async def handle(_: Delivery) -> None:
            began.set()
            await ended.wait()
            queue.stop()

        running = asyncio.create_task(queue.run(handle))
        await began.wait()
        for _ in range(40):
            await h.pass_time(h.lease / 10)
            await asyncio.sleep(0.002)
        assert await h.rest(other) == []
        ended.set()
        await running
        stat = await other.stat()
        assert stat is not None
        assert stat.pending == 0

    @pytest.mark.parametrize(
        ("first", "then"), list(itertools.permutations(["ack", "nack", "reject"], 2))
    )
    async def test_the_first_settlement_wins(self, h: Harness, first: str, then: str) -> None:
        queue = await h.queue()
        await queue.send(Message(b"1"))
        [delivery] = await take(queue, 1)
        for action in (first, then, first):
            await (delivery.reject("bad") if action == "reject" else getattr(delivery, action)())
        stat = await queue.stat()
        assert stat is not None
        assert (stat.pending, stat.dead) == {"ack": (0, 0), "nack": (1, 0), "reject": (0, 1)}[first]

    async def test_only_what_was_not_acknowledged_comes_again_in_any_order_of_acks(
        self, h: Harness
    ) -> None:
        h.stop_clock()
        dice = random.Random(3)
        orders = list(itertools.permutations(range(4)))
        orders += [tuple(dice.sample(range(8), 8)) for _ in range(20)]
        for number, order in enumerate(orders):
            doomed = await h.queue(f"q{number}")
            await doomed.send_many(numbered(len(order)))
            deliveries = await take(doomed, len(order))
            acked = order[: dice.randrange(len(order) + 1)]
            for place in acked:
                await deliveries[place].ack()
            # Gone without a word: what it holds comes again when its leases have run out.
            await h.pass_lease()
            heir = await h.queue(f"q{number}")
            again = [int(b) - 1 for b in bodies(await h.rest(heir))]
            assert again == sorted(set(order) - set(acked)), order
            await doomed.close()
            await heir.close()

    # Giving back ------------------------------------------------------------------------

    async def test_a_nacked_message_comes_again_as_the_next_attempt(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send(Message(b"1"))
        for attempt in (1, 2, 3):
            [delivery] = await take(queue, 1)
            assert delivery.attempt == attempt
            await delivery.nack()

    async def test_a_nacked_message_waits_for_its_delay(self, h: Harness) -> None:
        h.stop_clock()
        queue = await h.queue()
        await queue.send(Message(b"1"))
        [delivery] = await take(queue, 1)
        await delivery.nack(delay=5.0)
        await h.pass_time(4.9)
        assert await h.rest(queue) == []
        await h.pass_time(0.2)
        assert bodies(await take(queue, 1)) == [b"1"]

    async def test_a_closed_consumer_gives_back_at_once_and_no_attempt_is_counted(
        self, h: Harness
    ) -> None:
        leaving, staying = await h.queue(), await h.queue()
        await leaving.send_many(numbered(3))
        await take(leaving, 3)
        waiting = asyncio.create_task(take(staying, 3))
        async with asyncio.timeout(1.0):
            await leaving.close()
            again = await waiting
        assert bodies(again) == [b"1", b"2", b"3"]
        assert {delivery.attempt for delivery in again} == {1}

    async def test_the_last_attempt_is_followed_by_a_dead_letter(self, h: Harness) -> None:
        h.stop_clock()
        queue = await h.queue(max_attempts=3)
        await queue.send_many(numbered(3))
        handled: list[bytes] = []

        async def handle(delivery: Delivery) -> None:
            handled.append(delivery.message.body)
            if delivery.message.body == b"2":
                raise OSError("poison")

        running = asyncio.create_task(queue.run(handle))
        await h.pass_until(lambda: queue.received.rejected == 1)
        queue.stop()
        await running

        [letter] = await queue.dead_letters()
        assert (letter.message.body, letter.attempts) == (b"2", 3)
        assert letter.reason == "OSError: poison"
        assert letter.origin == "queue q"
        assert sorted(handled) == [b"1", b"2", b"2", b"2", b"3"]

    async def test_a_message_that_always_takes_its_consumer_along_becomes_a_dead_letter(
        self, h: Harness
    ) -> None:
        h.stop_clock()
        queue = await h.queue(max_attempts=3)
        await queue.send(Message(b"1"))
        for _ in range(3):
            await take(queue, 1)
            await h.pass_lease()
        assert await h.rest(queue) == []
        [letter] = await queue.dead_letters()
        assert letter.attempts == 3
        assert "never settled" in letter.reason

    async def test_a_handler_can_reject_at_once(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send(Message(b"?"))

        async def handle(_: Delivery) -> None:
            queue.stop()
            raise RejectError("cannot be decoded")

        await queue.run(handle)
        [letter] = await queue.dead_letters()
        assert (letter.reason, letter.attempts) == ("cannot be decoded", 1)

    async def test_a_replayed_dead_letter_is_tried_anew(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send_many(numbered(3))
        deliveries = await take(queue, 3)
        for delivery in deliveries:
            await delivery.reject("bad")

        assert await queue.replay([deliveries[1].message.id]) == 1

        [again] = await take(queue, 1)
        assert (again.message, again.attempt) == (deliveries[1].message, 1)
        assert [d.message.body for d in await queue.dead_letters()] == [b"1", b"3"]
        assert await queue.replay(limit=1) == 1
        assert await queue.replay() == 1
        assert await queue.dead_letters() == []
        assert bodies(await take(queue, 2)) == [b"1", b"3"]

    async def test_an_expired_message_becomes_a_dead_letter(self, h: Harness) -> None:
        h.stop_clock()
        queue = await h.queue()
        await queue.send_many([Message(b"old", ttl=5.0), Message(b"new", ttl=50.0)])
        await h.pass_time(6.0)
        assert bodies(await h.rest(queue)) == [b"new"]
        [letter] = await queue.dead_letters()
        assert letter.message.body == b"old"
        assert "expired" in letter.reason
        assert queue.received.expired == 1

    # Order ------------------------------------------------------------------------------

    async def test_fifo_is_the_order_of_sending(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send_many(numbered(100))
        assert bodies(await take(queue, 100)) == [b"%d" % n for n in range(1, 101)]

    async def test_lifo_is_the_newest_first(self, h: Harness) -> None:
        queue = await h.queue(discipline="lifo")
        await queue.send_many(numbered(5))
        assert bodies(await take(queue, 2)) == [b"5", b"4"]
        await queue.send(Message(b"6"))
        assert bodies(await take(queue, 4)) == [b"6", b"3", b"2", b"1"]

    async def test_priority_is_the_highest_first_then_the_oldest(self, h: Harness) -> None:
        queue = await h.queue(discipline="priority")
        await queue.send_many(
            [Message(b"%d%c" % (p, c), priority=p) for c in b"ab" for p in (0, 9, 5)]
        )
        assert bodies(await take(queue, 6)) == [b"9a", b"9b", b"5a", b"5b", b"0a", b"0b"]

    async def test_random_is_no_order_and_leaves_nothing_out(self, h: Harness) -> None:
        queue = await h.queue(discipline="random")
        await queue.send_many(numbered(100))
        found = [int(b) for b in bodies(await take(queue, 100))]
        assert sorted(found) == list(range(1, 101))
        assert found != sorted(found)
        # Position and value are unrelated: |correlation| of 100 pairs beyond 0.5 is a
        # chance of less than one in a million.
        mean = 50.5
        covariance = sum((i - mean) * (v - mean) for i, v in enumerate(found, 1))
        assert abs(covariance / sum((v - mean) ** 2 for v in found)) < 0.5

    async def test_a_discipline_cannot_change(self, h: Harness) -> None:
        await h.queue(discipline="lifo")
        await h.queue()
        with pytest.raises(InvalidURLError, match="lifo"):
            await h.queue(discipline="fifo")

    async def test_a_priority_nobody_would_heed_is_refused(self, h: Harness) -> None:
        queue = await h.queue()
        with pytest.raises(UnsupportedFeatureError, match="discipline=priority"):
            await queue.send(Message(b"", priority=1))

    async def test_aggregated_takes_several_as_one(self, h: Harness) -> None:
        queue = await h.queue(discipline="aggregated", aggregate=4)
        await queue.send_many(numbered(6))
        [delivery] = await queue.receive(1, wait=0.0)
        assert [m.body for m in delivery.messages] == [b"1", b"2", b"3", b"4"]
        await delivery.ack()
        [rest] = await queue.receive(1, wait=0.0)
        await rest.nack()
        # What failed together is tried alone.
        alone = await queue.receive(5, wait=0.0)
        assert [[m.body for m in d.messages] for d in alone] == [[b"5"], [b"6"]]

    async def test_a_delayed_message_lets_others_pass(self, h: Harness) -> None:
        h.stop_clock()
        queue = await h.queue()
        await queue.send_many([Message(b"later", delay=5.0), Message(b"now")])
        assert bodies(await h.rest(queue)) == [b"now"]
        stat = await queue.stat()
        assert stat is not None
        assert (stat.delayed, stat.held) == (1, 1)
        await h.pass_time(5.1)
        assert bodies(await h.rest(queue)) == [b"later"]

    async def test_a_waiting_consumer_wakes_for_a_delayed_message(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send(Message(b"1", delay=0.2))
        async with asyncio.timeout(1.0):
            assert bodies(await queue.receive(1, wait=5.0)) == [b"1"]

    async def test_the_order_of_a_key_is_kept_across_failures(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send_many([Message(b"%d" % n, key=f"k{n % 5}") for n in range(50)])
        dice = random.Random(5)
        done: dict[str | None, list[int]] = {}

        async def handle(delivery: Delivery) -> None:
            await asyncio.sleep(dice.random() / 500)
            if delivery.attempt == 1 and delivery.message.body in (b"7", b"23"):
                raise OSError("once")
            done.setdefault(delivery.message.key, []).append(int(delivery.message.body))
            if sum(map(len, done.values())) == 50:
                queue.stop()

        async with asyncio.timeout(PATIENCE):
            await queue.run(handle, concurrency=8)
        assert all(part == sorted(part) for part in done.values())

    # Bounds -----------------------------------------------------------------------------

    async def test_the_capacity_holds_to_the_message(self, h: Harness) -> None:
        queue, other = await h.queue(capacity=5), await h.queue(capacity=5)
        await queue.send_many(numbered(3))
        with pytest.raises(SendManyError) as failed:
            await other.send_many(numbered(4))
        assert list(failed.value.failures) == [2, 3]
        [delivery] = await take(queue, 1)  # held is not gone
        with pytest.raises(QueueFullError):
            await other.send(Message(b"x"))
        await delivery.ack()
        await other.send(Message(b"x"))
        assert other.counters.refused_full == 3

    async def test_drop_newest_drops_and_counts(self, h: Harness) -> None:
        queue = await h.queue(capacity=2, overflow="drop-newest")
        await queue.send_many(numbered(3))
        await queue.send(Message(b"4"))
        assert (queue.counters.stored, queue.counters.dropped) == (2, 2)
        assert bodies(await h.rest(queue)) == [b"1", b"2"]

    async def test_drop_oldest_makes_room_and_never_takes_what_is_held(self, h: Harness) -> None:
        queue = await h.queue(capacity=3, overflow="drop-oldest")
        await queue.send_many(numbered(3))
        [held] = await take(queue, 1)
        await queue.send_many([Message(b"4"), Message(b"5")])
        await held.ack()
        assert bodies(await h.rest(queue)) == [b"4", b"5"]
        stat = await queue.stat()
        assert stat is not None
        assert stat.dropped == 2

    async def test_wait_lets_the_sender_wait_for_room(self, h: Harness) -> None:
        queue = await h.queue(capacity=2, overflow="wait")
        sending = asyncio.create_task(queue.send_many(numbered(5)))
        found: list[bytes] = []
        async with asyncio.timeout(PATIENCE):
            while len(found) < 5:
                for delivery in await queue.receive(1, wait=1.0):
                    found.append(delivery.message.body)
                    stat = await queue.stat()
                    assert stat is not None
                    assert stat.pending <= 2
                    await delivery.ack()
            await sending
        assert found == [b"1", b"2", b"3", b"4", b"5"]

    async def test_closing_ends_the_wait_for_room(self, h: Harness) -> None:
        queue = await h.queue(capacity=1, overflow="wait")
        await queue.send(Message(b"1"))
        sending = asyncio.create_task(queue.send(Message(b"2")))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(1.0):
            await queue.close()
        with pytest.raises(QueueFullError):
            await sending

    # At most once -----------------------------------------------------------------------

    async def test_at_most_once_never_hands_over_twice(self, h: Harness) -> None:
        h.stop_clock()
        queue = await h.queue(delivery="at-most-once")
        await queue.send_many(numbered(3))
        deliveries = await queue.receive(2, wait=0.0)
        assert all(delivery.settled for delivery in deliveries)
        await h.pass_time(3 * h.lease)
        assert bodies(await h.rest(await h.queue())) == [b"3"]

    # Looking ----------------------------------------------------------------------------

    async def test_stat_and_peek_tell_what_is_ready_held_and_delayed(self, h: Harness) -> None:
        h.stop_clock()
        queue = await h.queue()
        await queue.send_many([*numbered(3), Message(b"later", delay=60.0)])
        [first] = await take(queue, 1)
        await h.pass_time(2.0)
        stat = await queue.stat()
        assert stat is not None
        assert (stat.pending, stat.ready, stat.held, stat.delayed) == (4, 2, 1, 1)
        assert stat.oldest_seconds == pytest.approx(2.0)
        assert [(p.message.body, p.state) for p in await queue.peek()] == [
            (b"2", "ready"),
            (b"3", "ready"),
            (b"1", "held"),
            (b"later", "delayed"),
        ]
        await h.pass_time(h.lease)  # its lease is over, whether or not anybody looked
        stat = await queue.stat()
        assert stat is not None
        assert (stat.ready, stat.held) == (3, 0)
        await (await h.queue()).receive(9, wait=0.0)
        with pytest.raises(LeaseLostError):
            await first.ack()

    async def test_purging_leaves_nothing_and_fences_what_is_held(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send_many(numbered(4))
        held, bad = await take(queue, 2)
        await bad.reject("bad")
        assert await queue.purge() == 3
        with pytest.raises(LeaseLostError):
            await held.ack()
        stat = await queue.stat()
        assert stat is not None
        assert (stat.pending, stat.dead) == (0, 1)
        assert await queue.purge(dead=True) == 1
        await queue.send(Message(b"new"))
        assert bodies(await take(queue, 1)) == [b"new"]

    # Handlers ---------------------------------------------------------------------------

    async def test_stopping_gives_back_what_was_taken_ahead(self, h: Harness) -> None:
        queue, other = await h.queue(prefetch=10), await h.queue()
        await queue.send_many(numbered(10))
        began = asyncio.Event()

        async def handle(_: Delivery) -> None:
            began.set()
            await asyncio.sleep(0.05)

        running = asyncio.create_task(queue.run(handle, concurrency=2))
        await began.wait()
        queue.stop()
        async with asyncio.timeout(1.0):
            await running
            again = await take(other, 8)
        assert {delivery.attempt for delivery in again} == {1}

    async def test_a_drain_that_takes_too_long_gives_back(self, h: Harness) -> None:
        queue, other = await h.queue(), await h.queue()
        await queue.send(Message(b"1"))
        began = asyncio.Event()

        async def hang(_: Delivery) -> None:
            began.set()
            await asyncio.Event().wait()

        running = asyncio.create_task(queue.run(hang))
        await began.wait()
        queue.stop(timeout=0.05)
        async with asyncio.timeout(2.0):
            await running
            assert bodies(await take(other, 1)) == [b"1"]

    async def test_a_handler_that_hangs_fails_after_its_timeout(self, h: Harness) -> None:
        queue = await h.queue(max_attempts=1)
        await queue.send(Message(b"1"))

        async def hang(_: Delivery) -> None:
            queue.stop()
            await asyncio.Event().wait()

        async with asyncio.timeout(PATIENCE):
            await queue.run(hang, timeout=0.05)
        [letter] = await queue.dead_letters()
        assert "longer than 0.05 s" in letter.reason

    async def test_a_handler_that_blocks_the_loop_is_named(
        self, h: Harness, caplog: pytest.LogCaptureFixture
    ) -> None:
        import time

        queue = await h.queue()
        await queue.send(Message(b"1"))

        async def dreamy(_: Delivery) -> None:
            queue.stop()
            time.sleep(1.7)  # what no handler should do

        with caplog.at_level(logging.WARNING, "molva.messaging"):
            await queue.run(dreamy)
        assert any("dreamy has blocked" in r.getMessage() for r in caplog.records)

    async def test_a_handler_that_returns_late_does_no_harm(
        self, h: Harness, caplog: pytest.LogCaptureFixture
    ) -> None:
        h.stop_clock()
        queue, other = await h.queue(), await h.queue()
        await queue.send(Message(b"1"))
        [late] = await take(queue, 1)
        await h.pass_lease()
        [timely] = await take(other, 1)
        with pytest.raises(LeaseLostError):
            await late.ack()
        await timely.ack()
        await eventually(lambda: other.received.acked == 1)

    async def test_iterating_hands_over_one_after_the_other(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send_many(numbered(20))
        found = []
        async for delivery in queue:
            found.append(delivery.message.body)
            await delivery.ack()
            if len(found) == 20:
                queue.stop()
        assert found == [b"%d" % n for n in range(1, 21)]
