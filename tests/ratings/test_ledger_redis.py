"""The Redis ledger passes the suite of all ledgers."""

from collections.abc import AsyncIterator
from uuid import uuid4

import msgspec
import pytest
from redis.asyncio import Redis

from tests.ratings.ledger_suite import LedgerHarness, LedgerSuite


class RedisHarness(LedgerHarness):
    examples = 40

    def __init__(self, base: str) -> None:
        self.base = base
        self.prefix = f"test-{uuid4().hex[:12]}"

    def url(self, **options: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"{self.base}?prefix={self.prefix}&{query}".rstrip("&")

    async def reset(self) -> None:
        async with Redis.from_url(self.base) as client:
            keys = [key async for key in client.scan_iter(f"{self.prefix}:*", count=1_000)]
            if keys:
                await client.delete(*keys)

    async def erase_comments(self) -> None:
        async with Redis.from_url(self.base) as client:
            for key in [key async for key in client.scan_iter(f"{self.prefix}:*:log")]:
                for at, found in enumerate(await client.lrange(key, 0, -1)):
                    packed = bytes(found)  # type: ignore[arg-type]
                    head = 31 + int.from_bytes(packed[29:31], "big")
                    words = msgspec.msgpack.decode(packed[head:])
                    words[1] = None
                    erased = packed[:head] + msgspec.msgpack.encode(words)
                    await client.lset(key, at, erased)  # type: ignore[arg-type]

    async def derived(self) -> object:
        raise AssertionError("nothing can be rebuilt")


class TestRedis(LedgerSuite):
    @pytest.fixture
    async def harness(self, redis_url: str) -> AsyncIterator[LedgerHarness]:
        harness = RedisHarness(redis_url)
        yield harness
        await harness.reset()
