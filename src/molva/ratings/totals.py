"""What a total is: the reference that every ledger is compared with.

Pure, and simple before anything else: it walks over all entries, again for each question.
A ledger answers the same questions from running sums.
"""

from collections import Counter
from collections.abc import Iterable

from molva.ratings.ledger.protocol import LedgerEntry, Total

__all__ = ["total"]


def total(
    entries: Iterable[LedgerEntry],
    *,
    item: str | None = None,
    n: int,
    as_of: int | None = None,
    trusted: bool = True,
) -> Total | None:
    """Return the total of the last ``n`` ratings at ``as_of``, counted one by one.

    Args:
        entries: All entries of one campaign in the order of their sequence numbers.
        item: One item; None for all of the campaign's ratings.
        n: Window, n ≥ 1.
        as_of: Sequence number to read at; None for the last.
        trusted: Whether changes, retractions and exclusions count.

    Returns:
        None where there is nothing to average.

    Example:
        >>> def rating(seq: int, rate: int) -> LedgerEntry:
        ...     return LedgerEntry(seq, "rating", bytes(16), "", rate, None, seq, seq, None, 0, 0)
        >>> total([rating(1, 3), rating(2, 4), rating(3, 8)], n=2).average
        6.0
    """
    upto = [entry for entry in entries if as_of is None or entry.seq <= as_of]
    rates: dict[int, int] = {}
    retracted: set[int] = set()
    excluded: set[int] = set()
    for entry in upto:
        if entry.kind == "rating" and item in (None, entry.item):
            assert entry.rate is not None
            rates[entry.seq] = entry.rate
        elif trusted and entry.target_seq in rates:
            match entry.kind:
                case "change":
                    assert entry.rate is not None
                    rates[entry.target_seq] = entry.rate
                case "retraction":
                    retracted.add(entry.target_seq)
                case "exclusion":
                    excluded.add(entry.target_seq)
                case "restoration":
                    excluded.discard(entry.target_seq)
    counted = [rate for seq, rate in rates.items() if seq not in retracted | excluded]
    if not counted:
        return None
    window = counted[-n:]
    distribution = dict(sorted(Counter(counted).items()))
    return Total(sum(window), len(window), len(counted), distribution, upto[-1].seq)
