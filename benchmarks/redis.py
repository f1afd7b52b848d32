"""Molva on Redis Streams against raw redis-py with hiredis, on a server that syncs every write."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis
from tests.brokers import private_redis

from benchmarks.brokers import IN_FLIGHT, against_raw
from molva.messaging import Message

__all__ = ["redis"]


def redis() -> None:
    """Measure sending and receiving."""
    with private_redis() as server:
        against_raw(
            "redis",
            "Messaging on Redis Streams against raw redis-py",
            server.url,
            _Raw(server.url),
            lambda: f"bench-{uuid.uuid4().hex[:8]}",
        )


class _Raw:
    """redis-py in one asyncio process: pipelines of XADD; XREADGROUP, then XACK of all read.

    Receiving, it takes up to a thousand, takes id, body and key of each in hand, and waits for
    the XACK. That asks nobody whether they are still its own: what another consumer has taken
    over meanwhile is acknowledged all the same.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, topic: str, messages: list[Message]) -> float:
        async def work(client: Redis) -> float:
            await client.xadd(topic, _fields(Message(b"warm-up", key="")))
            started = time.perf_counter()
            for at in range(0, len(messages), IN_FLIGHT):
                async with client.pipeline(transaction=False) as pipeline:
                    for message in messages[at : at + IN_FLIGHT]:
                        pipeline.xadd(topic, _fields(message))
                    await pipeline.execute()
            return len(messages) / (time.perf_counter() - started)

        return self._run(work)

    def send_one_by_one(self, topic: str, messages: list[Message]) -> float:
        async def work(client: Redis) -> float:
            await client.xadd(topic, _fields(Message(b"warm-up", key="")))
            started = time.perf_counter()
            for message in messages:
                await client.xadd(topic, _fields(message))
            return len(messages) / (time.perf_counter() - started)

        return self._run(work)

    def receive(self, topic: str, number: int) -> float:
        async def work(client: Redis) -> float:
            await client.xgroup_create(topic, "g", "0")
            first = await self._settle_batch(client, topic)
            started = time.perf_counter()
            left = number - first
            while left > 0:
                left -= await self._settle_batch(client, topic)
            return (number - first) / (time.perf_counter() - started)

        return self._run(work)

    async def _settle_batch(self, client: Redis, topic: str) -> int:
        reply: Any = await client.xreadgroup("g", "c", {topic: ">"}, count=1_000)
        [(_, entries)] = reply.items() if isinstance(reply, dict) else reply
        if isinstance(reply, dict):
            [entries] = entries
        for _, fields in entries:
            fields[b"id"], fields[b"body"], fields[b"key"]
        await client.xack(topic, "g", *(id_ for id_, _ in entries))
        return len(entries)

    def _run(self, work: Callable[[Redis], Awaitable[float]]) -> float:
        async def run() -> float:
            async with Redis.from_url(self._url) as client:
                return await work(client)

        return asyncio.run(run())


def _fields(message: Message) -> Any:
    return {"id": message.id, "body": message.body, "key": message.key}
