"""A program that the tests start, stop and kill: one process that uses a broker.

python actor.py publish URL         sends for ever; prints each id once it is stored
python actor.py send URL BODY...    sends these, each when a line comes in
python actor.py consume URL SECONDS works SECONDS on each message, acks it, prints it
python actor.py hold URL            takes messages, prints and never settles them
python actor.py time URL            prints when, on the monotonic clock, each arrived
python actor.py open URL            waits for a line, opens, sends one, prints "opened"
python actor.py lock PATH           holds the write lock until a line comes in
"""

import asyncio
import random
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import apsw

from molva.messaging import Delivery, Message, open_subscription, open_topic


def say(*words: object) -> None:
    print(*words, flush=True)


async def publish(url: str) -> None:
    async with await open_topic(url) as topic:

        async def one(task: int) -> None:
            number = 0
            while True:
                message = Message(b"%d" % number, key=str(task))
                await topic.send(message)
                say(message.id.hex())
                number += 1

        await asyncio.gather(*(one(task) for task in range(4)))


async def send(url: str, *bodies: str) -> None:
    async with await open_topic(url) as topic:
        await topic.send(Message(b"warm-up"))
        say("ready")
        for body in bodies:
            await asyncio.to_thread(sys.stdin.readline)
            started = time.monotonic()
            await topic.send(Message(body.encode()))
            say(started)


async def consume(url: str, seconds: str) -> None:
    rng = random.Random(url)

    async def handle(delivery: Delivery) -> None:
        await asyncio.sleep(float(seconds) * rng.random() * 2)
        await delivery.ack()
        say(delivery.message.key, delivery.message.body.decode())

    async with await open_subscription(url) as subscription:
        say("ready")
        await subscription.run(handle, concurrency=8)


async def hold(url: str) -> None:
    async with await open_subscription(url) as subscription:
        say("ready")
        while True:
            for delivery in await subscription.receive(100):
                say(delivery.message.key, delivery.message.body.decode())


async def arrive(url: str) -> None:
    async with await open_subscription(url) as subscription:
        say("ready")
        async for delivery in subscription:
            say(time.monotonic())
            await delivery.ack()


async def open_at_once(url: str) -> None:
    say("ready")
    sys.stdin.readline()
    async with await open_topic(url) as topic, await open_subscription(url):
        await topic.send(Message(b"1"))
    say("opened")


def lock(path: str) -> None:
    connection = apsw.Connection(str(Path(path)))
    connection.set_busy_timeout(5_000)
    connection.execute("BEGIN IMMEDIATE")
    say("ready")
    sys.stdin.readline()
    connection.execute("ROLLBACK")
    connection.close()


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "lock":
        lock(*arguments)
    else:
        programs: dict[str, Callable[..., Coroutine[object, object, None]]] = {
            "publish": publish,
            "send": send,
            "consume": consume,
            "hold": hold,
            "time": arrive,
            "open": open_at_once,
        }
        asyncio.run(programs[command](*arguments))
