"""A ledger in a SQLite file."""

from pathlib import Path
from typing import Final

import apsw
import msgspec

from tests.faults.live.ledgers.content import Content, Row, Running

__all__ = ["SEQ_BITS", "read_file", "read_sqlite"]

# An entry's key is the campaign's key and, below so many bits, its sequence number.
SEQ_BITS: Final = 40

_ROWS: Final = f"""
    SELECT c.campaign, e.entry_key & {(1 << SEQ_BITS) - 1}, e.id, s.item, e.rate,
        e.item_position, e.item_sum, e.campaign_position, e.campaign_sum
    FROM entry e
    JOIN campaign c ON c.campaign_key = e.entry_key >> {SEQ_BITS}
    LEFT JOIN scope s ON s.scope_key = e.item_key
    ORDER BY e.entry_key
"""
_TOTALS: Final = """
    SELECT c.campaign, s.item, s.count, s.sum, s.distribution
    FROM scope s JOIN campaign c USING (campaign_key)
"""


async def read_sqlite(url: str) -> Content:
    """Return what ``sqlite:///path`` holds."""
    return read_file(Path(url.removeprefix("sqlite://")))


def read_file(path: Path) -> Content:
    """Return what a file holds. Its index by id is of the ratings themselves."""
    ledger = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        ledger.set_busy_timeout(5_000)
        ledger.execute("BEGIN")
        rows = [
            Row(campaign, seq, id_, item, rate, Running(*running))
            for campaign, seq, id_, item, rate, *running in ledger.execute(_ROWS)
        ]
        decode = msgspec.json.Decoder(dict[int, int]).decode
        totals = {
            (campaign, item): (count, sum_, decode(distribution))
            for campaign, item, count, sum_, distribution in ledger.execute(_TOTALS)
        }
    finally:
        ledger.close()
    return Content(rows, totals)
