"""``verify`` names whatever was tampered with; ``rebuild`` mends what is derived."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from molva.ratings.ledger import Difference, Ledger, LedgerUnavailableError, open_ledger
from molva.ratings.rating import (
    Change,
    Comment,
    Entry,
    Exclusion,
    Rating,
    Restoration,
    Retraction,
    Submission,
)


@contextlib.asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Ledger]:
    ledger = await open_ledger(f"sqlite://{folder}/ledger.db")
    try:
        yield ledger
    finally:
        await ledger.close()


def submission(n: int, entry: Entry) -> Submission:
    return Submission(n.to_bytes(16, "big"), entry)


async def fill(ledger: Ledger) -> None:
    """Enough of everything that each table has rows, blocks included."""
    target = (7).to_bytes(16, "big")
    batch = [
        submission(i, Rating("c", 1, i % 7, f"item-{i % 2}", "so" if i == 3 else None))
        for i in range(1, 700)
    ]
    batch += [
        submission(1_001, Change("c", 1, target, 10)),
        submission(1_002, Exclusion("c", 1, target, "spam")),
        submission(1_003, Exclusion("c", 1, (600).to_bytes(16, "big"), "spam")),
        submission(1_004, Restoration("c", 1, target)),
        submission(1_005, Retraction("c", 1, (99).to_bytes(16, "big"))),
        submission(1_006, Comment("c", 1, target, "hm")),
        submission(1_007, Rating("other", 1, 3)),
    ]
    await ledger.apply(batch, applied_at_us=2)


async def verified(folder: Path) -> list[Difference]:
    async with opened(folder) as ledger:
        return [difference async for difference in ledger.verify()]


def tamper(folder: Path, statement: str) -> None:
    connection = apsw.Connection(str(folder / "ledger.db"))
    connection.execute(statement)
    assert connection.total_changes() == 1, "one row, or the test proves nothing"
    connection.close()


DERIVED = [
    ("UPDATE campaign SET last_seq = last_seq + 1 WHERE campaign = 'c'", "campaign: last_seq"),
    ("UPDATE scope SET count = count + 1 WHERE item = 'item-0'", "item 'item-0', scope: count"),
    ("UPDATE scope SET sum = sum - 1 WHERE campaign_key = 1 AND item IS NULL", "scope: sum"),
    ("UPDATE scope SET distribution = '{}' WHERE item = 'item-1'", "scope: distribution"),
    ("UPDATE block SET distribution = '{\"1\":1}' WHERE scope_key = 2 AND block = 1", "block 1"),
    ("DELETE FROM block WHERE scope_key = 1 AND block = 2", "block 2: row"),
    ("INSERT INTO block VALUES (1, 99, '{}')", "block: rows"),
    ("UPDATE correction SET position = 8 WHERE scope_key = 1 AND from_seq = 701", "701: position"),
    ("UPDATE correction SET rate_before = 1 WHERE scope_key = 1 AND from_seq = 701", "rate_before"),
    ("UPDATE correction SET rate_after = 1 WHERE scope_key = 1 AND from_seq = 701", "rate_after"),
    ("UPDATE correction SET count = 1 WHERE scope_key = 1 AND from_seq = 703", "703: count"),
    ("UPDATE correction SET shift = '{}' WHERE scope_key = 1 AND from_seq = 703", "703: shift"),
    ("UPDATE node SET d_count = 5 WHERE scope_key = 1 AND node = 8 AND from_seq = 702", "d_count"),
    ("UPDATE node SET d_sum = 5 WHERE scope_key = 1 AND node = 8 AND from_seq = 702", "d_sum"),
    ("DELETE FROM node WHERE scope_key = 1 AND node = 8 AND from_seq = 702", "node 8 702: row"),
    ("INSERT INTO node VALUES (1, 3, 702, 0, 1)", "node: rows"),
    ("UPDATE amended SET rate = 9 WHERE entry_key & 0xFFFFFFFFFF = 8", "entry 8, amended: rate"),
    ("UPDATE amended SET excluded = 1 WHERE entry_key & 0xFFFFFFFFFF = 8", "amended: excluded"),
    ("UPDATE amended SET retracted = 1 WHERE entry_key & 0xFFFFFFFFFF = 8", "amended: retracted"),
]

TRUTH = [
    ("UPDATE entry SET rate = 6 WHERE entry_key = 1 << 40 | 50", "entry 50: item_sum"),
    ("UPDATE entry SET item_position = 999 WHERE entry_key = 1 << 40 | 50", "50: item_position"),
    ("UPDATE entry SET item_sum = 1 WHERE entry_key = 1 << 40 | 50", "entry 50: item_sum"),
    ("UPDATE entry SET campaign_position = 1 WHERE entry_key = 1 << 40 | 50", "campaign_position"),
    ("UPDATE entry SET campaign_sum = 1 WHERE entry_key = 1 << 40 | 50", "50: campaign_sum"),
    ("UPDATE entry SET entry_key = 1 << 40 | 9999 WHERE entry_key = 1 << 40 | 706", "seq"),
    ("DELETE FROM entry WHERE entry_key = 1 << 40 | 20", "entry 20: seq"),
    ("UPDATE entry SET kind = 77 WHERE entry_key = 1 << 40 | 701", "entry 701: kind"),
    ("UPDATE entry SET kind = 2 WHERE entry_key = 1 << 40 | 704", "amended: retracted"),
    ("UPDATE entry SET target_key = 5 WHERE entry_key = 1 << 40 | 701", "701: target_key"),
    ("UPDATE comment SET text = 'no' WHERE entry_key = 1 << 40 | 4", "comment of entry 4: text"),
    ("UPDATE reason SET text = 'no' WHERE entry_key = 1 << 40 | 702", "reason of entry 702: text"),
    ("INSERT INTO comment VALUES (5, 'no')", "comment of entry 5: row"),
    ("DELETE FROM scope WHERE item = 'item-0'", "item 3: row"),
    ("DELETE FROM campaign WHERE campaign = 'other'", "campaign 2: row"),
]


@pytest.mark.parametrize(("statement", "where"), DERIVED, ids=[s for s, _ in DERIVED])
async def test_a_derived_number_that_was_changed_is_named(
    tmp_path: Path, statement: str, where: str
) -> None:
    async with opened(tmp_path) as ledger:
        await fill(ledger)
    tamper(tmp_path, statement)

    found = await verified(tmp_path)
    assert [difference for difference in found if where in difference.where], found

    async with opened(tmp_path) as ledger:
        await ledger.rebuild()
    assert await verified(tmp_path) == []


@pytest.mark.parametrize(("statement", "where"), TRUTH, ids=[s for s, _ in TRUTH])
async def test_an_entry_that_was_changed_is_named(
    tmp_path: Path, statement: str, where: str
) -> None:
    async with opened(tmp_path) as ledger:
        await fill(ledger)
    tamper(tmp_path, statement)

    found = await verified(tmp_path)

    assert [difference for difference in found if where in difference.where], found


async def test_an_untouched_ledger_has_no_differences(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await fill(ledger)
    assert await verified(tmp_path) == []


async def test_erased_words_are_no_difference(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await fill(ledger)
    tamper(tmp_path, "DELETE FROM comment WHERE entry_key = 1 << 40 | 4")
    assert await verified(tmp_path) == []


async def test_verify_reads_one_snapshot_while_ratings_arrive(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await fill(ledger)
        stop = asyncio.Event()

        async def write() -> None:
            n = 5_000
            while not stop.is_set():
                n += 1
                await ledger.apply([submission(n, Rating("c", 1, 5, "item-0"))], applied_at_us=3)
                await asyncio.sleep(0)

        writing = asyncio.create_task(write())
        found = []
        for _ in range(5):
            found += [difference async for difference in ledger.verify()]
        stop.set()
        await writing
        assert found == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [("count = 5", "contradicts itself"), ("distribution = 'nonsense'", "'nonsense'")],
)
async def test_a_damaged_total_is_no_fault_of_the_rating(
    tmp_path: Path, damage: str, message: str
) -> None:
    async with opened(tmp_path) as ledger:
        await fill(ledger)
        tamper(tmp_path, f"UPDATE scope SET {damage} WHERE item = 'item-0'")
        with pytest.raises(LedgerUnavailableError, match=message):
            await ledger.apply([submission(5_000, Rating("c", 1, 5, "item-0"))], applied_at_us=3)
        await ledger.rebuild()
        await ledger.apply([submission(5_000, Rating("c", 1, 5, "item-0"))], applied_at_us=3)
    assert await verified(tmp_path) == []
