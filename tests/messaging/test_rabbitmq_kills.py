"""RabbitMQ servers that are killed as soon as something new has stored its first message.

Under load is for the suite of all drivers.
"""

import asyncio
from collections.abc import Iterator

import pytest

from molva.messaging import Message, open_queue, open_subscription, open_topic, with_options
from molva.messaging.conformance import take
from tests.brokers import Server, private_rabbitmq


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with private_rabbitmq(hurried=True) as server:
        yield server


@pytest.mark.parametrize("delay", [0.0, 10.0])
async def test_a_message_outlives_a_server_killed_as_soon_as_its_new_queues_stored_it(
    server: Server, delay: float
) -> None:
    """A delayed one lies in queues of its own, which are as new."""
    url = with_options(server.url, queue=f"new-{delay:.0f}")
    async with await open_queue(url) as queue:
        await queue.send(Message(b"1", delay=delay))
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        [delivery] = await take(queue, 1)
        assert delivery.message.body == b"1"


async def test_a_new_subscription_outlives_one_that_was_killed_when_it_was_made(
    server: Server,
) -> None:
    url = with_options(server.url, topic="new")
    async with await open_topic(url) as topic:
        await topic.send(Message(b"kept"))
        async with await open_subscription(with_options(url, subscription="s")) as subscription:
            await topic.send(Message(b"sent"))
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            deliveries = await take(subscription, 2)
            assert [delivery.message.body for delivery in deliveries] == [b"kept", b"sent"]
