"""How long the SQLite ledger takes: a rating applied, a total read, at several sizes.

    python benchmarks/ledger.py --rows 10000 1000000 --items 100 --folder /var/tmp

Closed loop, one process: each call is made when the one before has returned. Times are
medians over calls, with the 5th and 95th percentile. Commits include their fsync.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import apsw

from molva._base.ids import new_id
from molva.ratings.ledger.sqlite import SQLiteLedger
from molva.ratings.rating import Exclusion, Rating, Submission

_BATCHES: Final = {1: 400, 64: 100, 1_000: 40}
_WINDOWS: Final = (1, 100, 10_000)
_READS: Final = 2_000
_FILL: Final = 5_000


def main() -> None:
    """Fill a ledger to each size in turn; measure at each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    print(f"SQLite {apsw.sqlite_lib_version()}, {arguments.items} items")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        asyncio.run(measure(Path(folder), sorted(arguments.rows), arguments.items))


async def measure(folder: Path, sizes: list[int], items: int) -> None:
    path = folder / "ledger.db"
    ledger = SQLiteLedger.open(path, commit="loop")
    submissions = ratings(items)
    filled = 0
    for size in sizes:
        started = time.perf_counter()
        for _ in range(filled, size, _FILL):
            await ledger.apply(take(submissions, _FILL), applied_at_us=1)
        seconds = time.perf_counter() - started
        print(f"\n{size:,} ratings, filled at {(size - filled) / seconds:,.0f} ratings/s")
        filled = size
        for batch, times in _BATCHES.items():
            show(f"apply, batch of {batch}", await applied(ledger, submissions, batch, times))
            filled += batch * times
        await read_all(ledger)
        suspects = take(submissions, 300)
        await ledger.apply(suspects, applied_at_us=1)
        excluded = [Submission(new_id(), Exclusion("c", 1, rating.id)) for rating in suspects[::3]]
        started = time.perf_counter()
        await ledger.apply(excluded, applied_at_us=1)
        print(f"  exclusion {(time.perf_counter() - started) / len(excluded) * 1e6:24.1f} µs each")
        await read_all(ledger)
        started = time.perf_counter()
        await ledger.apply(suspects, applied_at_us=1)
        print(f"  redelivered {(time.perf_counter() - started) / len(suspects) * 1e6:.1f} µs each")
        print(f"  file {path.stat().st_size / filled:.0f} bytes a rating")
    started = time.perf_counter()
    differences = [difference async for difference in ledger.verify()]
    seconds = time.perf_counter() - started
    print(f"\nverify {seconds:.1f} s, {len(differences)} differences")
    started = time.perf_counter()
    await ledger.rebuild()
    print(f"rebuild {time.perf_counter() - started:.1f} s")
    await ledger.close()


def ratings(items: int) -> Iterator[Submission]:
    random_ = random.Random(1)
    for _ in itertools.count():
        item = f"item-{random_.randrange(items)}"
        yield Submission(
            new_id(), Rating("c", time.time_ns() // 1_000, random_.randint(0, 10), item)
        )


def take(submissions: Iterator[Submission], number: int) -> list[Submission]:
    return list(itertools.islice(submissions, number))


async def applied(
    ledger: SQLiteLedger, submissions: Iterator[Submission], batch: int, times: int
) -> list[float]:
    """Return microseconds a rating."""
    found = []
    for _ in range(times):
        submitted = take(submissions, batch)
        started = time.perf_counter()
        await ledger.apply(submitted, applied_at_us=1)
        found.append((time.perf_counter() - started) / batch * 1e6)
    return found


async def read_all(ledger: SQLiteLedger) -> None:
    middle = await ledger.last_seq("c") // 2
    for what, item, as_of, trusted in (
        ("raw", None, None, False),
        ("trusted", None, None, True),
        ("item, trusted", "item-3", None, True),
        ("as_of, trusted", None, middle, True),
        ("item, as_of, trusted", "item-3", middle, True),
    ):
        for n in _WINDOWS:
            found = []
            for _ in range(_READS):
                started = time.perf_counter()
                await ledger.total("c", item=item, n=n, as_of=as_of, trusted=trusted)
                found.append((time.perf_counter() - started) * 1e6)
            show(f"total, {what}, n={n:,}", found)


def show(what: str, microseconds: list[float]) -> None:
    low, *_, high = statistics.quantiles(microseconds, n=20)
    median = statistics.median(microseconds)
    print(f"  {what:36} {median:8.1f} µs  ({low:.1f} to {high:.1f})", flush=True)


if __name__ == "__main__":
    main()
