"""The ledger at 10⁴ and at 10⁷ ratings: reading totals, applying batches."""

import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import Report
from molva._base.ids import new_id
from molva.ratings.ledger import Ledger, open_ledger
from molva.ratings.rating import Rating, Submission

SIZES = (10_000, 10_000_000)
WINDOWS = (1, 10, 100, 1_000, 10_000)
FILL = 5_000
BATCH = 1_000
READS = 1_000
ROUNDS = 9


def ledger() -> None:
    """Measure a small ledger and a large one, in turns."""
    report = Report(
        "ledger",
        "The ledger at 10⁴ and at 10⁷ ratings",
        f"One item; time-ordered ids; batches of {BATCH:,}, each with its fsync; {ROUNDS} rounds, "
        "small and large in turns; medians. Survived: kill and power.",
    )
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_measure(Path(folder), report))
    report.write()


async def _measure(folder: Path, report: Report) -> None:
    submissions = _ratings()
    ledgers = []
    for size in SIZES:
        found = await open_ledger(f"sqlite://{folder}/{size}.db")
        started = time.perf_counter()
        for _ in range(size // FILL):
            await found.apply(list(itertools.islice(submissions, FILL)), applied_at_us=1)
        seconds = time.perf_counter() - started
        report.add(f"filled to {size:,}", f"{size / seconds:,.0f}/s", f"batches of {FILL:,}")
        ledgers.append(found)
    small, large = ledgers
    rates: dict[int, list[float]] = {0: [], 1: []}
    reads: dict[tuple[int, int], list[float]] = {}
    for _ in range(ROUNDS):
        for which, found in enumerate((small, large)):
            rates[which].append(await _apply(found, submissions))
            for n in WINDOWS:
                reads.setdefault((which, n), []).append(await _read(found, n))
    report.ratio("apply at 10⁷ / apply at 10⁴", rates[1], rates[0], "0.5")
    base = statistics.median(reads[0, 1])
    worst = 0.0
    for n in WINDOWS:
        both = [statistics.median(reads[which, n]) * 1e6 for which in (0, 1)]
        worst = max(worst, *(value / (base * 1e6) for value in both))
        report.add(f"total, n = {n:,}", f"{both[1]:.1f} µs", f"at 10⁷; at 10⁴ {both[0]:.1f} µs")
    report.add("slowest of these / n = 1 at 10⁴", f"{worst:.2f}", "asked for 1.5")
    for found in ledgers:
        await found.close()


async def _apply(found: Ledger, submissions: Iterator[Submission]) -> float:
    seconds = []
    for _ in range(10):
        batch = list(itertools.islice(submissions, BATCH))
        started = time.perf_counter()
        await found.apply(batch, applied_at_us=1)
        seconds.append(time.perf_counter() - started)
    return BATCH / statistics.median(seconds)


async def _read(found: Ledger, n: int) -> float:
    seconds = []
    for _ in range(READS):
        started = time.perf_counter()
        await found.total("default", item="the item", n=n)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _ratings() -> Iterator[Submission]:
    numbers = random.Random(1)
    while True:
        now_us = time.time_ns() // 1_000
        rating = Rating("default", now_us, numbers.randint(0, 10), "the item")
        yield Submission(new_id(), rating)
