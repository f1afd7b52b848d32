"""A ledger in PostgreSQL: the tables of ``_postgresql_1.sql``, in one snapshot."""

from collections import Counter
from typing import Final
from urllib.parse import parse_qs, urlsplit

import asyncpg
import msgspec

from tests.faults.live.ledgers.content import Content, Row, Running
from tests.faults.live.ledgers.sqlite import SEQ_BITS

__all__ = ["read_postgresql"]

# Ratings in a block: a scope's distribution is that of its last block, and what came after.
_BLOCK: Final = 256

_ROWS: Final = f"""
    SELECT c.campaign, e.entry_key & {(1 << SEQ_BITS) - 1} AS seq, e.id, s.item, e.rate,
        e.item_position, e.item_sum, e.campaign_position, e.campaign_sum
    FROM {{schema}}.entry e
    JOIN {{schema}}.campaign c ON c.campaign_key = e.entry_key >> {SEQ_BITS}
    LEFT JOIN {{schema}}.scope s ON s.scope_key = e.item_key
    ORDER BY e.entry_key
"""
_TOTALS: Final = """
    SELECT c.campaign, s.item, s.count, s.sum, b.block, b.distribution::text
    FROM {schema}.scope s
    JOIN {schema}.campaign c USING (campaign_key)
    LEFT JOIN LATERAL (
        SELECT block, distribution FROM {schema}.block WHERE scope_key = s.scope_key
        ORDER BY block DESC LIMIT 1
    ) b ON true
"""


async def read_postgresql(url: str) -> Content:
    """Return what ``postgresql://…?schema=NAME`` holds. Its index by id is of the ratings."""
    parts = urlsplit(url)
    schema = parse_qs(parts.query).get("schema", ["molva_ledger"])[0]
    connection = await asyncpg.connect(parts._replace(query="").geturl(), timeout=10)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            found = await connection.fetch(_ROWS.format(schema=schema))
            kept = await connection.fetch(_TOTALS.format(schema=schema))
    finally:
        await connection.close()
    rows = [
        Row(campaign, seq, id_, item, rate, Running(*running))
        for campaign, seq, id_, item, rate, *running in found
    ]
    decode = msgspec.json.Decoder(dict[int, int]).decode
    totals = {}
    for campaign, item, count, sum_, block, distribution in kept:
        rates: Counter[int] = Counter(decode(distribution) if distribution else {})
        # Blocks of an item are cut by its positions, those of a campaign by its entries.
        behind = _BLOCK * (block or 0)
        for row in rows:
            if row.campaign != campaign or item not in (None, row.item):
                continue
            assert row.running is not None
            if (row.seq if item is None else row.running.item_position) > behind:
                rates[row.rate] += 1
        totals[campaign, item] = (count, sum_, dict(rates))
    return Content(rows, totals)
