"""``molva pub`` and ``molva sub``: a line a message."""

import asyncio
import sys
from io import BufferedReader
from typing import cast

import click

from molva.cli.exits import translated_errors
from molva.cli.running import run_until_signal
from molva.messaging import Delivery, Message, open_subscription, open_topic

__all__ = ["pub", "sub"]

# Lines that travel in one call.
_BATCH = 1_000


@click.command()
@click.argument("url")
@click.option("--key", help="Key of every message: those of one key keep their order.")
def pub(url: str, key: str | None) -> None:
    """Send each line of stdin as a message to the topic URL names.

    URL is, for example, 'sqlite:///var/lib/app/queue.db?topic=orders'. Ends when stdin does;
    every line was then stored.
    """

    async def main() -> None:
        async with await open_topic(url) as topic:
            while True:
                # One line at least, and what else is there: a terminal sends at once, a
                # file in batches.
                lines = await asyncio.to_thread(_read_lines)
                if not lines:
                    return
                await topic.send_many([Message(line, key=key) for line in lines])

    with translated_errors():
        asyncio.run(main())


def _read_lines() -> list[bytes]:
    buffer = cast(BufferedReader, sys.stdin.buffer)
    lines = []
    line = buffer.readline()
    while line:
        lines.append(line.rstrip(b"\r\n"))
        if len(lines) == _BATCH or not buffer.peek(1)[:1]:
            break
        line = buffer.readline()
    return lines


@click.command()
@click.argument("url")
@click.option("--limit", type=click.IntRange(min=1), help="End after so many messages.")
def sub(url: str, limit: int | None) -> None:
    """Print each message of a subscription as a line, and acknowledge it.

    URL is, for example, 'sqlite:///var/lib/app/queue.db?topic=orders&subscription=billing'. Runs
    until Ctrl-C, or for --limit messages.
    """

    async def main(stop: asyncio.Event) -> None:
        async with await open_subscription(url) as subscription:
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
