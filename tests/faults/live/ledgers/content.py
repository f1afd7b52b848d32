"""What every ledger is read into."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

__all__ = ["Content", "Kept", "Row", "Running"]

# (campaign, item or None) to (count, sum, distribution), as a ledger keeps them.
Kept = Mapping[tuple[str, str | None], tuple[int, int, Mapping[int, int]]]


class Running(NamedTuple):
    """What a ledger keeps beside a rating: its place in its item and in its campaign.

    The sums are those of all rates up to and with this one.
    """

    item_position: int
    item_sum: int
    campaign_position: int
    campaign_sum: int


class Row(NamedTuple):
    """One rating in the ledger."""

    campaign: str
    seq: int
    id: bytes
    item: str
    rate: int
    running: Running | None = None


@final
@dataclass(frozen=True, slots=True)
class Content:
    """All that a ledger holds.

    Attributes:
        rows: Its ratings, by campaign and sequence number.
        totals: What it keeps beside them.
        known: (campaign, id) of what would be known if it came again, where a ledger keeps
            ids apart from its ratings; None where it does not.
    """

    rows: list[Row]
    totals: Kept
    known: frozenset[tuple[str, bytes]] | None = None
