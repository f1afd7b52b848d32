"""What the files hold when a run is over.

The ledger is read with SQL of our own, on a read-only connection: its entries and the
numbers that it keeps beside them. Reading it with the code under test would let one bug
hide another. Dead letters have no second road; they are read through messaging.

Adding a table or a column to the ledger? What is read here must stay: the checker's
independence is worth that it breaks loudly.
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, final

import apsw
import msgspec

from molva.messaging import open_topic

__all__ = ["Dead", "Evidence", "Place", "Row", "collect", "read_ledger"]

# An entry's key is the campaign's key and, below so many bits, its sequence number.
_SEQ_BITS: Final = 40

_ROWS: Final = f"""
    SELECT c.campaign, e.entry_key & {(1 << _SEQ_BITS) - 1}, e.id, s.item, e.rate
    FROM entry e
    JOIN campaign c ON c.campaign_key = e.entry_key >> {_SEQ_BITS}
    LEFT JOIN scope s ON s.scope_key = e.item_key
    ORDER BY e.entry_key
"""
_TOTALS: Final = """
    SELECT c.campaign, s.item, s.count, s.sum, s.distribution
    FROM scope s JOIN campaign c USING (campaign_key)
"""


# (campaign, item or None) to (count, sum, distribution), as a ledger keeps them.
Kept = Mapping[tuple[str, str | None], tuple[int, int, Mapping[int, int]]]


class Row(NamedTuple):
    """One rating in the ledger."""

    campaign: str
    seq: int
    id: bytes
    item: str
    rate: int


class Dead(NamedTuple):
    """One dead letter."""

    id: bytes
    body: bytes
    reason: str


@final
@dataclass(frozen=True, slots=True)
class Evidence:
    """What the files hold.

    Attributes:
        rows: The ledger's ratings, by campaign and sequence number.
        totals: The totals that the ledger keeps.
        dead: Dead letters.
        stored: Messages that the broker ever took.
        duplicates: Ratings that the workers say they met again.
    """

    rows: list[Row]
    totals: Kept
    dead: list[Dead]
    stored: int
    duplicates: int


@final
@dataclass(frozen=True, slots=True)
class Place:
    """Where a service keeps what.

    Attributes:
        data: Its folder.
        ledger: The file of the ledger, which may lie on another disk.
        witness: What the workers write down; see ``launch``.
    """

    data: Path
    ledger: Path
    witness: Path

    @property
    def options(self) -> tuple[str, ...]:
        """Return the options of every command that say so."""
        return ("--data", str(self.data), "--ledger", f"sqlite://{self.ledger}")

    @property
    def topic_url(self) -> str:
        """Return the URL of accepted ratings. Nothing is made where nothing is."""
        return f"sqlite://{self.data}/queue.db?topic=ratings&create=never"


async def collect(place: Place) -> Evidence:
    """Read the files. Safe beside a running service."""
    rows, totals = read_ledger(place.ledger)
    async with await open_topic(place.topic_url) as topic:
        dead = [
            Dead(letter.message.id, letter.message.body, letter.reason)
            for letter in await topic.dead_letters("process", 1_000_000)
        ]
        stat = await topic.stat()
        assert stat is not None
    return Evidence(rows, totals, dead, stat.stored, _duplicates(place.witness))


def read_ledger(path: Path) -> tuple[list[Row], Kept]:
    """Return the ratings of a ledger's file, and the totals that it keeps."""
    ledger = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        ledger.set_busy_timeout(5_000)
        ledger.execute("BEGIN")
        rows = [Row(*row) for row in ledger.execute(_ROWS)]
        decode = msgspec.json.Decoder(dict[int, int]).decode
        totals = {
            (campaign, item): (count, sum_, decode(distribution))
            for campaign, item, count, sum_, distribution in ledger.execute(_TOTALS)
        }
    finally:
        ledger.close()
    return rows, totals


def _duplicates(witness: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return sum(map(int, re.findall(r"DUPLICATE=(\d+)", witness.read_text())))
    return 0
