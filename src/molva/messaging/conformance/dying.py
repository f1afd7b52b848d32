"""Real processes that are killed, brokers that restart, connections that are cut.

Consumers and publishers are processes of their own and die by SIGKILL. Where the harness
offers it, the broker is restarted and its connections are cut under load.
"""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable

from molva.messaging.conformance.actors import Start
from molva.messaging.conformance.harness import Harness, Suite, needs, offered
from molva.messaging.conformance.waiting import PATIENCE, bodies, eventually, take
from molva.messaging.delivery import Delivery
from molva.messaging.driver import Action
from molva.messaging.errors import UnavailableError
from molva.messaging.message import Message
from molva.messaging.queue import Queue
from molva.messaging.topic import Topic

__all__ = ["Dying"]

# Messages that several publishers send while a broker is restarted or cut off.
_UNDER_LOAD = 1_500


class Dying(Suite):
    """What outlives a process, a connection, a broker's restart."""

    @needs("shared")
    async def test_what_a_killed_consumer_held_comes_to_another(
        self, h: Harness, start: Start
    ) -> None:
        h.use_processes()
        sender = await h.sender()
        await (await h.consumer()).close()
        holder = await (await start("hold", h.consumer_url())).ready()
        await sender.send_many([Message(b"%d" % n, key=str(n)) for n in range(20)])
        await eventually(lambda: len(set(holder.lines)) == 20)

        await holder.kill()
        heir = await h.consumer()
        loop = asyncio.get_running_loop()
        killed_at = loop.time()
        again = bodies(await take(heir, 20)) + bodies(await h.rest(heir))

        lease = h.lease if h.can("leases") else 0.0
        assert loop.time() - killed_at < 2 * lease + h.death_interval + 20 * h.quiet + 10.0
        assert {int(body) for body in again} == set(range(20))
        h.count_duplicates(again, most=0, why="kill of a consumer that acknowledged nothing")

    @needs("shared")
    async def test_after_acks_in_any_order_a_kill_brings_back_what_is_declared(
        self, h: Harness, start: Start
    ) -> None:
        h.use_processes()
        dice = random.Random(9)
        sender = await h.sender()
        await (await h.consumer()).close()
        orders = [dice.sample(range(8), dice.randrange(9)) for _ in range(30)]
        sent = [Message(b"%d.%d" % (n, p), key=str(n)) for n in range(30) for p in range(8)]
        await sender.send_many(sent)
        words = ["".join(map(str, order)) or "-" for order in orders]
        doomed = await start("ack", h.consumer_url(), *words)
        await doomed.said("acked")

        await asyncio.sleep(h.ack_interval)
        await doomed.kill()
        acked = {b"%d.%d" % (n, place) for n, order in enumerate(orders) for place in order}
        left = {message.body for message in sent} - acked
        heir = await h.consumer()
        again: list[bytes] = []
        async with asyncio.timeout(PATIENCE + h.death_interval):
            while not set(again) >= left:
                again += bodies(await heir.receive(1_000, wait=0.5))
        again += bodies(await h.rest(heir))

        tail = 0 if h.can("by-message") else len(acked)
        h.count_duplicates([*acked, *(b for b in again if b in acked)], most=tail, why="kill")
        assert set(again) - acked == left
        h.count_duplicates([b for b in again if b in left], most=0, why="kill")

    @needs("shared")
    async def test_all_that_a_killed_publisher_was_told_of_is_there(
        self, h: Harness, start: Start
    ) -> None:
        sender, consumer = await h.sender(), await h.consumer()
        publisher = await start("publish", h.sender_url())
        await eventually(lambda: len(publisher.lines) > 100)

        await publisher.kill()
        told = {bytes.fromhex(line) for line in publisher.lines if len(line) == 32}
        await sender.send(Message(b"last"))
        got: list[bytes] = []
        async with asyncio.timeout(PATIENCE):
            while not told <= set(got):
                deliveries = await consumer.receive(1_000, wait=0.5)
                got += [delivery.message.id for delivery in deliveries]
                await consumer.settle([(delivery, Action.ACK) for delivery in deliveries])

        h.count_duplicates(got, most=0, why="kill of a publisher")

    @needs("shared", "per-key")
    async def test_the_order_of_a_key_is_kept_across_kills(self, h: Harness, start: Start) -> None:
        h.use_processes()
        sender = await h.sender()
        await (await h.consumer()).close()
        await sender.send_many([Message(b"%d" % n, key=str(n % 10)) for n in range(400)])
        heard: list[str] = []
        for _ in range(3):
            before = len(heard)
            doomed = await (await start("handle", h.consumer_url(), "0.002", heard=heard)).ready()
            await eventually(lambda seen=before: len(heard) > seen + 60)  # type: ignore[misc]
            await doomed.kill()
        await (await start("handle", h.consumer_url(), "0.001", heard=heard)).ready()
        await eventually(lambda: len(set(heard)) == 400)

        highest: dict[str, int] = defaultdict(lambda: -10)
        for line in heard:
            key, number = line.split()
            # Again, perhaps, from some point on; but never one before those in front of it.
            expected = highest[key] + 10 if highest[key] >= 0 else int(key)
            assert int(number) <= expected, line
            highest[key] = max(highest[key], int(number))
        h.count_duplicates(heard, most=3 * len(set(heard)), why="kill")

    @needs("shared", "kill")
    @offered("restart_broker")
    async def test_nothing_is_lost_when_the_broker_restarts_under_load(self, h: Harness) -> None:
        await self._disturbed(h, h.restart_broker)

    @needs("shared")
    @offered("cut_connections")
    async def test_cut_connections_come_back_by_themselves(self, h: Harness) -> None:
        await self._disturbed(h, h.cut_connections)

    async def _disturbed(self, h: Harness, disturb: Callable[[], Awaitable[None]]) -> None:
        """A hundred publishers, one consumer, two disturbances; all of it arrives."""
        h.shorten_leases()  # of what was under way when it was disturbed
        sender, consumer = await h.sender(), await h.consumer()
        messages = [Message(b"%d" % n, key=str(n % 50)) for n in range(_UNDER_LOAD)]
        handled: Counter[bytes] = Counter()
        waiting = iter(messages)
        confirmed = 0
        again = 0

        async def publish() -> None:
            nonlocal confirmed, again
            for message in waiting:
                again += await _sent(sender, message) - 1
                confirmed += 1
                await asyncio.sleep(0.01)

        def handle(delivery: Delivery) -> "asyncio.Future[None]":
            handled[delivery.message.id] += 1
            return asyncio.ensure_future(asyncio.sleep(0))

        async def consume() -> None:
            while True:
                try:
                    return await consumer.run(handle, concurrency=8)
                except UnavailableError:
                    await asyncio.sleep(0.05)  # the same object goes on: nothing is reopened

        consuming = asyncio.create_task(consume())
        publishing = [asyncio.create_task(publish()) for _ in range(100)]
        for part in (3, 2):
            await eventually(lambda part=part: confirmed > _UNDER_LOAD // part)  # type: ignore[misc]
            await disturb()
        async with asyncio.timeout(6 * PATIENCE):
            await asyncio.gather(*publishing)
            while len(handled) < _UNDER_LOAD:
                await asyncio.sleep(0.01)
        consumer.stop()
        async with asyncio.timeout(PATIENCE):
            await consuming

        assert handled.keys() == {message.id for message in messages}
        # What was under way, on either side, twice; and the tail of each lane.
        most = again + 2 * 1_000 if h.can("by-message") else 3 * _UNDER_LOAD
        h.count_duplicates(handled.elements(), most=most, why="disturbance")


async def _sent(sender: Topic | Queue, message: Message) -> int:
    """Send until it is confirmed, always under one id; return how often it was tried."""
    for attempt in range(1, 1_000):
        try:
            await sender.send(message)
        except UnavailableError:
            await asyncio.sleep(0.05)
        else:
            return attempt
    raise AssertionError("the broker never came back")
