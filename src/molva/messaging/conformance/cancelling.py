"""A cancelled call loses nothing."""

import asyncio
import contextlib
import random
import time

from molva.messaging import Action, Message
from molva.messaging.conformance.harness import Harness, Suite
from molva.messaging.conformance.waiting import PATIENCE, bodies, numbered

__all__ = ["Cancelling"]


class Cancelling(Suite):
    """A cancelled call loses nothing."""

    async def test_receives_cancelled_a_thousand_times_lose_nothing(self, h: Harness) -> None:
        sender, consumer = await h.sender(), await h.consumer()
        rng = random.Random(7)
        got: list[bytes] = []
        over = asyncio.Event()

        async def send() -> int:
            sent = 0
            while not over.is_set():
                await sender.send(Message(b"%d" % sent, key=str(sent)))
                sent += 1
                await asyncio.sleep(rng.random() * 0.0006)
            return sent

        sending = asyncio.create_task(send())
        for _ in range(1_000):
            receiving = asyncio.create_task(consumer.receive(wait=5.0))
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.001)
            else:
                for _ in range(rng.randrange(6)):
                    await asyncio.sleep(0)
            receiving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                deliveries = await receiving
                got += bodies(deliveries)
                await consumer.settle([(d, Action.ACK) for d in deliveries])
        over.set()
        sent = await sending
        # What cancelled calls had under way may still have to be given back.
        deadline = time.monotonic() + PATIENCE
        while len(set(got)) < sent and time.monotonic() < deadline:
            got += bodies(await h.rest(consumer))
            await asyncio.sleep(0.01)
        got += bodies(await h.rest(consumer))

        assert set(map(int, got)) == set(range(sent))
        h.count_duplicates(got, most=0, why="cancelled receive")

    async def test_a_sender_stays_usable_when_sends_are_cancelled(self, h: Harness) -> None:
        sender, consumer = await h.sender(), await h.consumer()
        rng = random.Random(8)
        confirmed: set[bytes] = set()
        messages = [Message(b"%d" % n, key=str(n)) for n in range(300)]

        async def send(message: Message) -> None:
            await sender.send(message)
            confirmed.add(message.id)

        for message in messages:
            sending = asyncio.create_task(send(message))
            for _ in range(rng.randrange(6)):
                await asyncio.sleep(0)
            sending.cancel()
            await asyncio.wait([sending])
        await sender.send(Message(b"last", key="k"))

        arrived = [d.message for d in await h.rest(consumer)]
        assert {message.id for message in arrived} >= confirmed
        assert len({message.id for message in arrived}) == len(arrived)
        assert b"last" in {message.body for message in arrived}

    async def test_a_cancelled_batch_leaves_the_sender_usable(self, h: Harness) -> None:
        sender, consumer = await h.sender(), await h.consumer()
        sending = asyncio.create_task(sender.send_many(numbered(5_000)))
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait([sending])

        async with asyncio.timeout(PATIENCE):
            await sender.send(Message(b"last"))
            await sender.close()

        assert b"last" in bodies(await h.rest(consumer))
