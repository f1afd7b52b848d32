"""The PostgreSQL ledger passes the suite of all ledgers."""

from collections.abc import AsyncIterator
from uuid import uuid4

import asyncpg
import pytest

from tests.ratings.ledger_suite import LedgerHarness, LedgerSuite

_TABLES = (
    *("campaign", "scope", "block", "correction", "node", "amended", "entry"),
    *("comment", "reason", "no_effect"),
)


class PostgreSQLHarness(LedgerHarness):
    examples = 15
    long = 2_000

    def __init__(self, base: str) -> None:
        self.base = base
        self.schema = f"ledger_{uuid4().hex[:12]}"

    def url(self, **options: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"{self.base}?schema={self.schema}&{query}".rstrip("&")

    async def execute(self, *statements: str) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(self.base)
        try:
            await connection.execute(f"SET search_path = {self.schema}")
            found: list[asyncpg.Record] = []
            for statement in statements:
                found = await connection.fetch(statement)
            return found
        finally:
            await connection.close()

    async def reset(self) -> None:
        if await self.execute(f"SELECT FROM pg_namespace WHERE nspname = '{self.schema}'"):
            await self.execute(f"TRUNCATE {', '.join(_TABLES)} RESTART IDENTITY")

    async def erase_comments(self) -> None:
        await self.execute("DELETE FROM comment")

    async def derived(self) -> object:
        return {
            table: sorted(map(repr, await self.execute(f"SELECT * FROM {table}")))
            for table in _TABLES
        }

    async def drop(self) -> None:
        await self.execute(f"DROP SCHEMA IF EXISTS {self.schema} CASCADE")


class TestPostgreSQL(LedgerSuite):
    @pytest.fixture
    async def harness(self, postgresql_url: str) -> AsyncIterator[LedgerHarness]:
        harness = PostgreSQLHarness(postgresql_url)
        yield harness
        await harness.drop()
