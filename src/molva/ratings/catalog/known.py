"""The campaigns that a process knows: kept in memory, looked up again when they changed."""

from typing import Final, final

from molva._base.clock import Clock
from molva.ratings.campaign import Campaign
from molva.ratings.catalog.protocol import Catalog

__all__ = ["KnownCampaigns"]

# Seconds between two looks whether the catalog has changed.
_INTERVAL: Final = 1.0


@final
class KnownCampaigns:
    """A catalog's campaigns, as they were a moment ago.

    A change is followed within a second, a new campaign at once: whoever meets an unknown
    name calls ``refresh`` before he believes it.
    """

    def __init__(self, catalog: Catalog, clock: Clock) -> None:
        self._catalog = catalog
        self._clock = clock
        self._known: dict[str, Campaign] = {}
        self._revision: object = None
        self._next_look = 0.0
        self._looking = 0

    def get(self, name: str) -> Campaign | None:
        """Return the campaign; None where it has to be looked up, by ``refresh``."""
        # While somebody looks, the others go on with what was known: a server that answers
        # nothing must not hold up everybody for as long as one call may take.
        fresh = self._looking or self._clock.monotonic() < self._next_look
        return self._known.get(name) if fresh else None

    async def refresh(self) -> dict[str, Campaign]:
        """Return all campaigns by name, read anew if anything changed.

        Raises:
            CatalogError: The catalog cannot be read. ``get`` goes on with what was known.
        """
        self._looking += 1
        try:
            revision = await self._catalog.revision()
            if revision != self._revision:
                self._known = {c.name: c for c in await self._catalog.campaigns()}
                self._revision = revision
        finally:
            self._looking -= 1
            # Also after a failure: one look a second is enough to see that it is over.
            self._next_look = self._clock.monotonic() + _INTERVAL
        return self._known

    def last_known(self, name: str) -> Campaign | None:
        """Return the campaign as it was when the catalog could last be read."""
        return self._known.get(name)
