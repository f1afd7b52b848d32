"""The catalog: campaigns, in a file or a server that a URL names.

>>> import asyncio, tempfile
>>> async def names(url: str) -> list[str]:
...     catalog = await open_catalog(url)
...     try:
...         return [campaign.name for campaign in await catalog.campaigns()]
...     finally:
...         await catalog.close()
>>> with tempfile.TemporaryDirectory() as folder:
...     asyncio.run(names(f"sqlite://{folder}/catalog.db"))
['default']
"""

from typing import Final

from molva._base.url import POSTGRESQL_OPTIONS, ResourceURL, missing_extra, one_of
from molva.ratings.catalog.protocol import (
    Catalog,
    CatalogBrokenError,
    CatalogDamagedError,
    CatalogError,
    CatalogUnavailableError,
    CatalogURLError,
    CatalogVersionError,
    ScaleNarrowedError,
)

__all__ = [
    "Catalog",
    "CatalogBrokenError",
    "CatalogDamagedError",
    "CatalogError",
    "CatalogURLError",
    "CatalogUnavailableError",
    "CatalogVersionError",
    "ScaleNarrowedError",
    "migrate_catalog",
    "open_catalog",
]

# Scheme to the options that its catalog knows.
_OPTIONS: Final = {
    "sqlite": ("create",),
    "postgresql": POSTGRESQL_OPTIONS,
}


async def open_catalog(url: str) -> Catalog:
    """Open the catalog that ``url`` names, making it where it is missing.

    A new catalog holds the campaign ``default``.

    Args:
        url: ``sqlite:///var/lib/molva/catalog.db`` is the file
            ``/var/lib/molva/catalog.db``, percent-encoded where needed. Its folder must
            exist. ``postgresql://user@host/database`` is a schema of that database.
            ``?create=never`` refuses to make what is missing.

    Raises:
        CatalogURLError: The URL is wrong, or the server that it names refuses it.
        CatalogError: The catalog cannot be opened.
    """
    parsed = _parsed(url)
    # The import waits until it is needed: neither needs the other one's library.
    if parsed.scheme == "postgresql":
        with missing_extra("postgresql", CatalogURLError):
            from molva.ratings.catalog.postgresql import PostgreSQLCatalog

        return await PostgreSQLCatalog.open(parsed)
    from molva.ratings.catalog.sqlite import SQLiteCatalog

    create = parsed.option("create", one_of("auto", "never"), "auto")
    return await SQLiteCatalog.open(str(parsed.file()), create=create == "auto")


async def migrate_catalog(url: str) -> tuple[int, int] | None:
    """Bring a catalog to the newest version; return the old version and the new one.

    Returns:
        None for a catalog that is migrated whenever it is opened.

    Raises:
        CatalogError: As ``open_catalog``.
    """
    parsed = _parsed(url)
    if parsed.scheme == "postgresql":
        with missing_extra("postgresql", CatalogURLError):
            from molva.ratings.catalog.postgresql import migrate_postgresql_catalog

        return await migrate_postgresql_catalog(parsed)
    await (await open_catalog(url)).close()
    return None


def _parsed(url: str) -> ResourceURL:
    parsed = ResourceURL.read(url, what="catalog", file="catalog", error=CatalogURLError)
    parsed.check_scheme(_OPTIONS)
    parsed.check_options(_OPTIONS[parsed.scheme])
    return parsed
