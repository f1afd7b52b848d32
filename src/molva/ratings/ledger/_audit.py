"""Comparing a SQLite ledger's derived tables with its entries, and writing them anew.

What they should hold comes from ``_fold``.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Final, cast

import apsw

from molva.ratings.ledger._content import text_hash
from molva.ratings.ledger._fold import Fold, FoldedEntry, Row, Value
from molva.ratings.ledger._schema import (
    COMMENT,
    EXCLUSION,
    SEQ_BITS,
    SEQ_MASK,
    EntryRow,
    entry_checksum,
)
from molva.ratings.ledger.protocol import Difference

__all__ = ["differences", "rebuild"]

# Derived tables: columns of the key, columns that follow from the entries.
_DERIVED: Final = {
    "campaign": (("campaign_key",), ("last_seq",)),
    "scope": (("scope_key",), ("count", "sum", "distribution")),
    "block": (("scope_key", "block"), ("distribution",)),
    "correction": (
        ("scope_key", "from_seq"),
        ("position", "rate_before", "rate_after", "count", "shift"),
    ),
    "node": (("scope_key", "node", "from_seq"), ("d_count", "d_sum")),
    "amended": (("entry_key",), ("rate", "retracted", "excluded")),
}
# The names in these are the truth; only their numbers are derived.
_NAMED: Final = ("campaign", "scope")

# Rows that a rebuild collects before it writes them.
_ROWS_A_WRITE: Final = 1_000

# In the order that a checksum is of.
_EVERY_COLUMN: Final = (
    "entry_key, id, kind, rate, item_key, item_position, item_sum, campaign_position, "
    "campaign_sum, target_key, text_hash, accepted_at_us, applied_at_us, checksum"
)
_SELECT_ENTRY: Final = f"SELECT {', '.join(FoldedEntry._fields)} FROM entry"


def differences(connection: apsw.Connection) -> Iterator[Difference | None]:
    """Yield each number that does not follow from the entries; None now and then.

    The caller holds a read transaction. A None says that work is under way, so that
    whoever waits can pause or give up.
    """
    for (problem,) in connection.execute("PRAGMA integrity_check"):
        if problem != "ok":
            yield Difference("", "file", problem, "ok")
    kept_rows: Counter[str] = Counter()
    for found in _recomputed(connection):
        if isinstance(found, Difference):
            yield found
        else:
            kept_rows[found.table] += 1
            yield from _compare(connection, found)
            yield None
    for table in _DERIVED:
        [(rows,)] = connection.execute(f"SELECT count(*) FROM {table}")
        if rows > kept_rows[table]:
            yield Difference("", f"{table}: rows", rows, kept_rows[table])
    yield from _words(connection)


def _compare(connection: apsw.Connection, row: Row) -> Iterator[Difference]:
    keys, columns = _DERIVED[row.table]
    # The first part of a key is the scope or the rating, which `of` names in words.
    where = " ".join([f"{row.of}, {row.table}", *map(str, row.key[1:])])
    kept = connection.execute(
        f"SELECT {', '.join(columns)} FROM {row.table} "
        f"WHERE {' AND '.join(f'{key} = ?' for key in keys)}",
        row.key,
    ).fetchone()
    if kept is None:
        yield Difference(row.campaign, f"{where}: row", None, row.values)
        return
    for column, kept_value, value in zip(columns, kept, row.values, strict=True):
        if kept_value != value:
            yield Difference(row.campaign, f"{where}: {column}", kept_value, value)


def rebuild(connection: apsw.Connection) -> None:
    """Write every derived table anew. The caller holds a write transaction."""
    for table in _DERIVED:
        if table not in _NAMED:
            connection.execute(f"DELETE FROM {table}")
    rows: defaultdict[str, list[tuple[Value, ...]]] = defaultdict(list)
    for found in _recomputed(connection):
        if isinstance(found, Difference):
            continue  # about an entry: those are not ours to change
        waiting = rows[found.table]
        waiting.append((*found.values, *found.key))
        if len(waiting) == _ROWS_A_WRITE:
            _write(connection, found.table, waiting)
    for table, waiting in rows.items():
        _write(connection, table, waiting)


def _write(connection: apsw.Connection, table: str, rows: list[tuple[Value, ...]]) -> None:
    keys, columns = _DERIVED[table]
    if table in _NAMED:
        numbers = ", ".join(f"{column} = ?" for column in columns)
        statement = f"UPDATE {table} SET {numbers} WHERE {keys[0]} = ?"
    else:
        names = (*columns, *keys)
        marks = ", ".join("?" * len(names))
        statement = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})"
    connection.executemany(statement, rows)
    rows.clear()


def _recomputed(connection: apsw.Connection) -> Iterator[Row | Difference]:
    """Yield each derived row as it should be, and what is wrong with the entries."""

    def look_up(key: int) -> FoldedEntry | None:
        row = connection.execute(f"{_SELECT_ENTRY} WHERE entry_key = ?", (key,)).fetchone()
        return None if row is None else FoldedEntry(*row)

    campaigns = connection.execute("SELECT campaign_key, campaign FROM campaign").fetchall()
    keys = []
    for key, campaign in campaigns:
        assert isinstance(key, int)
        assert isinstance(campaign, str)
        keys.append(key)
        scopes = cast(
            "list[tuple[int, str | None]]",
            connection.execute(
                "SELECT scope_key, item FROM scope WHERE campaign_key = ?", (key,)
            ).fetchall(),
        )
        fold = Fold(key, campaign, scopes, look_up)
        yield from fold.begin()
        for *row, checksum in connection.execute(
            f"SELECT {_EVERY_COLUMN} FROM entry WHERE entry_key BETWEEN ? AND ? ORDER BY entry_key",
            (key << SEQ_BITS, key << SEQ_BITS | SEQ_MASK),
        ):
            entry = FoldedEntry._make((row[0], *row[2:10]))
            if not _is_sound(cast("EntryRow", tuple(row)), checksum):
                where = f"entry {entry.entry_key & SEQ_MASK}: checksum"
                yield Difference(campaign, where, checksum, "that of its columns")
            yield from fold.take(entry)
        yield from fold.end()
    marks = ", ".join(map(str, keys)) or "NULL"
    for (unknown,) in connection.execute(
        f"SELECT DISTINCT entry_key >> {SEQ_BITS} AS k FROM entry WHERE k NOT IN ({marks})"
    ):
        yield Difference("", f"campaign {unknown}: row", None, "has entries")


def _is_sound(row: EntryRow, checksum: object) -> bool:
    """Return whether all of an entry is as it was written."""
    try:
        return checksum in (None, entry_checksum(row))
    except OverflowError:
        return False  # a value of another type or size than was ever written


def _words(connection: apsw.Connection) -> Iterator[Difference | None]:
    """Compare texts that were not erased with the hashes in their entries."""
    for table, kind in (("comment", COMMENT), ("reason", EXCLUSION)):
        for entry_key, text, kept_kind, kept_hash in connection.execute(
            f"SELECT {table}.entry_key, text, kind, text_hash "
            f"FROM {table} LEFT JOIN entry USING (entry_key)"
        ):
            where = f"{table} of entry {entry_key & SEQ_MASK}"
            if kept_kind != kind:
                yield Difference("", f"{where}: row", text, None)
            elif text_hash(text) != kept_hash:
                yield Difference("", f"{where}: text", text, "another text, by its hash")
            yield None
