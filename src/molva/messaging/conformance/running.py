"""``run`` and ``async for``: concurrency, retries, stopping."""

import asyncio
import itertools
import random
from collections import Counter, defaultdict

from molva.messaging import (
    Delivery,
    Message,
)
from molva.messaging.conformance.harness import Harness, Suite, needs
from molva.messaging.conformance.waiting import (
    PATIENCE,
    bodies,
    collector,
    eventually,
    numbered,
    running_with,
    take,
)

__all__ = ["Running"]


class Running(Suite):
    """``run`` and ``async for``: concurrency, retries, stopping."""

    async def test_run_acks_what_its_handler_returned_from(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(3))
        got: list[bytes] = []

        async with running_with(subscription, collector(got)):
            await eventually(lambda: len(got) == 3)
        await subscription.close()

        assert await h.rest(await h.subscription()) == []

    async def test_run_leaves_alone_what_its_handler_settled(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        attempts: list[int] = []

        async def handle(delivery: Delivery) -> None:
            attempts.append(delivery.attempt)
            if delivery.attempt < 3:
                await delivery.nack()

        async with running_with(subscription, handle):
            await eventually(lambda: len(attempts) == 3)

        assert attempts == [1, 2, 3]

    async def test_run_does_not_retry_what_was_settled_before_its_handler_raised(
        self, h: Harness
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(2))
        got: list[bytes] = []

        async def handle(delivery: Delivery) -> None:
            got.append(delivery.message.body)
            await delivery.ack()
            raise RuntimeError("after the ack")

        async with running_with(subscription, handle):
            await eventually(lambda: len(got) == 2)

        assert got == [b"1", b"2"]
        assert await subscription.dead_letters() == []

    async def test_run_works_keys_side_by_side(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"1", key=str(n)) for n in range(3)])
        together = asyncio.Barrier(4)

        async with running_with(subscription, lambda _: together.wait(), concurrency=3):
            async with asyncio.timeout(PATIENCE):
                await together.wait()

    async def test_run_never_works_on_more_than_was_asked_for(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"1", key=str(n)) for n in range(60)])
        running, most, done = 0, 0, 0

        async def handle(_: Delivery) -> None:
            nonlocal running, most, done
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            done += 1

        async with running_with(subscription, handle, concurrency=3):
            await eventually(lambda: done == 60)

        assert most == 3

    @needs("in-process")
    async def test_run_works_one_key_one_after_the_other(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(10))
        running, most, done = 0, 0, 0

        async def handle(_: Delivery) -> None:
            nonlocal running, most, done
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            done += 1

        async with running_with(subscription, handle, concurrency=8):
            await eventually(lambda: done == 10)

        assert most == 1

    async def test_run_tries_again_with_growing_delays(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        tried_at: list[float] = []

        def handle(_: Delivery) -> None:
            tried_at.append(h.clock.monotonic())
            raise RuntimeError("no")

        async with running_with(subscription, handle):
            await h.pass_until(lambda: len(tried_at) == 5)

        gaps = [later - earlier for earlier, later in itertools.pairwise(tried_at)]
        for gap, longest in zip(gaps, (0.5, 1.0, 2.0, 4.0), strict=True):
            assert 0.75 * longest <= gap <= longest + h.slack

    async def test_run_gives_up_after_the_last_attempt(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription(max_attempts=3)
        await topic.send_many(numbered(2))
        attempts: list[tuple[bytes, int]] = []

        def handle(delivery: Delivery) -> None:
            attempts.append((delivery.message.body, delivery.attempt))
            if delivery.message.body == b"1":
                raise RuntimeError("poison 🎈")

        async with running_with(subscription, handle):
            await h.pass_until(lambda: len(attempts) >= 4)

        assert attempts == [(b"1", 1), (b"1", 2), (b"1", 3), (b"2", 1)]
        [dead] = await subscription.dead_letters()
        assert (dead.message.body, dead.attempts) == (b"1", 3)
        assert dead.reason == "RuntimeError: poison 🎈"

    async def test_run_counts_its_own_attempts_towards_a_nack(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription(max_attempts=4)
        await topic.send(Message(b"1"))
        attempts: list[int] = []

        async def handle(delivery: Delivery) -> None:
            attempts.append(delivery.attempt)
            if len(attempts) == 2:
                await delivery.nack()
            elif len(attempts) < 4:
                raise RuntimeError("no")

        async with running_with(subscription, handle):
            await h.pass_until(lambda: len(attempts) >= 4)

        assert attempts == [1, 2, 3, 4]

    @needs("in-process")
    async def test_run_keeps_the_order_of_a_key_over_retries(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"%d" % n, key=str(n % 3)) for n in range(30)])
        failures = Counter({n: random.Random(n).choice((0, 0, 1, 2)) for n in range(30)})
        done: dict[str | None, list[int]] = defaultdict(list)

        def handle(delivery: Delivery) -> None:
            number = int(delivery.message.body)
            if failures[number]:
                failures[number] -= 1
                raise RuntimeError("not yet")
            done[delivery.message.key].append(number)

        async with running_with(subscription, handle, concurrency=3):
            await h.pass_until(lambda: sum(map(len, done.values())) >= 30)

        assert done == {str(k): list(range(k, 30, 3)) for k in range(3)}

    async def test_run_does_not_hold_up_other_keys_while_one_waits_to_be_retried(
        self, h: Harness
    ) -> None:
        h.stop_clock()  # time stands still: a retry would never come
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"bad", key="a"))
        await topic.send_many([Message(b"good", key=str(n)) for n in range(20)])
        done = 0

        def handle(delivery: Delivery) -> None:
            nonlocal done
            if delivery.message.body == b"bad":
                raise RuntimeError("no")
            done += 1

        async with running_with(subscription, handle, concurrency=1):
            await eventually(lambda: done == 20)

    async def test_stop_ends_run_after_the_handlers_under_way(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"%d" % n, key=str(n)) for n in range(20)])
        begun, finished = 0, 0
        go_on = asyncio.Event()

        async def handle(_: Delivery) -> None:
            nonlocal begun, finished
            begun += 1
            await go_on.wait()
            finished += 1

        async with running_with(subscription, handle, concurrency=2) as running:
            await eventually(lambda: begun == 2)
            subscription.stop()
            await asyncio.sleep(0.02)
            assert not running.done()
            go_on.set()
            async with asyncio.timeout(PATIENCE):
                await running

        assert finished == 2
        await subscription.close()
        assert len(await take(await h.subscription(), 18)) == 18

    async def test_stop_does_not_wait_for_a_retry(self, h: Harness) -> None:
        h.stop_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(3))
        tried = asyncio.Event()

        def handle(_: Delivery) -> None:
            tried.set()
            raise RuntimeError("no")

        async with running_with(subscription, handle) as running:
            await tried.wait()
            await asyncio.sleep(0.01)
            subscription.stop()
            async with asyncio.timeout(PATIENCE):
                await running

        again = await h.rest(subscription)
        assert h.placed(bodies(again)) == [b"1", b"2", b"3"]
        assert {d.message.body: d.attempt for d in again}[b"1"] == 2

    async def test_a_cancelled_run_gives_everything_back(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"%d" % n, key="ab"[n % 2]) for n in range(10)])
        started = asyncio.Event()

        async def handle(_: Delivery) -> None:
            started.set()
            await asyncio.Event().wait()

        running = asyncio.create_task(subscription.run(handle, concurrency=2))
        await started.wait()
        running.cancel()
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait([running])

        again = await h.rest(subscription)
        assert running.cancelled()
        assert {d.attempt for d in again} == {1}
        for key in ("a", "b"):
            numbers = [int(d.message.body) for d in again if d.message.key == key]
            numbers = numbers if h.can("in-place") else sorted(numbers)
            assert numbers == list(range("ab".index(key), 10, 2))

    async def test_a_run_cancelled_at_any_moment_gives_everything_back(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        handled: Counter[bytes] = Counter()
        sent = 0

        async def handle(delivery: Delivery) -> None:
            await asyncio.sleep(0)
            handled[delivery.message.body] += 1

        for steps in range(60):
            running = asyncio.create_task(subscription.run(handle, concurrency=2))
            await asyncio.sleep(0)
            sending = asyncio.create_task(topic.send(Message(b"%d" % sent, key=str(sent % 3))))
            sent += 1
            for _ in range(steps % 15):
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.wait([running, sending])

        handled.update(d.message.body for d in await h.rest(subscription))
        assert handled.keys() == {b"%d" % n for n in range(sent)}

    async def test_a_handler_that_was_cancelled_gives_its_message_back(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(5))
        got: list[bytes] = []

        def handle(delivery: Delivery) -> None:
            got.append(delivery.message.body)
            if len(got) == 1:
                raise asyncio.CancelledError

        async with running_with(subscription, handle):
            await eventually(lambda: len(got) == 6)

        assert got == [b"1", b"1", b"2", b"3", b"4", b"5"]

    async def test_iterating_yields_one_after_the_other_until_stopped(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(numbered(5))
        got = []

        async with asyncio.timeout(PATIENCE):
            async for delivery in subscription:
                got.append(delivery.message.body)
                await delivery.ack()
                if len(got) == 3:
                    subscription.stop()

        assert got == [b"1", b"2", b"3"]
        assert h.placed(bodies(await h.rest(subscription, least=2))) == [b"4", b"5"]

    async def test_close_ends_an_iteration(self, h: Harness) -> None:
        subscription = await h.subscription()

        async def iterate() -> None:
            async for _ in subscription:
                pass

        iterating = asyncio.create_task(iterate())
        await asyncio.sleep(0.01)
        await subscription.close()

        async with asyncio.timeout(PATIENCE):
            await iterating
