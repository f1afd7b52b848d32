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

from molva._base.url import ResourceURL, one_of
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
    "open_catalog",
]

# Scheme to the options that its catalog knows.
_OPTIONS: Final = {"sqlite": ("create",)}


async def open_catalog(url: str) -> Catalog:
    """Open the catalog that ``url`` names, making it where it is missing.

    A new catalog holds the campaign ``default``.

    Args:
        url: ``sqlite:///var/lib/molva/catalog.db`` is the file
            ``/var/lib/molva/catalog.db``, percent-encoded where needed. Its folder must
            exist. ``?create=never`` refuses to make a missing file.

    Raises:
        CatalogURLError: The URL is wrong: an unknown scheme, option or value, no path.
        CatalogError: The catalog cannot be opened.
    """
    parsed = ResourceURL.read(url, what="catalog", file="catalog", error=CatalogURLError)
    parsed.check_scheme(_OPTIONS)
    parsed.check_options(_OPTIONS[parsed.scheme])
    create = parsed.option("create", one_of("auto", "never"), "auto")
    # The import waits until it is needed: another scheme does without apsw.
    from molva.ratings.catalog.sqlite import SQLiteCatalog

    return await SQLiteCatalog.open(str(parsed.file()), create=create == "auto")
