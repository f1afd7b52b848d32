"""``verify`` names what was tampered with on a server; ``rebuild`` mends what is derived."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from molva.ratings.ledger import Ledger
from molva.ratings.rating import Change, Comment, Exclusion, Restoration, Retraction
from tests.ratings.ledger_suite.harness import differences
from tests.ratings.ledger_suite.submissions import about, apply, rating
from tests.ratings.test_ledger_postgresql import PostgreSQLHarness
from tests.ratings.test_ledger_redis import RedisHarness


async def fill(ledger: Ledger) -> None:
    """Enough of everything that each table has rows, blocks included."""
    await apply(
        ledger,
        *(
            rating(i, i % 7, f"item-{i % 2}", comment="so" if i == 3 else None)
            for i in range(1, 700)
        ),
        about(1_001, Change, 7, 10),
        about(1_002, Exclusion, 7, "spam"),
        about(1_003, Exclusion, 600, "spam"),
        about(1_004, Restoration, 7),
        about(1_005, Retraction, 99),
        about(1_006, Comment, 7, "hm"),
        rating(1_007, 3, campaign="other"),
    )


def entry(seq: int) -> str:
    first = "(SELECT campaign_key::bigint << 40 FROM campaign WHERE campaign = 'c')"
    return f"entry_key = {first} + {seq}"


WHOLE = (
    "scope_key = (SELECT scope_key FROM scope JOIN campaign USING (campaign_key) "
    "WHERE campaign = 'c' AND item IS NULL)"
)

DERIVED = [
    ("UPDATE campaign SET last_seq = last_seq + 1 WHERE campaign = 'c'", "campaign: last_seq"),
    ("UPDATE scope SET count = count + 1 WHERE item = 'item-0'", "item 'item-0', scope: count"),
    (f"UPDATE scope SET sum = sum - 1 WHERE {WHOLE}", "campaign, scope: sum"),
    (f"UPDATE block SET distribution = '{{\"1\":1}}' WHERE {WHOLE} AND block = 1", "block 1"),
    (f"DELETE FROM block WHERE {WHOLE} AND block = 2", "block 2: row"),
    ("INSERT INTO block VALUES (1, 99, '{}')", "block: rows"),
    (f"UPDATE correction SET position = 8 WHERE {WHOLE} AND from_seq = 701", "701: position"),
    (f"UPDATE correction SET rate_after = 1 WHERE {WHOLE} AND from_seq = 701", "rate_after"),
    (f"UPDATE correction SET shift = '{{}}' WHERE {WHOLE} AND from_seq = 703", "703: shift"),
    (f"UPDATE node SET d_sum = 5 WHERE {WHOLE} AND node = 8 AND from_seq = 702", "d_sum"),
    (f"DELETE FROM node WHERE {WHOLE} AND node = 8 AND from_seq = 702", "node 8 702: row"),
    ("INSERT INTO node VALUES (1, 3, 702, 0, 1)", "node: rows"),
    (f"UPDATE amended SET rate = 9 WHERE {entry(8)}", "entry 8, amended: rate"),
]

TRUTH = [
    (f"UPDATE entry SET rate = 6 WHERE {entry(50)}", "entry 50: item_sum"),
    (f"UPDATE entry SET campaign_position = 1 WHERE {entry(50)}", "campaign_position"),
    (f"DELETE FROM entry WHERE {entry(20)}", "entry 20: seq"),
    (f"UPDATE entry SET kind = 77 WHERE {entry(701)}", "entry 701: kind"),
    (f"UPDATE entry SET target_key = 5 WHERE {entry(701)}", "701: target_key"),
    (f"UPDATE comment SET text = 'no' WHERE {entry(4)}", "comment of entry 4: text"),
    ("INSERT INTO comment VALUES (5, 'no')", "comment of entry 5: row"),
    ("DELETE FROM campaign WHERE campaign = 'other'", ": row"),
]


@pytest.fixture
async def postgresql(postgresql_url: str) -> AsyncIterator[PostgreSQLHarness]:
    harness = PostgreSQLHarness(postgresql_url)
    async with harness.opened() as ledger:
        await fill(ledger)
        assert await differences(ledger) == []
    yield harness
    await harness.drop()


@pytest.mark.parametrize(("statement", "where"), DERIVED, ids=[where for _, where in DERIVED])
async def test_a_derived_number_that_was_changed_is_named(
    postgresql: PostgreSQLHarness, statement: str, where: str
) -> None:
    assert await postgresql.execute(f"{statement} RETURNING 1"), "or the test proves nothing"
    async with postgresql.opened() as ledger:
        found = await differences(ledger)
        assert [difference for difference in found if where in difference.where], found
        await ledger.rebuild()
        assert await differences(ledger) == []


@pytest.mark.parametrize(("statement", "where"), TRUTH, ids=[where for _, where in TRUTH])
async def test_an_entry_that_was_changed_is_named(
    postgresql: PostgreSQLHarness, statement: str, where: str
) -> None:
    assert await postgresql.execute(f"{statement} RETURNING 1"), "or the test proves nothing"
    async with postgresql.opened() as ledger:
        found = await differences(ledger)
        assert [difference for difference in found if where in difference.where], found


@pytest.mark.parametrize(
    ("command", "where"),
    [
        (("HINCRBY", "campaign", "count", "1"), "items: count"),
        (("HINCRBY", "campaign", "sum", "-1"), "ring: last sum"),
        (("HINCRBY", "campaign", "seq", "1"), "log: entries"),
        (("HSET", "items", "item-0", "349 1 0 0"), "ring: last sum"),
        (("HINCRBY", "rates", "3", "1"), "rates: count"),
        (("HINCRBY", "shift", "3", "1"), "shift: count"),
        (("HSET", "net", "7", "0 99"), "net: count and sum"),
        (("SETRANGE", "ring", "700", "\x00\x00\x00\x00\x00\x01"), "ring: order of seq"),
        (("RPOP", "log"), "log: entries"),
    ],
    ids=str,
)
async def test_what_redis_keeps_twice_is_compared(
    redis_url: str, command: tuple[str, ...], where: str
) -> None:
    harness = RedisHarness(redis_url)
    async with harness.opened() as ledger:
        await fill(ledger)
        assert await differences(ledger) == []
        async with Redis.from_url(redis_url) as client:
            name, key, *rest = command
            await client.execute_command(  # type: ignore[no-untyped-call]
                name, f"{harness.prefix}:{{c}}:{key}", *rest
            )
        found = await differences(ledger)
        assert [difference for difference in found if where in difference.where], found
    await harness.reset()
