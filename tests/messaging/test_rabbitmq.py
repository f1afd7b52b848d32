"""The RabbitMQ driver passes the suite of all drivers."""

import contextlib
import secrets

import aiormq
import pytest
from aiormq.exceptions import AMQPError

from molva.messaging import with_options
from molva.messaging.conformance import Harness, QueueConformance, TopicConformance
from molva.messaging.drivers._amqp_options import Names


class RabbitMQHarness(Harness):
    moment = 0.5
    quiet = 0.3

    def __init__(self, server_url: str) -> None:
        super().__init__()
        self._server_url = server_url
        # Whoever else uses the server sees other names.
        self._prefix = f"test-{secrets.token_hex(6)}"

    def base_url(self) -> str:
        return with_options(self._server_url, prefix=self._prefix)

    async def kept(self, topic: str = "t") -> int:
        total = 0
        async with aiormq.connect(self._server_url) as connection:
            for subscription in ("a", "b"):
                channel = await connection.channel()
                names = Names.of_subscription(self._prefix, topic, subscription)
                with contextlib.suppress(AMQPError):
                    found = await channel.queue_declare(names.main, passive=True)
                    total += found.message_count or 0
        return total


class TestRabbitMQTopic(TopicConformance):
    @pytest.fixture
    def harness(self, rabbitmq_url: str) -> Harness:
        return RabbitMQHarness(rabbitmq_url)


class TestRabbitMQQueue(QueueConformance):
    @pytest.fixture
    def harness(self, rabbitmq_url: str) -> Harness:
        return RabbitMQHarness(rabbitmq_url)
