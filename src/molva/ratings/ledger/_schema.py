"""The ledger's file: its tables, its kinds of entries, its packed keys.

Two tables are the truth and are only appended to: ``entry``, and ``campaign`` with the
names in ``scope``. ``comment`` and ``reason`` hold words, apart from the numbers, so that
they can be erased. ``no_effect`` remembers ids that were answered without an entry.
Everything else is derived from the entries: ``molva verify`` compares it, ``molva
rebuild`` writes it anew.

A *scope* is what a total is kept for: one item, or a campaign as a whole (item NULL).

Numbers after an entry stand in its row and never change: the campaign's running count of
ratings and their running sum in every row, those of the item in the rows of ratings. The
count grows by 0 or 1 from one row to the next, so the row of any count is found by jumps
over the dense primary key, and the campaign as a whole needs no index.
"""

import struct
from typing import Final
from zlib import crc32

import msgspec

from molva.ratings.ledger.protocol import LedgerUnavailableError

__all__ = [
    "APPLICATION_ID",
    "BLOCK",
    "CHANGE",
    "COMMENT",
    "EXCLUSION",
    "KINDS",
    "MAX_RATE",
    "MIGRATIONS",
    "RATING",
    "RESTORATION",
    "RETRACTION",
    "SEQ_BITS",
    "SEQ_MASK",
    "EntryRow",
    "decode_distribution",
    "encode_distribution",
    "entry_checksum",
]

# "MoLe" in ASCII: what `file` and SQLite's application_id show for a ledger of ours.
APPLICATION_ID: Final = 0x4D6F_4C65

# Kinds of entries as they stand in the file. Numbers are never reused.
KINDS: Final = ("rating", "change", "retraction", "comment", "exclusion", "restoration")
RATING, CHANGE, RETRACTION, COMMENT, EXCLUSION, RESTORATION = range(6)

# An entry's key is campaign_key << SEQ_BITS | seq: one integer, so that the table itself
# is the index by campaign and sequence number. 10¹² entries for each of 8 million
# campaigns.
SEQ_BITS: Final = 40
SEQ_MASK: Final = (1 << SEQ_BITS) - 1

# Rates beyond this are refused: 2⁴⁰ of them still sum up within a signed 64-bit integer.
# Scales are far narrower; see campaign.py.
MAX_RATE: Final = 1 << 20

# Every so many entries of a campaign, and ratings of an item, the distribution so far is
# kept. Larger, and a read at an old `as_of` counts more rows (up to 0.15 ms at 256);
# smaller, and the file grows: 256 add about a tenth of a byte a rating for each rate of
# the scale.
BLOCK: Final = 256

_VERSION_1: Final = f"""
CREATE TABLE campaign (
    campaign_key INTEGER PRIMARY KEY,
    campaign TEXT NOT NULL UNIQUE,
    last_seq INTEGER NOT NULL
) STRICT;

-- item NULL: the campaign as a whole. count, sum and distribution are raw.
CREATE TABLE scope (
    scope_key INTEGER PRIMARY KEY,
    campaign_key INTEGER NOT NULL,
    item TEXT,
    count INTEGER NOT NULL,
    sum INTEGER NOT NULL,
    distribution TEXT NOT NULL,
    UNIQUE (campaign_key, item)
) STRICT;

-- A row never changes. rate: of a rating, or the new one of a change. target_key: the
-- rating that any other entry is about. text_hash: of the words that came with it.
CREATE TABLE entry (
    entry_key INTEGER PRIMARY KEY,
    id BLOB,
    kind INTEGER NOT NULL,
    rate INTEGER,
    item_key INTEGER,
    item_position INTEGER,
    item_sum INTEGER,
    campaign_position INTEGER NOT NULL,
    campaign_sum INTEGER NOT NULL,
    target_key INTEGER,
    text_hash BLOB,
    accepted_at_us INTEGER NOT NULL,
    applied_at_us INTEGER NOT NULL
) STRICT;
-- NULL: a comment that came with its rating, which has the id.
CREATE UNIQUE INDEX entry_by_id ON entry (id) WHERE id IS NOT NULL;
CREATE UNIQUE INDEX entry_by_item ON entry (item_key, item_position)
    WHERE item_key IS NOT NULL;

CREATE TABLE comment (entry_key INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT;
CREATE TABLE reason (entry_key INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT;

CREATE TABLE no_effect (
    id BLOB PRIMARY KEY,
    content_hash BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- The raw distribution of a scope after its first {BLOCK} × block ratings; of a campaign
-- as a whole, after its first {BLOCK} × block entries.
CREATE TABLE block (
    scope_key INTEGER NOT NULL,
    block INTEGER NOT NULL,
    distribution TEXT NOT NULL,
    PRIMARY KEY (scope_key, block)
) STRICT, WITHOUT ROWID;

-- What an entry changed in a scope. A rate is NULL where the rating does not count.
-- count: ratings of the scope at that moment. shift: by how much the distribution differs
-- from the raw one, all corrections up to this one together.
CREATE TABLE correction (
    scope_key INTEGER NOT NULL,
    from_seq INTEGER NOT NULL,
    position INTEGER NOT NULL,
    rate_before INTEGER,
    rate_after INTEGER,
    count INTEGER NOT NULL,
    shift TEXT NOT NULL,
    PRIMARY KEY (scope_key, from_seq)
) STRICT, WITHOUT ROWID;

-- A Fenwick tree over the positions of a scope, every version of each node: the sum of the
-- corrections up to from_seq at the positions that the node covers. See _corrections.py.
CREATE TABLE node (
    scope_key INTEGER NOT NULL,
    node INTEGER NOT NULL,
    from_seq INTEGER NOT NULL,
    d_count INTEGER NOT NULL,
    d_sum INTEGER NOT NULL,
    PRIMARY KEY (scope_key, node, from_seq)
) STRICT, WITHOUT ROWID;

-- Ratings that were changed, retracted or excluded: what they are now.
CREATE TABLE amended (
    entry_key INTEGER PRIMARY KEY,
    rate INTEGER NOT NULL,
    retracted INTEGER NOT NULL,
    excluded INTEGER NOT NULL
) STRICT;
"""

# Of all columns of an entry, so that ``molva verify`` finds a flipped bit also where no
# number follows from it: an id, an instant. NULL in entries that are older than it.
_VERSION_2: Final = "ALTER TABLE entry ADD COLUMN checksum INTEGER"

MIGRATIONS: Final = (_VERSION_1, _VERSION_2)

# An entry's columns in their order, without the checksum.
_ENTRY: Final = struct.Struct("<q16sqqqqqqqq8sqq")
_ABSENT: Final = -(1 << 63)

EntryRow = tuple[
    int, bytes | None, int, int | None, int | None, int | None, int | None,
    int, int, int | None, bytes | None, int, int,
]  # fmt: skip
"""A row of ``entry``, without its checksum."""


def entry_checksum(row: EntryRow) -> int:
    """Return what is stored beside an entry to find a flipped bit: SQLite looks for none.

    Raises:
        OverflowError: A value is beyond 64 bits, or no integer: SQLite would refuse it too.
    """
    (
        key, id_, kind, rate, item_key, item_position, item_sum,
        campaign_position, campaign_sum, target_key, text_hash, accepted_at_us, applied_at_us,
    ) = row  # fmt: skip
    try:
        packed = _ENTRY.pack(
            key,
            id_ or b"",
            kind,
            _ABSENT if rate is None else rate,
            _ABSENT if item_key is None else item_key,
            _ABSENT if item_position is None else item_position,
            _ABSENT if item_sum is None else item_sum,
            campaign_position,
            campaign_sum,
            _ABSENT if target_key is None else target_key,
            text_hash or b"",
            accepted_at_us,
            applied_at_us,
        )
    except struct.error as error:
        raise OverflowError(f"{row!r:.200} cannot be stored: {error}") from error
    return crc32(packed)


_decode: Final = msgspec.json.Decoder(dict[int, int]).decode


def decode_distribution(text: str) -> dict[int, int]:
    """Return the distribution that was kept as JSON.

    Raises:
        LedgerUnavailableError: It is none: the file was tampered with.
    """
    try:
        return _decode(text)
    except ValueError as error:
        # No ValueError: no rating is to blame.
        problem = f"the ledger keeps {text!r:.60} for a distribution; see 'molva rebuild'"
        raise LedgerUnavailableError(problem) from error


def encode_distribution(distribution: dict[int, int]) -> str:
    """Return the distribution as JSON, lowest rate first: equal ones are equal text.

    >>> encode_distribution({10: 3, 9: 1})
    '{"9":1,"10":3}'
    """
    in_order = {rate: distribution[rate] for rate in sorted(distribution)}
    return msgspec.json.encode(in_order).decode()
