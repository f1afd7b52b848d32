"""A program that the tests start, stop and kill: one process that uses a broker.

python -m molva.messaging.conformance.actor COMMAND URL ...

publish URL         sends for ever; prints each id once it is stored
send URL BODY...    sends these, each when a line comes in
consume URL SECONDS works SECONDS on each message, acks it, prints it
hold URL            takes messages, prints and never settles them
time URL            prints when, on the monotonic clock, each arrived
open URL            waits for a line, opens, sends one, prints "opened"
"""

import asyncio
import random
import sys
import time
from collections.abc import Callable, Coroutine

from molva.messaging import Delivery, Message, open_subscription, open_topic

__all__: list[str] = []


def _say(*words: object) -> None:
    """Print a line at once, for whoever reads the pipe."""
    print(*words, flush=True)


async def _publish(url: str) -> None:
    """Send for ever; say each id once it is stored."""
    async with await open_topic(url) as topic:

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
    async with await open_topic(url) as topic:
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

    async with await open_subscription(url) as subscription:
        _say("ready")
        await subscription.run(handle, concurrency=8)


async def _hold(url: str) -> None:
    """Take messages, say them, never settle them."""
    async with await open_subscription(url) as subscription:
        _say("ready")
        while True:
            for delivery in await subscription.receive(100):
                _say(delivery.message.key, delivery.message.body.decode())


async def _arrive(url: str) -> None:
    """Say when, on the monotonic clock, each message arrived."""
    async with await open_subscription(url) as subscription:
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


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    programs: dict[str, Callable[..., Coroutine[object, object, None]]] = {
        "publish": _publish,
        "send": _send,
        "consume": _consume,
        "hold": _hold,
        "time": _arrive,
        "open": _open_at_once,
    }
    asyncio.run(programs[command](*arguments))
