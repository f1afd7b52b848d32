"""What changes, retractions and exclusions do to a scope's numbers, at any ``as_of``.

A correction is (position, Δcount, Δsum, from which sequence): a Δ is what the rating
contributes after it, less what it contributed before. Trusted totals are raw ones plus
the corrections up to ``as_of``; the last n ratings *that count* may begin further back
than n positions, where some of the newest were excluded.

Corrections are summed in a Fenwick tree over positions: node k covers the ``lowbit(k)``
positions up to k. A node is never updated. Each correction appends a new version of the
nodes that cover its position, so the tree of any ``as_of`` is there for ever, and finding
where the last n begin takes one look-up for each bit of the scope's count, whatever n and
whatever ``as_of``. A tree in place is smaller, but then a read at an old ``as_of`` has to
take back everything since, which has no bound.

A node that is a power of two above the scope's count covers all of it. Such nodes are not
stored: their sum is that of all corrections, which each correction's row carries (its
``shift``). When the scope grows past one, its sum up to then is therefore known.
"""

from dataclasses import dataclass
from typing import Final, final

import apsw

from molva.ratings.ledger._schema import decode_distribution, encode_distribution

__all__ = ["NO_CORRECTIONS", "Corrections", "add_correction", "corrections_at", "position_before"]


@final
@dataclass(frozen=True, slots=True)
class Corrections:
    """All corrections of one scope up to one moment.

    Attributes:
        root: The smallest power of two above every corrected position.
        d_count: By how much the count of ratings that count differs from the raw one.
        d_sum: The same for their sum.
        shift: The same for the distribution; rates without a difference are absent.
    """

    root: int
    d_count: int
    d_sum: int
    shift: dict[int, int]


NO_CORRECTIONS: Final = Corrections(1, 0, 0, {})


def corrections_at(connection: apsw.Connection, scope_key: int, as_of: int) -> Corrections:
    """Return the sum of a scope's corrections up to ``as_of``."""
    row: tuple[int, str] | None = connection.execute(
        "SELECT count, shift FROM correction WHERE scope_key = ? AND from_seq <= ? "
        "ORDER BY from_seq DESC LIMIT 1",
        (scope_key, as_of),
    ).fetchone()
    if row is None:
        return NO_CORRECTIONS
    count, shift_text = row
    shift = decode_distribution(shift_text)
    d_sum = sum(rate * d_count for rate, d_count in shift.items())
    return Corrections(_root(count), sum(shift.values()), d_sum, shift)


def position_before(
    connection: apsw.Connection,
    scope_key: int,
    as_of: int,
    corrections: Corrections,
    *,
    count: int,
    left_out: int,
) -> tuple[int, int]:
    """Find where the window begins that leaves out the first ratings that count.

    Args:
        connection: In a read transaction.
        scope_key: The scope.
        as_of: The moment, as a sequence number of the campaign.
        corrections: The scope's at ``as_of``.
        count: The scope's raw count at ``as_of``.
        left_out: How many ratings that count come before the window, ≥ 0.

    Returns:
        The greatest position up to which exactly ``left_out`` ratings count, and the sum
        of the corrections up to there.
    """
    position = counted = d_sum = 0
    step = 1 << count.bit_length() >> 1
    while step:
        node = position + step
        if node <= count:
            if node < corrections.root:
                d_node_count, d_node_sum = _node(connection, scope_key, node, as_of)
            elif position:
                # Beyond every corrected position.
                d_node_count = d_node_sum = 0
            else:
                d_node_count, d_node_sum = corrections.d_count, corrections.d_sum
            if counted + step + d_node_count <= left_out:
                position = node
                counted += step + d_node_count
                d_sum += d_node_sum
        step >>= 1
    return position, d_sum


def add_correction(
    connection: apsw.Connection,
    scope_key: int,
    *,
    count: int,
    position: int,
    from_seq: int,
    rate_before: int | None,
    rate_after: int | None,
) -> None:
    """Append a correction and the nodes that cover its position.

    Args:
        connection: In a write transaction.
        scope_key: The scope.
        count: The scope's raw count now.
        position: Of the corrected rating in the scope.
        from_seq: The entry that corrects it.
        rate_before: What it counted with; None where it did not count.
        rate_after: What it counts with from now on.
    """
    before = corrections_at(connection, scope_key, from_seq)
    shift = before.shift.copy()
    for rate, d_count in ((rate_before, -1), (rate_after, 1)):
        if rate is not None:
            shift[rate] = shift.get(rate, 0) + d_count
            if not shift[rate]:
                del shift[rate]
    connection.execute(
        "INSERT INTO correction VALUES (?, ?, ?, ?, ?, ?, ?)",
        (scope_key, from_seq, position, rate_before, rate_after, count, encode_distribution(shift)),
    )
    d_count = (rate_after is not None) - (rate_before is not None)
    d_sum = (rate_after or 0) - (rate_before or 0)
    root = _root(count)
    nodes = {}
    if before is not NO_CORRECTIONS:
        # The scope grew: these covered all of it, and were not stored, until now.
        grown = before.root
        while grown < root:
            nodes[grown] = (before.d_count, before.d_sum)
            grown <<= 1
    node = position
    while node < root:
        kept_count, kept_sum = nodes.get(node) or _node(connection, scope_key, node, from_seq)
        nodes[node] = (kept_count + d_count, kept_sum + d_sum)
        node += node & -node
    connection.executemany(
        "INSERT INTO node VALUES (?, ?, ?, ?, ?)",
        [(scope_key, node, from_seq, *sums) for node, sums in nodes.items()],
    )


def _root(count: int) -> int:
    return 1 << count.bit_length()


def _node(connection: apsw.Connection, scope_key: int, node: int, as_of: int) -> tuple[int, int]:
    row: tuple[int, int] | None = connection.execute(
        "SELECT d_count, d_sum FROM node WHERE scope_key = ? AND node = ? AND from_seq <= ? "
        "ORDER BY from_seq DESC LIMIT 1",
        (scope_key, node, as_of),
    ).fetchone()
    return row or (0, 0)
