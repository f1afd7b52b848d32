"""A program that the tests of full queues start: another process at the same file.

python room_program.py make URL    takes what waits; settles one a line that comes in, says when
python room_program.py wait URL    fills the queue, then waits for room for ever
"""

import asyncio
import itertools
import sys
import time

from molva.messaging import Message, QueueFullError, open_queue, open_subscription


async def make_room(url: str) -> None:
    opening = open_queue(url) if "queue=" in url else open_subscription(url)
    async with await opening as source:
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            [delivery] = await source.receive()
            settled_at = time.monotonic()
            await delivery.ack()
            print(settled_at, flush=True)


async def wait_for_room(url: str) -> None:
    async with await open_queue(url) as full:
        try:
            for _ in itertools.count():
                await full.send(Message(b"filling"))
        except QueueFullError:
            print("ready", flush=True)
    async with await open_queue(f"{url}&overflow=wait") as waiting:
        await waiting.send(Message(b"never"))


if __name__ == "__main__":
    command, url = sys.argv[1:]
    asyncio.run({"make": make_room, "wait": wait_for_room}[command](url))
