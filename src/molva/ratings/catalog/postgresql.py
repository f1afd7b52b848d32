"""PostgreSQL catalog: campaigns in a database, for processes on any number of machines.

URL:
    ``postgresql://user:password@db.example:5432/molva``

    ``schema``
        Name of the catalog's schema in the database. Default ``molva_catalog``.
    ``create``
        ``auto`` makes a missing schema, ``never`` refuses to. Default auto.
    ``timeout``
        Seconds that a call may take. Default 5.
    ``connections``, ``statement_cache_size``, and libpq's options
        As the PostgreSQL ledger's.

Design:
    One row counts the changes. Its number is the revision, and its lock is what puts
    writers in a line. NOTIFY was rejected: it needs a connection of its own, is lost while
    that one is broken, and a PgBouncer between us does not pass it on.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, TypeVar, final

import asyncpg

from molva._base.postgresql import (
    PostgreSQL,
    PostgreSQLError,
    PostgreSQLURL,
    RefusedError,
    UnsuitableError,
    VersionError,
)
from molva._base.postgresql_schema import (
    check_or_make_schema,
    in_schema,
    migrate_schema,
    read_script,
)
from molva._base.url import ResourceURL
from molva.ratings.campaign import Campaign, check_campaign
from molva.ratings.catalog.protocol import (
    CatalogError,
    CatalogUnavailableError,
    CatalogURLError,
    CatalogVersionError,
    ScaleNarrowedError,
)

__all__ = ["PostgreSQLCatalog", "migrate_postgresql_catalog"]

T = TypeVar("T")

# A script for each version. One that was released never changes.
_SCRIPTS: Final = ("_postgresql_1.sql",)

_SCHEMA: Final = "molva_catalog"
# Seconds that a call may take: a visitor waits for some of them.
_TIMEOUT: Final = 5.0

_COLUMNS: Final = 'name, question, minimum, maximum, "window"'


@final
class PostgreSQLCatalog:
    """A catalog in a schema of PostgreSQL. See ``Catalog``. Made by ``open``."""

    def __init__(self, server: PostgreSQL) -> None:
        self._server = server
        schema = server.url.schema
        self._all = in_schema(f"SELECT {_COLUMNS} FROM molva.campaign ORDER BY name", schema)
        self._one = in_schema(f"SELECT {_COLUMNS} FROM molva.campaign WHERE name = $1", schema)
        self._revision = in_schema("SELECT revision FROM molva.revision", schema)
        self._lock = in_schema("SELECT FROM molva.revision FOR UPDATE", schema)
        self._moved = in_schema("UPDATE molva.revision SET revision = revision + 1", schema)
        self._put = in_schema(
            f"INSERT INTO molva.campaign ({_COLUMNS}) VALUES ($1, $2, $3, $4, $5) "
            "ON CONFLICT (name) DO UPDATE SET question = excluded.question, "
            'minimum = excluded.minimum, maximum = excluded.maximum, "window" = excluded."window"',
            schema,
        )

    @classmethod
    async def open(cls, url: ResourceURL) -> "PostgreSQLCatalog":
        """Return the catalog that ``url`` names, made where it is missing and may be made.

        Raises:
            CatalogURLError: The server will not have us: password, database, TLS, rights.
            CatalogVersionError: The schema is of another version, or something else, or the
                server is one that we cannot use.
            CatalogUnavailableError: It cannot be reached now.
        """
        server = PostgreSQL(_settings(url))
        try:
            with _translated(opening=True):
                await check_or_make_schema(server, "catalog", _scripts())
        except BaseException:
            await server.close()
            raise
        return cls(server)

    async def campaigns(self) -> list[Campaign]:
        """Return all campaigns, in the order of their names."""
        rows = await self._call(lambda connection: connection.fetch(self._all))
        return [_campaign(row) for row in rows]

    async def campaign(self, name: str) -> Campaign | None:
        """Return the campaign of that name; None where there is none."""
        if "\0" in name:
            return None  # which PostgreSQL would refuse to look for
        row = await self._call(lambda connection: connection.fetchrow(self._one, name))
        return None if row is None else _campaign(row)

    async def put_campaign(self, campaign: Campaign) -> bool:
        """Store a campaign; True if it was created. See ``Catalog``."""
        check_campaign(campaign)

        async def put(connection: asyncpg.Connection) -> bool:
            async with self._server.transaction(connection):
                await connection.execute(self._lock)
                row = await connection.fetchrow(self._one, campaign.name)
                old = None if row is None else _campaign(row)
                if old == campaign:
                    return False
                if old is not None and not (
                    campaign.minimum <= old.minimum and old.maximum <= campaign.maximum
                ):
                    raise ScaleNarrowedError(old, campaign)
                await connection.execute(
                    self._put,
                    campaign.name,
                    campaign.question,
                    campaign.minimum,
                    campaign.maximum,
                    campaign.window,
                )
                await connection.execute(self._moved)
                return old is None

        return await self._call(put)

    async def revision(self) -> int:
        """Return a number that differs whenever any process changed anything in between."""
        revision = await self._call(lambda connection: connection.fetchval(self._revision))
        assert isinstance(revision, int)
        return revision

    async def _call(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        if self._server.closed:
            raise CatalogError(f"{self._server.url.shown}: the catalog is closed")
        with _translated(opening=False):
            return await self._server.run(work)

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._server.close()


async def migrate_postgresql_catalog(url: ResourceURL) -> tuple[int, int]:
    """Make the catalog, or bring it to the newest version; return the old and the new one.

    Raises:
        CatalogError: As ``PostgreSQLCatalog.open``.
    """
    server = PostgreSQL(_settings(url))
    try:
        with _translated(opening=True):
            return await migrate_schema(server, "catalog", _scripts())
    finally:
        await server.close()


def _settings(url: ResourceURL) -> PostgreSQLURL:
    return PostgreSQLURL.read(url, schema=_SCHEMA, timeout=_TIMEOUT)


def _scripts() -> list[str]:
    return [read_script("molva.ratings.catalog", name) for name in _SCRIPTS]


def _campaign(row: asyncpg.Record) -> Campaign:
    name, question, minimum, maximum, window = row
    return Campaign(name=name, question=question, minimum=minimum, maximum=maximum, window=window)


@contextlib.contextmanager
def _translated(*, opening: bool) -> Iterator[None]:
    """Raise what the server's errors mean to whoever uses a catalog."""
    try:
        yield
    except (VersionError, UnsuitableError) as error:
        raise (CatalogVersionError if opening else CatalogUnavailableError)(str(error)) from error
    except RefusedError as error:
        # A server that let us in once is expected to do so again.
        raise (CatalogURLError if opening else CatalogUnavailableError)(str(error)) from error
    except (PostgreSQLError, asyncpg.PostgresError) as error:
        raise CatalogUnavailableError(str(error)) from error
