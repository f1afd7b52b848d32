"""Ledgers beside each other: ratings applied a second, by 1, 2 and 4 workers.

Servers are started here, durable, on loopback. All of them survive kill and power.
"""

import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
from tests.brokers import private_postgresql, private_redis

from benchmarks.report import Report
from molva.ratings.ledger import migrate_ledger

WORKERS = (1, 2, 4)
CAMPAIGNS = (1, 8)
SECONDS = 4.0
ROUNDS = 3
SIZES = (10_000, 10_000_000)


def ledgers(*, sizes: tuple[int, ...] = SIZES, rounds: int = ROUNDS) -> None:
    """Measure every ledger with every number of workers, in turns; then PostgreSQL's growth."""
    report = Report(
        "ledgers",
        "Ledgers beside each other",
        f"Batches of 1,000 ratings of 20 items, each durable before the next; processes of their "
        f"own, {SECONDS:g} s at work each; {rounds} rounds in turns; medians. Survived by all: kill "
        "and power. Workers make their ratings while the clock stands still, but on the same cores.",
    )
    with _servers() as urls:
        figures: dict[tuple[str, int, int], list[float]] = {}
        for _ in range(rounds):
            for kind, url in urls.items():
                for campaigns in CAMPAIGNS:
                    for workers in WORKERS if kind != "sqlite" else (1,):
                        rate = _applied(_fresh(kind, url), campaigns, workers)
                        figures.setdefault((kind, campaigns, workers), []).append(rate)
        for (kind, campaigns, workers), rates in figures.items():
            what = f"{kind}: {workers} worker{'s' * (workers > 1)}, {campaigns} campaign{'s' * (campaigns > 1)}"
            spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
            report.add(what, f"{statistics.median(rates):,.0f}/s", spread)
            report.figures[what] = rates
        _growth(report, urls["postgresql"], sizes, rounds)
    report.write()


_schemas = iter(range(1_000_000))


def _fresh(kind: str, url: str) -> str:
    """Return the URL of an empty ledger there."""
    name = f"bench_{next(_schemas)}"
    if kind == "sqlite":
        return url.replace("ledger.db", f"{name}.db")
    return f"{url}?{'schema' if kind == 'postgresql' else 'prefix'}={name}"


@contextlib.contextmanager
def _servers() -> Iterator[dict[str, str]]:
    with (
        tempfile.TemporaryDirectory() as folder,
        private_postgresql(
            shared_buffers="512MB", max_wal_size="8GB", checkpoint_timeout="15min"
        ) as postgresql,
        private_redis() as redis,
    ):
        yield {
            "sqlite": f"sqlite://{Path(folder)}/ledger.db",
            "postgresql": postgresql.url,
            "redis": redis.url,
        }


def _applied(url: str, campaigns: int, workers: int) -> float:
    """Return how many ratings so many workers apply a second, together."""
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.ledger_writer"),
                *(url, str(campaigns), str(SECONDS)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(workers)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "a writer failed; see above"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in processes)


def _growth(report: Report, url: str, sizes: tuple[int, ...], rounds: int) -> None:
    """Compare PostgreSQL's rate at a few rows with that at many."""
    filled = {size: f"{url}?schema=rows_{size}" for size in sizes}
    for size, where in filled.items():
        asyncio.run(_fill(where, f"rows_{size}", size))
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size, where in filled.items():
            rates[size].append(_applied(where, 1, 1))
    small, large = sizes
    report.ratio(
        f"postgresql: apply at {large:,} / at {small:,}", rates[large], rates[small], "0.5"
    )


async def _fill(url: str, schema: str, rows: int) -> None:
    """Write a ledger of so many ratings of one item into the real schema, by one statement."""
    await migrate_ledger(url)
    connection = await asyncpg.connect(url.partition("?")[0])
    await connection.execute(f"SET search_path = {schema}")
    await connection.execute("SELECT add_campaigns('{campaign-0}')")
    await connection.execute("INSERT INTO scope (campaign_key, item) VALUES (1, 'item-0')")
    await connection.execute(
        "INSERT INTO entry (entry_key, accepted_at_us, applied_at_us, campaign_position, "
        "campaign_sum, item_key, item_position, item_sum, rate, kind, id) "
        "SELECT (1::bigint << 40) + i, i, i, i, total, 2, i, total, rate, 0, "
        # As time-ordered as ours, and older than all of them.
        "decode(lpad(to_hex(1600000000000 + i), 12, '0') || '7000' || "
        "substr(md5(i::text), 1, 16), 'hex') "
        "FROM (SELECT i, (i % 11)::int AS rate, sum(i % 11) OVER (ORDER BY i) AS total "
        f"FROM generate_series(1::bigint, {rows}) AS i) AS ratings",
        timeout=1_200,
    )
    await connection.execute(
        "UPDATE campaign SET last_seq = (SELECT max(campaign_position) FROM entry);"
        "UPDATE scope SET count = (SELECT max(campaign_position) FROM entry), "
        "sum = (SELECT max(campaign_sum) FROM entry);"
        f"SELECT add_campaign_blocks(1, 1, 0, {rows}), add_item_blocks(2, 0, {rows})",
        timeout=1_200,
    )
    await connection.execute("VACUUM ANALYZE", timeout=1_200)
    await connection.close()
