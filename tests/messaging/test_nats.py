"""The NATS driver passes the suite of all drivers; channels have tests of their own."""

import dataclasses
import secrets

import nats
import pytest

from molva.messaging import with_options
from molva.messaging.conformance import PATIENCE, Harness, QueueConformance, TopicConformance
from molva.messaging.driver import Capabilities
from molva.messaging.drivers import _nats_consumer
from molva.messaging.drivers import nats as driver
from molva.messaging.drivers._nats_messages import Names
from molva.messaging.url import Kind


class NATSHarness(Harness):
    # Long enough to acknowledge what a publisher stored, one by one, on a busy machine: each is
    # a sync.
    lease = 1.5
    moment = 0.5
    quiet = 0.15
    silences = 1
    # Deleting is seen to by who consumes; here more often than in earnest, to wait for less.
    delete_interval = 0.5

    def __init__(self, server_url: str) -> None:
        super().__init__()
        self._server_url = server_url
        # Whoever else uses the server sees other names.
        self._prefix = f"test-{secrets.token_hex(6)}"
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(_nats_consumer, "_LOOK", 0.2)

    def base_url(self) -> str:
        return with_options(self._server_url, prefix=self._prefix, sync="always")

    def capabilities(self, kind: Kind) -> Capabilities:
        best = driver.QUEUE_CAPABILITIES if kind == "queue" else driver.TOPIC_CAPABILITIES
        return one_server(best)

    async def kept(self, topic: str = "t") -> int:
        client = await nats.connect(self._server_url)
        try:
            stream = Names(self._prefix, "topic", topic).stream
            streams = client.jetstream(timeout=PATIENCE)
            return (await streams.stream_info(stream)).state.messages
        finally:
            await client.close()

    async def close(self) -> None:
        await super().close()
        self._patch.undo()
        client = await nats.connect(self._server_url)
        try:
            streams = client.jetstream(timeout=PATIENCE)
            for found in await streams.streams_info():
                name = found.config.name or ""
                if name.startswith(f"{self._prefix}_"):
                    await streams.delete_stream(name)
        finally:
            await client.close()


def one_server(best: Capabilities) -> Capabilities:
    """Return what one server can do that syncs: all but to outlive its machine."""
    return dataclasses.replace(best, survives=best.survives - {"node"})


class TestNATSTopic(TopicConformance):
    @pytest.fixture
    def harness(self, nats_url: str) -> Harness:
        return NATSHarness(nats_url)


class TestNATSQueue(QueueConformance):
    @pytest.fixture
    def harness(self, nats_url: str) -> Harness:
        return NATSHarness(nats_url)
