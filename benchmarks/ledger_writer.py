"""One process that applies ratings to a ledger as fast as it takes them.

    python -m benchmarks.ledger_writer URL CAMPAIGNS SECONDS

Says that it is ready, begins when it is told to, and prints how many it applied a second.
"""

import random
import sys
import time

import uvloop

from molva._base.ids import new_id
from molva.ratings.ledger import open_ledger
from molva.ratings.rating import Rating, Submission

BATCH = 1_000
ITEMS = 20
# Batches that are made at a time, while the clock stands still.
AHEAD = 20


async def write(url: str, campaigns: int, seconds: float) -> None:
    ledger = await open_ledger(url)
    for _ in range(6):  # the server's plans, and the rows of campaigns and items
        await ledger.apply(_batch(campaigns), applied_at_us=1)
    print("ready", flush=True)
    sys.stdin.readline()
    applied, at_work = 0, 0.0
    while at_work < seconds:
        batches = [_batch(campaigns) for _ in range(AHEAD)]
        began = time.perf_counter()
        for batch in batches:
            await ledger.apply(batch, applied_at_us=1)
            applied += BATCH
        at_work += time.perf_counter() - began
    print(applied / at_work, flush=True)
    await ledger.close()


def _batch(campaigns: int) -> list[Submission]:
    now_us = time.time_ns() // 1_000
    return [
        Submission(
            new_id(),
            Rating(
                f"campaign-{random.randrange(campaigns)}",
                now_us,
                random.randint(0, 10),
                f"item-{random.randrange(ITEMS)}",
            ),
        )
        for _ in range(BATCH)
    ]


if __name__ == "__main__":
    uvloop.run(write(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
