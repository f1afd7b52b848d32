"""What the service answers in JSON: one type for each document.

Handlers encode these and the OpenAPI document describes these, so that the two cannot
come to differ. Refusals are in ``problem``.
"""

from collections.abc import Sequence
from typing import final

import msgspec

from molva.ratings.campaign import Campaign
from molva.ratings.ledger.protocol import Total

__all__ = ["Accepted", "CampaignList", "LiveTotal", "Readiness", "TotalAnswer"]


@final
class Accepted(msgspec.Struct, frozen=True):
    """A rating was stored and will be counted once.

    Attributes:
        id: The rating's id, a UUID in lower case. Sending the same rating under it again
            is safe.
    """

    id: str


@final
class TotalAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A moving average and what stands around it.

    Attributes:
        average: Mean of the last ``n`` rates.
        n: How many ratings the average takes.
        count: How many ratings there are in all.
        distribution: Rate to number of ratings, of all ``count``; rates never given are
            absent.
        as_of: The campaign's sequence number up to which all of this holds.
        pending: Ratings accepted and not yet counted; null where the broker cannot tell.
    """

    average: float
    n: int
    count: int
    distribution: dict[int, int]
    as_of: int
    pending: int | None


@final
class LiveTotal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The data of a live ``total`` event; only ``count``, 0, while there is nothing yet.

    Attributes:
        count: How many ratings there are in all.
        average: Mean of the last ``n`` rates.
        n: How many ratings the average takes.
        distribution: Rate to number of ratings, of all ``count``.
        as_of: The campaign's sequence number up to which all of this holds.
    """

    count: int
    average: float | None = None
    n: int | None = None
    distribution: dict[int, int] | None = None
    as_of: int | None = None

    @classmethod
    def of(cls, total: Total | None) -> "LiveTotal":
        """Return the event's data for what the ledger answered."""
        if total is None:
            return cls(count=0)
        return cls(
            count=total.count,
            average=total.average,
            n=total.n,
            distribution=dict(total.distribution),
            as_of=total.as_of,
        )


@final
class CampaignList(msgspec.Struct, frozen=True):
    """All campaigns, in the order of their names."""

    campaigns: Sequence[Campaign]


@final
class Readiness(msgspec.Struct, frozen=True):
    """This process is ready for requests.

    Attributes:
        pending: Ratings accepted and not yet counted; null where the broker cannot tell.
    """

    pending: int | None
