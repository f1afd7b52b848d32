"""The PostgreSQL catalog passes the suite of all catalogs; what only its server can do."""

from collections.abc import AsyncIterator
from uuid import uuid4

import asyncpg
import pytest

from molva.ratings.catalog import (
    CatalogUnavailableError,
    CatalogURLError,
    CatalogVersionError,
    migrate_catalog,
    open_catalog,
)
from tests.ratings.catalog_suite import TALK, CatalogSuite


@pytest.fixture
async def url(postgresql_url: str) -> AsyncIterator[str]:
    schema = f"catalog_{uuid4().hex[:12]}"
    yield f"{postgresql_url}?schema={schema}"
    await _execute(postgresql_url, f"DROP SCHEMA IF EXISTS {schema} CASCADE")


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url.partition("?")[0])
    await connection.execute(statement)
    await connection.close()


class TestPostgreSQLCatalog(CatalogSuite):
    pass


async def test_create_never_makes_no_schema(url: str) -> None:
    with pytest.raises(CatalogVersionError, match="molva migrate"):
        await open_catalog(f"{url}&create=never")


async def test_a_catalog_that_was_migrated_opens_with_create_never(url: str) -> None:
    assert await migrate_catalog(url) == (0, 1)
    assert await migrate_catalog(url) == (1, 1)
    catalog = await open_catalog(f"{url}&create=never")
    assert await catalog.put_campaign(TALK)
    await catalog.close()


async def test_a_newer_catalog_is_left_alone(url: str) -> None:
    await migrate_catalog(url)
    await _execute(url, f"UPDATE {url.partition('schema=')[2]}.molva SET version = 99")
    with pytest.raises(CatalogVersionError, match="version 99"):
        await open_catalog(url)


async def test_a_ledger_is_no_catalog(url: str) -> None:
    await migrate_catalog(url)
    await _execute(url, f"UPDATE {url.partition('schema=')[2]}.molva SET kind = 'ledger'")
    with pytest.raises(CatalogVersionError, match="holds a ledger, no catalog"):
        await open_catalog(url)


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(CatalogUnavailableError, match="cannot be reached"):
        await open_catalog("postgresql://molva@127.0.0.1:1/molva")


async def test_a_missing_database_is_a_wrong_url(postgresql_url: str) -> None:
    with pytest.raises(CatalogURLError, match="does not exist"):
        await open_catalog(postgresql_url.removesuffix("molva") + "nowhere")
