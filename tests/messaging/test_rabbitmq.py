"""The RabbitMQ driver passes the suite of all drivers."""

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from typing import ClassVar

import aiormq
import pytest
from aiormq.exceptions import AMQPError

from molva.messaging import with_options
from molva.messaging.conformance import Harness, QueueConformance, Suite, TopicConformance
from molva.messaging.conformance.dying import Dying
from molva.messaging.conformance.holding import Holding
from molva.messaging.drivers import _amqp_topology
from molva.messaging.drivers._amqp_options import Names
from tests.brokers import Server, private_rabbitmq
from tests.brokers.rabbitmq import rabbitmqctl

# Steps of the ladder that delays of some seconds need.
_STEPS = 8


class RabbitMQHarness(Harness):
    # Whether queues are used at once that are new: nobody kills the server.
    hurries: ClassVar[bool] = True
    moment = 0.5
    quiet = 0.3
    # A quorum queue keeps acknowledgements in its channel while 32 are being written.
    ack_interval = 1.0

    def __init__(self, server_url: str) -> None:
        super().__init__()
        self._server_url = server_url
        # Whoever else uses the server sees other names.
        self._prefix = f"test-{secrets.token_hex(6)}"
        self._made: set[Names] = set()
        self._topics: set[str] = set()
        self._patch = pytest.MonkeyPatch()
        if self.hurries:
            self._patch.setattr(_amqp_topology, "NEW_QUEUE", 0.0)

    def base_url(self) -> str:
        return with_options(self._server_url, prefix=self._prefix)

    def url(self, topic: str = "t", subscription: str | None = None, /, **options: object) -> str:
        self._topics.add(topic)
        self._made.add(Names.of_subscription(self._prefix, topic, subscription or "s"))
        return super().url(topic, subscription, **options)

    def queue_url(self, queue: str = "q", /, **options: object) -> str:
        self._made.add(Names.of_queue(self._prefix, queue))
        return super().queue_url(queue, **options)

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

    async def close(self) -> None:
        await super().close()
        self._patch.undo()
        # A queue is a process with a log of its own: hundreds slow a server down.
        async with aiormq.connect(self._server_url) as connection:
            channel = await connection.channel()
            for topic in self._topics:
                await channel.exchange_delete(Names.exchange_of(self._prefix, topic))
                await channel.exchange_delete(Names.kept_of(self._prefix, topic))
                await channel.queue_delete(Names.kept_of(self._prefix, topic))
            for names in self._made:
                later = [names.later(step) for step in range(_STEPS)]
                for name in (names.main, names.dead, *later):
                    await channel.queue_delete(name, nowait=True)
                for name in later:
                    await channel.exchange_delete(name, nowait=True)
            await channel.basic_qos(prefetch_count=1)  # answered once all before it is done


class TestRabbitMQTopic(TopicConformance):
    @pytest.fixture
    def harness(self, rabbitmq_url: str) -> Harness:
        return RabbitMQHarness(rabbitmq_url)


class TestRabbitMQQueue(QueueConformance):
    @pytest.fixture
    def harness(self, rabbitmq_url: str) -> Harness:
        return RabbitMQHarness(rabbitmq_url)


class DisturbedHarness(RabbitMQHarness):
    """With a server of its own, whose connections can be cut, and which can be restarted."""

    hurries = False

    def __init__(self, server: Server) -> None:
        super().__init__(server.url)
        self._server = server

    async def restart_broker(self) -> None:
        await asyncio.to_thread(self._server.kill)
        await asyncio.to_thread(self._server.start)

    async def cut_connections(self) -> None:
        await asyncio.to_thread(
            rabbitmqctl, self._server.place, "close_all_connections", "cut by a test"
        )


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    with private_rabbitmq(hurried=True) as server:
        yield server


class Disturbed(Suite):
    """What the suite does to a broker that lets it."""

    _disturbed = Dying._disturbed
    test_nothing_is_lost_when_the_broker_restarts_under_load = (
        Dying.test_nothing_is_lost_when_the_broker_restarts_under_load
    )
    test_cut_connections_come_back_by_themselves = (
        Dying.test_cut_connections_come_back_by_themselves
    )
    test_an_ack_after_a_cut_settles_its_message_or_says_that_it_did_not = (
        Holding.test_an_ack_after_a_cut_settles_its_message_or_says_that_it_did_not
    )

    @pytest.fixture
    def harness(self, own_server: Server) -> Harness:
        return DisturbedHarness(own_server)


@pytest.mark.asyncio
class TestDisturbedRabbitMQTopic(Disturbed):
    kind = "topic"


@pytest.mark.asyncio
class TestDisturbedRabbitMQQueue(Disturbed):
    kind = "queue"
