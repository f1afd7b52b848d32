"""Comparing a PostgreSQL ledger's derived tables with its entries, and writing them anew.

What they should hold comes from ``_fold``. Rows are compared some hundreds at a time: a
round trip for each would take hours where a ledger is long.
"""

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Final

import asyncpg
import msgspec

from molva._base.postgresql import PostgreSQL
from molva._base.postgresql_schema import in_schema
from molva.ratings.ledger._content import text_hash
from molva.ratings.ledger._fold import Fold, FoldedEntry, Row, Value
from molva.ratings.ledger._schema import (
    COMMENT,
    EXCLUSION,
    SEQ_BITS,
    SEQ_MASK,
    encode_distribution,
)
from molva.ratings.ledger.protocol import Difference

__all__ = ["differences", "rebuild"]

# Derived tables: columns of the key, columns that follow from the entries.
_DERIVED: Final = {
    "campaign": (("campaign_key",), ("last_seq",)),
    "scope": (("scope_key",), ("count", "sum")),
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
_JSON: Final = ("distribution", "shift")

# Entries that are read, and rows that are compared or written, at a time.
_PAGE: Final = 1_000

_COLUMNS: Final = ", ".join(FoldedEntry._fields)
_Sql = Callable[[str], str]


async def differences(
    connection: asyncpg.Connection, server: PostgreSQL
) -> AsyncIterator[Difference]:
    """Yield each number that does not follow from the entries, in one snapshot."""
    sql = _in(server)
    await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    try:
        rows: Counter[str] = Counter()
        waiting: defaultdict[str, list[Row]] = defaultdict(list)
        async for found in _recomputed(connection, sql):
            if isinstance(found, Difference):
                yield found
                continue
            rows[found.table] += 1
            page = waiting[found.table]
            page.append(found)
            if len(page) == _PAGE:
                for difference in await _compare(connection, sql, page):
                    yield difference
                page.clear()
        for page in waiting.values():
            for difference in await _compare(connection, sql, page):
                yield difference
        for table in _DERIVED:
            kept = await connection.fetchval(sql(f"SELECT count(*) FROM molva.{table}"))
            if kept > rows[table]:
                yield Difference("", f"{table}: rows", kept, rows[table])
        async for difference in _words(connection, sql):
            yield difference
    finally:
        if not connection.is_closed():
            await connection.execute("ROLLBACK")


async def _compare(connection: asyncpg.Connection, sql: _Sql, page: list[Row]) -> list[Difference]:
    if not page:
        return []
    table = page[0].table
    keys, columns = _DERIVED[table]
    arrays = ", ".join(f"${n}::bigint[]" for n in range(1, len(keys) + 1))
    kept = {
        tuple(row[: len(keys)]): tuple(row[len(keys) :])
        for row in await connection.fetch(
            sql(
                f"SELECT {', '.join((*keys, *map(_read, columns)))} FROM molva.{table} "
                f"WHERE ({', '.join(keys)}) IN (SELECT * FROM unnest({arrays}))"
            ),
            *zip(*(row.key for row in page), strict=True),
        )
    }
    found = []
    for row in page:
        # The first part of a key is the scope or the rating, which `of` names in words.
        where = " ".join([f"{row.of}, {table}", *map(str, row.key[1:])])
        if row.key not in kept:
            found.append(Difference(row.campaign, f"{where}: row", None, row.values))
            continue
        values = row.values[: len(columns)]
        for column, kept_value, value in zip(columns, kept[row.key], values, strict=True):
            shown = _in_order(kept_value) if column in _JSON else kept_value
            if shown != value:
                found.append(Difference(row.campaign, f"{where}: {column}", shown, value))
    return found


def _read(column: str) -> str:
    return f"{column}::text" if column in _JSON else column


def _in_order(text: str) -> str:
    """Return the distribution as ``_fold`` writes it; anything else as it is."""
    try:
        return encode_distribution(msgspec.json.decode(text, type=dict[int, int]))
    except msgspec.ValidationError:
        return text


async def rebuild(connection: asyncpg.Connection, server: PostgreSQL) -> None:
    """Write every derived table anew, in one transaction that no writer gets into."""
    sql = _in(server)
    async with server.transaction(connection):
        await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        await connection.execute(sql("LOCK TABLE molva.campaign IN EXCLUSIVE MODE"))
        for table in _DERIVED:
            if table not in _NAMED:
                await connection.execute(sql(f"DELETE FROM molva.{table}"))
        waiting: defaultdict[str, list[Row]] = defaultdict(list)
        async for found in _recomputed(connection, sql):
            if isinstance(found, Difference):
                continue  # about an entry: those are not ours to change
            page = waiting[found.table]
            page.append(found)
            if len(page) == _PAGE:
                await _write(connection, sql, page)
        for page in waiting.values():
            await _write(connection, sql, page)


async def _write(connection: asyncpg.Connection, sql: _Sql, page: list[Row]) -> None:
    if not page:
        return
    table = page[0].table
    keys, columns = _DERIVED[table]
    names = (*keys, *columns)
    marks = [f"${n}" for n in range(1, len(names) + 1)]
    if table in _NAMED:
        pairs = ", ".join(
            f"{name} = {mark}" for name, mark in zip(names, marks, strict=True) if name not in keys
        )
        statement = f"UPDATE molva.{table} SET {pairs} WHERE {keys[0]} = $1"
    else:
        statement = f"INSERT INTO molva.{table} ({', '.join(names)}) VALUES ({', '.join(marks)})"
    rows: list[tuple[Value, ...]] = [(*row.key, *row.values[: len(columns)]) for row in page]
    await connection.executemany(sql(statement), rows)
    page.clear()


async def _recomputed(connection: asyncpg.Connection, sql: _Sql) -> AsyncIterator[Row | Difference]:
    """Yield each derived row as it should be, and what is wrong with the entries."""
    keys = []
    for key, campaign in await connection.fetch(
        sql("SELECT campaign_key, campaign FROM molva.campaign ORDER BY campaign_key")
    ):
        keys.append(key)
        scopes = await connection.fetch(
            sql("SELECT scope_key, item FROM molva.scope WHERE campaign_key = $1"), key
        )
        targets: dict[int, FoldedEntry] = {}
        fold = Fold(key, campaign, [(row[0], row[1]) for row in scopes], targets.get)
        for difference in fold.begin():
            yield difference
        last = key << SEQ_BITS
        while page := await connection.fetch(
            sql(
                f"SELECT {_COLUMNS} FROM molva.entry "
                f"WHERE entry_key > $1 AND entry_key <= $2 ORDER BY entry_key LIMIT {_PAGE}"
            ),
            last,
            key << SEQ_BITS | SEQ_MASK,
        ):
            entries = [FoldedEntry(*row) for row in page]
            last = entries[-1].entry_key
            targets.clear()
            targets.update(await _targets(connection, sql, entries))
            for entry in entries:
                for found in fold.take(entry):
                    yield found
        for row in fold.end():
            yield row
    for (unknown,) in await connection.fetch(
        sql(
            f"SELECT DISTINCT entry_key >> {SEQ_BITS} FROM molva.entry "
            f"WHERE entry_key >> {SEQ_BITS} <> ALL ($1::bigint[])"
        ),
        keys,
    ):
        yield Difference("", f"campaign {unknown}: row", None, "has entries")


async def _targets(
    connection: asyncpg.Connection, sql: _Sql, entries: list[FoldedEntry]
) -> dict[int, FoldedEntry]:
    wanted = [entry.target_key for entry in entries if entry.target_key is not None]
    if not wanted:
        return {}
    rows = await connection.fetch(
        sql(f"SELECT {_COLUMNS} FROM molva.entry WHERE entry_key = ANY ($1)"), wanted
    )
    return {row[0]: FoldedEntry(*row) for row in rows}


async def _words(connection: asyncpg.Connection, sql: _Sql) -> AsyncIterator[Difference]:
    """Compare texts that were not erased with the hashes in their entries."""
    for table, kind in (("comment", COMMENT), ("reason", EXCLUSION)):
        last = -1
        while page := await connection.fetch(
            sql(
                f"SELECT entry_key, text, kind, text_hash FROM molva.{table} "
                "LEFT JOIN molva.entry USING (entry_key) "
                f"WHERE entry_key > $1 ORDER BY entry_key LIMIT {_PAGE}"
            ),
            last,
        ):
            for entry_key, text, kept_kind, kept_hash in page:
                last = entry_key
                words = text.decode(errors="replace")
                where = f"{table} of entry {entry_key & SEQ_MASK}"
                if kept_kind != kind:
                    yield Difference("", f"{where}: row", words, None)
                elif text_hash(words) != kept_hash:
                    yield Difference("", f"{where}: text", words, "another text, by its hash")


def _in(server: PostgreSQL) -> _Sql:
    return lambda text: in_schema(text, server.url.schema)
