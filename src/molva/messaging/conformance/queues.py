"""What every queue does: one consumer a message, leases, orders, bounds, dead letters."""

import asyncio
import itertools
import json
import random

import pytest

from molva.messaging import (
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
    open_queue,
)
from molva.messaging.conformance.harness import Harness, Suite, needs
from molva.messaging.conformance.waiting import PATIENCE, bodies, numbered, take
from molva.messaging.driver import ALL_FEATURES

__all__ = ["Queues"]


class Queues(Suite):
    """What every queue does."""

    # Basics -----------------------------------------------------------------------------

    @needs("priority")
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
            assert bodies(await h.rest(queue, least=1)) == [name.encode()]

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
        for option in h.options("queue"):
            wrong = option[:-1] + "q" + option[-1]
            with pytest.raises(InvalidURLError, match=rf"'{wrong}'; did you mean '{option}'\?"):
                await open_queue(h.queue_url("q", **{wrong: 3}))

    async def test_an_option_of_topics_is_named_as_such(self, h: Harness) -> None:
        with pytest.raises(InvalidURLError, match="for a topic"):
            await h.queue(lanes=3)

    async def test_what_is_missing_is_refused_at_open_and_who_has_it_is_named(
        self, h: Harness
    ) -> None:
        for feature in sorted(ALL_FEATURES.keys() - h.capabilities("queue").features):
            with pytest.raises(UnsupportedFeatureError) as refused:
                await h.queue(require=f"fifo,{feature}")
            assert refused.value.feature == feature
        with pytest.raises(InvalidURLError, match=r"did you mean 'priority'\?"):
            await h.queue(require="prioriti")

    @needs("capacity")
    async def test_two_opens_share_no_options(self, h: Harness) -> None:
        bounded, unbounded = await h.queue(capacity=1), await h.queue()
        await unbounded.send_many(numbered(3, key=None))
        with pytest.raises(QueueFullError):
            await bounded.send(Message(b"4"))
        assert unbounded.capacity is None

    async def test_messages_outlive_those_who_sent_them(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send_many(numbered(3, key=None))
        await queue.close()
        assert bodies(await take(await h.queue(), 3)) == [b"1", b"2", b"3"]

    # One consumer a message -------------------------------------------------------------

    async def test_consumers_share_the_messages(self, h: Harness) -> None:
        queues = [await h.queue() for _ in range(3)]
        await queues[0].send_many(numbered(30, key=None))
        found = [bodies(await take(queue, 10)) for queue in queues]
        assert sorted(int(b) for part in found for b in part) == list(range(1, 31))

    async def test_many_receivers_of_one_queue_each_get_their_own(self, h: Harness) -> None:
        queue = await h.queue()
        waiting = [asyncio.create_task(queue.receive(1, wait=PATIENCE)) for _ in range(64)]
        await asyncio.sleep(0.01)

        await queue.send_many(numbered(64, key=None))

        found = [bodies(deliveries) for deliveries in await asyncio.gather(*waiting)]
        assert sorted(int(b) for [b] in found) == list(range(1, 65))

    # Leases -----------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("first", "then"), list(itertools.permutations(["ack", "nack", "reject"], 2))
    )
    async def test_the_first_settlement_wins(self, h: Harness, first: str, then: str) -> None:
        queue = await h.queue()
        await queue.send(Message(b"1"))
        [delivery] = await take(queue, 1)
        for action in (first, then, first):
            await (delivery.reject("bad") if action == "reject" else getattr(delivery, action)())
        again, dead = await h.rest(queue), await queue.dead_letters()
        assert (len(again), len(dead)) == (int(first == "nack"), int(first == "reject"))

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
        began = h.clock.monotonic()
        await delivery.nack(delay=h.moment)
        await h.pass_time(h.moment * (0.99 if h.virtual else 0.3))
        early = await queue.receive(1, wait=0.0)
        # Unless the machine stood still until it was due.
        assert not early or h.clock.monotonic() - began >= h.moment
        await h.pass_time(h.moment * 0.02)
        assert bodies(early or await take(queue, 1)) == [b"1"]

    async def test_the_last_attempt_is_followed_by_a_dead_letter(self, h: Harness) -> None:
        h.stop_clock()
        queue = await h.queue(max_attempts=3)
        await queue.send_many(numbered(3, key=None))
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
        assert letter.origin == f"queue {h.prefix}q"
        assert sorted(handled) == [b"1", b"2", b"2", b"2", b"3"]

    @needs("leases", "exact-attempts")
    async def test_a_message_that_always_takes_its_consumer_along_becomes_a_dead_letter(
        self, h: Harness
    ) -> None:
        h.stop_clock()
        queue = await h.queue(max_attempts=3)
        await queue.send(Message(b"1"))
        # Twice more, alone.
        for _ in range(5):
            await take(queue, 1)
            await h.pass_lease()
        assert await h.rest(queue) == []
        [letter] = await queue.dead_letters()
        assert letter.attempts == 5
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

    @needs("replay")
    async def test_a_replayed_dead_letter_is_tried_anew(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send_many(numbered(3, key=None))
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
        assert h.placed(bodies(await take(queue, 2))) == [b"1", b"3"]

    async def test_an_expired_message_becomes_a_dead_letter(self, h: Harness) -> None:
        h.stop_clock()
        queue = await h.queue()
        await queue.send_many(
            [Message(b"old", ttl=h.moment / 2), Message(b"new", ttl=h.moment * 9)]
        )
        await h.pass_time(h.moment)
        assert bodies(await h.rest(queue, least=1)) == [b"new"]
        [letter] = await queue.dead_letters()
        assert letter.message.body == b"old"
        assert "expired" in letter.reason
        assert queue.received.expired == 1

    # Order ------------------------------------------------------------------------------

    @needs("fifo")
    async def test_fifo_is_the_order_of_sending(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send_many(numbered(100, key=None))
        assert bodies(await take(queue, 100)) == [b"%d" % n for n in range(1, 101)]

    @needs("lifo")
    async def test_lifo_is_the_newest_first(self, h: Harness) -> None:
        queue = await h.queue(discipline="lifo")
        await queue.send_many(numbered(5, key=None))
        assert bodies(await take(queue, 2)) == [b"5", b"4"]
        await queue.send(Message(b"6"))
        assert bodies(await take(queue, 4)) == [b"6", b"3", b"2", b"1"]

    @needs("priority")
    async def test_priority_is_the_highest_first_then_the_oldest(self, h: Harness) -> None:
        queue = await h.queue(discipline="priority")
        await queue.send_many(
            [Message(b"%d%c" % (p, c), priority=p) for c in b"ab" for p in (0, 9, 5)]
        )
        assert bodies(await take(queue, 6)) == [b"9a", b"9b", b"5a", b"5b", b"0a", b"0b"]

    @needs("random")
    async def test_random_is_no_order_and_leaves_nothing_out(self, h: Harness) -> None:
        queue = await h.queue(discipline="random")
        await queue.send_many(numbered(100, key=None))
        found = [int(b) for b in bodies(await take(queue, 100))]
        assert sorted(found) == list(range(1, 101))
        assert found != sorted(found)
        # Position and value are unrelated: |correlation| of 100 pairs beyond 0.5 is a
        # chance of less than one in a million.
        mean = 50.5
        covariance = sum((i - mean) * (v - mean) for i, v in enumerate(found, 1))
        assert abs(covariance / sum((v - mean) ** 2 for v in found)) < 0.5

    @needs("lifo")
    async def test_a_discipline_cannot_change(self, h: Harness) -> None:
        await h.queue(discipline="lifo")
        await h.queue()
        with pytest.raises(InvalidURLError, match="lifo"):
            await h.queue(discipline="fifo")

    async def test_a_priority_nobody_would_heed_is_refused(self, h: Harness) -> None:
        queue = await h.queue()
        with pytest.raises(UnsupportedFeatureError, match="discipline=priority"):
            await queue.send(Message(b"", priority=1))

    @needs("aggregated")
    async def test_aggregated_takes_several_as_one(self, h: Harness) -> None:
        queue = await h.queue(discipline="aggregated", aggregate=4)
        await queue.send_many(numbered(6, key=None))
        [delivery] = await take(queue, 1)
        assert [m.body for m in delivery.messages] == [b"1", b"2", b"3", b"4"]
        await delivery.ack()
        [rest] = await take(queue, 1)
        await rest.nack()
        # What failed together is tried alone.
        alone = await take(queue, 2)
        assert sorted([m.body for m in d.messages] for d in alone) == [[b"5"], [b"6"]]

    @needs("delay")
    async def test_a_delayed_message_lets_others_pass(self, h: Harness) -> None:
        h.stop_clock()
        queue = await h.queue()
        began = h.clock.monotonic()
        await queue.send_many([Message(b"later", delay=h.moment), Message(b"now")])
        assert bodies(await take(queue, 1)) == [b"now"]
        early = await queue.receive(1, wait=0.0)
        # Unless the machine stood still until it was due.
        assert not early or h.clock.monotonic() - began >= h.moment
        if h.can("exact-stat"):
            stat = await queue.stat()
            assert stat is not None
            if h.clock.monotonic() - began < h.moment:
                assert (stat.delayed, stat.held) == (1, 1)
        await h.pass_time(h.moment * 1.02)
        assert bodies(early or await take(queue, 1)) == [b"later"]

    @needs("delay")
    async def test_a_waiting_consumer_wakes_for_a_delayed_message(self, h: Harness) -> None:
        h.let_only_wake_ups_wake()
        queue = await h.queue()
        await queue.send(Message(b"1", delay=0.2))
        async with asyncio.timeout(PATIENCE):
            assert bodies(await queue.receive(1, wait=3 * PATIENCE)) == [b"1"]

    @needs("in-process")
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

    @needs("exact-capacity")
    async def test_the_capacity_holds_to_the_message(self, h: Harness) -> None:
        queue, other = await h.queue(capacity=5), await h.queue(capacity=5)
        await queue.send_many(numbered(3, key=None))
        with pytest.raises(SendManyError) as failed:
            await other.send_many(numbered(4, key=None))
        assert list(failed.value.failures) == [2, 3]
        [delivery] = await take(queue, 1)  # held is not gone
        with pytest.raises(QueueFullError):
            await other.send(Message(b"x"))
        await delivery.ack()
        await other.send(Message(b"x"))
        assert other.counters.refused_full == 3

    @needs("exact-capacity", "drop-newest")
    async def test_drop_newest_drops_and_counts(self, h: Harness) -> None:
        queue = await h.queue(capacity=2, overflow="drop-newest")
        await queue.send_many(numbered(3, key=None))
        await queue.send(Message(b"4"))
        assert (queue.counters.stored, queue.counters.dropped) == (2, 2)
        assert bodies(await h.rest(queue, least=2)) == [b"1", b"2"]

    @needs("exact-capacity", "drop-oldest")
    async def test_drop_oldest_makes_room_and_never_takes_what_is_held(self, h: Harness) -> None:
        queue = await h.queue(capacity=3, overflow="drop-oldest")
        await queue.send_many(numbered(3, key=None))
        [held] = await take(queue, 1)
        await queue.send_many([Message(b"4"), Message(b"5")])
        await held.ack()
        assert bodies(await h.rest(queue, least=2)) == [b"4", b"5"]
        stat = await queue.stat()
        assert stat is not None
        assert stat.dropped == 2

    @needs("exact-capacity", "wait", "exact-stat")
    async def test_wait_lets_the_sender_wait_for_room(self, h: Harness) -> None:
        queue = await h.queue(capacity=2, overflow="wait")
        sending = asyncio.create_task(queue.send_many(numbered(5, key=None)))
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

    @needs("exact-capacity", "wait")
    async def test_closing_ends_the_wait_for_room(self, h: Harness) -> None:
        queue = await h.queue(capacity=1, overflow="wait")
        await queue.send(Message(b"1"))
        sending = asyncio.create_task(queue.send(Message(b"2")))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(PATIENCE):
            await queue.close()
        with pytest.raises(QueueFullError):
            await sending

    # At most once -----------------------------------------------------------------------

    async def test_at_most_once_never_hands_over_twice(self, h: Harness) -> None:
        h.shorten_leases()
        h.stop_clock()
        queue = await h.queue(delivery="at-most-once")
        await queue.send_many(numbered(3, key=None))
        deliveries = await take(queue, 2)
        assert all(delivery.settled for delivery in deliveries)
        await h.pass_time(2 * h.lease)
        assert bodies(await h.rest(await h.queue(), least=1)) == [b"3"]

    # Looking ----------------------------------------------------------------------------

    @needs("exact-stat", "peek", "delay", "leases")
    async def test_stat_and_peek_tell_what_is_ready_held_and_delayed(self, h: Harness) -> None:
        h.stop_clock()
        queue = await h.queue()
        await queue.send_many([*numbered(3, key=None), Message(b"later", delay=60.0)])
        [first] = await take(queue, 1)
        await h.pass_time(h.lease / 5)
        stat = await queue.stat()
        assert stat is not None
        assert (stat.pending, stat.ready, stat.held, stat.delayed) == (4, 2, 1, 1)
        assert stat.oldest_seconds in (None, pytest.approx(h.lease / 5, abs=h.slack))
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
        await take(await h.queue(), 3)
        with pytest.raises(LeaseLostError):
            await first.ack()

    @needs("purge", "exact-stat", "leases")
    async def test_purging_leaves_nothing_and_fences_what_is_held(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send_many(numbered(4, key=None))
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

    async def test_iterating_hands_over_one_after_the_other(self, h: Harness) -> None:
        queue = await h.queue()
        await queue.send_many(numbered(20, key=None))
        found = []
        async for delivery in queue:
            found.append(delivery.message.body)
            await delivery.ack()
            if len(found) == 20:
                queue.stop()
        assert found == [b"%d" % n for n in range(1, 21)]
