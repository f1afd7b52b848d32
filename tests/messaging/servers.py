"""What is asked of every broker that is a server: wrong addresses, and a server that dies.

A module of tests gives its scheme to ``Unreachable``, and its own server to
``lose_nothing_while_killed``.
"""

import asyncio
import contextlib
from collections import Counter
from typing import ClassVar

import pytest

from molva.messaging import (
    Delivery,
    Message,
    Queue,
    Subscription,
    Topic,
    UnavailableError,
    open_queue,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import eventually
from tests.brokers import Server
from tests.brokers.ports import free_ports

__all__ = [
    "AT_ONCE",
    "Unreachable",
    "both_ends",
    "consume",
    "lose_nothing_while_killed",
    "refusal",
    "send_surely",
]

# Seconds within which whatever is wrong must be told. The drivers give up sooner, each after four:
# Kafka's ``_kafka_broker._FIRST_REQUEST``, Redis' ``redis_server._TIMEOUT``, NATS's
# ``_nats_link._TIMEOUT``, AMQP's ``_amqp_link.ANSWER``. The rest is for a busy machine.
AT_ONCE = 9.5


async def refusal(url: str, **options: str) -> Exception:
    """Return the error by which opening is refused, which must not take long."""
    async with asyncio.timeout(AT_ONCE):
        with pytest.raises(Exception) as refused:  # noqa: PT011 - the caller looks at it
            await open_queue(with_options(url, queue="q", **options))
    return refused.value


class Unreachable:
    """A server that is not there, or says nothing."""

    scheme: ClassVar[str]

    async def test_a_port_where_nobody_listens_is_named(self) -> None:
        [port] = free_ports(1)
        error = await refusal(f"{self.scheme}://127.0.0.1:{port}")
        assert isinstance(error, UnavailableError)
        assert f"127.0.0.1:{port}" in str(error)

    async def test_a_server_that_never_answers_is_given_up(self) -> None:
        async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.read()
            finally:
                writer.close()

        server = await asyncio.start_server(hang, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        error = await refusal(f"{self.scheme}://127.0.0.1:{port}")
        assert isinstance(error, UnavailableError)
        assert "no answer in time" in str(error)
        server.close()
        await asyncio.sleep(0.05)  # for the server's side to notice


async def send_surely(sender: Topic | Queue, message: Message) -> None:
    """Send until it is confirmed, as whoever answers 503 lets its clients do."""
    while True:
        try:
            await sender.send(message)
            return
        except UnavailableError:
            await asyncio.sleep(0.05)


async def consume(consumer: Subscription | Queue, got: Counter[bytes]) -> None:
    """Count what is settled, whatever becomes of the server meanwhile."""

    async def count(delivery: Delivery) -> None:
        got[delivery.message.body] += 1

    while True:
        with contextlib.suppress(UnavailableError):
            await consumer.run(count, concurrency=8)


async def both_ends(kind: str, url: str, lease: str) -> tuple[Topic | Queue, Subscription | Queue]:
    """Open a topic and its subscription, or a queue twice."""
    if kind == "topic":
        url = with_options(url, topic="t")
        sender = await open_topic(url)
        return sender, await open_subscription(f"{url}&subscription=s&lease={lease}")
    url = with_options(url, queue="q", lease=lease)
    return await open_queue(url), await open_queue(url)


async def lose_nothing_while_killed(kind: str, server: Server, **options: str) -> None:
    """Kill a server twice under a hundred publishers: all that was confirmed arrives.

    ``options`` stand in the URL.
    """
    publishers, each = 100, 20
    sender, consumer = await both_ends(kind, with_options(server.url, **options), "1")
    got: Counter[bytes] = Counter()
    sent: set[bytes] = set()

    async def publish(number: int) -> None:
        for n in range(each):
            body = b"%d.%d" % (number, n)
            await send_surely(sender, Message(body))
            sent.add(body)
            await asyncio.sleep(0.01)

    consuming = asyncio.create_task(consume(consumer, got))
    publishing = [asyncio.create_task(publish(number)) for number in range(publishers)]
    for part in (1 / 3, 1 / 2):
        enough = part * publishers * each
        await eventually(lambda enough=enough: len(sent) > enough)  # type: ignore[misc]
        server.kill()
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.restart)
    async with asyncio.timeout(60):
        await asyncio.gather(*publishing)
        while sent - got.keys():
            await asyncio.sleep(0.05)
    assert len(sent) == publishers * each
    consuming.cancel()
    await asyncio.wait([consuming])
    await sender.close()
    await consumer.close()
