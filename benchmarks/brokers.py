"""Brokers that are servers: Molva against the raw client library, used as well as one can.

What is measured is written once; a broker adds a ``Peer``: the same work with its client
library and nothing around it. Turns are interleaved, ours and theirs one after the other on
one server, so that a noisy machine is noisy for both.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from benchmarks.report import Report
from molva.messaging import (
    Action,
    Message,
    Subscription,
    open_subscription,
    open_topic,
    with_options,
)

__all__ = ["IN_FLIGHT", "Peer", "against_raw"]

# Messages under way at a time, theirs and ours: the number.
IN_FLIGHT: Final = 256
_TURNS: Final = 5
# Turns ahead of the first that counts: what a server on a virtual machine does for the first
# time it does ten times as slowly.
_WARM_UP: Final = 2
# Body size to the number of messages a turn: a second's work, or a little less.
_NUMBERS: Final = {16: 40_000, 1_024: 30_000, 65_536: 1_500}
_BATCH: Final = 1_000


class Peer(Protocol):
    """The raw client library, doing what our driver does: confirmed sends, settled receives.

    Each returns messages a second. Connecting is not measured: a first message goes ahead of
    those that are sent, and receiving is measured from the end of the first batch on.
    """

    def send(self, topic: str, messages: list[Message]) -> float:
        """Send all, at most ``IN_FLIGHT`` under way, until every one is confirmed."""
        ...

    def send_one_by_one(self, topic: str, messages: list[Message]) -> float:
        """Send each when the one before it is confirmed."""
        ...

    def receive(self, topic: str, number: int) -> float:
        """Receive and settle so many in batches, from the oldest on.

        As whoever works on them: body, key and id of each are taken in hand.
        """
        ...


def against_raw(
    name: str,
    title: str,
    url: str,
    peer: Peer,
    new_topic: Callable[[], str],
    numbers: Mapping[int, int] = _NUMBERS,
    *,
    beyond: tuple[str, "Peer"] | None = None,
) -> None:
    """Measure a broker's driver against its raw client library; write the report.

    Args:
        name: Of the report's file.
        title: Of the report.
        url: Where the broker is.
        peer: The raw client library.
        new_topic: Makes a name of a topic that is not there yet.
        numbers: How many messages a turn for each size of a body.
        beyond: What else our sends are set against, and what it is called: what the broker can
            do and its client library has no call for.
    """
    report = Report(
        name,
        title,
        f"{_TURNS} turns, ours and theirs one after the other in each, on one server and the same "
        f"topics' settings, {_WARM_UP} turns more ahead of the first for its warm-up; each message has a key and an id of 16 bytes; {IN_FLIGHT} in flight.",
    )
    warm_up = _WARM_UP
    for size, number in numbers.items():
        columns: list[list[float]] = [[] for _ in range(6)]
        many, raw_many, tasks, taken, raw_taken, by_hand = columns
        for _ in range(warm_up + _TURNS):
            topic, raw_topic = new_topic(), new_topic()
            messages, others = (
                [Message(b"x" * size, key=str(n % 100)) for n in range(number)] for _ in range(2)
            )
            for each in (topic, raw_topic):
                asyncio.run(_make(with_options(url, topic=each, subscription="s")))
            raw_many.append(peer.send(raw_topic, messages))
            many.append(asyncio.run(_send_many(with_options(url, topic=topic), messages)))
            raw_taken.append(peer.receive(raw_topic, number))
            if beyond is not None:
                by_hand.append(beyond[1].send(new_topic(), messages))
            taken.append(asyncio.run(_receive(with_options(url, topic=topic), number)))
            # Others: a server that drops what it has seen would do nothing for the same again.
            tasks.append(asyncio.run(_send(with_options(url, topic=topic), others)))
        for column in columns:
            del column[:warm_up]
        warm_up = 0
        of = f"{size:,} B"
        report.ratio(f"send_many, {of}", many, raw_many, "0.8")
        if beyond is not None:
            report.ratio(f"send_many, {of}, against {beyond[0]}", many, by_hand, "nothing")
        report.ratio(f"{IN_FLIGHT} tasks, a send awaited in each, {of}", tasks, raw_many, "0.5")
        report.ratio(f"receive and settle in batches, {of}", taken, raw_taken, "0.8")
    alone, raw_alone = [], []
    for _ in range(_TURNS):
        topic = new_topic()
        asyncio.run(_make(with_options(url, topic=topic, subscription="s")))
        messages = [Message(b"x" * 16, key="k") for _ in range(500)]
        raw_alone.append(peer.send_one_by_one(topic, messages))
        alone.append(asyncio.run(_send_alone(with_options(url, topic=topic), messages)))
    report.ratio("one after the other, 16 B", alone, raw_alone, "0.5")
    report.write()


async def _make(url: str) -> None:
    await (await open_subscription(url)).close()


async def _send_many(url: str, messages: list[Message]) -> float:
    async with await open_topic(url) as topic:
        await topic.send(Message(b"warm-up"))
        started = time.perf_counter()
        await topic.send_many(messages)
        return len(messages) / (time.perf_counter() - started)


async def _send(url: str, messages: list[Message]) -> float:
    async with await open_topic(url) as topic:
        await topic.send(Message(b"warm-up"))
        left = iter(messages)

        async def produce() -> None:
            for message in left:
                await topic.send(message)

        started = time.perf_counter()
        await asyncio.gather(*(produce() for _ in range(IN_FLIGHT)))
        return len(messages) / (time.perf_counter() - started)


async def _send_alone(url: str, messages: list[Message]) -> float:
    async with await open_topic(url) as topic:
        await topic.send(Message(b"warm-up"))
        started = time.perf_counter()
        for message in messages:
            await topic.send(message)
        return len(messages) / (time.perf_counter() - started)


async def _receive(url: str, number: int) -> float:
    async with await open_subscription(with_options(url, subscription="s")) as subscription:
        first = await _settle_batch(subscription)
        started = time.perf_counter()
        left = number - first
        while left > 0:
            left -= await _settle_batch(subscription)
        return (number - first) / (time.perf_counter() - started)


async def _settle_batch(subscription: Subscription) -> int:
    deliveries = await subscription.receive(_BATCH)
    for delivery in deliveries:
        message = delivery.message
        message.body, message.key, message.id  # noqa: B018 - as whoever works on it
    await subscription.settle([(delivery, Action.ACK) for delivery in deliveries])
    return len(deliveries)
