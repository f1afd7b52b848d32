"""Molva on RabbitMQ against raw aio-pika, on quorum queues, which sync what they confirm."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Final

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractIncomingMessage
from tests.brokers import private_rabbitmq

from benchmarks.brokers import IN_FLIGHT, against_raw
from molva.messaging import Message
from molva.messaging.drivers._amqp_options import Names

__all__ = ["rabbitmq"]

# Body size to the number of messages a turn: some seconds' work of a client in pure Python.
_NUMBERS: Final = {16: 4_000, 1_024: 4_000, 65_536: 1_500}
# As Molva receives: what is taken and settled at once.
_BATCH: Final = 1_000


def rabbitmq() -> None:
    """Measure sending and receiving."""
    with private_rabbitmq() as server:
        against_raw(
            "rabbitmq",
            "Messaging on RabbitMQ against raw aio-pika",
            server.url,
            _Raw(server.url),
            lambda: f"bench-{uuid.uuid4().hex[:8]}",
            _NUMBERS,
        )


class _Raw:
    """aio-pika in one asyncio process, on the very exchanges and queues that Molva made.

    Sending: persistent, mandatory, confirmed, 256 under way. Receiving: a consumer with a window of
    two batches, so that one is on its way while the other is taken in hand; the newest of a batch
    acknowledges all of it.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, topic: str, messages: list[Message]) -> float:
        async def work(channel: AbstractChannel) -> float:
            exchange = await channel.get_exchange(Names.exchange_of("molva", topic))
            await _publish(exchange, Message(b"warm-up"))
            started = time.perf_counter()
            for at in range(0, len(messages), IN_FLIGHT):
                some = messages[at : at + IN_FLIGHT]
                await asyncio.gather(*(_publish(exchange, message) for message in some))
            return len(messages) / (time.perf_counter() - started)

        return self._run(work)

    def send_one_by_one(self, topic: str, messages: list[Message]) -> float:
        async def work(channel: AbstractChannel) -> float:
            exchange = await channel.get_exchange(Names.exchange_of("molva", topic))
            await _publish(exchange, Message(b"warm-up"))
            started = time.perf_counter()
            for message in messages:
                await _publish(exchange, message)
            return len(messages) / (time.perf_counter() - started)

        return self._run(work)

    def receive(self, topic: str, number: int) -> float:
        async def work(channel: AbstractChannel) -> float:
            await channel.set_qos(prefetch_count=2 * _BATCH)
            queue = await channel.get_queue(Names.of_subscription("molva", topic, "s").main)
            began, first, taken = 0.0, 0, 0
            over = asyncio.Event()

            async def take(message: AbstractIncomingMessage) -> None:
                nonlocal began, first, taken
                taken += 1
                place = taken
                _ = message.message_id, message.body, message.headers
                if place % _BATCH == 0 or place == number:
                    await message.ack(multiple=True)
                    if not first:
                        began, first = time.perf_counter(), place
                if place == number:
                    over.set()

            await queue.consume(take)
            await over.wait()
            return (number - first) / (time.perf_counter() - began)

        return self._run(work)

    def _run(self, work: Callable[[AbstractChannel], Awaitable[float]]) -> float:
        async def run() -> float:
            async with await aio_pika.connect(self._url) as connection:
                return await work(await connection.channel(on_return_raises=True))

        return asyncio.run(run())


async def _publish(exchange: AbstractExchange, message: Message) -> None:
    made = aio_pika.Message(
        message.body,
        message_id=message.id.hex(),
        headers={"key": message.key or ""},
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )
    await exchange.publish(made, routing_key="", mandatory=True)
