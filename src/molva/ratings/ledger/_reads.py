"""Reading totals: point look-ups only, in one snapshot, at a cost that is flat in n.

The sum of the last n is the running sum at the end less that where the window begins.
Now, the end stands in the scope's row; at an old ``as_of`` it is the campaign's entry of
that number, or, for an item, its last rating up to there, found by bisection: sequence
numbers grow with positions.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import apsw

from molva.ratings.ledger._corrections import (
    NO_CORRECTIONS,
    Corrections,
    corrections_at,
    position_before,
)
from molva.ratings.ledger._schema import (
    BLOCK,
    COMMENT,
    KINDS,
    RATING,
    SEQ_BITS,
    SEQ_MASK,
    decode_distribution,
)
from molva.ratings.ledger.protocol import LedgerEntry, LedgerError, LedgerSize, Total

__all__ = ["read_entries", "read_last_seq", "read_size", "read_total"]


@final
@dataclass(slots=True)
class _Scope:
    """The raw totals of a scope at ``as_of``."""

    campaign_key: int
    is_item: bool
    scope_key: int
    as_of: int
    count: int
    sum: int
    distribution: dict[int, int]


def read_last_seq(connection: apsw.Connection, campaign: str) -> int:
    """Return the campaign's last sequence number, 0 without one."""
    row: tuple[int] | None = connection.execute(
        "SELECT last_seq FROM campaign WHERE campaign = ?", (campaign,)
    ).fetchone()
    return row[0] if row else 0


def read_size(connection: apsw.Connection) -> LedgerSize:
    """Return how much the ledger holds."""
    [(campaigns, entries, ratings)] = connection.execute(
        "SELECT count(*), ifnull(sum(last_seq), 0), ifnull(sum(count), 0) "
        "FROM campaign JOIN scope USING (campaign_key) WHERE item IS NULL"
    )
    return LedgerSize(campaigns, entries, ratings)


def read_entries(
    connection: apsw.Connection, campaign: str, *, since_seq: int, upto_seq: int
) -> list[LedgerEntry]:
    """Return the campaign's entries after ``since_seq``, up to ``upto_seq``."""
    rows = connection.execute(
        "SELECT entry_key, kind, id, item, rate, target_key, item_position, campaign_position, "
        f"CASE kind WHEN {COMMENT} THEN comment.text ELSE reason.text END, "
        "accepted_at_us, applied_at_us FROM campaign "
        f"JOIN entry ON entry_key > campaign.campaign_key << {SEQ_BITS} | ?2 "
        f"AND entry_key <= campaign.campaign_key << {SEQ_BITS} | ?3 "
        "LEFT JOIN scope ON scope_key = item_key LEFT JOIN comment USING (entry_key) "
        "LEFT JOIN reason USING (entry_key) WHERE campaign = ?1 ORDER BY entry_key",
        (campaign, since_seq, upto_seq),
    )
    return [
        LedgerEntry(
            seq=key & SEQ_MASK,
            kind=KINDS[kind],
            id=id_,
            item=item,
            rate=rate,
            target_seq=None if target_key is None else target_key & SEQ_MASK,
            position=position,
            campaign_position=campaign_position,
            text=text,
            accepted_at_us=accepted_at_us,
            applied_at_us=applied_at_us,
        )
        for (
            key,
            kind,
            id_,
            item,
            rate,
            target_key,
            position,
            campaign_position,
            text,
            accepted_at_us,
            applied_at_us,
        ) in rows
    ]


def read_total(
    connection: apsw.Connection,
    campaign: str,
    *,
    item: str | None,
    n: int,
    as_of: int | None,
    trusted: bool,
) -> Total | None:
    """Return the total; the caller holds a transaction, so that all look-ups agree."""
    row: tuple[int, int, int, int, int, str] | None = connection.execute(
        "SELECT campaign_key, last_seq, scope_key, count, sum, distribution "
        "FROM campaign JOIN scope USING (campaign_key) WHERE campaign = ? AND item IS ?",
        (campaign, item),
    ).fetchone()
    if row is None:
        return None
    campaign_key, last_seq, scope_key, count, sum_, distribution = row
    if as_of is None or as_of >= last_seq:
        scope = _Scope(
            campaign_key, item is not None, scope_key, last_seq, count, sum_,
            decode_distribution(distribution),
        )  # fmt: skip
    elif as_of <= 0:
        return None
    else:
        scope = _Scope(campaign_key, item is not None, scope_key, as_of, 0, 0, {})
        _go_back(connection, scope, count)
    if not scope.count:
        return None
    corrections = NO_CORRECTIONS
    if trusted:
        corrections = corrections_at(connection, scope_key, scope.as_of)
    return _total(connection, scope, corrections, n)


def _total(
    connection: apsw.Connection, scope: _Scope, corrections: Corrections, n: int
) -> Total | None:
    """Return the last n of a scope; ``corrections`` are those to be heeded."""
    count = scope.count + corrections.d_count
    if not count:
        return None
    sum_ = scope.sum + corrections.d_sum
    distribution = scope.distribution
    for rate, d_count in corrections.shift.items():
        distribution[rate] = distribution.get(rate, 0) + d_count
    kept = sum(distribution.values()), sum(r * number for r, number in distribution.items())
    if kept != (count, sum_):
        raise LedgerError(
            f"the ledger contradicts itself: {count:,} ratings with the sum {sum_:,}, and by its "
            f"distribution {kept[0]:,} with {kept[1]:,}; see 'molva verify' and 'molva rebuild'"
        )
    window_sum = sum_
    if n < count:
        position, d_sum = count - n, 0
        if corrections is not NO_CORRECTIONS:
            position, d_sum = position_before(
                connection,
                scope.scope_key,
                scope.as_of,
                corrections,
                count=scope.count,
                left_out=count - n,
            )
        window_sum -= _running_sum(connection, scope, position) + d_sum
    return Total(
        sum=window_sum,
        n=min(n, count),
        count=count,
        distribution={
            rate: distribution[rate] for rate in sorted(distribution) if distribution[rate]
        },
        as_of=scope.as_of,
    )


def _running_sum(connection: apsw.Connection, scope: _Scope, position: int) -> int:
    """Return the raw sum of the scope's first ``position`` ratings."""
    if not position:
        return 0
    if not scope.is_item:
        return _campaign_sum(connection, scope, position)
    [(sum_,)] = connection.execute(
        "SELECT item_sum FROM entry WHERE item_key = ? AND item_position = ?",
        (scope.scope_key, position),
    )
    assert isinstance(sum_, int)
    return sum_


def _campaign_sum(connection: apsw.Connection, scope: _Scope, position: int) -> int:
    """Return the campaign's running sum where its count of ratings is ``position``.

    From one entry to the next the count grows by 0 or 1. So from an entry that is d
    ratings too far, d entries back is never too far back; and from one that is d short, d
    entries on is never too far on. Such jumps are exact where all entries are ratings,
    and short where others come in long runs: each third probe therefore halves what is
    left.
    """
    base = scope.campaign_key << SEQ_BITS
    low, high = position, scope.as_of - (scope.count - position)
    for probes in itertools.count(1):
        probe = high if probes % 3 else (low + high) // 2
        [(count, sum_)] = connection.execute(
            "SELECT campaign_position, campaign_sum FROM entry WHERE entry_key = ?",
            (base + probe,),
        )
        assert isinstance(count, int)
        assert isinstance(sum_, int)
        if count == position:
            return sum_
        if low > high:
            raise LedgerError(
                f"the ledger contradicts itself: no entry has {position:,} ratings up to it; see "
                "'molva verify'"
            )
        if count > position:
            high = probe - (count - position)
        else:
            low = probe + (position - count)
    raise AssertionError("unreachable")


def _go_back(connection: apsw.Connection, scope: _Scope, count_now: int) -> None:
    """Fill in the totals of a scope as they were at its ``as_of``."""
    if scope.is_item:
        _go_back_in_item(connection, scope, count_now)
        return
    key = scope.campaign_key << SEQ_BITS | scope.as_of
    [(scope.count, scope.sum)] = connection.execute(
        "SELECT campaign_position, campaign_sum FROM entry WHERE entry_key = ?", (key,)
    )
    scope.distribution = _block(connection, scope.scope_key, scope.as_of)
    _add_rates(
        scope.distribution,
        connection.execute(
            f"SELECT rate FROM entry WHERE entry_key > ? AND entry_key <= ? AND kind = {RATING}",
            (key - scope.as_of % BLOCK, key),
        ),
    )


def _go_back_in_item(connection: apsw.Connection, scope: _Scope, count_now: int) -> None:
    def entry_key(position: int) -> int:
        [(key,)] = connection.execute(
            "SELECT entry_key FROM entry WHERE item_key = ? AND item_position = ?",
            (scope.scope_key, position),
        )
        assert isinstance(key, int)
        return key

    last_key = scope.campaign_key << SEQ_BITS | scope.as_of
    scope.count = bisect_right(range(1, count_now + 1), last_key, key=entry_key)
    if not scope.count:
        return
    scope.sum = _running_sum(connection, scope, scope.count)
    scope.distribution = _block(connection, scope.scope_key, scope.count)
    _add_rates(
        scope.distribution,
        connection.execute(
            "SELECT rate FROM entry "
            "WHERE item_key = ? AND item_position > ? AND item_position <= ?",
            (scope.scope_key, scope.count - scope.count % BLOCK, scope.count),
        ),
    )


def _block(connection: apsw.Connection, scope_key: int, after: int) -> dict[int, int]:
    row: tuple[str] | None = connection.execute(
        "SELECT distribution FROM block WHERE scope_key = ? AND block = ?",
        (scope_key, after // BLOCK),
    ).fetchone()
    return decode_distribution(row[0]) if row else {}


def _add_rates(distribution: dict[int, int], rows: Iterable[tuple[int]]) -> None:
    for (rate,) in rows:
        distribution[rate] = distribution.get(rate, 0) + 1
