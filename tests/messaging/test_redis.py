"""The Redis driver passes the suite of all drivers; channels have tests of their own."""

import asyncio
import secrets

import pytest
import redis

from molva.messaging import with_options
from molva.messaging.conformance import Harness, QueueConformance, TopicConformance
from molva.messaging.drivers import _redis_queue, _redis_subscription


class RedisHarness(Harness):
    lease = 1.0
    moment = 0.5
    quiet = 0.15
    silences = 1
    # Deleting is seen to once a second, by who receives.
    delete_interval = 1.1

    def __init__(self, server_url: str) -> None:
        super().__init__()
        self._server_url = server_url
        # Whoever else uses the server sees other keys.
        self._prefix = f"test-{secrets.token_hex(6)}"
        self._patch = pytest.MonkeyPatch()

    def base_url(self) -> str:
        return with_options(self._server_url, prefix=self._prefix)

    def let_only_wake_ups_wake(self) -> None:
        self._patch.setattr(_redis_queue, "_LOOK", 60.0)
        self._patch.setattr(_redis_subscription, "_LOOK", 60.0)

    def let_deleting_hurry(self) -> None:
        # Not in all tests: who looks so often also finds a lease that ran out so much sooner.
        self._patch.setattr(_redis_subscription, "_LOOK", 0.2)
        self.delete_interval = 0.3

    async def cut_connections(self) -> None:
        with redis.Redis.from_url(self._server_url) as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    async def kept(self, topic: str = "t") -> int:
        with redis.Redis.from_url(self._server_url) as client:
            return int(client.xlen(f"{self._prefix}:{{topic:{topic}}}:log"))

    async def close(self) -> None:
        await super().close()
        self._patch.undo()
        await asyncio.to_thread(self._forget)

    def _forget(self) -> None:
        with redis.Redis.from_url(self._server_url) as client:
            for key in client.scan_iter(match=f"{self._prefix}:*", count=10_000):
                client.unlink(key)


class TestRedisTopic(TopicConformance):
    @pytest.fixture
    def harness(self, redis_url: str) -> Harness:
        return RedisHarness(redis_url)


class TestRedisQueue(QueueConformance):
    @pytest.fixture
    def harness(self, redis_url: str) -> Harness:
        return RedisHarness(redis_url)
