"""What every ledger promises, whatever it is kept in.

A ledger is append-only. It applies a batch of entries in one transaction: each new entry
takes the campaign's next sequence number, and a rating also its position and the running
sum in its item and in its campaign. These never change, so any last n at any ``as_of``
is two look-ups. What corrects a rating is a further entry; its effect is a correction
(position, Δcount, Δsum, from which sequence), which trusted reads add and raw reads leave
out.

    LedgerError
    ├── LedgerURLError             correct the configuration
    ├── LedgerServerError          another server, or other settings of it
    ├── LedgerUnsupportedError     ask for less, or choose a ledger that keeps more
    ├── LedgerUnavailableError     try again later; nothing was applied
    │   └── LedgerBrokenError      this process must not write to it again: start a new one
    └── LedgerVersionError         it is newer or to be migrated, or no ledger: not touched
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol, final

from molva.ratings.rating import Submission

__all__ = [
    "Difference",
    "Ledger",
    "LedgerBrokenError",
    "LedgerCapabilities",
    "LedgerEntry",
    "LedgerError",
    "LedgerServerError",
    "LedgerSize",
    "LedgerURLError",
    "LedgerUnavailableError",
    "LedgerUnsupportedError",
    "LedgerVersionError",
    "Outcome",
    "Total",
]


class LedgerError(Exception):
    """Anything that a ledger could not do."""


@final
class LedgerURLError(LedgerError, ValueError):
    """The URL names no ledger, or an option that its ledger does not have."""


@final
class LedgerServerError(LedgerError):
    """The server cannot keep a ledger: too old, or set to forget what it should keep."""


@final
class LedgerUnsupportedError(LedgerError):
    """This ledger does not keep what would answer that; see its ``LedgerCapabilities``."""


class LedgerUnavailableError(LedgerError):
    """The ledger cannot be reached or is busy. Nothing was applied; try again later."""


@final
class LedgerBrokenError(LedgerUnavailableError):
    """A write failed in a way after which this process may not write there again.

    The batch may reappear or not; the same ids make trying again safe. A new process
    opens the ledger afresh and brings it in order first.
    """


@final
class LedgerVersionError(LedgerError):
    """The ledger is of another version, or is none at all. It was not touched."""


@final
class Outcome(Enum):
    """What became of one submission."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"  # its id stands there with the same content: nothing to do
    CONFLICT = "conflict"  # its id stands there with other content: the first one won
    NO_RATING = "no rating"  # it corrects a rating that this campaign does not have
    NO_EFFECT = "no effect"  # it corrects what is already so, or what was taken back


@final
@dataclass(frozen=True, slots=True)
class LedgerCapabilities:
    """What the ledger can do, with the settings it was opened with.

    Attributes:
        survives: What an applied entry outlives, out of ``kill``, ``power``, ``node``.
        history: Whether reads at every old ``as_of`` are answered, and the derived numbers
            can be rebuilt. Without it, trusted numbers are read at an old ``as_of`` only
            where nothing was corrected since.
        window: How many of the last ratings of an item and of a campaign, and how many of
            a campaign's last entries, can be read and corrected one by one; None for all.
        horizon_seconds: How long ids are remembered; None for ever.
        ids: Whether equal ids meet in the whole ``ledger``, or in one ``campaign`` only.
    """

    survives: frozenset[str]
    history: bool
    window: int | None
    horizon_seconds: float | None
    ids: Literal["ledger", "campaign"]


@final
@dataclass(frozen=True, slots=True)
class Total:
    """A moving average and what stands around it, read at one moment.

    Attributes:
        sum: Sum of the last ``n`` rates.
        n: How many ratings the average takes: the asked-for window, or all if fewer.
        count: How many ratings there are in all, up to ``as_of``.
        distribution: Rate to number of ratings, of all ``count``; rates never given are
            absent.
        as_of: The campaign's sequence number up to which all of this holds.
    """

    sum: int
    n: int
    count: int
    distribution: Mapping[int, int]
    as_of: int

    @property
    def average(self) -> float:
        """The moving average; ``n`` is never 0 in a Total."""
        return self.sum / self.n


@final
@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One line of the ledger. It never changes, but for words that were erased.

    Attributes:
        seq: The campaign's sequence number, dense from 1.
        kind: ``rating``, ``change``, ``retraction``, ``comment``, ``exclusion`` or
            ``restoration``.
        id: 16 bytes; None for a comment that came with its rating, whose id it shares.
        item: What was rated, "" for the campaign itself; None for any other kind.
        rate: Of a rating, or the new one of a change; None for the rest.
        target_seq: The rating that any other kind is about.
        position: How many ratings the item has with this one; None for any other kind.
        campaign_position: How many ratings the campaign has with this entry.
        text: The words of a comment, or the reason of an exclusion; None without, or
            where they were erased.
        accepted_at_us: When the intake accepted it: microseconds since 1970, UTC.
        applied_at_us: When the ledger applied it.
    """

    seq: int
    kind: str
    id: bytes | None
    item: str | None
    rate: int | None
    target_seq: int | None
    position: int | None
    campaign_position: int
    text: str | None
    accepted_at_us: int
    applied_at_us: int


@final
@dataclass(frozen=True, slots=True)
class LedgerSize:
    """How much the ledger holds: campaigns, entries of all kinds, ratings among them."""

    campaigns: int
    entries: int
    ratings: int


@final
@dataclass(frozen=True, slots=True)
class Difference:
    """One number that the ledger keeps and that its entries do not give."""

    campaign: str
    where: str
    kept: object
    recomputed: object


class Ledger(Protocol):
    """Where ratings are counted."""

    @property
    def capabilities(self) -> LedgerCapabilities:
        """What this ledger can do as it was opened."""
        ...

    async def apply(
        self, batch: Sequence[Submission], *, applied_at_us: int
    ) -> list[Outcome | Exception]:
        """Apply a batch in one transaction, in its order.

        When this returns, what was applied is as durable as ``capabilities.survives``
        says, and may be acknowledged.

        Returns:
            For each submission what became of it; an Exception where this one submission
            alone cannot be applied, ever (its neighbours are applied).

        Raises:
            LedgerUnavailableError: Nothing was applied, or, for LedgerBrokenError, it is
                unknown. Try again with the same ids.
        """
        ...

    async def total(
        self,
        campaign: str,
        *,
        item: str | None = None,
        n: int,
        as_of: int | None = None,
        trusted: bool = True,
    ) -> Total | None:
        """Return the average of the last ``n`` ratings at ``as_of``.

        Args:
            campaign: Name of the campaign.
            item: One item of it; None for all of its ratings together.
            n: Window, n ≥ 1.
            as_of: The campaign's sequence number to read at; None for now. One beyond
                the last is read as the last.
            trusted: With corrections (changes, retractions, exclusions); without them
                every rating counts as it was first given.

        Returns:
            None where there is nothing to average.

        Raises:
            LedgerUnsupportedError: The ledger does not keep what would answer that.
            LedgerError: The ledger failed.
        """
        ...

    async def last_seq(self, campaign: str) -> int:
        """Return the campaign's last sequence number; 0 where it has no entry."""
        ...

    def entries(self, campaign: str, *, since_seq: int = 0) -> AsyncIterator[LedgerEntry]:
        """Yield the campaign's entries after ``since_seq`` in order, as they stand now.

        Raises:
            LedgerUnsupportedError: The ledger keeps only later ones.
        """
        ...

    async def size(self) -> LedgerSize:
        """Return how much the ledger holds, at a cost that grows with campaigns only."""
        ...

    def verify(self) -> AsyncIterator[Difference]:
        """Recompute every number from the entries; yield each that differs."""
        ...

    async def rebuild(self) -> None:
        """Recompute the derived tables from the entries, in one transaction.

        Raises:
            LedgerUnsupportedError: The ledger does not keep all entries.
        """
        ...

    async def close(self) -> None:
        """Release the ledger. Idempotent."""
        ...
