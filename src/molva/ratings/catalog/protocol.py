"""What every catalog promises, whatever it is kept in.

The catalog is what a deployment's processes agree on beside its ratings: today the
campaigns. It is small, read often and written rarely, so a process keeps what it read and
asks ``revision`` whether that still holds.

    CatalogError
    ├── CatalogURLError            correct the URL
    ├── ScaleNarrowedError         keep the old scale within the new one, or start a campaign
    ├── CatalogUnavailableError    try again later; nothing was changed
    │   └── CatalogBrokenError     this process must not write to it again: start a new one
    ├── CatalogDamagedError        restore it from a copy
    └── CatalogVersionError        the file is newer, or no catalog: nothing was touched
"""

from typing import Protocol, final

from molva.ratings.campaign import Campaign

__all__ = [
    "Catalog",
    "CatalogBrokenError",
    "CatalogDamagedError",
    "CatalogError",
    "CatalogURLError",
    "CatalogUnavailableError",
    "CatalogVersionError",
    "ScaleNarrowedError",
]


class CatalogError(Exception):
    """Anything that a catalog could not do."""


@final
class CatalogURLError(CatalogError, ValueError):
    """The URL names no catalog that can be opened."""


@final
class ScaleNarrowedError(CatalogError, ValueError):
    """The new scale would leave out rates that visitors may have given already."""

    def __init__(self, old: Campaign, new: Campaign) -> None:
        super().__init__(
            f"campaign {new.name!r}: scale {new.minimum} to {new.maximum} is refused: it leaves "
            f"out rates of {old.minimum} to {old.maximum}, which may have been given already; "
            "a scale can only become wider, a narrower one needs a new campaign"
        )
        self.old = old
        self.new = new


class CatalogUnavailableError(CatalogError):
    """The catalog cannot be reached or is busy. Nothing was changed; try again later."""


@final
class CatalogBrokenError(CatalogUnavailableError):
    """A write failed in a way after which this process may not write there again."""


@final
class CatalogDamagedError(CatalogError):
    """The catalog cannot be read: truncated or overwritten."""


@final
class CatalogVersionError(CatalogError):
    """The catalog was written by a newer version, or is none at all. It was not touched."""


class Catalog(Protocol):
    """Where campaigns are kept. All methods belong to one event loop."""

    async def campaigns(self) -> list[Campaign]:
        """Return all campaigns, in the order of their names.

        Raises:
            CatalogError: The catalog failed.
        """
        ...

    async def campaign(self, name: str) -> Campaign | None:
        """Return the campaign of that name; None where there is none.

        Raises:
            CatalogError: The catalog failed.
        """
        ...

    async def put_campaign(self, campaign: Campaign) -> bool:
        """Store a campaign: a new one, or in place of the one of that name.

        Returns:
            True if it was created. Storing what is there already changes nothing.

        Raises:
            ValueError: A field is outside what is accepted: see ``check_campaign``.
            ScaleNarrowedError: The campaign exists with a scale that does not fit into
                the new one.
            CatalogError: The catalog failed; nothing was changed.
        """
        ...

    async def revision(self) -> int:
        """Return a number that differs whenever any process changed anything in between.

        Cheap: a look at a file, or one round trip. It may also differ without a change, and
        compares only with other answers of this object.

        Raises:
            CatalogError: The catalog failed.
        """
        ...

    async def close(self) -> None:
        """Release the catalog. Idempotent."""
        ...
