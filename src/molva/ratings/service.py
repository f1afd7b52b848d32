"""What the HTTP surface needs of the process that it runs in."""

from typing import Protocol

from molva._base.clock import Clock
from molva.ratings.catalog.protocol import Catalog
from molva.ratings.ledger.protocol import Ledger

__all__ = ["Service"]


class Service(Protocol):
    """One process of the rating service, as its HTTP surface sees it."""

    @property
    def catalog(self) -> Catalog:
        """Where campaigns are kept."""
        ...

    @property
    def ledger(self) -> Ledger:
        """Where ratings are counted."""
        ...

    @property
    def clock(self) -> Clock:
        """Where time comes from."""
        ...

    async def pending(self) -> int | None:
        """Return how many messages were accepted and are not yet applied.

        None where the broker cannot tell.
        """
        ...

    async def ready(self) -> list[str]:
        """Return why this process should get no requests now; empty if it should.

        The reasons are shown to whoever asks: no secrets, no addresses.
        """
        ...

    async def metrics(self) -> bytes:
        """Return the process's metrics in Prometheus' text format."""
        ...
