"""Stopping: what is under way ends, what was taken ahead is given back at once."""

import asyncio
import logging
import time

import pytest

from molva.messaging.conformance.harness import Harness, Suite
from molva.messaging.conformance.waiting import PATIENCE, bodies, eventually, take
from molva.messaging.delivery import Delivery
from molva.messaging.message import Message

__all__ = ["Draining"]


class Draining(Suite):
    """Stopping, draining, and handlers that behave badly."""

    async def test_what_was_taken_ahead_is_given_back_at_once(self, h: Harness) -> None:
        h.lease = 3 * PATIENCE  # so that nothing comes because a lease ran out
        h.lengthen_sessions()
        sender, leaving = await h.sender(), await h.consumer()
        messages = [Message(b"%d" % n, key=str(n)) for n in range(20)]
        await sender.send_many(messages)
        began, over = asyncio.Event(), asyncio.Event()
        handled: list[bytes] = []

        async def handle(delivery: Delivery) -> None:
            began.set()
            await over.wait()
            handled.append(delivery.message.body)

        running = asyncio.create_task(leaving.run(handle, concurrency=2))
        await began.wait()
        await asyncio.sleep(0.05)  # to take ahead what it will
        other = await h.consumer()
        leaving.stop()
        over.set()
        async with asyncio.timeout(PATIENCE):
            await running
        loop = asyncio.get_running_loop()
        stopped_at = loop.time()
        await leaving.close()
        again = await take(other, 20 - len(handled))

        # Long before a lease runs out, or the session of who left, where there are sessions.
        assert loop.time() - stopped_at < PATIENCE / 2
        assert sorted(bodies(again) + handled) == sorted(m.body for m in messages)
        assert {delivery.attempt for delivery in again} == {1}

    async def test_a_drain_that_takes_too_long_gives_back(self, h: Harness) -> None:
        sender, consumer = await h.sender(), await h.consumer()
        await sender.send(Message(b"1"))
        began = asyncio.Event()

        async def hang(_: Delivery) -> None:
            began.set()
            await asyncio.Event().wait()

        running = asyncio.create_task(consumer.run(hang))
        await began.wait()
        consumer.stop(timeout=0.05)
        async with asyncio.timeout(PATIENCE):
            await running
        assert bodies(await take(consumer, 1)) == [b"1"]

    async def test_a_handler_that_hangs_fails_after_its_timeout(self, h: Harness) -> None:
        sender, consumer = await h.sender(), await h.consumer(max_attempts=1)
        await sender.send(Message(b"1"))

        async def hang(_: Delivery) -> None:
            consumer.stop()
            await asyncio.Event().wait()

        async with asyncio.timeout(PATIENCE):
            await consumer.run(hang, timeout=0.05)
        [letter] = await consumer.dead_letters()
        assert "longer than 0.05 s" in letter.reason

    async def test_a_handler_that_blocks_the_loop_is_named(
        self, h: Harness, caplog: pytest.LogCaptureFixture
    ) -> None:
        sender, consumer = await h.sender(), await h.consumer()
        await sender.send(Message(b"1"))

        async def dreamy(_: Delivery) -> None:
            consumer.stop()
            until = time.monotonic() + PATIENCE
            while "dreamy has blocked" not in caplog.text and time.monotonic() < until:
                time.sleep(0.05)  # what no handler should do

        with caplog.at_level(logging.WARNING, "molva.messaging"):
            await consumer.run(dreamy)
        assert any("dreamy has blocked" in r.getMessage() for r in caplog.records)

    async def test_a_cancelled_handler_task_gives_its_message_back(self, h: Harness) -> None:
        sender, consumer = await h.sender(), await h.consumer()
        await sender.send(Message(b"1"))
        tasks: list[asyncio.Task[None] | None] = []

        async def handle(_: Delivery) -> None:
            tasks.append(asyncio.current_task())
            await asyncio.Event().wait()

        running = asyncio.create_task(consumer.run(handle))
        await eventually(lambda: tasks)
        consumer.stop()
        assert tasks[0] is not None
        tasks[0].cancel()
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait([running])

        [again] = await take(consumer, 1)
        assert (again.message.body, again.attempt) == (b"1", 1)

    async def test_a_busy_neighbour_starves_nobody(self, h: Harness) -> None:
        busy_sender, busy = await h.sender("busy"), await h.consumer("busy")
        sender, consumer = await h.sender("calm"), await h.consumer("calm")
        await busy_sender.send_many([Message(b"1", key=str(n)) for n in range(4_000)])
        arrived = asyncio.Event()

        async def work(_: Delivery) -> None:
            await asyncio.sleep(0.005)

        async def note(_: Delivery) -> None:
            arrived.set()

        running = [
            asyncio.create_task(busy.run(work, concurrency=4)),
            asyncio.create_task(consumer.run(note)),
        ]
        await eventually(lambda: busy.received.acked > 20)
        await sender.send(Message(b"2"))
        async with asyncio.timeout(PATIENCE):
            await arrived.wait()
        left = 4_000 - busy.received.acked
        busy.stop()
        consumer.stop()
        await asyncio.gather(*running)

        assert left > 0  # it did not have to wait until its neighbour was idle

    async def test_what_was_never_closed_is_warned_of(self, h: Harness) -> None:
        sender = await h.sender()
        unclosed = await h.consumer()
        h.forget(unclosed)
        with pytest.warns(ResourceWarning, match="never closed"):
            unclosed.__del__()
        await unclosed.close()
        await sender.send(Message(b"1"))
        assert bodies(await take(await h.consumer(), 1)) == [b"1"]
