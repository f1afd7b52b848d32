"""``molva pub`` and ``molva sub``: a line a message."""

import asyncio
import sys
from collections.abc import Iterator
from io import BufferedReader
from typing import cast

import click

from molva.cli.exits import translated_errors
from molva.cli.running import run_until_signal
from molva.messaging import (
    Delivery,
    Message,
    Queue,
    Subscription,
    Topic,
    open_queue,
    open_subscription,
    open_topic,
)
from molva.messaging.url import BrokerURL

__all__ = ["pub", "sub"]

# Lines that travel in one call.
_BATCH = 1_000
# Bytes of stdin that are read at once, at most.
_CHUNK = 65_536
# What a shell says of a program that Ctrl-C ended: 128 + SIGINT.
_INTERRUPTED = 130


@click.command()
@click.argument("url")
@click.option("--key", help="Key of every message: those of one key keep their order.")
def pub(url: str, key: str | None) -> None:
    """Send each line of stdin as a message to the topic or queue that URL names.

    URL is, for example, 'sqlite:///var/lib/app/queue.db?topic=orders'. Ends when stdin does;
    every line was then stored. Ctrl-C ends it too; what was sent until then is stored.
    """
    with translated_errors():
        try:
            # Stdin is read in this thread: one that waits for a terminal cannot be stopped.
            with asyncio.Runner() as runner:
                topic: Topic | Queue = runner.run(_open(url))
                try:
                    for lines in _read_lines():
                        runner.run(topic.send_many([Message(line, key=key) for line in lines]))
                finally:
                    runner.run(topic.close())
        except KeyboardInterrupt:
            sys.exit(_INTERRUPTED)


async def _open(url: str) -> Topic | Queue:
    return await (open_topic(url) if BrokerURL.parse(url).queue is None else open_queue(url))


def _read_lines() -> Iterator[list[bytes]]:
    """Yield the lines that are there: a terminal's at once, a file's in batches."""
    stdin = cast(BufferedReader, sys.stdin.buffer)
    begun = bytearray()  # the line whose end has not come yet
    while chunk := stdin.read1(_CHUNK):
        begun += chunk
        if b"\n" not in chunk:
            continue
        *lines, begun = begun.split(b"\n")
        for at in range(0, len(lines), _BATCH):
            yield [bytes(line.rstrip(b"\r")) for line in lines[at : at + _BATCH]]
    if begun:
        yield [bytes(begun.rstrip(b"\r"))]


@click.command()
@click.argument("url")
@click.option("--limit", type=click.IntRange(min=1), help="End after so many messages.")
def sub(url: str, limit: int | None) -> None:
    """Print each message of a subscription or queue as a line, and acknowledge it.

    URL is, for example, 'sqlite:///var/lib/app/queue.db?topic=orders&subscription=billing'. Runs
    until Ctrl-C, or for --limit messages.
    """

    async def main(stop: asyncio.Event) -> None:
        opened: Subscription | Queue
        if BrokerURL.parse(url).queue is None:
            opened = await open_subscription(url)
        else:
            opened = await open_queue(url)
        async with opened as subscription:
            stopping = asyncio.ensure_future(stop.wait())
            stopping.add_done_callback(lambda _: subscription.stop())
            printed = 0
            async for delivery in subscription:
                await _print(delivery)
                printed += 1
                if printed == limit:
                    subscription.stop()
            stopping.cancel()

    with translated_errors():
        run_until_signal(main)


async def _print(delivery: Delivery) -> None:
    sys.stdout.buffer.write(delivery.message.body + b"\n")
    # Printed means read: whoever reads the pipe has it before it is acknowledged.
    sys.stdout.buffer.flush()
    await delivery.ack()
