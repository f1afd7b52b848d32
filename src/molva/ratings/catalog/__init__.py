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

import difflib
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from molva._base.redaction import redact
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

_SCHEMES: Final = ("sqlite",)
_SQLITE_OPTIONS: Final = {"create": ("auto", "never")}


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
    path, options = _parse(url)
    # The import waits until it is needed: another scheme does without apsw.
    from molva.ratings.catalog.sqlite import SQLiteCatalog

    return await SQLiteCatalog.open(path, create=options.get("create", "auto") == "auto")


def _parse(url: str) -> tuple[str, dict[str, str]]:
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        shown = f"catalog URL {redact(url)!r}"
        if not parts.scheme or "://" not in url:
            raise CatalogURLError(f"{shown}: no scheme; 'sqlite:///path/catalog.db' is one")
        raise CatalogURLError(
            f"{shown}: unknown scheme {parts.scheme!r}{_nearest(parts.scheme, _SCHEMES)}"
        )
    if parts.netloc or len(parts.path) < 2 or parts.fragment:
        raise CatalogURLError(
            f"catalog URL {redact(url)!r}: 'sqlite://' and the absolute path of a file are "
            "accepted, as in sqlite:///var/lib/molva/catalog.db; write '#' and '?' in it as "
            "%23 and %3F"
        )
    options: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _SQLITE_OPTIONS:
            raise CatalogURLError(
                f"sqlite: unknown option {name!r}{_nearest(name, tuple(_SQLITE_OPTIONS))}"
            )
        if value not in _SQLITE_OPTIONS[name]:
            raise CatalogURLError(
                f"sqlite: option {name}={value!r}{_nearest(value, _SQLITE_OPTIONS[name])}"
            )
        if name in options:
            raise CatalogURLError(f"sqlite: option {name!r} is given twice")
        options[name] = value
    return unquote(parts.path), options


def _nearest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}"
