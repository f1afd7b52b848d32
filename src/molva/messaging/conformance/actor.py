"""A program that the tests start, stop and kill: one process that uses a broker.

python -m molva.messaging.conformance.actor COMMAND URL ...

publish URL         sends for ever; prints each id once it is stored
send URL BODY...    sends these, each when a line comes in
consume URL SECONDS works SECONDS on each message, acks it, prints it
handle URL SECONDS  works SECONDS on each message, prints it, acks it
apply URL FILE      counts each message in a SQLite file under its id, acks it, prints "."
ack URL ORDER...    takes messages N.PLACE; acks of each N those places, in that order
hold URL            takes messages, prints and never settles them
time URL            prints when, on the monotonic clock, each arrived
ask URL REPLIES     opens a requester, asks, waits for what never comes
open URL            waits for a line, opens, sends one, prints "opened"
"""

import asyncio
import random
import sqlite3
import sys
import time
from collections.abc import Callable, Coroutine

from molva.messaging import (
    Delivery,
    Message,
    Queue,
    Subscription,
    Topic,
    open_queue,
    open_requester,
    open_subscription,
    open_topic,
)
from molva.messaging.conformance.waiting import patiently
from molva.messaging.url import BrokerURL

__all__: list[str] = []


def _say(*words: object) -> None:
    """Print a line at once, for whoever reads the pipe."""
    # In one write: whoever is killed between two of them would leave half a line.
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


async def _sender(url: str) -> Topic | Queue:
    queue = BrokerURL.parse(url).queue
    return await patiently(lambda: open_topic(url) if queue is None else open_queue(url))


async def _consumer(url: str) -> Subscription | Queue:
    queue = BrokerURL.parse(url).queue
    return await patiently(lambda: open_subscription(url) if queue is None else open_queue(url))


async def _publish(url: str) -> None:
    """Send for ever; say each id once it is stored."""
    async with await _sender(url) as topic:

        async def one(task: int) -> None:
            number = 0
            while True:
                message = Message(b"%d" % number, key=str(task))
                await topic.send(message)
                _say(message.id.hex())
                number += 1

        await asyncio.gather(*(one(task) for task in range(4)))


async def _send(url: str, *bodies: str) -> None:
    """Send these, each when a line comes in; say when, on the monotonic clock."""
    async with await _sender(url) as topic:
        await topic.send(Message(b"warm-up"))
        _say("ready")
        for body in bodies:
            await asyncio.to_thread(sys.stdin.readline)
            started = time.monotonic()
            await topic.send(Message(body.encode()))
            _say(started)


async def _consume(url: str, seconds: str) -> None:
    """Work about ``seconds`` on each message, ack it, say it."""
    rng = random.Random(url)

    async def handle(delivery: Delivery) -> None:
        await asyncio.sleep(float(seconds) * rng.random() * 2)
        await delivery.ack()
        _say(delivery.message.key, delivery.message.body.decode())

    async with await _consumer(url) as subscription:
        _say("ready")
        await subscription.run(handle, concurrency=8)


async def _handle(url: str, seconds: str) -> None:
    """Work about ``seconds`` on each message, say it, ack it."""
    rng = random.Random(url)

    async def handle(delivery: Delivery) -> None:
        await asyncio.sleep(float(seconds) * rng.random() * 2)
        _say(delivery.message.key, delivery.message.body.decode())

    async with await _consumer(url) as consumer:
        _say("ready")
        await consumer.run(handle, concurrency=8)


async def _apply(url: str, path: str) -> None:
    """Count each message once, whatever happens: its id is the primary key of its effect."""
    file = sqlite3.connect(path, isolation_level=None, timeout=30.0)

    async def handle(delivery: Delivery) -> None:
        file.execute(
            "INSERT INTO effect (id, value, times) VALUES (?, ?, 1) "
            "ON CONFLICT (id) DO UPDATE SET times = times + 1",
            (delivery.message.id, int(delivery.message.body)),
        )
        await asyncio.sleep(0)
        await delivery.ack()
        _say(".")

    async with await _consumer(url) as consumer:
        _say("ready")
        await consumer.run(handle, concurrency=8)


async def _ack(url: str, *orders: str) -> None:
    """Take eight messages for each order, ack the places in it, say so, hold the others."""
    async with await _consumer(url) as consumer:
        _say("ready")
        held: dict[bytes, Delivery] = {}
        while len(held) < 8 * len(orders):
            held |= {d.message.body: d for d in await consumer.receive(1_000)}
        for number, order in enumerate(orders):
            for place in order.strip("-"):
                await held[b"%d.%d" % (number, int(place))].ack()
        _say("acked")
        await asyncio.Event().wait()


async def _hold(url: str) -> None:
    """Take messages, say them, never settle them."""
    async with await _consumer(url) as subscription:
        _say("ready")
        while True:
            for delivery in await subscription.receive(100):
                _say(delivery.message.key, delivery.message.body.decode())


async def _arrive(url: str) -> None:
    """Say when, on the monotonic clock, each message arrived."""
    async with await _consumer(url) as subscription:
        _say("ready")
        async for delivery in subscription:
            _say(time.monotonic())
            await delivery.ack()


async def _open_at_once(url: str) -> None:
    """Wait for a line, open, send one message."""
    _say("ready")
    sys.stdin.readline()
    async with await open_topic(url) as topic, await open_subscription(url):
        await topic.send(Message(b"1"))
    _say("opened")


async def _ask(url: str, replies: str) -> None:
    """Open a requester, say so, wait for a reply that never comes."""
    async with await open_requester(url, replies) as requester:
        _say("ready")
        await requester.ask(Message(b"1"), timeout=3600.0)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    programs: dict[str, Callable[..., Coroutine[object, object, None]]] = {
        "publish": _publish,
        "send": _send,
        "consume": _consume,
        "handle": _handle,
        "apply": _apply,
        "ack": _ack,
        "hold": _hold,
        "time": _arrive,
        "ask": _ask,
        "open": _open_at_once,
    }
    asyncio.run(programs[command](*arguments))
