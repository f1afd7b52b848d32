"""The Kafka driver passes the suite of all drivers."""

import asyncio
import itertools
import time
import uuid

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from molva.messaging.conformance import Harness, TopicConformance
from molva.messaging.url import with_options

__all__ = ["KafkaHarness", "remove_topics"]


class KafkaHarness(Harness):
    # A rebalance: everybody has to be told by a heartbeat, some 0.2 s here, in two rounds.
    share_interval = 1.5
    settle_interval = 0.3
    quiet = 0.5
    death_interval = 6.0
    lane_grace = 3.0
    ack_orders = 4

    def __init__(self, url: str) -> None:
        super().__init__()
        self.prefix = f"t{uuid.uuid4().hex[:8]}-"
        self._server_url = url
        self._session = "4"

    def base_url(self) -> str:
        return with_options(self._server_url, session=self._session, grace="3")

    def lengthen_sessions(self) -> None:
        self._session = "120"

    def key_in_lane(self, lane: int, lanes: int) -> str:
        return next(k for k in map(str, itertools.count()) if murmur2_lane(k, lanes) == lane)

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(remove_topics, self._server_url, self.prefix)


def murmur2_lane(key: str, lanes: int) -> int:
    """Return the partition that Kafka's Java clients choose for a key."""
    data, m = key.encode(), 0x5BD1E995
    mask = 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    whole = len(data) // 4 * 4
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = (h * m & mask) ^ k
    rest = data[whole:]
    if rest:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    h ^= h >> 15
    return (h & 0x7FFFFFFF) % lanes


def remove_topics(url: str, prefix: str, within: float = 90.0) -> None:
    """Remove the topics whose names begin so: a server with thousands of them is slow.

    A server that was held or killed a moment ago may have no controller yet, and a client that
    learned that may wait for one in vain: another is asked, until ``within`` seconds are over.
    """
    server = url.partition("://")[2].partition("?")[0].rpartition("@")[2].rstrip("/")
    deadline = time.monotonic() + within
    while True:
        try:
            return _remove_topics_once(server, prefix)
        except KafkaException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _remove_topics_once(server: str, prefix: str) -> None:
    admin = AdminClient({"bootstrap.servers": server})
    names = [name for name in admin.list_topics(timeout=10).topics if name.startswith(prefix)]
    if names:
        for future in admin.delete_topics(names, request_timeout=10).values():
            try:
                future.result()
            except KafkaException as failure:
                # An earlier try removed it, and its answer was lost.
                if failure.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise


class TestKafka(TopicConformance):
    @pytest.fixture
    def harness(self, kafka_url: str) -> Harness:
        return KafkaHarness(kafka_url)
