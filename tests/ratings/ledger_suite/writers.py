"""Several writers, in one process and in many, some of which are killed."""

import asyncio
import contextlib
import random
import signal

import pytest

from molva.ratings.ledger import Ledger, LedgerUnavailableError
from molva.ratings.rating import Change, Comment, Exclusion, Submission
from tests.ratings.ledger_suite.harness import LedgerHarness, Suite, differences, writer
from tests.ratings.ledger_suite.submissions import APPLIED, DUPLICATE, about, apply, ratings

__all__ = ["Writers"]


class Writers(Suite):
    async def test_concurrent_batches_of_one_ledger_are_all_counted(
        self, harness: LedgerHarness
    ) -> None:
        async with harness.opened() as ledger:
            batches = [ratings(first, 20) for first in range(1, 1_001, 20)]
            await asyncio.gather(*(apply(ledger, *batch) for batch in batches + batches))
        await harness.assert_sound(last_seq=1_000)

    async def test_a_cancelled_batch_leaves_the_ledger_in_order(
        self, harness: LedgerHarness
    ) -> None:
        async with harness.opened() as ledger:
            for first in range(1, 2_000, 100):
                cancelled = asyncio.create_task(apply(ledger, *ratings(first, 100)))
                await asyncio.sleep(random.random() / 200)
                cancelled.cancel()
                following = asyncio.create_task(apply(ledger, *ratings(first, 100)))
                with contextlib.suppress(asyncio.CancelledError):
                    await cancelled
                assert set(await following) <= {APPLIED, DUPLICATE}
        await harness.assert_sound(last_seq=2_000)

    async def test_two_openings_of_one_ledger_share_a_dense_sequence(
        self, harness: LedgerHarness
    ) -> None:
        async def write(ledger: Ledger, first: int) -> None:
            for at in range(first, first + 500, 10):
                assert set(await apply(ledger, *ratings(at, 10))) == {APPLIED}

        async with harness.opened() as one, harness.opened() as other:
            await asyncio.gather(write(one, 1), write(other, 10_001))
            assert await one.last_seq("c") == await other.last_seq("c") == 1_000
        await harness.assert_sound(last_seq=1_000)

    async def test_the_same_batches_through_two_openings_at_once_count_once(
        self, harness: LedgerHarness
    ) -> None:
        """A rebalance hands the same messages to two workers; the ids decide."""

        async def write(ledger: Ledger) -> None:
            for at in range(1, 1_001, 50):
                outcomes = await patiently(ledger, ratings(at, 50))
                assert set(outcomes) <= {APPLIED, DUPLICATE}

        async with harness.opened() as one, harness.opened() as other:
            await asyncio.gather(write(one), write(other))
        await harness.assert_sound(last_seq=1_000)

    async def test_campaigns_in_any_order_never_lock_each_other_out(
        self, harness: LedgerHarness
    ) -> None:
        names = [f"c{i}" for i in range(8)]

        async def write(ledger: Ledger, first: int) -> None:
            random_ = random.Random(first)
            for at in range(first, first + 400, 20):
                random_.shuffle(names)
                batch = [
                    submission
                    for i, name in enumerate(names)
                    for submission in ratings(at * 100 + i * 20, 20, campaign=name)
                ]
                assert set(await apply(ledger, *batch)) == {APPLIED}

        async with harness.opened() as one, harness.opened() as other:
            await asyncio.gather(write(one, 1), write(other, 100_001))
            for name in sorted(names):
                assert await one.last_seq(name) == 2 * 20 * 20
            assert await differences(one) == []

    async def test_corrections_beside_ratings_leave_every_number_right(
        self, harness: LedgerHarness
    ) -> None:
        async def correct(ledger: Ledger) -> None:
            for at in range(1, 200):
                await apply(
                    ledger,
                    about(50_000 + at, Change, at, 3),
                    about(60_000 + at, Exclusion, at + 1, "x"),
                    about(70_000 + at, Comment, at, "hm"),
                )

        async def rate(ledger: Ledger) -> None:
            for at in range(1_001, 3_001, 40):
                assert set(await apply(ledger, *ratings(at, 40))) == {APPLIED}

        async with harness.opened() as one, harness.opened() as other:
            await apply(one, *ratings(1, 300))
            await asyncio.gather(correct(one), rate(other))
            assert await differences(one) == []

    async def test_two_processes_on_one_ledger_share_a_dense_sequence(
        self, harness: LedgerHarness
    ) -> None:
        async with harness.opened():
            pass
        url = harness.url()
        with writer(url, 1, 7, 2_001) as one, writer(url, 10_001, 50, 12_001) as other:
            for process in (one, other):
                await asyncio.to_thread(process.communicate)
                assert process.returncode == 0
        await harness.assert_sound(last_seq=2 * 4_000)

    @pytest.mark.parametrize("size", [1, 40, 400])
    async def test_what_a_killed_process_had_applied_is_there(
        self, harness: LedgerHarness, size: int
    ) -> None:
        random_ = random.Random(size)
        async with harness.opened():
            pass
        done = 1
        for _ in range(4):
            with writer(harness.url(), done, size, 10**9) as process:
                assert process.stdout is not None
                reached = int(await asyncio.to_thread(process.stdout.readline))
                await asyncio.sleep(random_.random() / 5)
                process.send_signal(signal.SIGKILL)
                *_, last = [reached, *map(int, process.stdout.read().split())]
            async with harness.opened() as ledger:
                # What was reported is there; of the batch under way all or nothing. A
                # server may still be at it when its client is dead.
                assert await settled_seq(ledger) in (2 * (last - 1), 2 * (last + size - 1))
                assert await differences(ledger) == []
            done = last


async def patiently(ledger: Ledger, batch: list[Submission]) -> list[object]:
    """Apply as a worker does: a batch that was refused as a whole is tried again."""
    while True:
        try:
            return [*await apply(ledger, *batch)]
        except LedgerUnavailableError:
            await asyncio.sleep(0.01)


async def settled_seq(ledger: Ledger) -> int:
    seq = await ledger.last_seq("c")
    while True:
        await asyncio.sleep(0.1)
        before, seq = seq, await ledger.last_seq("c")
        if before == seq:
            return seq
