"""What is cut at every point: fifty ratings from the sender to the ledger, acknowledged."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final
from unittest.mock import patch

from molva._base import sqlite_writer
from molva._base.clock import ManualClock
from molva._base.sqlite_mark import Mark, mark_file
from molva.messaging import (
    Action,
    Message,
    Queue,
    Subscription,
    open_queue,
    open_subscription,
    open_topic,
)
from molva.ratings.ledger import Ledger, open_ledger
from molva.ratings.rating import Rating, Submission
from tests.faults.crash.disk import Disk, Operation

__all__ = ["POISON", "RATINGS", "apply", "message", "opened", "record", "submission", "topic_url"]

RATINGS: Final = 50
_BATCH: Final = 7
# Ratings that nobody can count: they go to the dead letters.
POISON: Final = frozenset({11, 30})


async def record(folder: Path) -> Disk:
    """Run the scenario on a recording disk."""
    disk = Disk()
    clock = ManualClock()

    def put(mark: Mark, content: bytes) -> None:
        # Written past the VFS, and never synced.
        disk.log.append(Operation("write", Path(mark_file(mark._path)).name, 0, content))

    # Short, so that the WAL is copied back several times on the way.
    with (
        patch.object(sqlite_writer, "CHECKPOINT_PAGES", 12),
        patch.object(Mark, "_put", put),
    ):
        async with opened(folder, clock, disk.vfs_name) as (subscription, queue, ledger):
            url = topic_url(folder, disk.vfs_name)
            async with await open_topic(url, clock=clock) as topic:
                for first in range(0, RATINGS, _BATCH):
                    messages = [message(n) for n in range(first, min(first + _BATCH, RATINGS))]
                    await topic.send_many(messages)
                    await queue.send_many(messages)
                    for one in messages:
                        disk.mark("sent", one.id)
                    if first == 2 * _BATCH:
                        await topic.send(messages[0])  # a client that tries again
                    await apply(subscription, ledger, disk, limit=_BATCH - 2)
                    await clock.pass_time(0.3)  # watermarks are written
                    await _work(queue)
            await apply(subscription, ledger, disk, limit=RATINGS)
        disk.mark("closed", b"")
    return disk


@contextlib.asynccontextmanager
async def opened(
    folder: Path, clock: ManualClock, vfs: str | None = None
) -> AsyncIterator[tuple[Subscription, Queue, Ledger]]:
    """Open a consumer, a queue and a ledger."""
    chosen = "" if vfs is None else f"&vfs={vfs}"
    async with contextlib.AsyncExitStack() as stack:
        ledger = await open_ledger(f"sqlite://{folder}/ledger.db?commit=loop{chosen}")
        stack.push_async_callback(ledger.close)
        queue = await open_queue(
            f"sqlite://{folder}/queue.db?queue=mails&commit=loop&lease=5{chosen}", clock=clock
        )
        stack.push_async_callback(queue.close)
        subscription = await open_subscription(
            f"{topic_url(folder, vfs)}&subscription=process", clock=clock
        )
        stack.push_async_callback(subscription.close)
        yield subscription, queue, ledger


async def apply(
    subscription: Subscription, ledger: Ledger, disk: Disk | None, *, limit: int
) -> int:
    """Do what a worker does, once: receive, apply in one transaction, then acknowledge."""
    deliveries = await subscription.receive(limit, wait=0.0)
    good = [d for d in deliveries if int(d.message.body) not in POISON]
    batch = [submission(int(d.message.body), d.message.id) for d in good]
    await ledger.apply(batch, applied_at_us=1)
    if disk is not None:
        for one in batch:
            disk.mark("applied", one.id)
    await subscription.settle([(d, Action.ACK) for d in good])
    dead = [(d, Action.REJECT) for d in deliveries if d not in good]
    await subscription.settle(dead, reason="poison")
    if disk is not None:
        for delivery, _ in dead:
            disk.mark("dead", delivery.message.id)
    return len(deliveries)


async def _work(queue: Queue) -> None:
    """Take from the queue, and settle in every way there is."""
    for number, delivery in enumerate(await queue.receive(4, wait=0.0)):
        if number == 0:
            await delivery.nack()
        elif number == 1:
            await delivery.extend(60.0)
            await delivery.ack()
        elif number == 2:
            await delivery.reject("poison")
        else:
            await delivery.ack()


def submission(number: int, id_: bytes) -> Submission:
    """Return the rating of a number."""
    return Submission(id_, Rating("default", 1, number % 11))


def message(number: int) -> Message:
    """Return the message that carries the rating of a number."""
    return Message(b"%d" % number, number.to_bytes(16, "big"), key=f"k{number % 5}")


def topic_url(folder: Path, vfs: str | None) -> str:
    """Return where ratings wait."""
    chosen = "" if vfs is None else f"&vfs={vfs}"
    return f"sqlite://{folder}/queue.db?topic=ratings&lanes=3&commit=loop{chosen}"
